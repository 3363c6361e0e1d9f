//! The typed client of the run and admin services.

use std::time::Duration;

use tokio::task::JoinSet;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::MESSAGE_BYTES_MAX;
use crate::tls::{Credentials, TlsError};
use crate::v1;
use crate::v1::admin_service_client::AdminServiceClient;
use crate::v1::checkpoint_service_client::CheckpointServiceClient;
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
    /// The user's settings cannot be used.
    #[error("`{path}`: {why}")]
    Settings {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The files of TLS do not go together.
    #[error("the TLS files cannot be used for `{url}`")]
    Tls {
        /// Where they were to be used.
        url: String,
        /// What the library said.
        #[source]
        source: tonic::transport::Error,
    },
    /// One side did not take the other's certificate.
    #[error("the certificates of this client and of the coordinator do not go together: {why}")]
    Certificate {
        /// The library's word for it.
        why: String,
    },
    /// None of several coordinators leads.
    #[error("none of the coordinators {urls} leads; an election takes some seconds")]
    NoLeader {
        /// Their addresses.
        urls: String,
    },
    /// Nobody answers there.
    #[error("no coordinator answers at {url}: {why}")]
    Unreachable {
        /// Where.
        url: String,
        /// What the network said.
        why: String,
    },
    /// No answer came in time.
    #[error("no answer in time: the coordinator may still be at it, and `--timeout` gives it more")]
    Late,
    /// The coordinator refused.
    #[error("{}", .0.message())]
    Refused(Box<Status>),
}

impl ClientError {
    /// Tells whether another address may do better.
    fn is_of_one_address(&self) -> bool {
        use ClientError::{Certificate, Late, Refused, Unreachable};
        matches!(self, Unreachable { .. } | Refused(_) | Late | Certificate { .. })
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        match alert_in(&status) {
            Some(why) => ClientError::Certificate { why },
            None if is_late(&status) => ClientError::Late,
            None => ClientError::Refused(Box::new(status)),
        }
    }
}

/// Tells whether a deadline has passed, here or there, as tonic says it.
fn is_late(status: &Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded};
    let without_reason = status.details().is_empty();
    without_reason
        && (status.code() == DeadlineExceeded
            || status.code() == Cancelled && status.message().contains("imeout expired"))
}

/// Finds what a TLS library says of a certificate among the causes of an error, where it does.
fn alert_in(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    const MARKS: [&str; 2] = ["received fatal alert", "invalid peer certificate"];
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts = causes.map(ToString::to_string);
    texts.find(|text| MARKS.iter().any(|mark| text.contains(mark)))
}

/// Shortest deadline of creating a run.
const CREATING: Duration = Duration::from_secs(60);
/// How often an idle stream is checked, and how long an answer may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(20));

/// The service that only a leader has.
const RUN_SERVICE: &str = "lacuna.v1.RunService";

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

/// Opens a channel to the coordinator within `timeout`; streams on it are kept alive and checked.
///
/// `urls` is an address, or those of an ensemble with commas between them: then it is the one that
/// leads. `https://` is spoken with the authority of `credentials`; with TLS files, `http://` is
/// refused, since a token would travel in the clear.
///
/// # Errors
/// [`ClientError`]; of several addresses, where none leads, what the last one said.
pub async fn connect(
    urls: &str,
    timeout: Duration,
    credentials: &Credentials,
) -> Result<Connection, ClientError> {
    let all: Vec<&str> = urls.split(',').map(str::trim).filter(|url| !url.is_empty()).collect();
    let [first, others @ ..] = &all[..] else {
        return connect_to(urls, timeout, credentials).await;
    };
    if others.is_empty() {
        return connect_to(first, timeout, credentials).await;
    }
    // All at once: those that are away take their time to say so.
    let mut asked = JoinSet::new();
    for url in all {
        let (url, credentials) = (url.to_string(), credentials.clone());
        asked.spawn(async move { leader_at(&url, timeout, &credentials).await });
    }
    let mut last: Option<ClientError> = None;
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok(Some(connection))) => return Ok(connection),
            Ok(Ok(None)) => {}
            Ok(Err(err)) if err.is_of_one_address() => last = Some(err),
            // What is wrong with addresses and files is said at once.
            Ok(Err(err)) => return Err(err),
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }
    Err(last.unwrap_or_else(|| ClientError::NoLeader { urls: urls.to_string() }))
}

