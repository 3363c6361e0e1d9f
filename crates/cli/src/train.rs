//! `lacuna train`: coordinator, agent and trainers on one machine, in one command.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use lacuna_api::client::Client;
use lacuna_api::v1;
use lacuna_control::timing::Timing;
use lacuna_coordinator::{Options, Security, Service};
use lacuna_cuda::Driver;
use lacuna_data::is_url;
use lacuna_spec::{RunSpec, Workers};
use lacuna_types::{BuildId, exit};
use tokio::process::{Child, Command};

use crate::client::tell_kept;
use crate::data::talk::count;
use crate::progress::{Progress, ProgressMode};
use crate::serve::coded;
use crate::verbosity::{is_verbose, talk};
use crate::{Coded, init_logs, runtime, spec};

/// `lacuna train`.
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// The run specification.
    file: PathBuf,
    /// Set a key of the specification, `train.seed=3`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Trainers on this machine; by default one per core, within `elastic.workers`.
    #[arg(long)]
    workers: Option<u32>,
    /// Devices to train on instead of the CPU, each by a trainer of its own: `cuda` for all GPUs,
    /// `cuda:0,2` for some of them.
    #[arg(long, value_name = "DEVICES", conflicts_with = "workers")]
    devices: Option<String>,
    /// How progress is shown.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressMode,
}

/// How long the workers get to end after the run has.
const AGENT_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of calls to the coordinator in this process.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How often the end of a run is looked for that its workers have heard of.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long that is looked for: what workers are told is written already.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Trains until the run ends or Ctrl-C stops it; the same command goes on later.
pub fn train(args: TrainArgs) -> anyhow::Result<u8> {
    init_logs("error");
    let mut spec = spec::read(&args.file, &args.overrides)?;
    let n = choose_workers(&args, &spec)?;
    spec.elastic.workers = Workers { min: spec.elastic.workers.min.min(n), max: n };
    let request = spec::request(&mut spec, true)?;
    let (worker, _) = find_worker()?;
    tell_of_devices(&args);
    let place = local_place(&spec);
    let saved = Path::new(&spec.checkpoint.to).join(&spec.name);
    std::fs::create_dir_all(place.join("logs"))
        .with_context(|| format!("create `{}`", place.display()))?;
    runtime()?.block_on(async {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (state, timing) = (place.join("coordinator"), Timing::one_machine());
        let options = Options { state, timing, security: Security::default() };
        let service = Service::open(addr, options).await.map_err(coded)?;
        let url = format!("http://{}", service.addr());
        talk!("page: {url}/runs/{}", spec.run_id());
        let (close, closed) = tokio::sync::oneshot::channel::<()>();
        // It ends as well where nobody is left to close it.
        let mut serving = tokio::spawn(service.serve(async { drop(closed.await) }));
        let log = place.join("logs/workers.log");
        let log_from = std::fs::metadata(&log).map_or(0, |meta| meta.len());
        let session = Training { args: &args, spec: &spec, url, worker, saved, n, log, log_from };
        tokio::select! {
            ended = session.run(request) => {
                drop(close);
                // What is left to write is written, within a bound of its own.
                let _ = serving.await;
                ended
            }
            served = &mut serving => match served {
                Ok(Err(err)) => Err(coded(err)),
                _ => Err(Coded::error(exit::INTERNAL, "the coordinator ended by itself")),
            },
        }
    })
}

/// Returns the folder for the state of the coordinator and for logs: that of the checkpoints, or,
/// where those go to a store, the run's folder under `runs` beside the caller.
fn local_place(spec: &RunSpec) -> PathBuf {
    let to = if is_url(&spec.checkpoint.to) { "runs" } else { &spec.checkpoint.to };
    Path::new(to).join(&spec.name)
}

/// Tells who did not name devices that there are some, which are many times as fast.
fn tell_of_devices(args: &TrainArgs) {
    if args.devices.is_some() || args.workers.is_some() {
        return;
    }
    if let Ok(n @ 1..) = Driver::load(None).and_then(|driver| driver.n_devices()) {
        let n = count(n.into(), "GPU");
        talk!("note: this machine has {n}, and this trains on the CPU: `--devices cuda` uses them");
    }
}

/// One trainer a core unless told otherwise, within what the spec allows.
fn choose_workers(args: &TrainArgs, spec: &RunSpec) -> anyhow::Result<u32> {
    let Workers { min, max } = spec.elastic.workers;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    if args.devices.is_some() {
        // The agent counts them.
        return Ok(max.min(spec.n_slots()));
    }
    let n = args.workers.unwrap_or(cores.clamp(min, max)).min(spec.n_slots());
    if n == 0 {
        return Err(Coded::error(exit::USAGE, "`--workers` must be at least 1"));
    }
    if args.workers.is_some_and(|asked| asked > n) {
        let text = format!("a step has {n} slots, so more than {n} workers cannot help");
        return Err(Coded::error(exit::USAGE, format!("{text}; lower `train.slot_batch`")));
    }
    Ok(n)
}

