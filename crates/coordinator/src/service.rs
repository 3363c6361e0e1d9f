//! Opening and serving a coordinator.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use lacuna_api::MESSAGE_BYTES_MAX;
use lacuna_api::v1::admin_service_server::AdminServiceServer;
use lacuna_api::v1::checkpoint_service_server::CheckpointServiceServer;
use lacuna_api::v1::run_service_server::RunServiceServer;
use lacuna_api::v1::worker_service_server::WorkerServiceServer;
use lacuna_control::timing::Timing;
use lacuna_spec::RunSpec;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tracing::{info, warn};

use crate::auth::{self, Door, DoorError, Guarded, Places, Security, guarded};
use crate::grpc::Grpc;
use crate::http;
use crate::registry::{STATE_FILE, Shared};
use crate::store::{SqliteStore, Store, StoreError, StoredRun};
use crate::waiting::{self, Standing, Waiting};

/// How long a call may take whose caller sets no deadline; a stream has answered by then.
const CALL_DEADLINE: Duration = Duration::from_secs(120);

/// How long callers are left without an answer while a coordinator starts.
const SOON: Duration = Duration::from_secs(2);

/// How often an idle connection is asked whether it lives, and how long it may take to answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));
/// How long a caller may take for the first bytes.
const FIRST_WORDS: Duration = Duration::from_secs(10);
/// How long TLS may take to begin.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long files for people's tools may take to be completed at the end.
const CLOSING: Duration = Duration::from_secs(5);

/// How a coordinator is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the state file.
    pub state: PathBuf,
    /// Waits and limits of the protocol.
    pub timing: Timing,
    /// Who may come in.
    pub security: Security,
}

