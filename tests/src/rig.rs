//! A cluster under faults: a coordinator and agents, each agent behind two proxies.
//!
//! ```text
//! agent, trainer ── control proxy ──▶ coordinator        peers ── mesh proxy ──▶ trainer
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use lacuna_api::client::Client;
use lacuna_api::v1;
use rustix::process::Signal;

use crate::history::History;
use crate::processes::{self, Guarded};
use crate::proxy::{Network, Order, Proxy};
use crate::{Binaries, Fixture};

/// Longest time for a coordinator to answer: it opens its state and reads checkpoints first.
const START: Duration = Duration::from_secs(30);
/// Longest time for trainers to notice that their agent is gone.
const END: Duration = Duration::from_secs(10);
/// Bytes of a log's end in reports.
const TAIL_BYTES: u64 = 3000;
/// Samples of a slot.
const SLOT_BATCH: u64 = 2;

/// What the rigs of one program share: the binaries and a packed data set.
pub struct Bench {
    fixture: Fixture,
}

impl Bench {
    /// Packs the data.
    pub fn new(binaries: Binaries) -> Self {
        Bench { fixture: Fixture::new(binaries, 256, 8) }
    }
}

/// A run to submit.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// Name, and name of its file.
    pub name: String,
    /// Steps.
    pub steps: u64,
    /// Slots of a step.
    pub slots: u64,
    /// Fewest and most workers.
    pub workers: (usize, usize),
    /// Checkpoint every so many steps.
    pub checkpoint_steps: u64,
    /// Digest of the state every so many steps.
    pub digest_every: u64,
    /// Figures every so many steps.
    pub track_every: u64,
}

impl RunSpec {
    fn text(&self, data: &Path) -> String {
        format!(
            "schema = 1\nname = \"{name}\"\nbase = \"preset:micro\"\n\
             data.shards = \"{data}\"\ndata.threads = 1\n\
             data.mean = [0.5, 0.5, 0.5]\ndata.std = [0.25, 0.25, 0.25]\n\
             train.duration = \"{steps}step\"\ntrain.batch = {batch}\n\
             train.slot_batch = {SLOT_BATCH}\ntrain.digest_every = {digest_every}\n\
             optim.base_lr = 0.01\noptim.warmup = \"10step\"\n\
             elastic.workers = \"{min}:{max}\"\n\
             checkpoint.to = \"ckpt\"\ncheckpoint.every = [\"{checkpoint}step\"]\n\
             track.every = \"{track}step\"\n",
            name = self.name,
            data = data.display(),
            steps = self.steps,
            batch = self.slots * SLOT_BATCH,
            digest_every = self.digest_every,
            min = self.workers.0,
            max = self.workers.1,
            checkpoint = self.checkpoint_steps,
            track = self.track_every,
        )
    }
}

/// An agent and its proxies.
pub struct Node {
    /// The agent.
    pub agent: Guarded,
    /// Between the node and the coordinator; up is towards the coordinator.
    pub control: Proxy,
    /// Between its peers and its trainer; up is towards the trainer.
    pub mesh: Proxy,
}

impl Node {
    /// Returns the address of the coordinator as the node knows it.
    pub fn url(&self) -> String {
        format!("http://{}", self.control.addr())
    }
}

/// A coordinator and its nodes. Everything ends when it is dropped.
pub struct Rig<'a> {
    bench: &'a Bench,
    dir: tempfile::TempDir,
    /// Least time of a slot.
    slot: Duration,
    network: Network,
    listen: String,
    coordinator: Option<Guarded>,
    nodes: BTreeMap<String, Node>,
    /// Addresses that trainers of this rig, and no other processes, have on their command line.
    urls: BTreeSet<String>,
}

impl<'a> Rig<'a> {
    /// Starts a coordinator.
    pub fn start(bench: &'a Bench, slot: Duration) -> anyhow::Result<Self> {
        let mut rig = Rig {
            bench,
            dir: tempfile::Builder::new()
                .prefix("lacuna-chaos-")
                .tempdir()
                .context("make a folder")?,
            slot,
            network: Network::new().context("start the proxies' thread")?,
            listen: "127.0.0.1:0".into(),
            coordinator: None,
            nodes: BTreeMap::new(),
            urls: BTreeSet::new(),
        };
        rig.start_coordinator()?;
        Ok(rig)
    }

    /// Returns the coordinator's address, without a proxy.
    pub fn url(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Returns a path in the rig's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self, name: &str) -> anyhow::Result<File> {
        let path = self.path(&format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&path);
        file.with_context(|| format!("open {}", path.display()))
    }

    /// Starts the coordinator, again on the state and port of the one before if there was one.
    pub fn start_coordinator(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new(&self.bench.fixture.binaries.lacuna);
        command
            .args(["coordinator", "--local", "--listen", &self.listen, "--state"])
            .arg(self.path("state"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(self.log("coordinator")?);
        let mut process = Guarded::start(&mut command).context("start the coordinator")?;
        let stdout = process.child().stdout.take().context("stdout is a pipe")?;
        let (said, hear) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            // Fails only where nobody waits any more.
            let _ = said.send(read.map(|_| line));
        });
        let line = hear.recv_timeout(START).context("the coordinator does not start")??;
        let addr = line.trim().strip_prefix("listening on http://");
        self.listen = addr.with_context(|| self.tails())?.to_string();
        self.coordinator = Some(process);
        Ok(())
    }

    /// Kills the coordinator with SIGKILL.
    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Sends the coordinator a signal, if it runs.
    pub fn signal_coordinator(&self, signal: Signal) {
        if let Some(coordinator) = &self.coordinator {
            coordinator.signal(signal);
        }
    }

