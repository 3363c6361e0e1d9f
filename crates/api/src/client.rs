//! The typed client of the run and admin services.

use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::MESSAGE_BYTES_MAX;
use crate::tls::{Credentials, TlsError};
use crate::v1;
use crate::v1::admin_service_client::AdminServiceClient;
use crate::v1::run_service_client::RunServiceClient;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("`{url}` is not a coordinator's address (like http://127.0.0.1:7070)")]
    Address {
        /// What was given.
        url: String,
        /// What the parser said.
        #[source]
        source: Option<tonic::transport::Error>,
    },
    /// The address and the files do not go together.
    #[error(
        "`{url}`: {}",
        if *has_files { "with TLS files the address begins with https://" }
        else { "https:// needs the authority's certificate: `--tls-dir` or LACUNA_TLS_DIR" }
    )]
    Scheme {
        /// What was given.
        url: String,
        /// Whether there are TLS files.
        has_files: bool,
    },
    /// A file to prove who one is cannot be used.
    #[error(transparent)]
    Credentials(#[from] TlsError),
    /// Nobody answers there.
    #[error("no coordinator answers at {url}")]
    Unreachable {
        /// Where.
        url: String,
        /// What the network said.
        #[source]
        source: tonic::transport::Error,
    },
    /// The coordinator refused, or the call took too long.
    #[error("{}", .0.message())]
    Refused(Box<Status>),
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        ClientError::Refused(Box::new(status))
    }
}

/// How often an idle stream is checked, and how long an answer may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(20));

/// A connection that shows its token with every call.
pub type Connection = InterceptedService<Channel, Bearer>;

/// Shows a token.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bearer")
    }
}

impl Bearer {
    fn of(credentials: &Credentials) -> Self {
        let value = credentials.token().and_then(|token| format!("Bearer {token}").parse().ok());
        Bearer(value.map(|mut value: MetadataValue<Ascii>| {
            value.set_sensitive(true);
            value
        }))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Opens a channel to `url` within `timeout`; streams on it are kept alive and checked.
///
/// `https://` is spoken with the authority of `credentials`; with TLS files, `http://` is refused,
/// since a token would travel in the clear.
pub async fn connect(
    url: &str,
    timeout: Duration,
    credentials: &Credentials,
) -> Result<Connection, ClientError> {
    let address = |source| ClientError::Address { url: url.to_string(), source };
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(address(None));
    }
    let mut endpoint = Endpoint::from_shared(url.to_string())
        .map_err(|err| address(Some(err)))?
        .connect_timeout(timeout)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    let tls = credentials.tls_config();
    if url.starts_with("https://") != tls.is_some() {
        return Err(ClientError::Scheme { url: url.to_string(), has_files: tls.is_some() });
    }
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).map_err(|err| address(Some(err)))?;
    }
    let unreachable = |source| ClientError::Unreachable { url: url.to_string(), source };
    let channel = endpoint.connect().await.map_err(unreachable)?;
    Ok(InterceptedService::new(channel, Bearer::of(credentials)))
}

/// A connection to a coordinator. Every unary call has the same deadline.
#[derive(Clone, Debug)]
pub struct Client {
    runs: RunServiceClient<Connection>,
    admin: AdminServiceClient<Connection>,
    timeout: Duration,
}

impl Client {
    /// Connects to `url` within `timeout`, which is also every unary call's deadline.
    pub async fn connect(url: &str, timeout: Duration) -> Result<Self, ClientError> {
        Client::connect_as(url, timeout, &Credentials::default()).await
    }

    /// The same for a caller that proves who it is.
    pub async fn connect_as(
        url: &str,
        timeout: Duration,
        credentials: &Credentials,
    ) -> Result<Self, ClientError> {
        let channel = connect(url, timeout, credentials).await?;
        let runs =
            RunServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let admin = AdminServiceClient::new(channel);
        Ok(Client { runs, admin, timeout })
    }

    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// Creates a run, or finds the one with the same name and spec; `resume` lets a stopped, paused
    /// or failed one go on. Returns the run and whether it is new.
    pub async fn create_run(
        &mut self,
        request: v1::CreateRunRequest,
    ) -> Result<(v1::Run, bool), ClientError> {
        let request = self.request(request);
        let response = self.runs.create_run(request).await?.into_inner();
        Ok((response.run.unwrap_or_default(), response.created))
    }

