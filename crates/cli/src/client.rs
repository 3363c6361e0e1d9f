//! Commands that talk to a coordinator.

use std::path::PathBuf;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use lacuna_api::client::ClientError;
use lacuna_api::v1;
use lacuna_coordinator::clock::rfc3339;
use lacuna_spec::RunSpec;
use lacuna_types::exit;
use tokio::signal::unix::{SignalKind, signal};

use crate::connect::{Connect, parse_time};
use crate::progress::{Progress, ProgressMode, run_json, short_bytes, short_duration};
use crate::voice::talk;
use crate::{Coded, runtime, spec};

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `lacuna submit`.
#[derive(Args, Debug)]
pub struct SubmitArgs {
    /// The run specification.
    file: PathBuf,
    /// Set a key of the specification, `train.seed=3`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Follow the run until it ends; then the exit code is the run's.
    #[arg(long)]
    watch: bool,
    /// Wait until the run has ended, as `lacuna wait` does and with its exit codes.
    #[arg(long, conflicts_with_all = ["watch", "dry_run"])]
    wait: bool,
    /// Print the request as JSON and send nothing: for clients in other languages.
    #[arg(long, conflicts_with = "watch")]
    dry_run: bool,
    /// How progress is shown.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressMode,
    #[command(flatten)]
    connect: Connect,
}

/// A command about one run.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Name of the run.
    run: String,
    /// How progress is shown.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressMode,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna runs`.
#[derive(Args, Debug)]
pub struct RunsArgs {
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna workers`.
#[derive(Args, Debug)]
pub struct WorkersArgs {
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Name of the run.
    run: String,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna wait`.
#[derive(Args, Debug)]
pub struct WaitArgs {
    /// Name of the run.
    run: String,
    /// Give up after this time, with exit code 124.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    limit: Option<Duration>,
    #[command(flatten)]
    connect: Connect,
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
    connect: Connect,
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
    /// How a list is printed.
    #[arg(long, short, value_enum, default_value = "table", conflicts_with = "node")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Name of the worker, `node:device`.
    worker: String,
    #[command(flatten)]
    connect: Connect,
}

/// Settings of `lacuna release`.
#[derive(Args, Debug)]
pub struct ReleaseArgs {
    /// Name of the worker, `node:device`.
    worker: String,
    #[command(flatten)]
    connect: Connect,
}

/// Creates a run, or lets the stopped one of the same name go on.
pub fn submit(args: SubmitArgs) -> anyhow::Result<u8> {
    let mut spec = spec::read(&args.file, &args.overrides)?;
    let request = spec::request(&mut spec, true)?;
    if args.dry_run {
        let v1::CreateRunRequest { resume, n_samples, fingerprint, .. } = request;
        let request = serde_json::json!({
            "spec": spec.to_json(), "resume": resume, "n_samples": n_samples,
            "fingerprint": fingerprint,
        });
        println!("{request}");
        return Ok(exit::OK);
    }
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        let (run, created) = client.create_run(request).await?;
        let what = if created { "created" } else { "is there already" };
        println!("run {} {what}: {} at step {}", run.run_id, run.state, run.step);
        tell_kept(&run, &spec);
        if args.watch {
            let run = follow(&args.connect, &run.run_id, Progress::new(args.progress)).await?;
            return Ok(run.map_or(exit::OK, |run| ending_code(&run)));
        }
        if args.wait {
            return wait_for(&args.connect, &run.run_id, None).await;
        }
        talk!("follow it with: lacuna watch {}", run.run_id);
        Ok(exit::OK)
    })
}

/// Says what of a specification a run that is on does not take over.
fn tell_kept(run: &v1::Run, wanted: &RunSpec) {
    let Ok(known) = serde_json::from_str::<RunSpec>(&run.spec) else { return };
    for difference in lacuna_spec::diff(&known, wanted) {
        talk!(
            "note: the run is on and keeps {} = {}, not {}: stop it and submit it again \
             (`lacuna scale` changes its workers as it trains)",
            difference.path,
            difference.old,
            difference.new
        );
    }
}

