//! Opening and serving a coordinator.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use lacuna_api::MESSAGE_BYTES_MAX;
use lacuna_api::v1::admin_service_server::AdminServiceServer;
use lacuna_api::v1::run_service_server::RunServiceServer;
use lacuna_api::v1::worker_service_server::WorkerServiceServer;
use lacuna_control::timing::Timing;
use lacuna_spec::RunSpec;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tracing::{info, warn};

use crate::catalogue::Catalogue;
use crate::grpc::Grpc;
use crate::registry::Shared;
use crate::store::{SqliteStore, Store as _, StoreError, StoredRun};

/// How a coordinator is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the state file.
    pub state: PathBuf,
    /// Waits and limits of the protocol.
    pub timing: Timing,
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
    /// Anybody on the network could use the service.
    #[error(
        "refusing to listen on {addr}: without tokens or TLS the service is open to everybody who \
         can reach it; listen on a loopback address"
    )]
    Exposed {
        /// The address.
        addr: SocketAddr,
    },
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
    // Held for the life of the service; the lock goes with the process.
    _lock: File,
}

/// Binds to a loopback address.
pub async fn bind(addr: SocketAddr) -> Result<TcpListener, StartError> {
    if !addr.ip().is_loopback() {
        return Err(StartError::Exposed { addr });
    }
    TcpListener::bind(addr).await.map_err(|source| StartError::Bind { addr, source })
}

impl Service {
    /// Takes the state's lock, counts the start, and puts every remembered run to work.
    pub async fn open(listener: TcpListener, options: Options) -> Result<Self, StartError> {
        if let Some(problem) = options.timing.problems().into_iter().next() {
            return Err(StartError::Timing(problem));
        }
        let path = options.state.display().to_string();
        let state = |source| StartError::State { path: path.clone(), source };
        let addr = listener.local_addr().map_err(state)?;
        std::fs::create_dir_all(&options.state).map_err(state)?;
        let lock = take_lock(&options, addr)?;
        let mut store = SqliteStore::open(&options.state.join("coordinator.sqlite"))?;
        let stored = parse_runs(store.runs()?)?;
        let epoch = store.next_epoch()?;
        info!(%addr, %epoch, runs = stored.len(), "coordinator started");
        let (shared, failures) = Shared::new(options, Box::new(store), epoch).map_err(state)?;
        for (run, spec) in stored {
            open_run(&shared, run, spec);
        }
        Ok(Service { shared, failures, listener, addr, _lock: lock })
    }

    /// Returns the address that clients and workers connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `shutdown` completes or the store fails. Open streams are cut.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), StartError> {
        let Service { shared, mut failures, listener, .. } = self;
        let grpc = Grpc(shared);
        // Set here: the server's own option is for listeners that it opens itself. Without it an
        // answer of several segments waits some 40 ms for the acknowledgement of the first.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = tonic::transport::Server::builder()
            .add_service(
                WorkerServiceServer::new(grpc.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                RunServiceServer::new(grpc.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(AdminServiceServer::new(grpc))
            .serve_with_incoming(incoming);
        tokio::select! {
            served = server => served.map_err(StartError::Serve),
            failure = failures.recv() => match failure {
                Some(error) => Err(StartError::Store(error)),
                None => Ok(()),
            },
            () = shutdown => Ok(()),
        }
    }
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

/// Puts a remembered run to work; one whose checkpoints cannot be read fails by itself.
fn open_run(shared: &Arc<Shared>, mut run: StoredRun, spec: RunSpec) {
    let id = run.run_id.clone();
    let fingerprint = run.fingerprint.clone();
    let opened = Catalogue::open(spec.clone(), run.n_samples, fingerprint, shared.epoch);
    let (catalogue, found) = match opened {
        Ok(opened) => opened,
        Err(err) => {
            warn!(run_id = %id, error = %err, "checkpoints cannot be used; the run is left alone");
            return;
        }
    };
    let news = found.news(&run.saved);
    news.iter().for_each(|record| run.saved.apply(record));
    let recorded = shared.store().record(&id, &news);
    if let Err(err) = recorded {
        shared.fail(err);
        return;
    }
    found.damaged.iter().for_each(|damaged| warn!(run_id = %id, "{damaged}"));
    if let Err(err) = shared.start_run(run, spec, catalogue) {
        warn!(run_id = %id, error = err, "run cannot be put to work");
    }
}