/// Connects to one coordinator of an ensemble, if it leads.
async fn leader_at(
    url: &str,
    timeout: Duration,
    credentials: &Credentials,
) -> Result<Option<Connection>, ClientError> {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;
    let connection = connect_to(url, timeout, credentials).await?;
    let mut asked = Request::new(HealthCheckRequest { service: RUN_SERVICE.to_string() });
    asked.set_timeout(timeout);
    let answer = HealthClient::new(connection.clone()).check(asked).await?.into_inner();
    let leads = answer.status == i32::from(ServingStatus::Serving);
    Ok(leads.then_some(connection))
}

/// Returns what an error comes from in the end; each layer above says that it failed.
fn root(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().map_or_else(String::new, ToString::to_string)
}

/// Completes `host:port`, as others write an address, to a URL; `None` for what is neither.
fn full_url(text: &str, has_tls: bool) -> Option<String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        return Some(text.to_string());
    }
    let (host, port) = text.rsplit_once(':')?;
    let is_host = !host.is_empty() && !host.contains("://");
    let scheme = if has_tls { "https" } else { "http" };
    (is_host && port.parse::<u16>().is_ok()).then(|| format!("{scheme}://{text}"))
}

async fn connect_to(
    url: &str,
    timeout: Duration,
    credentials: &Credentials,
) -> Result<Connection, ClientError> {
    let address = |source| ClientError::Address { url: url.to_string(), source };
    let tls = credentials.tls_config();
    let url = &full_url(url, tls.is_some()).ok_or_else(|| address(None))?;
    let mut endpoint = Endpoint::from_shared(url.to_string())
        .map_err(|err| address(Some(err)))?
        .connect_timeout(timeout)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    if url.starts_with("https://") != tls.is_some() {
        return Err(ClientError::Scheme { url: url.to_string(), has_files: tls.is_some() });
    }
    if let Some(tls) = tls {
        let unusable = |source| ClientError::Tls { url: url.to_string(), source };
        endpoint = endpoint.tls_config(tls).map_err(unusable)?;
    }
    let unreachable = |source: tonic::transport::Error| match alert_in(&source) {
        Some(why) => ClientError::Certificate { why },
        None => ClientError::Unreachable { url: url.to_string(), why: root(&source) },
    };
    let channel = endpoint.connect().await.map_err(unreachable)?;
    Ok(InterceptedService::new(channel, Bearer::of(credentials)))
}

/// A connection to a coordinator. Every unary call has the same deadline.
#[derive(Clone, Debug)]
pub struct Client {
    runs: RunServiceClient<Connection>,
    admin: AdminServiceClient<Connection>,
    checkpoints: CheckpointServiceClient<Connection>,
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
        let admin = AdminServiceClient::new(channel.clone());
        let checkpoints = CheckpointServiceClient::new(channel);
        Ok(Client { runs, admin, checkpoints, timeout })
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
        let mut request = self.request(request);
        // The coordinator looks for checkpoints first, and says itself when their place is away.
        request.set_timeout(self.timeout.max(CREATING));
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

