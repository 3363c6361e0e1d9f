//! Everything that a run's stream of updates said, with the times at which it was heard.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use lacuna_api::client::Client;
use lacuna_api::v1;
use lacuna_api::v1::watch_run_response::Update;
use tokio::sync::oneshot;

/// Longest time to reach the coordinator, and pause before the next try.
const CONNECT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_millis(20));
/// Updates that are kept: days of a run with a step each tenth of a second.
const ENTRIES_MAX: usize = 4_000_000;

/// A step's figures.
#[derive(Clone, Debug)]
pub struct Applied {
    /// When they were heard of.
    pub at: Instant,
    /// The figures.
    pub figures: v1::Figures,
}

/// An event of the run.
#[derive(Clone, Debug)]
pub struct Told {
    /// When it was heard of.
    pub at: Instant,
    /// The event.
    pub event: v1::RunEvent,
}

/// What was heard so far.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Newest snapshot.
    pub run: v1::Run,
    /// Figures in the order in which they came.
    pub applied: Vec<Applied>,
    /// Events in the order in which they came.
    pub told: Vec<Told>,
    /// Highest generation that had all its members and started, and its members.
    pub formed: (u64, usize),
    /// Highest sequence number.
    pub seq: u64,
}

impl Heard {
    /// Returns the newest step with figures.
    pub fn step(&self) -> u64 {
        self.applied.last().map_or(0, |applied| applied.figures.step)
    }

    /// Returns the events of a kind.
    pub fn kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Told> {
        self.told.iter().filter(move |told| told.event.kind == kind)
    }

    /// Returns the members by rank.
    pub fn members(&self) -> Vec<String> {
        let mut ranked: Vec<(u32, String)> = Vec::new();
        for worker in &self.run.workers {
            if let Some(rank) = worker.rank {
                ranked.push((rank, worker.worker_id.clone()));
            }
        }
        ranked.sort();
        ranked.into_iter().map(|(_, id)| id).collect()
    }

    /// Tells whether the group trains with `n` members.
    pub fn full(&self, n: usize) -> bool {
        self.run.state == "running" && self.formed.1 == n && self.members().len() == n
    }

    /// Returns the last `n` events as text.
    pub fn text(&self, n: usize) -> String {
        let from = self.told.len().saturating_sub(n);
        let mut text =
            format!("run is {} {}, step {}\n", self.run.state, self.run.why, self.step());
        for told in &self.told[from..] {
            text += &format!("  {}: {}\n", told.event.kind, told.event.text);
        }
        text
    }

    fn take(&mut self, response: v1::WatchRunResponse) -> anyhow::Result<()> {
        let at = Instant::now();
        self.seq = self.seq.max(response.seq);
        match response.update {
            Some(Update::Snapshot(run)) => self.run = run,
            Some(Update::Figures(figures)) => self.applied.push(Applied { at, figures }),
            Some(Update::Event(event)) => {
                if event.kind == "formed"
                    && let Some(formed) = parse_formed(&event.text)
                {
                    self.formed = (formed.generation, formed.world);
                }
                self.told.push(Told { at, event });
            }
            Some(Update::Picture(_)) | None => {}
        }
        if self.applied.len() + self.told.len() > ENTRIES_MAX {
            bail!("more than {ENTRIES_MAX} updates");
        }
        Ok(())
    }
}

/// A generation that started, read from its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formed {
    /// Its number.
    pub generation: u64,
    /// Members.
    pub world: usize,
    /// Step of the state that it goes on from.
    pub step: u64,
}

/// Reads `generation 3: 2 workers at step 41, …`.
pub fn parse_formed(text: &str) -> Option<Formed> {
    let (head, rest) = text.strip_prefix("generation ")?.split_once(": ")?;
    let (world, rest) = rest.split_once(" worker")?;
    let (_, rest) = rest.split_once(" at step ")?;
    let step = rest.split([',', ';']).next()?;
    Some(Formed {
        generation: head.parse().ok()?,
        world: world.parse().ok()?,
        step: step.trim().parse().ok()?,
    })
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows a run on a thread of its own until dropped.
#[derive(Debug)]
pub struct History {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl History {
    /// Starts to follow `run` on the coordinator at `url`, across its restarts.
    pub fn follow(url: &str, run: &str) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (url, run, to) = (url.to_string(), run.to_string(), shared.clone());
        let work = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = follow(&url, &run, &to) => {}
                    _ = stopped => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("history".into()).spawn(work)?;
        Ok(History { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns a copy of what was heard.
    pub fn heard(&self) -> Heard {
        self.shared.lock().clone()
    }

    /// Looks at what was heard.
    pub fn look<T>(&self, look: impl FnOnce(&Heard) -> T) -> T {
        look(&self.shared.lock())
    }

    /// Waits until `found` finds something in what was heard; `None` once `limit` has passed or the
    /// run has come to rest without it.
    pub fn until<T>(&self, limit: Duration, found: impl FnMut(&Heard) -> Option<T>) -> Option<T> {
        self.until_or(limit, found, |heard| heard.run.exit_code.is_some())
    }

    /// Waits until everything up to sequence number `seq` was heard; says whether it was.
    pub fn caught_up(&self, seq: u64, limit: Duration) -> bool {
        self.until_or(limit, |heard| (heard.seq >= seq).then_some(()), |_| false).is_some()
    }

    fn until_or<T>(
        &self,
        limit: Duration,
        mut found: impl FnMut(&Heard) -> Option<T>,
        give_up: impl Fn(&Heard) -> bool,
    ) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut heard = self.shared.lock();
        loop {
            if let Some(it) = found(&heard) {
                return Some(it);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || give_up(&heard) {
                return None;
            }
            let waited = self.shared.news.wait_timeout(heard, left);
            heard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The same, where not finding it is an error that says what was waited for.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        found: impl FnMut(&Heard) -> Option<T>,
    ) -> anyhow::Result<T> {
        let it = self.until(limit, found);
        it.with_context(|| format!("{what}: not within {limit:?}: {}", self.look(|h| h.text(12))))
    }
}

impl Drop for History {
    fn drop(&mut self) {
        // Fails only where the thread has ended.
        let _ = self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take() {
            // A panic there was printed by the thread itself.
            let _ = thread.join();
        }
    }
}

async fn follow(url: &str, run: &str, shared: &Shared) {
    loop {
        // A broken stream is expected while coordinators are killed; the next try follows at once.
        let _ = follow_once(url, run, shared).await;
        tokio::time::sleep(CONNECT.1).await;
    }
}

async fn follow_once(url: &str, run: &str, shared: &Shared) -> anyhow::Result<()> {
    let mut client = Client::connect(url, CONNECT.0).await?;
    let after = shared.lock().seq;
    let mut updates = client.watch_run(run, after).await?;
    while let Some(update) = updates.message().await? {
        shared.lock().take(update)?;
        shared.news.notify_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_formed_event_is_read() {
        let text = "generation 3: 2 workers at step 41, b:cpu0 healed from a:cpu0; slots: …";
        assert_eq!(parse_formed(text), Some(Formed { generation: 3, world: 2, step: 41 }));
        assert_eq!(parse_formed("forming generation 3: 2 workers (why)"), None);
    }
}
