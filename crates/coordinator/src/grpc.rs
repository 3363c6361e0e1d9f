//! The gRPC services: thin translations to the registry and the runs' tasks.

mod admin;
mod checkpoints;
pub(crate) mod create;
mod encoder;
mod facts;
pub(crate) mod idempotency;
pub(crate) mod logs;
pub(crate) mod messages;
pub(crate) mod pictures;
mod scale;
mod session;
pub(crate) mod specs;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use lacuna_api::error::{Reason, status};
use lacuna_api::v1::run_service_server::RunService;
use lacuna_api::v1::worker_service_server::WorkerService;
use lacuna_api::{v1, wire};
use lacuna_control::coordinator::{Event, Hello};
use lacuna_types::{BuildId, Incarnation, RunId, WorkerId};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use self::messages::run_message;
use self::session::Session;
use self::watch::watch_loop;
use crate::opening::Unopened;
use crate::registry::Shared;
use crate::run::{Input, SESSION_QUEUE, WATCH_QUEUE};
use crate::store::{SqliteStore, StoreError};

/// Longest piece of a process's last line that goes into an event.
const LAST_WORDS_MAX: usize = 200;
/// How long a run may take to write a wish down.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// Bound of an agent's outgoing queue: a kill for each of its devices, and the welcome.
const AGENT_QUEUE: usize = 128;
/// How long a new stream may take to introduce itself.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// How long who looks at runs waits for those that are being opened, and who wants one to act.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);
const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// Points of a curve where a caller does not say how many.
const POINTS: u32 = 1000;
/// Most points of a curve in one answer.
const POINTS_MAX: u32 = 10_000;
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
        Err(_) => Err(status(Reason::TimedOut, "no hello within 10 s")),
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
        if let Ok(run) = hello.run_id.parse::<RunId>() {
            // It keeps its state meanwhile, and comes again.
            self.0.wait_open(&run, OPEN_PATIENCE).await?;
        }
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
        use v1::agent_request::Message as M;
        let exited = match request.message {
            Some(M::TrainerExited(exited)) => exited,
            Some(M::TrainerLog(v1::TrainerLog { worker_id, text, missed })) => {
                if let Some(worker) = worker_of(&node, &worker_id) {
                    shared.logs.push(&worker, text, missed);
                }
                continue;
            }
            _ => continue,
        };
        let Some(worker) = worker_of(&node, &exited.worker_id) else { continue };
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

/// Returns the worker that an agent speaks of, if it is one of its own.
fn worker_of(node: &str, worker_id: &str) -> Option<WorkerId> {
    let Ok(worker) = worker_id.parse::<WorkerId>() else {
        warn!(%node, worker_id, "agent names a worker that cannot be");
        return None;
    };
    if node_of(&worker) != node {
        warn!(%node, %worker, "an agent speaks of another node's worker");
        return None;
    }
    Some(worker)
}

/// Returns the machine of a worker.
pub(crate) fn node_of(worker: &WorkerId) -> &str {
    worker.as_str().rsplit_once(':').map_or(worker.as_str(), |(node, _)| node)
}

/// Longest text of a caller that is kept.
const TEXT_MAX: usize = 1000;

