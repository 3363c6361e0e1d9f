//! Sessions of trainers: from the wire to the run's task and back.

use std::sync::Arc;

use lacuna_api::error::{Reason, status};
use lacuna_api::{v1, wire};
use lacuna_control::coordinator::Hello;
use lacuna_types::{RunId, exit};
use tonic::Streaming;
use tracing::{debug, warn};

use super::{node_of, pictures};
use crate::registry::Shared;
use crate::run::{Gone, Input, SessionSender};

/// One trainer's stream, from its hello to its end.
pub(super) struct Session {
    pub shared: Arc<Shared>,
    pub intro: Hello,
    pub device: String,
}

impl Session {
    pub async fn run(
        self,
        run: String,
        mut inbound: Streaming<v1::SessionRequest>,
        out: SessionSender,
    ) {
        let worker = self.intro.worker.clone();
        let (shared, stream) = (self.shared.clone(), out.clone());
        let known = run.parse::<RunId>().ok().filter(|run| shared.reattach(run));
        let run = match known {
            Some(run) => Some(run),
            None => self.wait_for_run(&mut inbound, &out).await,
        };
        if let Some(run) = run {
            shared.logs.attach(&worker, &run);
            self.serve(&run, inbound, out).await;
            shared.release(&run);
        }
        shared.leave(&worker, &stream);
    }

    /// Waits until a run wants this worker; `None` if the worker goes first.
    async fn wait_for_run(
        &self,
        inbound: &mut Streaming<v1::SessionRequest>,
        out: &SessionSender,
    ) -> Option<RunId> {
        let mut changes = self.shared.changes();
        loop {
            changes.mark_unchanged();
            let banned = self.shared.bans.of_node(node_of(&self.intro.worker));
            if let Some(why) = banned {
                // Nobody listens any more where it fails.
                let _ = out.send(Err(status(Reason::NodeBanned, why))).await;
                return None;
            }
            if let Some(run) = self.shared.assign() {
                return Some(run);
            }
            tokio::select! {
                changed = changes.changed() => changed.ok()?,
                message = inbound.message() => {
                    let message = wire::from_worker(message.ok()??).ok()?;
                    if let lacuna_control::message::ToCoordinator::Leaving { why } = message {
                        let code = exit::DRAINED;
                        let answer = lacuna_control::message::ToWorker::Exit { code, why };
                        // The worker goes either way.
                        let _ = out.try_send(Ok(wire::to_worker(answer)));
                        return None;
                    }
                }
            }
        }
    }

    async fn serve(
        self,
        run: &RunId,
        mut inbound: Streaming<v1::SessionRequest>,
        out: SessionSender,
    ) {
        let Some(input) = self.shared.input_of(run) else { return };
        let Some(welcome) = self.welcome(run) else { return };
        if out.send(Ok(welcome)).await.is_err() {
            return;
        }
        let shared = self.shared.clone();
        let session = shared.next_session();
        let (worker, incarnation) = (self.intro.worker.clone(), self.intro.incarnation);
        let gone = Gone::default();
        let attach = Input::Attach {
            session,
            hello: self.intro,
            device: self.device,
            out,
            gone: gone.clone(),
        };
        if input.send(attach).await.is_err() {
            return;
        }
        loop {
            let message = tokio::select! {
                message = inbound.message() => message,
                () = gone.notified() => return,
            };
            let request = match message {
                Ok(Some(request)) => request,
                Ok(None) => break,
                Err(err) => {
                    debug!(%worker, error = %err, "session stream broke");
                    break;
                }
            };
            if let Some(v1::session_request::Message::Picture(picture)) = request.message {
                pictures::keep(&shared, run, &worker, picture);
                continue;
            }
            let message = match wire::from_worker(request) {
                Ok(message) => message,
                Err(err) => {
                    warn!(%worker, error = %err, "malformed message; closing the session");
                    break;
                }
            };
            let message = Input::Message { worker: worker.clone(), incarnation, message };
            if input.send(message).await.is_err() {
                return;
            }
        }
        // Fails only when the task is gone.
        let _ = input.send(Input::Detach { session, worker, incarnation }).await;
    }

    fn welcome(&self, run: &RunId) -> Option<v1::SessionResponse> {
        let runs = self.shared.runs();
        let handle = runs.get(run)?;
        let (beat, lease) = self.shared.beat_and_lease();
        let orphan = self.shared.options.timing.orphan;
        let welcome = v1::Welcome {
            coord_epoch: self.shared.epoch.0,
            beat_ms: beat.as_millis() as u64,
            lease_ms: lease.as_millis() as u64,
            run_id: run.to_string(),
            spec: handle.spec_json.clone(),
            n_samples: handle.n_samples,
            fingerprint: handle.fingerprint.clone(),
            spec_digest: handle.spec.maths_digest().to_hex().to_string(),
            orphan_ms: orphan.as_millis() as u64,
        };
        let message = Some(v1::session_response::Message::Welcome(welcome));
        Some(v1::SessionResponse { message })
    }
}