/// Lists runs.
pub fn runs(args: RunsArgs) -> anyhow::Result<u8> {
    let runs = runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.list_runs().await
    })?;
    match args.output {
        Output::Json => {
            println!("{}", serde_json::Value::from(runs.iter().map(run_json).collect::<Vec<_>>()));
        }
        Output::Table => {
            println!("{:<32} {:<9} {:>12} {:>8} {:>7}", "RUN", "STATE", "STEP", "OF", "WORKERS");
            for run in runs {
                let v1::Run { run_id, state, step, total_steps, workers, .. } = run;
                let n = workers.iter().filter(|w| w.rank.is_some()).count();
                println!("{run_id:<32} {state:<9} {step:>12} {total_steps:>8} {n:>7}");
            }
        }
    }
    Ok(exit::OK)
}

/// Lists workers.
pub fn workers(args: WorkersArgs) -> anyhow::Result<u8> {
    let workers = runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.list_workers().await
    })?;
    match args.output {
        Output::Json => {
            let of = |w: &v1::Worker| {
                serde_json::json!({
                    "worker_id": w.worker_id, "run_id": w.run_id, "rank": w.rank, "state": w.state,
                    "phase": w.phase, "step": w.step, "device": w.device,
                })
            };
            println!("{}", serde_json::Value::from(workers.iter().map(of).collect::<Vec<_>>()));
        }
        Output::Table => {
            println!(
                "{:<28} {:<24} {:>4} {:<10} {:<10} {:>9} DEVICE",
                "WORKER", "RUN", "RANK", "STATE", "PHASE", "STEP"
            );
            for worker in workers {
                let v1::Worker { worker_id, run_id, rank, state, phase, step, device } = worker;
                let rank = rank.map_or("-".to_string(), |rank| rank.to_string());
                let run = if run_id.is_empty() { "-".to_string() } else { run_id };
                println!(
                    "{worker_id:<28} {run:<24} {rank:>4} {state:<10} {phase:<10} {step:>9} {device}"
                );
            }
        }
    }
    Ok(exit::OK)
}

/// Shows one run.
pub fn status(args: StatusArgs) -> anyhow::Result<u8> {
    let run = runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.get_run(&args.run).await
    })?;
    match args.output {
        Output::Json => println!("{}", run_json(&run)),
        Output::Table => print_run(&run),
    }
    Ok(exit::OK)
}

fn print_run(run: &v1::Run) {
    let saved = run.checkpoint_step.map_or("none".to_string(), |step| format!("step {step}"));
    println!("run         {}", run.run_id);
    println!("state       {}", run.state);
    if !run.why.is_empty() {
        println!("why         {}", run.why);
    }
    println!("step        {} of {}", run.step, run.total_steps);
    println!("generation  {}", run.generation);
    println!("checkpoint  {saved}");
    if let Some(figures) = &run.figures {
        println!("figures     {}", crate::progress::figures_line(run, figures));
    }
    if let Some(digest) = run.final_digest {
        println!("digest      {digest:016x}");
    }
    if run.workers.is_empty() {
        return;
    }
    if let Some(shares) = shares(run) {
        println!("shares      {shares}");
    }
    println!(
        "{:<28} {:>4} {:>5} {:<10} {:<10} {:>9} {:>6}",
        "WORKER", "RANK", "SLOTS", "STATE", "PHASE", "STEP", "MEMORY"
    );
    for worker in &run.workers {
        let v1::RunWorker { worker_id, rank, slots, state, phase, step, .. } = worker;
        let memory = match worker.memory_bytes {
            0 => "-".to_string(),
            bytes => short_bytes(bytes),
        };
        let rank = rank.map_or("-".to_string(), |rank| rank.to_string());
        println!(
            "{worker_id:<28} {rank:>4} {slots:>5} {state:<10} {phase:<10} {step:>9} {memory:>6}"
        );
    }
}