/// Cuts a text that a caller gave, and takes out what would steer a terminal that shows it.
fn bounded(text: String) -> String {
    let harmless = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    let mut text: String = text.chars().map(harmless).collect();
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

#[tonic::async_trait]
impl RunService for Grpc {
    type WatchRunStream = BoxStream<v1::WatchRunResponse>;
    type StreamLogsStream = BoxStream<v1::StreamLogsResponse>;

    async fn create_run(
        &self,
        request: Request<v1::CreateRunRequest>,
    ) -> Result<Response<v1::CreateRunResponse>, Status> {
        let (grpc, request) = (self.clone(), request.into_inner());
        // To its end, whether the caller waits for that or not: half of it would leave a claim of
        // the run's checkpoints that a second try does not know of.
        let created = tokio::spawn(async move {
            let mut turn = grpc.0.once.turn(&request).await?;
            match turn.answer() {
                Some(answer) => Ok::<_, Status>(answer),
                None => Ok(turn.keep(grpc.create_or_resume(request).await?)),
            }
        });
        let created = created.await.map_err(|err| status(Reason::Internal, err.to_string()))?;
        let (id, created) = created?;
        let run = Some(self.run_message(&id)?);
        Ok(Response::new(v1::CreateRunResponse { run, created }))
    }

    async fn get_run(
        &self,
        request: Request<v1::GetRunRequest>,
    ) -> Result<Response<v1::GetRunResponse>, Status> {
        let id = parse_run(&request.into_inner().run_id)?;
        // One that is still not open is shown as that.
        let _ = self.0.wait_open(&id, LOOK_PATIENCE).await;
        Ok(Response::new(v1::GetRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn list_runs(
        &self,
        request: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsResponse>, Status> {
        let v1::ListRunsRequest { page_size, page_token } = request.into_inner();
        self.0.wait_settled(LOOK_PATIENCE).await;
        let unopened: BTreeMap<RunId, Unopened> = self.0.opening.all().into_iter().collect();
        let runs = self.0.runs();
        let names: BTreeSet<&RunId> = unopened.keys().chain(runs.keys()).collect();
        let after = names.into_iter().skip_while(|id| id.as_str() <= page_token.as_str());
        let message = |id: &RunId| match (runs.get(id), unopened.get(id)) {
            (Some(handle), _) => run_message(id, handle),
            (None, run) => run.map(|run| run.message(id)).unwrap_or_default(),
        };
        let (runs, next_page_token) = page(after, page_size, message, |run| &run.run_id);
        Ok(Response::new(v1::ListRunsResponse { runs, next_page_token }))
    }

    async fn watch_run(
        &self,
        request: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let v1::WatchRunRequest { run_id, after_seq } = request.into_inner();
        let id = self.open_run(&run_id).await?;
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
        let id = self.open_run(&run_id).await?;
        self.tell(&id, Event::Stop { why: bounded(why) }).await?;
        Ok(Response::new(v1::StopRunResponse {}))
    }

    async fn cancel_run(
        &self,
        request: Request<v1::CancelRunRequest>,
    ) -> Result<Response<v1::CancelRunResponse>, Status> {
        let v1::CancelRunRequest { run_id, why } = request.into_inner();
        let id = self.open_run(&run_id).await?;
        self.tell(&id, Event::Cancel { why: bounded(why) }).await?;
        Ok(Response::new(v1::CancelRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn update_run(
        &self,
        request: Request<v1::UpdateRunRequest>,
    ) -> Result<Response<v1::UpdateRunResponse>, Status> {
        let id = self.update(request.into_inner()).await?;
        Ok(Response::new(v1::UpdateRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn validate_run(
        &self,
        request: Request<v1::ValidateRunRequest>,
    ) -> Result<Response<v1::ValidateRunResponse>, Status> {
        Ok(Response::new(specs::validate(request.get_ref())?))
    }

    async fn diff_runs(
        &self,
        request: Request<v1::DiffRunsRequest>,
    ) -> Result<Response<v1::DiffRunsResponse>, Status> {
        Ok(Response::new(self.compare(request.get_ref())?))
    }

    async fn get_metrics(
        &self,
        request: Request<v1::GetMetricsRequest>,
    ) -> Result<Response<v1::GetMetricsResponse>, Status> {
        let v1::GetMetricsRequest { run_id, points_max } = request.into_inner();
        let id = parse_run(&run_id)?;
        self.run_message(&id)?;
        let n = if points_max == 0 { POINTS } else { points_max.min(POINTS_MAX) };
        let path = self.0.state_file();
        let failed = |err: StoreError| status(Reason::Internal, lacuna_checkpoint::chain(&err));
        let read = move || {
            let store = SqliteStore::open_to_read(&path).map_err(failed)?;
            store.some_figures(&id, n.into()).map_err(failed)
        };
        let found = self.blocking(read).await?;
        let figures = found.into_values().map(messages::figures_message).collect();
        Ok(Response::new(v1::GetMetricsResponse { figures }))
    }

    async fn stream_logs(
        &self,
        request: Request<v1::StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let request = request.into_inner();
        let id = parse_run(&request.run_id)?;
        self.run_message(&id)?;
        let Ok(turn) = self.0.log_readers.clone().try_acquire_owned() else {
            let text = "too many streams of logs are open; try again";
            return Err(status(Reason::RateLimited, text));
        };
        let logs = self.0.logs.clone();
        let (out, answers) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(async move {
            let _turn = turn;
            logs.feed(&request, out).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn request_checkpoint(
        &self,
        request: Request<v1::RequestCheckpointRequest>,
    ) -> Result<Response<v1::RequestCheckpointResponse>, Status> {
        let id = self.open_run(&request.into_inner().run_id).await?;
        self.must_be_on(&id, "saves no checkpoint")?;
        self.tell(&id, Event::Checkpoint).await?;
        Ok(Response::new(v1::RequestCheckpointResponse {}))
    }

    async fn scale_run(
        &self,
        request: Request<v1::ScaleRunRequest>,
    ) -> Result<Response<v1::ScaleRunResponse>, Status> {
        let v1::ScaleRunRequest { run_id, workers_min, workers_max } = request.into_inner();
        let id = self.open_run(&run_id).await?;
        scale::scale(&self.0, &id, (workers_min, workers_max), None).await?;
        Ok(Response::new(v1::ScaleRunResponse { run: Some(self.run_message(&id)?) }))
    }

    async fn force_run(
        &self,
        request: Request<v1::ForceRunRequest>,
    ) -> Result<Response<v1::ForceRunResponse>, Status> {
        let id = self.open_run(&request.into_inner().run_id).await?;
        if !self.tell(&id, Event::Force).await? {
            let text = format!("run {id} waits for no silent members: nothing to force");
            return Err(status(Reason::WrongState, text));
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
        Err(_) => Err(status(Reason::TimedOut, "the run did not take the wish in time")),
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

    /// Refuses what only a run that is on can do.
    fn must_be_on(&self, id: &RunId, so: &str) -> Result<(), Status> {
        let run = self.run_message(id)?;
        if run.exit_code.is_none() {
            return Ok(());
        }
        let text =
            format!("run {id} is {}: it {so} (`lacuna resume {id}` lets it go on)", run.state);
        Err(status(Reason::WrongState, text))
    }

    /// Reads the name of a run, and waits until it is open.
    async fn open_run(&self, text: &str) -> Result<RunId, Status> {
        let id = parse_run(text)?;
        self.0.wait_open(&id, OPEN_PATIENCE).await?;
        Ok(id)
    }

    fn run_message(&self, id: &RunId) -> Result<v1::Run, Status> {
        if let Some(run) = self.0.opening.get(id) {
            return Ok(run.message(id));
        }
        let runs = self.0.runs();
        runs.get(id).map(|handle| run_message(id, handle)).ok_or_else(|| not_found(id))
    }
}

pub(crate) fn not_found(id: &RunId) -> Status {
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