    /// Ends a run now, without a checkpoint.
    pub async fn cancel_run(&mut self, run_id: &str, why: &str) -> Result<v1::Run, ClientError> {
        let message = v1::CancelRunRequest { run_id: run_id.to_string(), why: why.to_string() };
        let request = self.request(message);
        Ok(self.runs.cancel_run(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Reads a specification in TOML as `lacuna plan` does: what it comes to, or what is wrong.
    pub async fn validate_run(
        &mut self,
        spec: &str,
        overrides: &[String],
    ) -> Result<v1::ValidateRunResponse, ClientError> {
        let message =
            v1::ValidateRunRequest { spec: spec.to_string(), overrides: overrides.to_vec() };
        let request = self.request(message);
        Ok(self.runs.validate_run(request).await?.into_inner())
    }

    /// Changes those fields of a run that is on that `paths` names, `elastic.workers`; a run whose
    /// etag is not `etag`, where that is not empty, is left alone.
    pub async fn update_run(
        &mut self,
        run_id: &str,
        paths: &[&str],
        spec: &str,
        etag: &str,
    ) -> Result<v1::Run, ClientError> {
        let paths = paths.iter().map(ToString::to_string).collect();
        let request = self.request(v1::UpdateRunRequest {
            run_id: run_id.to_string(),
            update_mask: Some(prost_types::FieldMask { paths }),
            spec: spec.to_string(),
            etag: etag.to_string(),
        });
        Ok(self.runs.update_run(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Compares the specifications of two runs.
    pub async fn diff_runs(
        &mut self,
        old: &str,
        new: &str,
    ) -> Result<Vec<v1::SpecDifference>, ClientError> {
        let (old_run_id, new_run_id) = (old.to_string(), new.to_string());
        let request = self.request(v1::DiffRunsRequest { old_run_id, new_run_id });
        Ok(self.runs.diff_runs(request).await?.into_inner().differences)
    }

    /// Returns figures of a run's steps, at most `points_max`, 0 for the service's own number.
    pub async fn get_metrics(
        &mut self,
        run_id: &str,
        points_max: u32,
    ) -> Result<Vec<v1::Figures>, ClientError> {
        let request =
            self.request(v1::GetMetricsRequest { run_id: run_id.to_string(), points_max });
        Ok(self.runs.get_metrics(request).await?.into_inner().figures)
    }

    /// Returns what a run's workers log.
    pub async fn stream_logs(
        &mut self,
        request: v1::StreamLogsRequest,
    ) -> Result<Streaming<v1::StreamLogsResponse>, ClientError> {
        Ok(self.runs.stream_logs(request).await?.into_inner())
    }

    /// Returns the checkpoints of a run, the newest last.
    pub async fn list_checkpoints(
        &mut self,
        run_id: &str,
    ) -> Result<Vec<v1::Checkpoint>, ClientError> {
        let request = self.request(v1::ListCheckpointsRequest { run_id: run_id.to_string() });
        Ok(self.checkpoints.list_checkpoints(request).await?.into_inner().checkpoints)
    }

    /// Returns the manifest of a checkpoint, a JSON file.
    pub async fn get_manifest(&mut self, run_id: &str, step: u64) -> Result<Vec<u8>, ClientError> {
        let request = v1::GetManifestRequest { run_id: run_id.to_string(), step };
        let mut pieces = self.checkpoints.get_manifest(request).await?.into_inner();
        let mut text: Vec<u8> = Vec::new();
        while let Some(v1::GetManifestResponse { piece }) = pieces.message().await? {
            text.extend(piece);
        }
        Ok(text)
    }

    /// Keeps a checkpoint from being deleted, or lets it go.
    pub async fn pin_checkpoint(
        &mut self,
        run_id: &str,
        step: u64,
        pinned: bool,
        why: &str,
    ) -> Result<(), ClientError> {
        let (run_id, why) = (run_id.to_string(), why.to_string());
        let request = self.request(v1::PinCheckpointRequest { run_id, step, pinned, why });
        self.checkpoints.pin_checkpoint(request).await?;
        Ok(())
    }

    /// Reads a checkpoint whole, however long that takes; returns what is wrong with it.
    pub async fn verify_checkpoint(
        &mut self,
        run_id: &str,
        step: u64,
    ) -> Result<Vec<String>, ClientError> {
        let request = v1::VerifyCheckpointRequest { run_id: run_id.to_string(), step };
        let mut answers = self.checkpoints.verify_checkpoint(request).await?.into_inner();
        loop {
            match answers.message().await? {
                Some(answer) if answer.done => return Ok(answer.problems),
                Some(_) => {}
                None => return Err(tonic::Status::unavailable("the answer was cut off").into()),
            }
        }
    }

    /// Keeps a machine out of every run for `seconds`, 0 to let it back in; returns its workers
    /// that leave.
    pub async fn ban_node(
        &mut self,
        node: &str,
        seconds: u64,
        why: &str,
    ) -> Result<Vec<String>, ClientError> {
        let (node, why) = (node.to_string(), why.to_string());
        let request = self.request(v1::BanNodeRequest { node, seconds, why });
        Ok(self.admin.ban_node(request).await?.into_inner().worker_ids)
    }

    /// Returns the machines that are kept out, by name.
    pub async fn list_bans(&mut self) -> Result<Vec<v1::Ban>, ClientError> {
        let request = self.request(v1::ListBansRequest {});
        Ok(self.admin.list_bans(request).await?.into_inner().bans)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_no_scheme() {
        let url = |text| full_url(text, false);
        assert_eq!(url("head:7070").as_deref(), Some("http://head:7070"));
        assert_eq!(url("[::1]:7070").as_deref(), Some("http://[::1]:7070"));
        assert_eq!(full_url("head:7070", true).as_deref(), Some("https://head:7070"));
        assert_eq!(full_url("http://head", true).as_deref(), Some("http://head"));
        for bad in ["", "head", ":7070", "head:port", "head:70700", "ftp://head:7070"] {
            assert_eq!(url(bad), None, "{bad}");
        }
    }
}