/// Says how the members share the slots of a step out, where there are any.
fn shares(run: &v1::Run) -> Option<String> {
    let n = run.workers.iter().filter(|worker| worker.rank.is_some()).count() as u32;
    let busiest = run.workers.iter().map(|worker| worker.slots).max().filter(|n| *n > 0)?;
    let share = f64::from(run.n_slots) / f64::from(n * busiest);
    let percent = (100.0 * share).round();
    Some(format!(
        "{} slots over {n} workers, {busiest} at most: {percent} % of their time is of use",
        run.n_slots
    ))
}

/// Follows a run until it ends or the user quits.
pub fn watch(args: RunArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        match follow(&args.connect, &args.run, Progress::to_watch(args.progress)).await? {
            Some(run) => {
                print_run(&run);
                Ok(exit::OK)
            }
            None => {
                talk!("stopped watching; the run goes on");
                Ok(exit::OK)
            }
        }
    })
}

/// Shows a run until it has ended; `None` if the user quit. A broken stream is opened again.
///
/// What happened before is shown as far as somebody who looks now wants it: all of it on a screen
/// or for a program, the newest lines in a log, nothing where nothing is shown.
async fn follow(
    connect: &Connect,
    run: &str,
    mut progress: Progress,
) -> anyhow::Result<Option<v1::Run>> {
    let mut terminated = signal(SignalKind::terminate())?;
    let left = progress.left();
    let leave = async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated.recv() => {}
            () = left => {}
        }
    };
    tokio::pin!(leave);
    let mut seen = match progress.past() {
        u64::MAX => 0,
        n => {
            let asked = async { connect.client().await?.get_run(run).await };
            // Where it cannot be asked now, that is told below, and tried again.
            asked.await.map_or(0, |run| run.last_seq.saturating_sub(n))
        }
    };
    let mut alone: Option<Instant> = None;
    let end = loop {
        let once = follow_once(connect, run, &mut progress, &mut seen);
        let result = tokio::select! {
            result = once => result,
            () = &mut leave => break Ok(None),
        };
        match result {
            Ok(Some(run)) => break Ok(Some(run)),
            Ok(None) => alone = None,
            Err(err) if crate::look::is_final(&err) => break Err(err.into()),
            Err(err) => {
                let since = *alone.get_or_insert_with(Instant::now);
                if since.elapsed() > connect.patience() {
                    break Err(err.into());
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            () = &mut leave => break Ok(None),
        }
    };
    progress.finish();
    end
}

async fn follow_once(
    connect: &Connect,
    run: &str,
    progress: &mut Progress,
    seen: &mut u64,
) -> Result<Option<v1::Run>, ClientError> {
    let mut client = connect.client().await?;
    let mut updates = client.watch_run(run, *seen).await?;
    while let Some(update) = updates.message().await? {
        *seen = (*seen).max(update.seq);
        let snapshot = matches!(update.update, Some(v1::watch_run_response::Update::Snapshot(_)));
        progress.show(update);
        if snapshot && progress.run().exit_code.is_some() {
            let run = client.get_run(run).await?;
            show_rest(&mut updates, progress).await;
            return Ok(Some(run));
        }
    }
    Ok(None)
}

/// Shows what is under way already.
async fn show_rest(updates: &mut tonic::Streaming<v1::WatchRunResponse>, progress: &mut Progress) {
    let pause = Duration::from_millis(100);
    while let Ok(Ok(Some(update))) = tokio::time::timeout(pause, updates.message()).await {
        progress.show(update);
    }
}

fn ending_code(run: &v1::Run) -> u8 {
    run.exit_code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::OK)
}

/// Waits until a run has ended.
pub fn wait(args: WaitArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(wait_for(&args.connect, &args.run, args.limit))
}