/// Finds `lacuna-worker` and checks that it runs and is this build; returns what it says it is.
pub(crate) fn find_worker() -> anyhow::Result<(PathBuf, String)> {
    let unfit = |text: String| Coded::error(exit::UNFIT, text);
    let path = locate_worker().ok_or_else(|| {
        unfit(
            "`lacuna-worker` was not found: not in LACUNA_WORKER, not beside `lacuna`, not on \
             PATH; `make setup` builds it"
                .to_string(),
        )
    })?;
    let output = std::process::Command::new(&path).arg("--version").output();
    let output =
        output.map_err(|err| unfit(format!("failed to start `{}`: {err}", path.display())))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(unfit(format!(
            "`{} --version` failed ({}): {}; if a library is missing, run `make setup`",
            path.display(),
            output.status,
            why.trim()
        )));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let ours = BuildId::this().to_string();
    if !said.starts_with(&ours) {
        let text = format!(
            "`{}` is {}, this is {ours}: install the same build",
            path.display(),
            said.trim()
        );
        return Err(Coded::error(exit::VERSION, text));
    }
    Ok((path, said.trim().to_string()))
}

fn locate_worker() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("LACUNA_WORKER") {
        return Some(PathBuf::from(path));
    }
    let beside = std::env::current_exe().ok()?.with_file_name("lacuna-worker");
    if beside.is_file() {
        return Some(beside);
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("lacuna-worker")).find(|file| file.is_file())
}

struct Training<'a> {
    args: &'a TrainArgs,
    spec: &'a RunSpec,
    url: String,
    worker: PathBuf,
    /// Where its checkpoints lie.
    saved: PathBuf,
    n: u32,
    /// What the workers say, unless it is shown.
    log: PathBuf,
    /// Its size before they started.
    log_from: u64,
}

impl Training<'_> {
    async fn run(&self, request: v1::CreateRunRequest) -> anyhow::Result<u8> {
        let mut client = Client::connect(&self.url, CALL_DEADLINE).await?;
        let (run, _) = client.create_run(request).await?;
        if run.state == "finished" {
            println!("run {} is finished already, at step {}", run.run_id, run.step);
            print_end(&run, &self.saved);
            return Ok(exit::OK);
        }
        self.take_up(&mut client, &run).await?;
        let mut agent = self.start_agent()?;
        // The agent lives as long as this end is open; waiting for it would close it otherwise.
        let _lifeline = agent.stdin.take();
        let run = self.follow(&mut client, &run, &mut agent).await?;
        if tokio::time::timeout(AGENT_DEADLINE, agent.wait()).await.is_err() {
            talk!("workers did not end in time; killing them");
            agent.kill().await.context("kill the workers")?;
        }
        print_end(&run, &self.saved);
        Ok(run.exit_code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::INTERNAL))
    }

    /// A run that was left on by a command that was killed takes as many workers as come now.
    async fn take_up(&self, client: &mut Client, run: &v1::Run) -> anyhow::Result<()> {
        let Workers { min, max } = self.spec.elastic.workers;
        // Whatever the answer to its creation said: one that was about to stop takes the new spec.
        let run = client.scale_run(&run.run_id, min, max).await?;
        tell_kept(&run, self.spec, "stop it with Ctrl-C and start it again");
        Ok(())
    }

    fn start_agent(&self) -> anyhow::Result<Child> {
        let stderr = if is_verbose() {
            Stdio::inherit()
        } else {
            let file = File::options().create(true).append(true).open(&self.log);
            Stdio::from(file.with_context(|| format!("open `{}`", self.log.display()))?)
        };
        let devices = self.args.devices.clone().unwrap_or_else(|| format!("cpu:{}", self.n));
        Command::new(&self.worker)
            .args(["--coordinator", &self.url])
            .args(["--devices", &devices])
            .args(["--node-name", "local", "--once", "--with-parent"])
            // They are for another coordinator.
            .env_remove("LACUNA_TOKEN_FILE")
            .env_remove("LACUNA_TLS_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            // Its own group: Ctrl-C comes here alone, and the run is stopped in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start `{}`", self.worker.display()))
    }

    /// Shows the run until it ends; the first Ctrl-C stops it at a boundary, the second at once.
    async fn follow(
        &self,
        client: &mut Client,
        run: &v1::Run,
        agent: &mut Child,
    ) -> anyhow::Result<v1::Run> {
        let mut progress = Progress::new(self.args.progress);
        let (run, after) = (run.run_id.as_str(), run.last_seq);
        let mut updates = client.watch_run(run, after).await?;
        let mut stopping = false;
        let mut signals = crate::serve::StopSignals::new();
        let ended = loop {
            tokio::select! {
                update = updates.message() => match update.context("follow the run")? {
                    Some(update) => progress.show(update),
                    None => break client.get_run(run).await?,
                },
                () = signals.next() => {
                    if stopping {
                        progress.finish();
                        let text = "interrupted twice; workers killed";
                        return Err(Coded::error(exit::INTERRUPTED, text));
                    }
                    stopping = true;
                    progress.line("  stopping at a boundary, with a checkpoint; again: at once");
                    client.stop_run(run, "stopped by Ctrl-C").await?;
                }
                status = agent.wait() => {
                    let ended = self.after_agent(client, run, status).await;
                    progress.finish();
                    return ended;
                }
            }
            if progress.run().exit_code.is_some() {
                break client.get_run(run).await?;
            }
        };
        progress.finish();
        Ok(ended)
    }

    /// The workers are gone: either the run has just ended, or nothing will go on.
    async fn after_agent(
        &self,
        client: &mut Client,
        run: &str,
        status: std::io::Result<std::process::ExitStatus>,
    ) -> anyhow::Result<v1::Run> {
        let status = status.context("wait for the workers")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::FAILED);
        let since = Instant::now();
        // Workers hear of the end first, and a run whose devices all failed ends behind them.
        let is_near = matches!(code, exit::OK | exit::IO);
        while is_near && since.elapsed() < END_DEADLINE {
            let run = client.get_run(run).await?;
            if run.exit_code.is_some() {
                return Ok(run);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let run = client.get_run(run).await?;
        if run.exit_code.is_some() {
            return Ok(run);
        }
        let mut text = format!("the workers ended ({status})");
        if !is_verbose() {
            if let Some(error) = last_error(&self.log, self.log_from) {
                text += &format!(": {error}");
            }
            text += &format!("; their log is `{}`", self.log.display());
        }
        Err(Coded::error(code.max(1), text))
    }
}

