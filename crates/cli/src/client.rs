//! Commands that talk to a coordinator.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use lacuna_api::client::ClientError;
use lacuna_api::v1;
use lacuna_spec::{Mark, RunSpec, WorkerRow};
use lacuna_types::exit;
use tokio::signal::unix::{SignalKind, signal};

use crate::connect::{Connect, parse_time};
use crate::progress::{Progress, ProgressMode, run_json, short_bytes};
use crate::verbosity::talk;
use crate::{runtime, spec};

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
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// `lacuna watch`.
#[derive(Args, Debug)]
pub struct WatchArgs {
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
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// Creates a run, or lets the stopped one of the same name go on.
pub fn submit(args: SubmitArgs) -> anyhow::Result<u8> {
    let mut spec = spec::read(&args.file, &args.overrides)?;
    let request = spec::request(&mut spec, true)?;
    if args.dry_run {
        let v1::CreateRunRequest { resume, n_samples, fingerprint, request_id, .. } = request;
        let request = serde_json::json!({
            "spec": spec.to_json(), "resume": resume, "n_samples": n_samples,
            "fingerprint": fingerprint, "request_id": request_id,
        });
        println!("{request}");
        return Ok(exit::OK);
    }
    runtime()?.block_on(async {
        let (run, created) = create(&args.connect, request).await?;
        let what = if created { "created" } else { "is there already" };
        let line = format!("run {} {what}: {} at step {}", run.run_id, run.state, run.step);
        match args.output {
            Output::Table => println!("{line}"),
            // Whoever waits gets the run as it ended, and one object only.
            Output::Json if args.wait => {}
            Output::Json => {
                let mut told = run_json(&run);
                told["created"] = created.into();
                println!("{told}");
            }
        }
        let help = "stop it and submit it again (`lacuna scale` changes its workers as it trains)";
        tell_kept(&run, &spec, help);
        if args.watch {
            let run = follow(&args.connect, &run.run_id, Progress::new(args.progress)).await?;
            return Ok(run.map_or(exit::OK, |run| ending_code(&run)));
        }
        if args.wait {
            return wait_for(&args.connect, &run.run_id, None, args.output).await;
        }
        talk!("follow it with: lacuna watch {}", run.run_id);
        Ok(exit::OK)
    })
}

/// Sends a request until it is answered, for as long as a call may take: it is carried out once,
/// however often it comes.
async fn create(
    connect: &Connect,
    request: v1::CreateRunRequest,
) -> Result<(v1::Run, bool), ClientError> {
    let since = Instant::now();
    loop {
        let once = async { connect.client().await?.create_run(request.clone()).await };
        match once.await {
            Err(err) if !crate::inspect::is_final(&err) && since.elapsed() < connect.patience() => {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            answer => return answer,
        }
    }
}

/// Says what of a specification a run that is on does not take over, and what helps.
pub(crate) fn tell_kept(run: &v1::Run, wanted: &RunSpec, help: &str) {
    let Ok(known) = serde_json::from_str::<RunSpec>(&run.spec) else { return };
    // Where the maths differ the run is refused; an encoder that was pinned is the one meant.
    let differences = lacuna_spec::diff(&known, wanted);
    for kept in differences.iter().filter(|kept| kept.mark != Mark::Maths) {
        let (path, old, new) = (kept.path, &kept.old, &kept.new);
        talk!("note: the run is on and keeps {path} = {old}, not {new}: {help}");
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
                    "worker": w.worker_id, "run": w.run_id, "rank": w.rank, "state": w.state,
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
    put_run(args.output, &run);
    Ok(exit::OK)
}

/// Prints a run as a command's result.
pub(crate) fn put_run(output: Output, run: &v1::Run) {
    match output {
        Output::Json => println!("{}", run_json(run)),
        Output::Table => print_run(run),
    }
}

pub(crate) fn print_run(run: &v1::Run) {
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
    if let Some(uses) = uses(run) {
        println!("of use      {uses}");
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

/// Says how much of the workers' time would be of use with as many as the run may have: what
/// `lacuna plan` calls efficiency. The largest numbers only, where there are many.
fn uses(run: &v1::Run) -> Option<String> {
    let spec: RunSpec = serde_json::from_str(&run.spec).ok()?;
    let rows = lacuna_spec::plan::worker_rows(run.n_slots, spec.elastic.workers);
    let percent = |row: &WorkerRow| (100.0 * row.efficiency).round();
    let shown = &rows[rows.len().saturating_sub(USES_MAX)..];
    let texts: Vec<String> =
        shown.iter().map(|row| format!("{} % with {}", percent(row), row.n_workers)).collect();
    (rows.len() > 1).then(|| texts.join(", "))
}

/// Most numbers of workers that [`uses`] speaks of.
const USES_MAX: usize = 8;

/// Follows a run until it ends or the user quits.
pub fn watch(args: WatchArgs) -> anyhow::Result<u8> {
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
pub(crate) async fn follow(
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
            Err(err) if crate::inspect::is_final(&err) => break Err(err.into()),
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
    runtime()?.block_on(wait_for(&args.connect, &args.run, args.limit, args.output))
}

async fn wait_for(
    connect: &Connect,
    run: &str,
    limit: Option<Duration>,
    output: Output,
) -> anyhow::Result<u8> {
    let waited = follow(connect, run, Progress::new(ProgressMode::Off));
    let Ok(run) = tokio::time::timeout(limit.unwrap_or(Duration::MAX), waited).await else {
        return Ok(exit::WAIT_TIMED_OUT);
    };
    let Some(run) = run? else { return Ok(exit::INTERRUPTED) };
    put_run(output, &run);
    Ok(match run.state.as_str() {
        "finished" => exit::OK,
        "cancelled" => exit::WAIT_CANCELLED,
        _ => exit::WAIT_FAILED,
    })
}