async fn wait_for(connect: &Connect, run: &str, limit: Option<Duration>) -> anyhow::Result<u8> {
    let waited = follow(connect, run, Progress::new(ProgressMode::Off));
    let Ok(run) = tokio::time::timeout(limit.unwrap_or(Duration::MAX), waited).await else {
        return Ok(exit::WAIT_TIMED_OUT);
    };
    let Some(run) = run? else { return Ok(exit::INTERRUPTED) };
    print_run(&run);
    Ok(match run.state.as_str() {
        "finished" => exit::OK,
        "cancelled" => exit::WAIT_CANCELLED,
        _ => exit::WAIT_FAILED,
    })
}

/// Stops a run at its next boundary.
pub fn stop(args: RunArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.stop_run(&args.run, "stopped by `lacuna stop`").await?;
        let run = follow(&args.connect, &args.run, Progress::new(args.progress)).await?;
        let run = run.context("quit before the run had stopped")?;
        print_run(&run);
        match run.state.as_str() {
            "stopped" | "finished" => Ok(exit::OK),
            _ => Err(Coded::error(exit::FAILED, format!("the run is {}: {}", run.state, run.why))),
        }
    })
}

/// Ends a run now.
pub fn cancel(args: CancelArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        let before = client.get_run(&args.run).await?;
        let run = client.cancel_run(&args.run, &args.why).await?;
        if run.state != "cancelled" || before.state == "cancelled" {
            println!("run {} is {} already", run.run_id, run.state);
            return Ok(exit::OK);
        }
        let from = match run.checkpoint_step {
            Some(step) => format!("its checkpoint of step {step}"),
            None => "the beginning: it has no checkpoint".to_string(),
        };
        println!(
            "run {} was cancelled at step {}; `lacuna resume {}` lets it go on from {from}",
            run.run_id, before.step, run.run_id
        );
        Ok(exit::OK)
    })
}

/// Keeps a machine out, or lets it back in; without a name, lists those that are kept out.
pub fn ban(args: BanArgs) -> anyhow::Result<u8> {
    let Some(node) = &args.node else { return list_bans(&args) };
    let time = if args.lift { Duration::ZERO } else { args.time };
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        let leaving = client.ban_node(node, time.as_secs(), &args.why).await?;
        if args.lift {
            println!("node {node} may join again");
            return Ok(exit::OK);
        }
        println!("node {node} is kept out for {}", short_duration(time));
        for worker in leaving {
            println!("worker {worker} leaves at the next boundary");
        }
        Ok(exit::OK)
    })
}

fn list_bans(args: &BanArgs) -> anyhow::Result<u8> {
    let bans = runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.list_bans().await
    })?;
    let until = |ban: &v1::Ban| rfc3339(UNIX_EPOCH + Duration::from_millis(ban.until_ms));
    match args.output {
        Output::Json => {
            let of = |ban: &v1::Ban| {
                let (node, why) = (&ban.node, &ban.why);
                serde_json::json!({ "node": node, "until": until(ban), "why": why })
            };
            println!("{}", serde_json::Value::from(bans.iter().map(of).collect::<Vec<_>>()));
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

/// Asks for a checkpoint.
pub fn checkpoint(args: RunArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.request_checkpoint(&args.run).await?;
        println!("run {} will checkpoint at its next boundary", args.run);
        Ok(exit::OK)
    })
}

/// Takes a worker out.
pub fn drain(args: DrainArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.drain_worker(&args.worker, "drained by an operator").await?;
        println!("worker {} leaves at the next boundary", args.worker);
        Ok(exit::OK)
    })
}

/// Lets a worker back in that was kept out because it did harm.
pub fn release(args: ReleaseArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.release_worker(&args.worker).await?;
        println!("worker {} may join again", args.worker);
        Ok(exit::OK)
    })
}

/// Gives members up that fell silent, so that others can begin without them.
pub fn force(args: RunArgs) -> anyhow::Result<u8> {
    runtime()?.block_on(async {
        let mut client = args.connect.client().await?;
        client.force_run(&args.run).await?;
        println!("run {}: silent members are given up", args.run);
        Ok(exit::OK)
    })
}
