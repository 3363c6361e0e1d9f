//! All stubs of a test, the agents of their nodes, and what is known of both.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use lacuna_api::client::connect;
use lacuna_api::v1;
use lacuna_api::v1::worker_service_client::WorkerServiceClient;
use lacuna_types::{BuildId, Generation, Incarnation, WorkerId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;

use super::stub::{Clocks, End, News, Shared, Stub};

/// Devices of a node.
const DEVICES: usize = 8;
/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(120);
/// Bound of the conductor's queue: every stub may have news at once.
const NEWS: usize = 8192;

/// A stub and how to end it.
struct Member {
    worker: WorkerId,
    incarnation: Incarnation,
    end: Option<oneshot::Sender<End>>,
    task: AbortHandle,
}

/// Stubs and agents.
pub struct Fleet {
    members: Vec<Member>,
    agents: Vec<mpsc::Sender<v1::AgentRequest>>,
    news: mpsc::Receiver<News>,
    warm: watch::Sender<bool>,
    /// Newest generation of each run that has started completely.
    pub started: BTreeMap<String, (Generation, usize)>,
    starting: BTreeMap<(String, Generation), usize>,
    tasks: JoinSet<()>,
}

impl Fleet {
    /// Connects `n` stubs and their agents, and waits until a run has each of them.
    pub async fn connect(url: &str, n: usize, step: Duration) -> anyhow::Result<Self> {
        let (news_in, news) = mpsc::channel(NEWS);
        let warm = watch::Sender::new(false);
        let shared = Shared {
            url: url.to_string(),
            step,
            clocks: Arc::new(Clocks::default()),
            warm: warm.subscribe(),
            news: news_in,
        };
        let mut fleet = Fleet {
            members: Vec::new(),
            agents: Vec::new(),
            news,
            warm,
            started: BTreeMap::new(),
            starting: BTreeMap::new(),
            tasks: JoinSet::new(),
        };
        for node in 0..n.div_ceil(DEVICES) {
            let (agent, task) = agent(url, node).await?;
            fleet.agents.push(agent);
            fleet.tasks.spawn(task);
        }
        // A few at a time: a listener's queue of new connections is short.
        for first in (0..n).step_by(64) {
            let last = n.min(first + 64);
            (first..last).for_each(|i| fleet.add(i, &shared));
            fleet.wait_welcomed(last - first).await?;
        }
        Ok(fleet)
    }

    fn add(&mut self, i: usize, shared: &Shared) {
        let name = format!("node{:03}:{}", i / DEVICES, i % DEVICES);
        let worker: WorkerId = name.parse().expect("a worker's name");
        let incarnation = Incarnation(0x1ca1_0000_0000_0000 + i as u64);
        let (end, ended) = oneshot::channel();
        let life = Stub::live(shared.clone(), worker.clone(), incarnation, ended);
        let task = self.tasks.spawn(life);
        self.members.push(Member { worker, incarnation, end: Some(end), task });
    }

    async fn wait_welcomed(&mut self, n: usize) -> anyhow::Result<()> {
        let mut welcomed = 0;
        while welcomed < n {
            if let News::Welcomed = self.next_news().await.context("connect the stubs")? {
                welcomed += 1;
            }
        }
        Ok(())
    }

    async fn next_news(&mut self) -> anyhow::Result<News> {
        match tokio::time::timeout(DEADLINE, self.news.recv()).await {
            Ok(Some(news)) => Ok(news),
            Ok(None) => bail!("all stubs are gone"),
            Err(_) => bail!("nothing happened within {DEADLINE:?}"),
        }
    }

    /// Lets all stubs say at once that they are warm; returns when.
    pub fn warm_up(&self) -> Instant {
        self.warm.send_replace(true);
        Instant::now()
    }

    /// Waits until `n` runs have started a generation after the ones they are in, all members of
    /// it; returns when the last member was told.
    pub async fn wait_started(&mut self, n: usize) -> anyhow::Result<Instant> {
        let mut last = Instant::now();
        let mut complete = 0;
        while complete < n {
            let News::Started { run, generation, world, at } = self.next_news().await? else {
                bail!("a stub lost its connection");
            };
            last = last.max(at);
            let told = self.starting.entry((run.clone(), generation)).or_default();
            *told += 1;
            if *told == world {
                complete += 1;
                self.started.insert(run, (generation, world));
            }
        }
        Ok(last)
    }

    /// Ends `n` stubs, spread over all; agents report those that die.
    pub async fn end(&mut self, n: usize, how: End) -> anyhow::Result<Instant> {
        let alive: Vec<usize> =
            (0..self.members.len()).filter(|&i| self.members[i].end.is_some()).collect();
        let chosen: Vec<usize> =
            (0..n).map(|k| alive[(2 * k + 1) * alive.len() / (2 * n)]).collect();
        let at = Instant::now();
        for &i in &chosen {
            let member = &mut self.members[i];
            // Fails only where it has ended by itself.
            let _ = member.end.take().expect("it is alive").send(how);
            if matches!(how, End::Die) {
                member.task.abort();
                let report = exited(&member.worker, member.incarnation);
                let agent = &self.agents[i / DEVICES];
                agent.send(report).await.context("report an exit")?;
            }
        }
        Ok(at)
    }

    /// Returns the number of stubs that live.
    pub fn alive(&self) -> usize {
        self.members.iter().filter(|member| member.end.is_some()).count()
    }
}

fn exited(worker: &WorkerId, incarnation: Incarnation) -> v1::AgentRequest {
    let exited = v1::TrainerExited {
        worker_id: worker.to_string(),
        incarnation: Some(incarnation.0),
        how: "signal 9 (SIGKILL)".to_string(),
        stderr_tail: String::new(),
    };
    v1::AgentRequest { message: Some(v1::agent_request::Message::TrainerExited(exited)) }
}

/// Opens the stream of a node's agent; what it hears there is nothing to a stub.
async fn agent(
    url: &str,
    node: usize,
) -> anyhow::Result<(mpsc::Sender<v1::AgentRequest>, impl Future<Output = ()> + use<>)> {
    let channel = connect(url, DEADLINE, &Default::default()).await.context("connect an agent")?;
    let (requests, outgoing) = mpsc::channel(2 * DEVICES);
    let hello = v1::NodeHello {
        node: format!("node{node:03}"),
        build: Some(BuildId::this().into()),
        devices: (0..DEVICES).map(|device| format!("stub:{device}")).collect(),
    };
    let message = Some(v1::agent_request::Message::Hello(hello));
    requests.send(v1::AgentRequest { message }).await.context("introduce an agent")?;
    let mut client = WorkerServiceClient::new(channel);
    let mut answers =
        client.agent(ReceiverStream::new(outgoing)).await.context("open an agent")?.into_inner();
    let listen = async move { while let Ok(Some(_)) = answers.message().await {} };
    Ok((requests, listen))
}