/// A coordinator that could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not this machine's.
    #[error("failed to listen on {addr}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The door cannot be opened as it was asked for.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// The state folder cannot be used.
    #[error("failed to use state folder `{path}`")]
    State {
        /// The folder.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Another coordinator has the state.
    #[error("state folder `{path}` is in use by {holder}")]
    InUse {
        /// The folder.
        path: String,
        /// What the other one wrote about itself.
        holder: String,
    },
    /// The state file failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The wait limits contradict each other.
    #[error("timing: {0}")]
    Timing(String),
    /// Settings of an ensemble cannot work.
    #[error("{0}")]
    Ensemble(String),
    /// Another coordinator of the ensemble leads, or may soon.
    #[error("this coordinator leads no longer: its key in etcd is gone or may be soon")]
    LostLead,
    /// The server failed.
    #[error("failed to serve")]
    Serve(#[source] tonic::transport::Error),
}

/// A coordinator with its state open.
pub struct Service {
    shared: Arc<Shared>,
    failures: mpsc::Receiver<StoreError>,
    listener: TcpListener,
    addr: SocketAddr,
    door: Door,
    #[cfg(feature = "otlp")]
    otlp: Option<crate::Otlp>,
    // Held for the life of the service; the lock goes with the process.
    _lock: File,
}

impl Service {
    /// Listens on `addr` (port 0: any free port), takes the state's lock and counts the start.
    /// Remembered runs are put to work by [`serve`](Self::serve).
    ///
    /// # Errors
    /// An address that nothing protects, a port or a state folder in use, unreadable files.
    pub async fn open(addr: SocketAddr, options: Options) -> Result<Self, StartError> {
        // Before the address is taken: nothing listens that must not.
        let door = Arc::new(Door::new(addr, &options.security)?);
        let bind = |source| StartError::Bind { addr, source };
        let listener = StdListener::bind(addr).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let meanwhile = waiting::same(&listener).map_err(bind)?;
        let open_store = |folder: &Path| -> Result<Box<dyn Store>, StoreError> {
            Ok(Box::new(SqliteStore::open(&folder.join(STATE_FILE))?))
        };
        let listener = TcpListener::from_std(listener).map_err(bind)?;
        let mut opening = std::pin::pin!(Service::open_on(listener, options, open_store));
        // Most are soon open, and who asks meanwhile need not ask again.
        if let Ok(opened) = tokio::time::timeout(SOON, &mut opening).await {
            return opened;
        }
        let (_standing, known) = watch::channel(Standing::Starting);
        let waiting = Waiting::start(meanwhile, door, known);
        let opened = opening.await;
        waiting.end().await;
        opened
    }

    /// The same for an address that is taken already, and a store that `open_store` opens, in the
    /// folder of the state.
    pub(crate) async fn open_on(
        listener: TcpListener,
        options: Options,
        open_store: impl FnOnce(&Path) -> Result<Box<dyn Store>, StoreError> + Send + 'static,
    ) -> Result<Self, StartError> {
        if let Some(problem) = options.timing.problems().into_iter().next() {
            return Err(StartError::Timing(problem));
        }
        let path = options.state.display().to_string();
        let state = |source| StartError::State { path: path.clone(), source };
        let addr = listener.local_addr().map_err(state)?;
        let door = Door::new(addr, &options.security)?;
        std::fs::create_dir_all(&options.state).map_err(state)?;
        let lock = take_lock(&options, addr)?;
        let folder = options.state.clone();
        let open = move || {
            let mut store = open_store(&folder)?;
            let stored = parse_runs(store.runs()?)?;
            let epoch = store.next_epoch()?;
            Ok::<_, StoreError>((store, stored, epoch))
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let (store, stored, epoch) =
            opened.map_err(|err| state(std::io::Error::other(err.to_string())))??;
        info!(%addr, %epoch, runs = stored.len(), "coordinator started");
        let (shared, failures) = Shared::new(options, store, epoch).map_err(state)?;
        shared.expect(stored);
        if door.is_locked() && !door.is_encrypted() && !addr.ip().is_loopback() {
            warn!("tokens travel in the clear: give a certificate with `--tls-dir`");
        }
        Ok(Service {
            shared,
            failures,
            listener,
            addr,
            door,
            #[cfg(feature = "otlp")]
            otlp: None,
            _lock: lock,
        })
    }

    /// Has metrics pushed while it serves.
    #[cfg(feature = "otlp")]
    #[must_use]
    pub fn with_otlp(mut self, otlp: crate::Otlp) -> Self {
        self.otlp = Some(otlp);
        self
    }

    /// Returns the URL that clients and workers connect to.
    pub fn url(&self) -> String {
        let scheme = if self.door.is_encrypted() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// Returns the address that clients and workers connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `shutdown` completes or the store fails. Open streams are cut.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), StartError> {
        #[cfg(feature = "otlp")]
        let pushing = self.otlp.map(|otlp| {
            let close = watch::Sender::new(false);
            (tokio::spawn(otlp.run(self.shared.clone(), close.subscribe())), close)
        });
        let Service { shared, mut failures, listener, door, .. } = self;
        let door = Arc::new(door);
        let routes = routes(shared.clone(), door.clone()).await;
        // From here on their workers reach them.
        let opening = tokio::spawn(shared.clone().open_runs());
        let end = tokio::select! {
            served = serve_routes(listener, &door, routes, shutdown) => served,
            failure = failures.recv() => match failure {
                Some(error) => Err(StartError::Store(error)),
                None => Ok(()),
            },
        };
        opening.abort();
        shared.close(CLOSING).await;
        #[cfg(feature = "otlp")]
        if let Some((pushing, close)) = pushing {
            close.send_replace(true);
            // What could not be pushed by then is lost, as it is with any other collector.
            let _ = tokio::time::timeout(CLOSING, pushing).await;
        }
        end
    }
}

/// Answers on a listener until `shutdown` completes. Open streams are cut.
pub(crate) async fn serve_routes(
    listener: TcpListener,
    door: &Door,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let mut server = server(door)?;
    tokio::select! {
        served = server.add_routes(routes).serve_with_incoming(incoming(listener)) => {
            served.map_err(StartError::Serve)
        }
        () = shutdown => Ok(()),
    }
}

/// The same, and tells connections that are open to end: what a caller asks next is asked on
/// another one.
pub(crate) async fn serve_until(
    listener: TcpListener,
    door: &Door,
    routes: Routes,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let server = server(door)?.add_routes(routes);
    let served = server.serve_with_incoming_shutdown(incoming(listener), stop);
    served.await.map_err(StartError::Serve)
}

fn incoming(listener: TcpListener) -> impl Stream<Item = std::io::Result<Guarded>> {
    // Set here: the server's own option is for listeners that it opens itself. Without it an
    // answer of several segments waits some 40 ms for the acknowledgement of the first.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    guarded(incoming, FIRST_WORDS, Places::of_process())
}

fn server(door: &Door) -> Result<Server, StartError> {
    let server = Server::builder()
        .accept_http1(true)
        .timeout(CALL_DEADLINE)
        .http2_keepalive_interval(Some(KEEP_ALIVE.0))
        .http2_keepalive_timeout(Some(KEEP_ALIVE.1));
    match door.tls_config()? {
        Some(tls) => server.tls_config(tls.timeout(HANDSHAKE)).map_err(StartError::Serve),
        None => Ok(server),
    }
}

/// Everything that is answered on the one port.
async fn routes(shared: Arc<Shared>, door: Arc<Door>) -> Routes {
    let grpc = Grpc(shared.clone());
    let workers =
        WorkerServiceServer::new(grpc.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let runs = RunServiceServer::new(grpc.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<WorkerServiceServer<Grpc>>().await;
    health.set_serving::<RunServiceServer<Grpc>>().await;
    health.set_serving::<AdminServiceServer<Grpc>>().await;
    health.set_serving::<CheckpointServiceServer<Grpc>>().await;
    let routes = Routes::new(workers)
        .add_service(runs)
        .add_service(AdminServiceServer::new(grpc.clone()))
        .add_service(CheckpointServiceServer::new(grpc))
        .add_service(health_service)
        .add_service(reflection().build_v1().expect("the descriptors are ours"))
        .add_service(reflection().build_v1alpha().expect("the descriptors are ours"));
    let all = routes.into_axum_router().merge(http::router(shared)).fallback(http::not_found);
    Routes::from(all.layer(from_fn_with_state(door, auth::check)))
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(lacuna_api::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}

/// Takes the exclusive lock of the state folder and writes down who has it.
fn take_lock(options: &Options, addr: SocketAddr) -> Result<File, StartError> {
    let path = options.state.display().to_string();
    let state = |source| StartError::State { path: path.clone(), source };
    let file = options.state.join("lock");
    let mut lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(file)
        .map_err(state)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            lock.read_to_string(&mut holder).map_err(state)?;
            return Err(StartError::InUse { path, holder: holder.trim().to_string() });
        }
        Err(TryLockError::Error(source)) => return Err(state(source)),
    }
    let text = format!("process {} listening on {addr}\n", std::process::id());
    lock.set_len(0).and_then(|()| lock.rewind()).map_err(state)?;
    lock.write_all(text.as_bytes()).and_then(|()| lock.sync_all()).map_err(state)?;
    Ok(lock)
}

fn parse_runs(runs: Vec<StoredRun>) -> Result<Vec<(StoredRun, RunSpec)>, StoreError> {
    let parse = |run: StoredRun| {
        let spec: RunSpec = serde_json::from_str(&run.spec).map_err(|err| StoreError::Content {
            what: "a run's spec",
            detail: format!("{}: {err}", run.run_id),
        })?;
        Ok((run, spec))
    };
    runs.into_iter().map(parse).collect()
}
