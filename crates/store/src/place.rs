//! From a URL to the store behind it.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreScheme, RetryConfig};
use url::{Position, Url};

use crate::conditional::ConditionalComplete;
use crate::error::StoreError;
use crate::limits::Limits;

/// After this the client itself gives a request up; every wait of this crate is shorter.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(600);

/// What S3 is asked for unless its variables say otherwise: a checksum that it keeps with each
/// object, and deletions one by one, which every maker's store knows.
const S3_PLAIN: [(&str, &str); 2] =
    [("aws_checksum_algorithm", "crc64nvme"), ("aws_disable_bulk_delete", "true")];

/// Tells whether a text is a URL rather than a path of the file system.
pub fn is_url(text: &str) -> bool {
    let Some((scheme, _)) = text.split_once("://") else { return false };
    let mut chars = scheme.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// A store, and the folder of it that a URL names.
pub(crate) struct Place {
    pub store: Arc<dyn ObjectStore>,
    /// The same store, where it takes objects in parts.
    pub multipart: Option<Arc<dyn MultipartStore>>,
    pub folder: Path,
}

/// Finds the store behind a URL; nothing is asked of it yet.
///
/// Credentials and endpoints come from the environment variables that the providers' own tools read
/// (`AWS_…`, `GOOGLE_…`, `AZURE_…`); `options` win over them.
pub(crate) fn open(
    text: &str,
    options: &[(&str, &str)],
    limits: &Limits,
) -> Result<Place, StoreError> {
    let wrong = |why: String| StoreError::Url { url: text.to_string(), why };
    let url = Url::parse(text).map_err(|error| wrong(error.to_string()))?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it has a query or a fragment, which would be lost".to_string()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("credentials in it would be printed: use the environment".to_string()));
    }
    let (scheme, folder) =
        ObjectStoreScheme::parse(&url).map_err(|error| wrong(error.to_string()))?;
    // Another one that is already there will do as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Asking again is done by `fetch.rs`, which keeps what came.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let seconds = |time: Duration| format!("{} seconds", time.as_secs().max(1));
    let (timeout, connect) = (seconds(CLIENT_TIMEOUT), seconds(limits.stall));
    let plain = [("timeout", timeout.as_str()), ("connect_timeout", connect.as_str())];
    // Only what goes to plain HTTP by its own URL may; S3's variables say so for their endpoint.
    let more: Vec<(&str, &str)> =
        if url.scheme() == "http" { vec![("allow_http", "true")] } else { Vec::new() };
    /// All builders have the same functions and no common trait.
    macro_rules! build {
        ($builder:expr) => {{
            let mut builder = $builder;
            for (key, value) in plain.iter().chain(&more).chain(options) {
                let key =
                    key.parse().map_err(|error: object_store::Error| wrong(error.to_string()))?;
                builder = builder.with_config(key, *value);
            }
            Arc::new(builder.build().map_err(|error| wrong(error.to_string()))?)
        }};
    }
    /// Two views of one store.
    macro_rules! place {
        ($store:expr) => {{
            let store = $store;
            Place { store: store.clone(), multipart: Some(store), folder }
        }};
    }
    Ok(match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = s3_builder().with_http_connector(ConditionalComplete);
            place!(build!(builder.with_url(text).with_retry(retry)))
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env();
            place!(build!(builder.with_url(text).with_retry(retry)))
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::from_env();
            place!(build!(builder.with_url(text).with_retry(retry)))
        }
        ObjectStoreScheme::Http => {
            let host = &url[..Position::BeforePath];
            let store = build!(HttpBuilder::new().with_url(host).with_retry(retry));
            Place { store, multipart: None, folder }
        }
        _ => {
            let known = "s3, gs, az, abfs, http and https are known";
            return Err(wrong(format!("scheme `{}` is not served: {known}", url.scheme())));
        }
    })
}

/// Prepares a client of S3 by the environment.
fn s3_builder() -> AmazonS3Builder {
    let is_set = |name: &str| std::env::var_os(name.to_ascii_uppercase()).is_some();
    let mut builder = AmazonS3Builder::from_env();
    for (name, value) in S3_PLAIN {
        if !is_set(name)
            && let Ok(key) = name.parse()
        {
            builder = builder.with_config(key, value);
        }
    }
    builder
}