    /// Returns one run.
    pub async fn get_run(&mut self, run_id: &str) -> Result<v1::Run, ClientError> {
        let request = self.request(v1::GetRunRequest { run_id: run_id.to_string() });
        Ok(self.runs.get_run(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Returns every run, by name.
    pub async fn list_runs(&mut self) -> Result<Vec<v1::Run>, ClientError> {
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = self.request(v1::ListRunsRequest { page_size: 0, page_token });
            let page = self.runs.list_runs(request).await?.into_inner();
            all.extend(page.runs);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Follows a run: a snapshot first, then what happens after sequence number `after_seq`.
    pub async fn watch_run(
        &mut self,
        run_id: &str,
        after_seq: u64,
    ) -> Result<Streaming<v1::WatchRunResponse>, ClientError> {
        let request = v1::WatchRunRequest { run_id: run_id.to_string(), after_seq };
        Ok(self.runs.watch_run(request).await?.into_inner())
    }

    /// Stops a run at its next boundary, with a checkpoint.
    pub async fn stop_run(&mut self, run_id: &str, why: &str) -> Result<(), ClientError> {
        let message = v1::StopRunRequest { run_id: run_id.to_string(), why: why.to_string() };
        let request = self.request(message);
        self.runs.stop_run(request).await?;
        Ok(())
    }

    /// Asks for a checkpoint at the next boundary.
    pub async fn request_checkpoint(&mut self, run_id: &str) -> Result<(), ClientError> {
        let request = self.request(v1::RequestCheckpointRequest { run_id: run_id.to_string() });
        self.runs.request_checkpoint(request).await?;
        Ok(())
    }

    /// Changes how many workers train, from the next boundary on.
    pub async fn scale_run(
        &mut self,
        run_id: &str,
        workers_min: u32,
        workers_max: u32,
    ) -> Result<v1::Run, ClientError> {
        let message = v1::ScaleRunRequest { run_id: run_id.to_string(), workers_min, workers_max };
        let request = self.request(message);
        Ok(self.runs.scale_run(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Returns the coordinator's build and epoch.
    pub async fn info(&mut self) -> Result<v1::GetInfoResponse, ClientError> {
        let request = self.request(v1::GetInfoRequest {});
        Ok(self.admin.get_info(request).await?.into_inner())
    }

    /// Returns every worker that is connected or that a run remembers, by name.
    pub async fn list_workers(&mut self) -> Result<Vec<v1::Worker>, ClientError> {
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = self.request(v1::ListWorkersRequest { page_size: 0, page_token });
            let page = self.admin.list_workers(request).await?.into_inner();
            all.extend(page.workers);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Takes one worker out at the next boundary.
    pub async fn drain_worker(&mut self, worker_id: &str, why: &str) -> Result<(), ClientError> {
        let message =
            v1::DrainWorkerRequest { worker_id: worker_id.to_string(), why: why.to_string() };
        let request = self.request(message);
        self.admin.drain_worker(request).await?;
        Ok(())
    }

    /// Lets a worker back in that was kept out.
    pub async fn release_worker(&mut self, worker_id: &str) -> Result<(), ClientError> {
        let request = self.request(v1::ReleaseWorkerRequest { worker_id: worker_id.to_string() });
        self.admin.release_worker(request).await?;
        Ok(())
    }

    /// Gives silent members of a run up, so that others can begin.
    pub async fn force_run(&mut self, run_id: &str) -> Result<(), ClientError> {
        let request = self.request(v1::ForceRunRequest { run_id: run_id.to_string() });
        self.runs.force_run(request).await?;
        Ok(())
    }
}
