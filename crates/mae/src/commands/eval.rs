//! `lacuna-worker eval`: how good features are.

use clap::Subcommand;

use super::classify::{self, ClassifyArgs};
use super::knn::{self, KnnArgs};

/// Protocols of evaluation.
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Classify images by votes of the nearest training images; nothing is trained.
    Knn(KnnArgs),
    /// Classify images with a run that learned classes: a fine-tuned model or a linear probe.
    Classify(ClassifyArgs),
}

/// Runs an evaluation.
pub fn eval(command: &EvalCommand) -> anyhow::Result<u8> {
    match command {
        EvalCommand::Knn(args) => knn::knn(args),
        EvalCommand::Classify(args) => classify::classify(args),
    }
}
