//! The gRPC services: thin translations to the registry and the runs' tasks.

mod admin;
pub(crate) mod messages;
mod scale;
mod watch;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use lacuna_api::error::{Reason, status};
use lacuna_api::v1::run_service_server::RunService;
use lacuna_api::v1::worker_service_server::WorkerService;
use lacuna_api::{v1, wire};
use lacuna_control::coordinator::{Ending, Event, Hello};
use lacuna_control::journal::{Record, Saved};
use lacuna_spec::RunSpec;
use lacuna_types::{BuildId, Incarnation, RunId, WorkerId, exit};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use self::messages::run_message;
use self::watch::watch_loop;
use crate::catalogue::Catalogue;
use crate::registry::Shared;
use crate::run::{Gone, Input, SESSION_QUEUE, SessionSender, WATCH_QUEUE};
use crate::store::{StoreError, StoredRun};

/// Longest piece of a process's last line that goes into an event.
const LAST_WORDS_MAX: usize = 200;
/// How long a run may take to write a wish down.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// Bound of an agent's outgoing queue: a kill for each of its devices, and the welcome.
const AGENT_QUEUE: usize = 128;
/// How long a new stream may take to introduce itself.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// All services over one shared state.
#[derive(Clone)]
pub(crate) struct Grpc(pub Arc<Shared>);

fn parse_run(text: &str) -> Result<RunId, Status> {
    text.parse().map_err(|err: lacuna_types::NameError| status(Reason::Malformed, err.to_string()))
}

fn check_build(build: Option<v1::BuildId>, who: &str) -> Result<(), Status> {
    let theirs: BuildId = build.unwrap_or_default().into();
    let ours = BuildId::this();
    if theirs == ours {
        return Ok(());
    }
    let text = format!("{who} is {theirs}, the coordinator is {ours}: install the same build");
    warn!("{text}");
    Err(status(Reason::VersionSkew, text))
}

async fn first_message<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(HELLO_DEADLINE, inbound.message()).await {
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => Err(status(Reason::Malformed, "the stream ended without a hello")),
        Ok(Err(err)) => Err(err),
        Err(_) => Err(Status::deadline_exceeded("no hello within 10 s")),
    }
}

