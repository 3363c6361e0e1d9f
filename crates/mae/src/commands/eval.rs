//! `lacuna-worker eval`: how good features are.

use clap::{Args, Subcommand};

use super::classify::{self, ClassifyArgs};
use super::knn::{self, KnnArgs};
use super::usage;

/// Protocols of evaluation.
#[derive(Debug, Subcommand)]
#[command(
    after_help = "A linear probe and fine-tuning are runs, on as many workers as there are: \
                        `lacuna init --preset demo-linear` or `demo-finetune` writes a spec, \
                        `lacuna train` or `submit` trains, and `classify` judges what came of it."
)]
pub enum EvalCommand {
    /// Classify images by votes of the nearest training images; nothing is trained.
    Knn(KnnArgs),
    /// Classify images with a run that learned classes: a fine-tuned model or a linear probe.
    Classify(ClassifyArgs),
    /// Says how a linear probe is trained.
    #[command(hide = true)]
    Linear(Elsewhere),
    /// Says how a model is fine-tuned.
    #[command(hide = true)]
    Finetune(Elsewhere),
}

/// Whatever is given to a command that is another one.
#[derive(Args, Debug)]
pub struct Elsewhere {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Runs an evaluation.
pub fn eval(command: &EvalCommand) -> anyhow::Result<u8> {
    match command {
        EvalCommand::Knn(args) => knn::knn(args),
        EvalCommand::Classify(args) => classify::classify(args),
        EvalCommand::Linear(_) => Err(is_a_run("linear", "a linear probe")),
        EvalCommand::Finetune(_) => Err(is_a_run("finetune", "fine-tuning")),
    }
}

/// Tells people what to type who look for a task among the evaluations.
fn is_a_run(kind: &str, what: &str) -> anyhow::Error {
    let init = format!("lacuna init --preset demo-{kind} --name {kind} --data LABELLED");
    let judge = format!("lacuna-worker eval classify runs/{kind} --val LABELLED_TOO");
    usage(format!(
        "{what} is a run, on as many workers as there are:\n  \
         {init} --out {kind}.toml   (or base-{kind}, large-{kind}, …)\n  \
         lacuna train {kind}.toml --set task.encoder=runs/NAME\n  \
         {judge} --out {kind}.json --page {kind}.html"
    ))
}
