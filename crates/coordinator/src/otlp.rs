//! Metrics for collectors of OpenTelemetry: what `/metrics` says, pushed over OTLP/gRPC.
//!
//! Source of the settings: the OpenTelemetry environment variable specification
//! (`OTEL_EXPORTER_OTLP_*`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`).

mod convert;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client as service;
use tokio::sync::watch;
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tracing::{info, warn};

use crate::http;
use crate::registry::Shared;

/// How long a push may take, with connecting.
const DEADLINE: Duration = Duration::from_secs(10);

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The address.
    #[error("`{endpoint}` is not an address of a collector, such as http://127.0.0.1:4317")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// An address without a scheme.
    #[error("`{endpoint}` begins with neither http:// nor https://")]
    Scheme {
        /// What was given.
        endpoint: String,
    },
    /// Another protocol than is spoken.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL = `{protocol}`: only `grpc` is spoken")]
    Protocol {
        /// What was given.
        protocol: String,
    },
    /// The authority of the collector's certificate.
    #[error("failed to read OTEL_EXPORTER_OTLP_CERTIFICATE `{}`", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A header. Its value is not shown: as a rule it is a secret.
    #[error("OTEL_EXPORTER_OTLP_HEADERS: header {n} is not NAME=VALUE in ASCII")]
    Header {
        /// Which one, from 1.
        n: usize,
    },
    /// An attribute.
    #[error("OTEL_RESOURCE_ATTRIBUTES: `{text}` is not NAME=VALUE")]
    Attribute {
        /// What was given.
        text: String,
    },
}

/// Where metrics are pushed to, and as whose.
#[derive(Clone, Debug)]
pub struct Otlp {
    endpoint: Endpoint,
    shown: String,
    every: Duration,
    headers: Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>,
    /// Attributes of the resource, `service.name` among them.
    attributes: Vec<(String, String)>,
}

impl Otlp {
    /// Pushes to `endpoint` every `every`. `env` gives the variables of the specification.
    ///
    /// # Errors
    /// [`OtlpError`]
    pub fn new(
        endpoint: &str,
        every: Duration,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, OtlpError> {
        let shown = without_user(endpoint);
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(OtlpError::Scheme { endpoint: shown });
        }
        let protocol = env("OTEL_EXPORTER_OTLP_PROTOCOL").unwrap_or_default();
        if !["", "grpc"].contains(&protocol.as_str()) {
            return Err(OtlpError::Protocol { protocol });
        }
        let bad = |source| OtlpError::Endpoint { endpoint: without_user(endpoint), source };
        let mut channel = Endpoint::from_shared(endpoint.to_string())
            .map_err(bad)?
            .connect_timeout(DEADLINE)
            .timeout(DEADLINE);
        if endpoint.starts_with("https://") {
            let mut tls = ClientTlsConfig::new();
            if let Some(path) = env("OTEL_EXPORTER_OTLP_CERTIFICATE").map(PathBuf::from) {
                let read = std::fs::read(&path);
                let pem = read.map_err(|source| OtlpError::Certificate { path, source })?;
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            channel = channel.tls_config(tls).map_err(bad)?;
        }
        let headers = env("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default();
        let header = |(at, pair): (usize, &str)| {
            let found = pair.split_once('=').and_then(|(name, value)| {
                let name = name.trim().to_ascii_lowercase().parse().ok()?;
                let mut value: MetadataValue<Ascii> = decoded(value.trim()).parse().ok()?;
                value.set_sensitive(true);
                Some((name, value))
            });
            found.ok_or(OtlpError::Header { n: at + 1 })
        };
        let mut attributes = vec![
            ("service.name".to_string(), "lacuna-coordinator".to_string()),
            ("service.version".to_string(), lacuna_types::BuildId::this().to_string()),
        ];
        for pair in words(&env("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default()) {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| OtlpError::Attribute { text: pair.into() })?;
            attributes.push((name.trim().to_string(), decoded(value.trim())));
        }
        if let Some(name) = env("OTEL_SERVICE_NAME").filter(|name| !name.is_empty()) {
            attributes.push(("service.name".to_string(), name));
        }
        Ok(Otlp {
            endpoint: channel,
            shown,
            every,
            headers: words(&headers).enumerate().map(header).collect::<Result<_, _>>()?,
            attributes: last_of_each(attributes),
        })
    }

    /// Pushes until `closing` says so, and once more then.
    pub(crate) async fn run(self, shared: Arc<Shared>, mut closing: watch::Receiver<bool>) {
        let started = now_ns();
        let mut channel: Option<Channel> = None;
        let mut failing = false;
        info!(collector = self.shown, every = ?self.every, "pushing metrics");
        loop {
            let last = *closing.borrow_and_update();
            match self.push(&shared, &mut channel, started).await {
                Ok(()) if failing => {
                    failing = false;
                    info!(collector = self.shown, "metrics are pushed again");
                }
                Ok(()) => {}
                Err(error) => {
                    channel = None;
                    if !failing {
                        warn!(collector = self.shown, error, "metrics were not pushed; trying on");
                    }
                    failing = true;
                }
            }
            if last {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(self.every) => {}
                changed = closing.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn push(
        &self,
        shared: &Shared,
        channel: &mut Option<Channel>,
        started: u64,
    ) -> Result<(), String> {
        let text = http::metrics::render(shared).map_err(|err| err.to_string())?;
        let channel = match channel {
            Some(channel) => channel,
            none => {
                let opened = self.endpoint.connect().await;
                none.insert(opened.map_err(|err| lacuna_checkpoint::chain(&err))?)
            }
        };
        let mut client = service::MetricsServiceClient::new(channel.clone());
        let mut request =
            tonic::Request::new(convert::request(&text, &self.attributes, started, now_ns()));
        request.set_timeout(DEADLINE);
        for (name, value) in &self.headers {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        let answer = client
            .export(request)
            .await
            .map_err(|status| format!("{}: {}", status.code().description(), status.message()))?;
        match answer.into_inner().partial_success {
            Some(part) if part.rejected_data_points > 0 => {
                Err(format!("{} refused: {}", part.rejected_data_points, part.error_message))
            }
            _ => Ok(()),
        }
    }
}

/// Leaves a user and a password out of an address.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_string() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

/// Puts bytes in for `%20` and the like, as the specification has values of lists written.
fn decoded(text: &str) -> String {
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let byte = behind
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = &behind[2..];
            }
            None => {
                out.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Splits a list at commas.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

/// Keeps the last value of each name, in the order in which names came first.
fn last_of_each(pairs: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for (name, value) in pairs {
        match out.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => out.push((name, value)),
        }
    }
    out
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests;