#[tonic::async_trait]
impl WorkerService for Grpc {
    type SessionStream = BoxStream<v1::SessionResponse>;
    type AgentStream = BoxStream<v1::AgentResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let Some(v1::session_request::Message::Hello(hello)) =
            first_message(&mut inbound).await?.message
        else {
            return Err(status(Reason::Malformed, "a session begins with a hello"));
        };
        let malformed = |err: wire::WireError| status(Reason::Malformed, err.to_string());
        let intro: Hello = wire::hello(&hello).map_err(malformed)?;
        check_build(hello.build.clone(), &format!("worker {}", intro.worker))?;
        let (out, answers) = mpsc::channel(SESSION_QUEUE);
        self.0.enter(&intro.worker, intro.incarnation, &bounded(hello.device.clone()), &out)?;
        let session = Session { shared: self.0.clone(), intro, device: bounded(hello.device) };
        tokio::spawn(session.run(hello.run_id, inbound, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn agent(
        &self,
        request: Request<Streaming<v1::AgentRequest>>,
    ) -> Result<Response<Self::AgentStream>, Status> {
        let mut inbound = request.into_inner();
        let Some(v1::agent_request::Message::Hello(hello)) =
            first_message(&mut inbound).await?.message
        else {
            return Err(status(Reason::Malformed, "an agent's stream begins with a hello"));
        };
        check_build(hello.build.clone(), &format!("the agent of node {}", hello.node))?;
        info!(node = %hello.node, devices = hello.devices.len(), "node joined");
        let (out, answers) = mpsc::channel(AGENT_QUEUE);
        let beat_ms = self.0.options.timing.beat.as_millis() as u64;
        let welcome = v1::agent_response::Message::Welcome(v1::NodeWelcome { beat_ms });
        // The queue is new and has room.
        let _ = out.try_send(Ok(v1::AgentResponse { message: Some(welcome) }));
        self.0.enter_agent(&hello.node, &out);
        tokio::spawn(agent_loop(self.0.clone(), hello.node, inbound, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

async fn agent_loop(
    shared: Arc<Shared>,
    node: String,
    mut inbound: Streaming<v1::AgentRequest>,
    out: mpsc::Sender<Result<v1::AgentResponse, Status>>,
) {
    while let Ok(Some(request)) = inbound.message().await {
        let Some(v1::agent_request::Message::TrainerExited(exited)) = request.message else {
            continue;
        };
        let Ok(worker) = exited.worker_id.parse::<WorkerId>() else {
            warn!(%node, worker_id = exited.worker_id, "agent names a worker that cannot be");
            continue;
        };
        if worker.as_str().rsplit_once(':').is_none_or(|(home, _)| home != node) {
            warn!(%node, %worker, "an agent speaks of another node's worker");
            continue;
        }
        debug!(%node, %worker, how = exited.how, stderr = exited.stderr_tail, "trainer ended");
        let how = bounded(with_last_words(&exited.how, &exited.stderr_tail));
        let incarnation = exited.incarnation.map(Incarnation);
        if let Some(incarnation) = incarnation {
            shared.bury(&worker, incarnation);
        }
        let inputs: Vec<mpsc::Sender<Input>> =
            shared.runs().values().map(|h| h.ends.input.clone()).collect();
        for input in inputs {
            let how = how.clone();
            let event = Event::TrainerExited { worker: worker.clone(), incarnation, how };
            // Fails only when that run's task is gone.
            let _ = input.send(Input::Event(event)).await;
        }
    }
    shared.leave_agent(&node, &out);
    info!(%node, "node left");
}

/// Longest text of a caller that is kept.
const TEXT_MAX: usize = 1000;

/// Cuts a text that a caller gave.
fn bounded(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
    text
}

/// Adds the end of what a process wrote to how it ended, where it ended by itself and not well.
fn with_last_words(how: &str, stderr: &str) -> String {
    let failed = how.starts_with("exit code") && how != "exit code 0";
    match stderr.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) if failed => {
            let line: String = line.trim().chars().take(LAST_WORDS_MAX).collect();
            format!("{how}: {line}")
        }
        _ => how.to_string(),
    }
}

/// One trainer's stream, from its hello to its end.
struct Session {
    shared: Arc<Shared>,
    intro: Hello,
    device: String,
}

impl Session {
    async fn run(
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
        let session = self.shared.next_session();
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

#[tonic::async_trait]
impl RunService for Grpc {
    type WatchRunStream = BoxStream<v1::WatchRunResponse>;

    async fn create_run(
        &self,
        request: Request<v1::CreateRunRequest>,
    ) -> Result<Response<v1::CreateRunResponse>, Status> {
        let v1::CreateRunRequest { spec, resume, n_samples, fingerprint } = request.into_inner();
        let invalid = |text: String| status(Reason::InvalidSpec, text);
        let spec: RunSpec = serde_json::from_str(&spec).map_err(|err| invalid(err.to_string()))?;
        if spec.data.order == lacuna_spec::Order::Auto {
            return Err(invalid(
                "`data.order` must be pinned by the client that knows the data".to_string(),
            ));
        }
        crate::run::run_config(&spec, n_samples).map_err(invalid)?;
        let id = spec.run_id();
        let created = match self.existing(&id, &spec, n_samples, &fingerprint)? {
            Some(input) => {
                if resume {
                    self.resume(&id, input, spec).await?;
                }
                false
            }
            None => {
                self.create(&id, spec, n_samples, fingerprint).await?;
                true
            }
        };
        let run = Some(self.run_message(&id)?);
        Ok(Response::new(v1::CreateRunResponse { run, created }))
    }

    async fn get_run(
        &self,
        request: Request<v1::GetRunRequest>,
    ) -> Result<Response<v1::GetRunResponse>, Status> {
        let id = parse_run(&request.into_inner().run_id)?;
        Ok(Response::new(v1::GetRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn list_runs(
        &self,
        request: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsResponse>, Status> {
        let v1::ListRunsRequest { page_size, page_token } = request.into_inner();
        let all = self.0.runs();
        let after = all.iter().skip_while(|(id, _)| id.as_str() <= page_token.as_str());
        let (runs, next_page_token) =
            page(after, page_size, |(id, handle)| run_message(id, handle), |run| &run.run_id);
        Ok(Response::new(v1::ListRunsResponse { runs, next_page_token }))
    }

    async fn watch_run(
        &self,
        request: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let v1::WatchRunRequest { run_id, after_seq } = request.into_inner();
        let id = parse_run(&run_id)?;
        self.run_message(&id)?;
        let (out, answers) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(watch_loop(self.clone(), id, after_seq, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn stop_run(
        &self,
        request: Request<v1::StopRunRequest>,
    ) -> Result<Response<v1::StopRunResponse>, Status> {
        let v1::StopRunRequest { run_id, why } = request.into_inner();
        self.tell(&parse_run(&run_id)?, Event::Stop { why: bounded(why) }).await?;
        Ok(Response::new(v1::StopRunResponse {}))
    }

    async fn request_checkpoint(
        &self,
        request: Request<v1::RequestCheckpointRequest>,
    ) -> Result<Response<v1::RequestCheckpointResponse>, Status> {
        self.tell(&parse_run(&request.into_inner().run_id)?, Event::Checkpoint).await?;
        Ok(Response::new(v1::RequestCheckpointResponse {}))
    }

    async fn scale_run(
        &self,
        request: Request<v1::ScaleRunRequest>,
    ) -> Result<Response<v1::ScaleRunResponse>, Status> {
        let v1::ScaleRunRequest { run_id, workers_min, workers_max } = request.into_inner();
        let id = parse_run(&run_id)?;
        scale::scale(&self.0, &id, workers_min, workers_max).await?;
        Ok(Response::new(v1::ScaleRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn force_run(
        &self,
        request: Request<v1::ForceRunRequest>,
    ) -> Result<Response<v1::ForceRunResponse>, Status> {
        let id = parse_run(&request.into_inner().run_id)?;
        if !self.tell(&id, Event::Force).await? {
            let text = format!("run {id} waits for no silent members: nothing to force");
            return Err(Status::failed_precondition(text));
        }
        Ok(Response::new(v1::ForceRunResponse {}))
    }
}

/// Passes a wish on to a run, waits until it is durable, and tells whether it changed anything.
async fn ask(input: mpsc::Sender<Input>, event: Event) -> Result<bool, Status> {
    let (done, told) = oneshot::channel();
    input.send(Input::Ask { event, done }).await.map_err(|_| going_down())?;
    match tokio::time::timeout(ASK_DEADLINE, told).await {
        Ok(Ok(met)) => Ok(met),
        Ok(Err(_)) => Err(going_down()),
        Err(_) => Err(Status::deadline_exceeded("the run did not take the wish in time")),
    }
}

/// Most entries of a list in one answer.
const PAGE_MAX: usize = 1000;

/// Takes a page off a list, and the token of the next one, which is the last name of this.
fn page<T, M>(
    mut all: impl Iterator<Item = T>,
    size: u32,
    make: impl FnMut(T) -> M,
    name: impl Fn(&M) -> &String,
) -> (Vec<M>, String) {
    let size = if size == 0 { PAGE_MAX } else { (size as usize).min(PAGE_MAX) };
    let found: Vec<M> = all.by_ref().take(size).map(make).collect();
    let more = all.next().is_some();
    let token = found.last().filter(|_| more).map(|last| name(last).clone());
    (found, token.unwrap_or_default())
}

fn going_down() -> Status {
    status(Reason::ShuttingDown, "the coordinator is going down")
}

impl Grpc {
    async fn tell(&self, id: &RunId, event: Event) -> Result<bool, Status> {
        ask(self.0.input_of(id).ok_or_else(|| not_found(id))?, event).await
    }

    /// Returns the queue of the run of this name, if there is one and `spec` means the same run.
    fn existing(
        &self,
        id: &RunId,
        spec: &RunSpec,
        n_samples: u64,
        fingerprint: &str,
    ) -> Result<Option<mpsc::Sender<Input>>, Status> {
        let Some(input) = self.0.input_of(id) else { return Ok(None) };
        let mut differences = self.0.differences(id, spec);
        if let Some(handle) = self.0.runs().get(id)
            && (handle.n_samples != n_samples || handle.fingerprint != fingerprint)
        {
            differences.push(format!(
                "data: {} samples ({}) -> {n_samples} samples ({fingerprint}) [maths]",
                handle.n_samples, handle.fingerprint
            ));
        }
        if let Some(handle) = self.0.runs().get(id)
            && handle.spec.checkpoint.to != spec.checkpoint.to
        {
            let (old, new) = (&handle.spec.checkpoint.to, &spec.checkpoint.to);
            differences.push(format!("checkpoint.to: {old} -> {new} [fixed while the run exists]"));
        }
        if differences.is_empty() {
            return Ok(Some(input));
        }
        let text = format!(
            "run `{id}` exists and differs:\n  {}\n\
             give the changed run another name",
            differences.join("\n  ")
        );
        Err(status(Reason::RunExists, text))
    }

    async fn resume(
        &self,
        id: &RunId,
        input: mpsc::Sender<Input>,
        spec: RunSpec,
    ) -> Result<(), Status> {
        let view = match self.0.runs().get_mut(id) {
            // A run that is on keeps its spec: what may change of it has calls of its own.
            Some(handle) if handle.ends.view.borrow().ending.is_none() => handle.ends.view.clone(),
            Some(handle) => {
                if handle.spec.track.tensorboard != spec.track.tensorboard {
                    self.0.follow(id, &spec, &handle.ends);
                }
                handle.spec = spec.clone();
                handle.spec_json = spec.to_json().to_string();
                handle.ends.view.clone()
            }
            None => return Err(not_found(id)),
        };
        let ending = view.borrow().ending.clone();
        match ending {
            Some(Ending::Finished { .. }) => Ok(()),
            _ => {
                input.send(Input::Resume(Box::new(spec))).await.map_err(|_| going_down())?;
                let mut view = view;
                let awake = view.wait_for(|view| view.ending.is_none());
                match tokio::time::timeout(HELLO_DEADLINE, awake).await {
                    Ok(Ok(_)) => Ok(()),
                    _ => Err(Status::deadline_exceeded("the run did not wake up in time")),
                }
            }
        }
    }

    async fn create(
        &self,
        id: &RunId,
        spec: RunSpec,
        n_samples: u64,
        fingerprint: String,
    ) -> Result<(), Status> {
        let (wanted, print, epoch) = (spec.clone(), fingerprint.clone(), self.0.epoch);
        let open = move || Catalogue::open(wanted, n_samples, print, epoch);
        let (catalogue, found) = tokio::task::spawn_blocking(open)
            .await
            .map_err(|err| status(Reason::Internal, err.to_string()))?
            .map_err(|err| {
                let to = &spec.checkpoint.to;
                status(Reason::Storage, format!("checkpoints at `{to}` cannot be used: {err}"))
            })?;
        for damaged in &found.damaged {
            warn!(run_id = %id, "{damaged}");
        }
        if spec.checkpoint.resume == lacuna_spec::Resume::Never && found.newest.is_some() {
            let text = format!(
                "run `{id}` has checkpoints at `{}` and `checkpoint.resume` is \"never\"",
                spec.checkpoint.to
            );
            return Err(status(Reason::RunExists, text));
        }
        // A run that was left alone at the start has a journal: its numbers are not used again.
        let internal = |err: StoreError| status(Reason::Internal, err.to_string());
        let journal = self.0.store().journal(id).map_err(internal)?;
        let mut saved = Saved::replay(journal.iter().map(|line| &line.record));
        let mut news = found.news(&saved);
        if saved.ending.is_some() {
            news.push(Record::Resumed);
        }
        news.iter().for_each(|record| saved.apply(record));
        let stored = StoredRun {
            run_id: id.clone(),
            spec: spec.to_json().to_string(),
            n_samples,
            fingerprint,
            saved,
        };
        let written = {
            let mut store = self.0.store();
            store.put_run(&stored).and_then(|()| store.record(id, &news))
        };
        if let Err(err) = written {
            let text = err.to_string();
            self.0.fail(err);
            return Err(status(Reason::Internal, text));
        }
        self.0.start_run(stored, spec, catalogue).map_err(|err| status(Reason::InvalidSpec, err))
    }

    fn run_message(&self, id: &RunId) -> Result<v1::Run, Status> {
        let runs = self.0.runs();
        runs.get(id).map(|handle| run_message(id, handle)).ok_or_else(|| not_found(id))
    }
}

fn not_found(id: &RunId) -> Status {
    status(Reason::RunNotFound, format!("there is no run `{id}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_go_with_failures_only() {
        let stderr = "loading\nerror: no such device\n\n";
        assert_eq!(with_last_words("exit code 1", stderr), "exit code 1: error: no such device");
        assert_eq!(with_last_words("exit code 0", stderr), "exit code 0");
        assert_eq!(with_last_words("killed by signal 9", stderr), "killed by signal 9");
        assert_eq!(with_last_words("exit code 1", ""), "exit code 1");
    }
}
