//! Feeding watchers.

use lacuna_api::v1;
use lacuna_types::RunId;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::Grpc;
use super::messages::update_message;

/// Updates read from the store at once for a watcher.
const PAGE: u64 = 256;

type WatchSender = mpsc::Sender<Result<v1::WatchRunResponse, Status>>;

/// Feeds one watcher until it goes: a snapshot, what is stored, then what happens; a snapshot again
/// whenever the run's state changes.
pub(super) async fn watch_loop(grpc: Grpc, id: RunId, after: u64, out: WatchSender) {
    let (mut view, updates) = {
        let runs = grpc.0.runs();
        let Some(handle) = runs.get(&id) else { return };
        (handle.ends.view.clone(), handle.ends.updates.subscribe())
    };
    let mut live = tokio_stream::wrappers::BroadcastStream::new(updates);
    let mut seen = after;
    let mut last_state: Option<v1::Run> = None;
    loop {
        let Ok(snapshot) = grpc.run_message(&id) else { return };
        // Later snapshots come behind the events that led to them.
        if last_state.is_none() && !send_snapshot(&out, &mut last_state, &snapshot, seen).await {
            return;
        }
        loop {
            let page = match grpc.0.store().updates(&id, seen, PAGE) {
                Ok(page) => page,
                Err(err) => {
                    grpc.0.fail(err);
                    return;
                }
            };
            if page.is_empty() {
                break;
            }
            for (seq, update) in page {
                seen = seq;
                if out.send(Ok(update_message(seq, update))).await.is_err() {
                    return;
                }
            }
        }
        if !send_snapshot(&out, &mut last_state, &snapshot, seen).await {
            return;
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            next = live.next() => if next.is_none() { return },
            () = out.closed() => return,
        }
    }
}

/// Sends a snapshot if it says something new; `false` if nobody listens any more.
async fn send_snapshot(
    out: &WatchSender,
    last: &mut Option<v1::Run>,
    snapshot: &v1::Run,
    seen: u64,
) -> bool {
    if !differs(last.as_ref(), snapshot) {
        return true;
    }
    *last = Some(snapshot.clone());
    let update = Some(v1::watch_run_response::Update::Snapshot(snapshot.clone()));
    out.send(Ok(v1::WatchRunResponse { update, seq: seen })).await.is_ok()
}

/// Tells whether a snapshot says something new beyond figures and steps, which come by themselves.
fn differs(last: Option<&v1::Run>, next: &v1::Run) -> bool {
    let Some(last) = last else { return true };
    let key = |run: &v1::Run| {
        let workers: Vec<(String, Option<u32>, u32, String)> = run
            .workers
            .iter()
            .map(|w| (w.worker_id.clone(), w.rank, w.slots, w.state.clone()))
            .collect();
        (run.state.clone(), run.generation, run.checkpoint_step, workers)
    };
    key(last) != key(next)
}
