//! What a browser and a monitoring system get from the same port: pages, metrics, health.
//!
//! Pages are rendered here and readable without JavaScript; a script of a few lines fetches them
//! again when the server says that something happened. Nothing is loaded from elsewhere.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use lacuna_api::v1;
use lacuna_types::RunId;
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt as _};

use crate::auth::Viewer;
use crate::grpc::Grpc;
use crate::registry::{Shared, lock};
use crate::store::{SqliteStore, StoreError};

mod actions;
mod chart;
mod checkpoint_cache;
pub(crate) mod metrics;
mod page;

/// How often the list of runs is fetched again.
const LIST_EVERY: Duration = Duration::from_secs(3);

/// Shortest time between two notices to one page.
const NOTICE_EVERY: Duration = Duration::from_secs(1);

/// How long a page waits for a run that is being opened.
const OPEN_PATIENCE: Duration = Duration::from_secs(1);

/// How long a page waits for its turn to read.
const TURN_DEADLINE: Duration = Duration::from_secs(3);

/// What may be loaded and run on a page: what is served here.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
                      img-src 'self' data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'self'; frame-ancestors 'none'";

/// What handlers share.
#[derive(Clone)]
pub(crate) struct Web {
    shared: Arc<Shared>,
    /// A connection of its own, so that a page that reads much keeps no run from writing.
    reader: Arc<Mutex<Option<SqliteStore>>>,
    /// One page reads at a time: others wait here, and not on threads that commits need.
    turn: Arc<Semaphore>,
    /// Lists of checkpoints.
    shelf: Arc<checkpoint_cache::Shelf>,
}

/// Routes of everything that is not gRPC.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let web = Web {
        shared,
        reader: Arc::default(),
        turn: Arc::new(Semaphore::new(1)),
        shelf: Arc::default(),
    };
    Router::new()
        .route("/", get(runs))
        .route("/notices", get(ticks))
        .route("/runs/{run}", get(run))
        .route("/runs/{run}/notices", get(notices))
        .route("/runs/{run}/diff/{other}", get(diff))
        .route("/runs/{run}/do/{deed}", post(actions::act))
        .route("/runs/{run}/pictures/{step}/{index}", get(picture))
        .route("/page.css", get(|| async { asset("text/css", include_str!("http/page.css")) }))
        .route("/page.js", get(|| async { asset("text/javascript", include_str!("http/page.js")) }))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }))
        .layer(from_fn(headers))
        .with_state(web)
}

/// Answers a path that nothing is at: gRPC in its own way.
pub(crate) async fn not_found(request: Request) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        return tonic::Status::unimplemented("there is no such method").into_http();
    }
    (StatusCode::NOT_FOUND, "there is nothing here; the runs are at /\n").into_response()
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text).into_response()
}

async fn headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Why a page cannot be shown.
enum Problem {
    NoRun(String),
    NoPicture { run: String, step: u64, index: u32 },
    NoDeed(String),
    Refused(tonic::Status),
    Busy,
    Store(StoreError),
    Bug(String),
}

impl From<StoreError> for Problem {
    fn from(err: StoreError) -> Self {
        Problem::Store(err)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (code, text) = match self {
            Problem::NoRun(run) => (StatusCode::NOT_FOUND, format!("there is no run `{run}`")),
            Problem::NoPicture { run, step, index } => {
                let text = format!("there is no picture {index} of step {step} of run `{run}`");
                (StatusCode::NOT_FOUND, text)
            }
            Problem::NoDeed(word) => {
                (StatusCode::NOT_FOUND, format!("there is no `{word}` to be asked for"))
            }
            Problem::Refused(status) => {
                let code = match status.code() {
                    tonic::Code::NotFound => StatusCode::NOT_FOUND,
                    tonic::Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
                    _ => StatusCode::CONFLICT,
                };
                (code, status.message().to_string())
            }
            Problem::Busy => {
                (StatusCode::SERVICE_UNAVAILABLE, "too many pages at once; try again".to_string())
            }
            Problem::Store(err) => {
                (StatusCode::SERVICE_UNAVAILABLE, lacuna_checkpoint::chain(&err))
            }
            Problem::Bug(text) => (StatusCode::INTERNAL_SERVER_ERROR, text),
        };
        (code, format!("{text}\n")).into_response()
    }
}

