//! Commands that change something: a run, its workers, machines.

use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use lacuna_api::v1;
use lacuna_coordinator::clock::rfc3339;
use lacuna_types::exit;
use serde_json::{Value, json};

use crate::client::{Output, follow, put_run};
use crate::connect::{Connect, parse_time};
use crate::progress::{Progress, ProgressMode, run_json, short_duration};
use crate::verbosity::{confirm, talk};
use crate::{Coded, runtime};

/// How a command says what it did, and to whom.
#[derive(Args, Debug)]
struct Say {
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

impl Say {
    /// Says what was done: a sentence to people, a value to programs.
    fn done(&self, sentence: &str, value: &Value) -> anyhow::Result<u8> {
        match self.output {
            Output::Table => println!("{sentence}"),
            Output::Json => println!("{value}"),
        }
        Ok(exit::OK)
    }
}

/// `lacuna stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    /// Name of the run.
    run: String,
    /// Why, for those who look at it later.
    #[arg(long, default_value = "stopped by `lacuna stop`")]
    why: String,
    /// How progress is shown.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressMode,
    #[command(flatten)]
    say: Say,
}

/// `lacuna checkpoint`.
#[derive(Args, Debug)]
pub struct CheckpointArgs {
    /// Name of the run.
    run: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna force`.
#[derive(Args, Debug)]
pub struct ForceArgs {
    /// Name of the run.
    run: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna resume`.
#[derive(Args, Debug)]
pub struct ResumeArgs {
    /// Name of the run.
    run: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna scale`.
#[derive(Args, Debug)]
pub struct ScaleArgs {
    /// Name of the run.
    run: String,
    /// Fewest and most workers, `2:8`, or one number for both.
    workers: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna cancel`.
#[derive(Args, Debug)]
pub struct CancelArgs {
    /// Name of the run.
    run: String,
    /// Why, for those who look at it later.
    #[arg(long, default_value = "cancelled by `lacuna cancel`")]
    why: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna drain` and `lacuna release`.
#[derive(Args, Debug)]
pub struct WorkerArgs {
    /// Name of the worker, `node:device`.
    worker: String,
    #[command(flatten)]
    say: Say,
}

/// `lacuna ban`.
#[derive(Args, Debug)]
pub struct BanArgs {
    /// Name of the machine, as `lacuna workers` shows it before the colon; without one, lists those
    /// that are kept out.
    node: Option<String>,
    /// How long: 90s, 15min, 24h or 7d.
    #[arg(long = "for", value_name = "TIME", default_value = "24h", value_parser = parse_time)]
    #[arg(requires = "node")]
    time: Duration,
    /// Why, for those who look at it later.
    #[arg(long, default_value = "", requires = "node")]
    why: String,
    /// Let the machine back in now.
    #[arg(long, conflicts_with = "time", requires = "node")]
    lift: bool,
    #[command(flatten)]
    say: Say,
}

/// Stops a run at its next boundary.
pub fn stop(args: StopArgs) -> anyhow::Result<u8> {
    let Say { output, connect } = &args.say;
    runtime()?.block_on(async {
        let mut client = connect.client().await?;
        let before = client.get_run(&args.run).await?;
        if before.exit_code.is_some() {
            talk!("run {} is {} already", before.run_id, before.state);
            put_run(*output, &before);
            return Ok(exit::OK);
        }
        client.stop_run(&args.run, &args.why).await?;
        let progress = Progress::new(args.progress).without_past();
        let Some(run) = follow(connect, &args.run, progress).await? else {
            talk!("the run stops at its next boundary all the same");
            return Ok(exit::INTERRUPTED);
        };
        put_run(*output, &run);
        match run.state.as_str() {
            "stopped" | "finished" => Ok(exit::OK),
            _ => Err(Coded::error(exit::FAILED, format!("the run is {}: {}", run.state, run.why))),
        }
    })
}

/// Ends a run now.
pub fn cancel(args: CancelArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        let before = client.get_run(&args.run).await?;
        if before.exit_code.is_none() {
            confirm(&lost_by_cancelling(&before))?;
        }
        let run = client.cancel_run(&args.run, &args.why).await?;
        if run.state != "cancelled" || before.state == "cancelled" {
            let text = format!("run {} is {} already", run.run_id, run.state);
            return args.say.done(&text, &run_json(&run));
        }
        let from = match run.checkpoint_step {
            Some(step) => format!("its checkpoint of step {step}"),
            None => "the beginning: it has no checkpoint".to_string(),
        };
        let text = format!(
            "run {} was cancelled at step {}; `lacuna resume {}` lets it go on from {from}",
            run.run_id, before.step, run.run_id
        );
        args.say.done(&text, &run_json(&run))
    })
}

fn lost_by_cancelling(run: &v1::Run) -> String {
    let kept = run.checkpoint_step.unwrap_or(0);
    let lost = run.step.saturating_sub(kept);
    format!(
        "end run {} now? It is at step {}, and the {lost} steps since its newest checkpoint would \
         be computed again (`lacuna stop` saves them first)",
        run.run_id, run.step
    )
}

/// Lets a stopped, paused or failed run go on with the spec that it has.
pub fn resume(args: ResumeArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        let run = client.get_run(&args.run).await?;
        if run.exit_code.is_none() {
            let text = format!("run {} is {} already", run.run_id, run.state);
            return args.say.done(&text, &run_json(&run));
        }
        let v1::Run { spec, n_samples, fingerprint, .. } = run;
        let request_id = lacuna_api::new_request_id();
        let request =
            v1::CreateRunRequest { spec, resume: true, n_samples, fingerprint, request_id };
        let (run, _) = client.create_run(request).await?;
        let text = format!("run {} is {} at step {}", run.run_id, run.state, run.step);
        args.say.done(&text, &run_json(&run))
    })
}

/// Changes how many workers train a run.
pub fn scale(args: ScaleArgs) -> anyhow::Result<u8> {
    let (min, max) = args.workers.split_once(':').unwrap_or((&args.workers, &args.workers));
    let (Ok(min), Ok(max)) = (min.parse(), max.parse()) else {
        let text = format!("`{}` is not MIN:MAX, like 2:8", args.workers);
        return Err(Coded::error(exit::USAGE, text));
    };
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        let run = client.scale_run(&args.run, min, max).await?;
        let text =
            format!("run {} takes {min} to {max} workers from its next boundary on", run.run_id);
        args.say.done(&text, &run_json(&run))
    })
}

/// Asks for a checkpoint.
pub fn checkpoint(args: CheckpointArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        client.request_checkpoint(&args.run).await?;
        let run = client.get_run(&args.run).await?;
        let text = format!("run {} will checkpoint at its next boundary", args.run);
        args.say.done(&text, &run_json(&run))
    })
}

/// Gives members up that fell silent, so that others can begin without them.
pub fn force(args: ForceArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        confirm(&format!(
            "give the silent members of run {} up? What they computed unseen is computed again",
            args.run
        ))?;
        client.force_run(&args.run).await?;
        let run = client.get_run(&args.run).await?;
        args.say.done(&format!("run {}: silent members are given up", args.run), &run_json(&run))
    })
}

/// Takes a worker out.
pub fn drain(args: WorkerArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        client.drain_worker(&args.worker, "drained by an operator").await?;
        let text = format!("worker {} leaves at the next boundary", args.worker);
        args.say.done(&text, &json!({ "worker": args.worker, "state": "draining" }))
    })
}

/// Lets a worker back in that was kept out because it did harm.
pub fn release(args: WorkerArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        client.release_worker(&args.worker).await?;
        let text = format!("worker {} may join again", args.worker);
        args.say.done(&text, &json!({ "worker": args.worker, "state": "released" }))
    })
}

/// Keeps a machine out, or lets it back in; without a name, lists those that are kept out.
pub fn ban(args: BanArgs) -> anyhow::Result<u8> {
    let Some(node) = &args.node else { return list_bans(&args.say) };
    let time = if args.lift { Duration::ZERO } else { args.time };
    runtime()?.block_on(async {
        let mut client = args.say.connect.client().await?;
        let was_banned = client.list_bans().await?.iter().any(|ban| ban.node == *node);
        let known = client.list_workers().await?;
        let is_known = known
            .iter()
            .any(|worker| worker.worker_id.rsplit_once(':').is_some_and(|(of, _)| of == node));
        let leaving = client.ban_node(node, time.as_secs(), &args.why).await?;
        if args.lift && !was_banned {
            talk!("note: node {node} was not kept out");
        } else if !args.lift && !is_known {
            talk!("note: no worker of a node {node} is connected");
        }
        let value = json!({ "node": node, "seconds": time.as_secs(), "leaving": leaving });
        if args.lift {
            return args.say.done(&format!("node {node} may join again"), &value);
        }
        let mut text = format!("node {node} is kept out for {}", short_duration(time));
        for worker in leaving {
            text += &format!("\nworker {worker} leaves at the next boundary");
        }
        args.say.done(&text, &value)
    })
}

fn list_bans(say: &Say) -> anyhow::Result<u8> {
    let bans = runtime()?.block_on(async {
        let mut client = say.connect.client().await?;
        client.list_bans().await
    })?;
    let until = |ban: &v1::Ban| rfc3339(UNIX_EPOCH + Duration::from_millis(ban.until_ms));
    match say.output {
        Output::Json => {
            let of = |ban: &v1::Ban| {
                let (node, why) = (&ban.node, &ban.why);
                json!({ "node": node, "until": until(ban), "why": why })
            };
            println!("{}", Value::from(bans.iter().map(of).collect::<Vec<_>>()));
        }
        Output::Table if bans.is_empty() => talk!("no machine is kept out"),
        Output::Table => {
            println!("{:<28} {:<20} WHY", "NODE", "UNTIL");
            for ban in &bans {
                println!("{:<28} {:<20} {}", ban.node, until(ban), ban.why);
            }
        }
    }
    Ok(exit::OK)
}