/// Most bytes of a log's end that are searched for an error.
const LOG_TAIL_BYTES: u64 = 64 << 10;

/// Takes the name of the trainer off a line that an agent passed on.
fn unnamed(line: &str) -> &str {
    line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, rest)| rest)
}

/// Returns the last error in a log from byte `from` on, without time and place in the code.
fn last_error(log: &Path, from: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(LOG_TAIL_BYTES)))).ok()?;
    let mut text = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    // A program's last words begin with `error: `; its log has time, level and module before them.
    let said = |line: &'_ str| match line.strip_prefix("error: ") {
        Some(message) => Some(message.trim().to_string()),
        None => {
            let (_, logged) = line.split_once(" ERROR ")?;
            let (_, message) = logged.split_once(": ").unwrap_or(("", logged));
            Some(message.trim().to_string())
        }
    };
    text.lines().rev().map(unnamed).find_map(said)
}

fn print_end(run: &v1::Run, saved: &Path) {
    let saved = run.checkpoint_step.map_or("no checkpoint".to_string(), |step| {
        format!("checkpoint of step {step} in {}", saved.display())
    });
    match run.state.as_str() {
        "finished" => {
            let digest = run.final_digest.map_or_else(String::new, |d| format!("{d:016x}"));
            println!("finished at step {}, state digest {digest}; {saved}", run.step);
        }
        "stopped" => {
            println!("stopped at step {}; {saved}; run the same command to go on", run.step)
        }
        state => println!("{state} at step {}: {}; {saved}", run.step, run.why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_this_run_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("workers.log");
        let old = "2026-01-01T00:00:00Z ERROR lacuna_worker::agent: an old one\n";
        let new = "2026-01-02T00:00:00Z ERROR lacuna_worker::entry: no driver: libcuda.so.1\n\
                   2026-01-02T00:00:01Z  INFO lacuna_worker::agent: ended\n";
        std::fs::write(&log, format!("{old}{new}")).unwrap();
        let from = old.len() as u64;
        assert_eq!(last_error(&log, from).as_deref(), Some("no driver: libcuda.so.1"));
        assert_eq!(last_error(&log, (old.len() + new.len()) as u64), None);
        assert_eq!(last_error(&folder.path().join("none"), 0), None);
        std::fs::write(&log, format!("{new}[local:cuda0] error: no NVIDIA driver: none\n"))
            .unwrap();
        assert_eq!(last_error(&log, 0).as_deref(), Some("no NVIDIA driver: none"));
    }
}
