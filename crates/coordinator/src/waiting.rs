//! What is answered on a coordinator's port while it has no service: it reads its state, or another
//! one leads.

use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse as _, Response};
use lacuna_api::error::{Reason, not_leader, status};
use lacuna_api::v1::admin_service_server::AdminServiceServer;
use lacuna_api::v1::checkpoint_service_server::CheckpointServiceServer;
use lacuna_api::v1::run_service_server::RunServiceServer;
use lacuna_api::v1::worker_service_server::WorkerServiceServer;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::service::Routes;

use crate::auth::{self, Door};
use crate::grpc::Grpc;
use crate::service::{self, StartError};

/// How long calls that are open may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// Why there is no service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The state is being read.
    Starting,
    /// The one at this address leads; empty where nobody does.
    Follows(String),
}

/// Answers until it is ended.
pub(crate) struct Waiting {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), StartError>>,
}

impl Waiting {
    /// Begins to answer on a listener.
    pub fn start(
        listener: TcpListener,
        door: Arc<Door>,
        standing: watch::Receiver<Standing>,
    ) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(listener, door, standing, async {
            // Dropped or sent: it is over.
            let _ = stopped.await;
        }));
        Waiting { stop, task }
    }

    /// Ends it: what a caller asks next is asked on another connection.
    pub async fn end(self) {
        let Waiting { stop, mut task } = self;
        drop(stop);
        if tokio::time::timeout(ENDING, &mut task).await.is_err() {
            // What is still open there is cut.
            task.abort();
        }
    }
}

/// Returns the same socket for another server.
pub(crate) fn same(listener: &StdListener) -> std::io::Result<TcpListener> {
    TcpListener::from_std(listener.try_clone()?)
}

async fn serve(
    listener: TcpListener,
    door: Arc<Door>,
    standing: watch::Receiver<Standing>,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    // The process is well (the empty name); its services are not there, or somebody else's.
    health.set_not_serving::<WorkerServiceServer<Grpc>>().await;
    health.set_not_serving::<RunServiceServer<Grpc>>().await;
    health.set_not_serving::<AdminServiceServer<Grpc>>().await;
    health.set_not_serving::<CheckpointServiceServer<Grpc>>().await;
    let others = move |request: Request| async move { answer(&standing.borrow(), &request) };
    let all = Routes::new(health_service).into_axum_router().fallback(others);
    let routes = Routes::from(all.layer(from_fn_with_state(door.clone(), auth::check)));
    service::serve_until(listener, &door, routes, stop).await
}

/// Says why there is no service, in the caller's protocol.
fn answer(standing: &Standing, request: &Request) -> Response {
    const STARTING: &str = "this coordinator is reading its state";
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return match standing {
            Standing::Starting => status(Reason::Starting, STARTING),
            Standing::Follows(leader) => not_leader(leader),
        }
        .into_http();
    }
    if request.uri().path() == "/healthz" {
        return "ok\n".into_response();
    }
    let text = match standing {
        Standing::Starting => format!("{STARTING}\n"),
        Standing::Follows(leader) => {
            let who = if leader.is_empty() { "nobody leads yet" } else { leader };
            format!("this coordinator does not lead; the leader: {who}\n")
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use lacuna_api::error::reason;

    use super::*;

    fn ask(standing: &Standing, path: &str, kind: Option<&str>) -> Response {
        let mut request = Request::get(path);
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        answer(standing, &request.body(Body::empty()).unwrap())
    }

    #[test]
    fn who_asks_is_told_why_there_is_no_service() {
        let follows = Standing::Follows("http://a:7070".to_string());
        for (standing, want) in
            [(Standing::Starting, Reason::Starting), (follows, Reason::NotLeader)]
        {
            let refusal = ask(&standing, "/lacuna.v1.RunService/GetRun", Some("application/grpc"));
            let found = tonic::Status::from_header_map(refusal.headers()).unwrap();
            assert_eq!((reason(&found), found.code()), (Some(want), tonic::Code::Unavailable));
            assert_eq!(ask(&standing, "/readyz", None).status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(ask(&standing, "/healthz", None).status(), StatusCode::OK);
        }
    }
}