    /// Starts an agent with one trainer, behind proxies of its own.
    pub fn add(&mut self, node: &str) -> anyhow::Result<()> {
        let coordinator: SocketAddr = self.listen.parse()?;
        let control = self.network.open(coordinator).context("open a proxy")?;
        let bind = crate::ports::free_addr()?;
        let mesh = self.network.open(bind).context("open a proxy")?;
        let url = format!("http://{}", control.addr());
        let mut command = Command::new(&self.bench.fixture.binaries.worker);
        command
            .args(["--coordinator", &url, "--node-name", node, "--devices", "cpu:1"])
            .args(["--bind-addr", &bind.to_string()])
            .args(["--advertise-addr", &mesh.addr().to_string(), "--with-parent"])
            .env("LACUNA_FAKE_SLOT_MS", self.slot.as_millis().to_string())
            .current_dir(self.dir.path())
            // Held open by this program: an agent that outlives it ends.
            .stdin(Stdio::piped())
            .stderr(self.log(node)?);
        let agent = Guarded::start(&mut command).context("start an agent")?;
        self.urls.insert(url);
        self.nodes.insert(node.to_string(), Node { agent, control, mesh });
        Ok(())
    }

    /// Returns the names of the nodes.
    pub fn node_names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Returns a node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Returns the node of a worker, `node:device`.
    pub fn node_of(&self, worker: &str) -> Option<&Node> {
        self.nodes.get(worker.split(':').next()?)
    }

    /// Takes a node out of the rig, to end its agent or wait for it.
    pub fn take(&mut self, name: &str) -> Option<Node> {
        self.nodes.remove(name)
    }

    /// Finds the process of a node's trainer, if it lives.
    pub fn trainer(&self, name: &str) -> Option<u32> {
        let node = self.nodes.get(name)?;
        crate::trainer_pid(&format!("{name}:cpu0"), &node.url())
    }

    /// Kills a node's trainer; says whether there was one.
    pub fn signal_trainer(&self, name: &str, signal: Signal) -> bool {
        let pid = self.trainer(name);
        pid.into_iter().for_each(|pid| processes::send(pid, signal));
        pid.is_some()
    }

    /// Undoes every fault that lasts: cut cables, stopped processes, a dead coordinator.
    pub fn mend(&mut self) -> anyhow::Result<()> {
        for (name, node) in &self.nodes {
            node.control.obey(Order::Resume);
            node.mesh.obey(Order::Resume);
            self.signal_trainer(name, Signal::CONT);
        }
        self.signal_coordinator(Signal::CONT);
        if self.coordinator.is_none() {
            self.start_coordinator()?;
        }
        Ok(())
    }

    /// Runs a `lacuna` command to its end.
    pub fn lacuna(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.bench.fixture.binaries.lacuna);
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.output().context("run lacuna")
    }

    /// Submits a run and follows it.
    pub fn submit(&self, spec: &RunSpec) -> anyhow::Result<History> {
        let path = self.path(&format!("{}.toml", spec.name));
        std::fs::write(&path, spec.text(&self.bench.fixture.path("data")))
            .context("write a spec")?;
        let path = path.to_str().context("a path in UTF-8")?;
        let output = self.lacuna(&["submit", path, "--coordinator", &self.url()])?;
        let (code, out, err) = crate::said(&output);
        ensure!(code == 0, "submit: exit code {code}: {out}{err}");
        History::follow(&self.url(), &spec.name)
    }

    /// Waits until a run ends and everything was heard of it.
    pub fn wait_end(
        &self,
        history: &History,
        run: &str,
        limit: Duration,
    ) -> anyhow::Result<v1::Run> {
        // The wait ends with the run; what it finds is asked for below.
        let _ = history.until(limit, |heard| heard.run.exit_code);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let asked = runtime.block_on(async {
            let mut client = Client::connect(&self.url(), END).await?;
            client.get_run(run).await
        });
        let last = asked.with_context(|| self.tails())?;
        ensure!(
            last.exit_code.is_some(),
            "the run did not end within {limit:?}: {}",
            history.look(|heard| heard.text(12))
        );
        ensure!(history.caught_up(last.last_seq, END), "the last updates do not come");
        Ok(last)
    }

    /// Ends every node at once and returns processes that stayed.
    pub fn end_nodes(&mut self) -> Vec<u32> {
        for (name, node) in &self.nodes {
            node.control.obey(Order::Resume);
            node.mesh.obey(Order::Resume);
            self.signal_trainer(name, Signal::CONT);
        }
        self.nodes.clear();
        let until = Instant::now() + END;
        let mut left = processes::find(|arg| self.urls.contains(arg));
        left.retain(|&pid| {
            let limit = until.saturating_duration_since(Instant::now());
            !processes::wait_for_end(pid, limit)
        });
        left.iter().for_each(|&pid| processes::send(pid, Signal::KILL));
        left
    }

    /// Returns the ends of all logs.
    pub fn tails(&self) -> String {
        let mut out = String::new();
        for (path, text) in self.logs() {
            let from = text.len().saturating_sub(TAIL_BYTES as usize);
            let from = (from..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            out += &format!("--- {path}\n{}\n", &text[from..]);
        }
        out
    }

    /// Returns all logs by name.
    pub fn logs(&self) -> BTreeMap<String, String> {
        let mut logs = BTreeMap::new();
        let Ok(entries) = std::fs::read_dir(self.dir.path()) else { return logs };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".log") {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                logs.insert(name, String::from_utf8_lossy(&bytes).into_owned());
            }
        }
        logs
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        // Said already where it matters; here it only has to be over.
        let _ = self.end_nodes();
    }
}
