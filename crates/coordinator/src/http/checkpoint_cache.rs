//! The checkpoints that pages show, listed at most every few seconds however many pages look.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lacuna_api::v1;
use lacuna_api::v1::checkpoint_service_server::CheckpointService as _;
use lacuna_types::RunId;
use tonic::Request;

use crate::grpc::Grpc;
use crate::registry::{Shared, lock};

/// How old a list may be.
const FRESH: Duration = Duration::from_secs(5);
/// How long a page waits for a list: a store may be far away, and the page has more to show.
const PATIENCE: Duration = Duration::from_secs(1);
/// After this time nobody waits for a list any more, and it is asked for again.
const GIVE_UP: Duration = Duration::from_secs(120);
/// Runs whose lists are kept.
const RUNS_MAX: usize = 64;

/// What is known of a run's checkpoints.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The newest list; `None` before there is one.
    pub checkpoints: Option<Vec<v1::Checkpoint>>,
    /// Why the list could not be renewed.
    pub problem: Option<String>,
}

#[derive(Debug)]
struct Entry {
    /// When the newest list was asked for.
    asked: Instant,
    /// Whether it has not come yet.
    awaited: bool,
    seen: Seen,
}

/// Lists by run.
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<BTreeMap<RunId, Entry>>);

impl Shelf {
    /// Returns what is known of a run's checkpoints, renewed where it is old.
    pub async fn look(self: &Arc<Self>, shared: &Arc<Shared>, id: &RunId) -> Seen {
        if self.claims(id) {
            let (shelf, grpc, id) = (self.clone(), Grpc(shared.clone()), id.clone());
            let list = tokio::spawn(async move {
                let request = v1::ListCheckpointsRequest { run_id: id.to_string() };
                let answer = grpc.list_checkpoints(Request::new(request)).await;
                let found = answer.map(|answer| answer.into_inner().checkpoints);
                shelf.put(&id, found.map_err(|status| status.message().to_string()));
            });
            // Goes on where it takes longer: the next page shows it.
            let _ = tokio::time::timeout(PATIENCE, list).await;
        }
        lock(&self.0).get(id).map(|entry| entry.seen.clone()).unwrap_or_default()
    }

    /// Tells whether the caller is the one to renew a run's list.
    fn claims(&self, id: &RunId) -> bool {
        let mut lists = lock(&self.0);
        let now = Instant::now();
        if let Some(entry) = lists.get_mut(id) {
            let limit = if entry.awaited { GIVE_UP } else { FRESH };
            if now.duration_since(entry.asked) < limit {
                return false;
            }
            (entry.asked, entry.awaited) = (now, true);
            return true;
        }
        if lists.len() >= RUNS_MAX {
            let oldest =
                lists.iter().min_by_key(|(_, entry)| entry.asked).map(|(id, _)| id.clone());
            oldest.and_then(|id| lists.remove(&id));
        }
        lists.insert(id.clone(), Entry { asked: now, awaited: true, seen: Seen::default() });
        true
    }

    fn put(&self, id: &RunId, found: Result<Vec<v1::Checkpoint>, String>) {
        if let Some(entry) = lock(&self.0).get_mut(id) {
            entry.awaited = false;
            match found {
                Ok(list) => entry.seen = Seen { checkpoints: Some(list), problem: None },
                Err(problem) => entry.seen.problem = Some(problem),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_pages_lists_and_what_was_known_stays() {
        let shelf = Shelf::default();
        let id = |name: &str| name.parse::<RunId>().unwrap();
        assert!(shelf.claims(&id("a")));
        assert!(!shelf.claims(&id("a")), "it is on its way");
        shelf.put(&id("a"), Ok(vec![v1::Checkpoint { step: 7, ..Default::default() }]));
        assert!(!shelf.claims(&id("a")), "it is new");
        shelf.put(&id("a"), Err("the disk is gone".to_string()));
        let seen = lock(&shelf.0)[&id("a")].seen.clone();
        assert_eq!(seen.checkpoints.map(|list| list[0].step), Some(7));
        assert_eq!(seen.problem.as_deref(), Some("the disk is gone"));
        for n in 0..2 * RUNS_MAX {
            shelf.claims(&id(&format!("r{n}")));
        }
        assert_eq!(lock(&shelf.0).len(), RUNS_MAX);
    }
}