impl Web {
    /// Reads from the state file on a thread that may wait.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&SqliteStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Problem> {
        let turn = tokio::time::timeout(TURN_DEADLINE, self.turn.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return Err(Problem::Busy) };
        let (reader, path) = (self.reader.clone(), self.shared.state_file());
        let work = move || {
            let _turn = turn;
            let mut reader = lock(&reader);
            let store = match reader.take() {
                Some(store) => store,
                None => SqliteStore::open_to_read(&path)?,
            };
            // Put back only if it worked: the next one opens the file anew.
            let found = read(&store)?;
            *reader = Some(store);
            Ok(found)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|err| return_bug(&err)).map_err(|found: Problem| found)
    }
}

fn return_bug<T>(err: &tokio::task::JoinError) -> Result<T, Problem> {
    Err(Problem::Bug(format!("a page could not be read: {err}")))
}

async fn runs(State(web): State<Web>) -> Result<Html<String>, Problem> {
    page::runs(&web.shared).map(Html).map_err(|err| Problem::Bug(err.to_string()))
}

async fn run(
    State(web): State<Web>,
    viewer: Viewer,
    Path(run): Path<String>,
) -> Result<Html<String>, Problem> {
    let no_run = || Problem::NoRun(run.clone());
    let id: RunId = run.parse().map_err(|_| no_run())?;
    web.shared.wait_open(&id, OPEN_PATIENCE).await.map_err(Problem::Refused)?;
    let seen = page::look(&web.shared, &id).ok_or_else(no_run)?;
    let read = move |store: &SqliteStore| page::Past::read(store, &id);
    let id = seen.id().clone();
    let past = web.read(read).await?;
    let saved = web.shelf.look(&web.shared, &id).await;
    let html = page::run(&seen, &past, &saved, viewer.may_act());
    html.map(Html).map_err(|err| Problem::Bug(err.to_string()))
}

/// Compares two runs' specifications.
async fn diff(
    State(web): State<Web>,
    Path((old, new)): Path<(String, String)>,
) -> Result<Html<String>, Problem> {
    let request = v1::DiffRunsRequest { old_run_id: old.clone(), new_run_id: new.clone() };
    let found = Grpc(web.shared).compare(&request).map_err(Problem::Refused)?;
    page::diff(old, new, found.differences).map(Html).map_err(|err| Problem::Bug(err.to_string()))
}

/// Sends a picture, which never changes: the state after a step is what it is, and the page's
/// address of it names what it is a function of.
async fn picture(
    State(web): State<Web>,
    Path((run, step, index)): Path<(String, u64, u32)>,
) -> Result<Response, Problem> {
    let id: RunId = run.parse().map_err(|_| Problem::NoRun(run.clone()))?;
    let found = web.read(move |store| store.picture(&id, step, index)).await?;
    let png = found.ok_or(Problem::NoPicture { run, step, index })?;
    let headers = [
        (header::CONTENT_TYPE, "image/png"),
        (header::CACHE_CONTROL, "private, max-age=31536000, immutable"),
    ];
    Ok((headers, png).into_response())
}

/// Tells a page, at most once a second, that something happened to its run.
async fn notices(
    State(web): State<Web>,
    Path(run): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let id: RunId = run.parse().map_err(|_| Problem::NoRun(run.clone()))?;
    let view = web.shared.runs().get(&id).map(|handle| handle.ends.view.clone());
    let view = view.ok_or(Problem::NoRun(run))?;
    let changes = tokio_stream::wrappers::WatchStream::from_changes(view).throttle(NOTICE_EVERY);
    let notices = changes.map(|_| Ok(Event::default().event("changed").data("")));
    Ok(Sse::new(notices).keep_alive(KeepAlive::default()))
}

/// Tells the list of runs every few seconds that something may have happened.
async fn ticks() -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let from = tokio::time::Instant::now() + LIST_EVERY;
    let ticks = tokio::time::interval_at(from, LIST_EVERY);
    let ticks = tokio_stream::wrappers::IntervalStream::new(ticks);
    Sse::new(ticks.map(|_| Ok(Event::default().event("changed").data(""))))
}

async fn metrics(State(web): State<Web>) -> Response {
    match metrics::render(&web.shared) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(err) => Problem::Bug(err.to_string()).into_response(),
    }
}
