//! The store and its calls.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio_stream::StreamExt;

use crate::error::StoreError;
use crate::limits::{Limits, Stop};
use crate::reader::ObjectReader;
use crate::{fetch, place};

/// Threads that move bytes; decoding threads wait for them and do not run meanwhile.
const THREADS: usize = 2;

/// How often a waiting caller looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);

/// How much longer than its deadline a request may take to say so.
const GRACE: Duration = Duration::from_secs(5);

/// How long a listing may take.
const LIST_DEADLINE: Duration = Duration::from_secs(600);

/// How long writing an object may take.
const PUT_DEADLINE: Duration = Duration::from_secs(600);

/// Most objects that a listing returns.
pub(crate) const LISTED_MAX: usize = 4_000_000;

/// An object, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Name below the store's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// What a store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Requests made for ranges.
    pub requests: u64,
    /// Those of them that were made again.
    pub retries: u64,
    /// Bytes that came.
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    retries: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    pub fn add_request(&self, bytes: u64, is_retry: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.retries.fetch_add(is_retry.into(), Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What requests share.
pub(crate) struct Shared {
    pub store: Arc<dyn ObjectStore>,
    pub multipart: Option<Arc<dyn MultipartStore>>,
    pub limits: Limits,
    pub permits: Semaphore,
    pub stats: Counters,
    folder: Path,
    base: String,
}

impl Shared {
    /// Returns the path of an object: the names of others are taken as they are, not encoded.
    pub fn path(&self, name: &str) -> Path {
        let whole = format!("{}/{name}", self.folder);
        Path::parse(whole.trim_matches('/')).unwrap_or_else(|_| self.folder.clone().join(name))
    }

    pub fn url(&self, name: &str) -> String {
        if name.is_empty() { self.base.clone() } else { format!("{}/{name}", self.base) }
    }
}

/// The objects below one URL.
pub struct Store {
    shared: Arc<Shared>,
    /// Taken when the store is dropped.
    runtime: Mutex<Option<Runtime>>,
    handle: Handle,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.shared.base)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Never waits, so that a store may be dropped on a thread of an async runtime.
        runtime.into_iter().for_each(Runtime::shutdown_background);
    }
}

/// A request under way; dropping it ends it.
pub struct Pending<T> {
    answer: Receiver<Result<T, StoreError>>,
    task: AbortHandle,
    object: String,
    deadline: Duration,
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({})", self.object)
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T> Pending<T> {
    /// Waits for the answer.
    pub fn wait(self, stop: &Stop) -> Result<T, StoreError> {
        let end = std::time::Instant::now() + self.deadline + GRACE;
        let stopped = || StoreError::Stopped { object: self.object.clone() };
        loop {
            match self.answer.recv_timeout(LOOK) {
                Ok(answer) => return answer,
                // The runtime is gone, and with it the store.
                Err(RecvTimeoutError::Disconnected) => return Err(stopped()),
                Err(RecvTimeoutError::Timeout) if stop.is_raised() => return Err(stopped()),
                Err(RecvTimeoutError::Timeout) if std::time::Instant::now() >= end => {
                    return Err(stopped());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Store {
    /// Opens the store behind a URL such as `s3://bucket/folder` or `https://host/folder`.
    ///
    /// Nothing is asked of it yet. Credentials and endpoints come from the environment variables
    /// that the providers' own tools read.
    pub fn open(url: &str, limits: Limits) -> Result<Self, StoreError> {
        Store::open_with(url, &[], limits)
    }

    /// Opens a store with options that win over the environment, by the names that the variables
    /// have in lower case (`aws_endpoint`, `aws_access_key_id`).
    pub fn open_with(
        url: &str,
        options: &[(&str, &str)],
        limits: Limits,
    ) -> Result<Self, StoreError> {
        let place = place::open(url, options, &limits)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("lacuna-store")
            .enable_all()
            .build();
        let runtime = runtime.map_err(|error| StoreError::Url {
            url: url.to_string(),
            why: format!("its threads could not be started: {error}"),
        })?;
        let shared = Shared {
            store: place.store,
            multipart: place.multipart,
            permits: Semaphore::new(limits.in_flight.max(1)),
            limits,
            stats: Counters::default(),
            folder: place.folder,
            base: url.trim_end_matches('/').to_string(),
        };
        let handle = runtime.handle().clone();
        Ok(Store { shared: Arc::new(shared), runtime: Mutex::new(Some(runtime)), handle })
    }

    /// Returns how long is tried.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// Returns the URL of the store's folder, without a slash at its end.
    pub fn url(&self) -> &str {
        &self.shared.base
    }

    /// Returns the URL of an object.
    pub fn url_of(&self, name: &str) -> String {
        self.shared.url(name)
    }

    /// Tells whether objects can be created on a condition and in parts.
    pub fn takes_uploads(&self) -> bool {
        self.shared.multipart.is_some()
    }

    /// Returns what was done so far.
    pub fn stats(&self) -> StoreStats {
        let Counters { requests, retries, bytes } = &self.shared.stats;
        StoreStats {
            requests: requests.load(Ordering::Relaxed),
            retries: retries.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
        }
    }

    /// Reads a range of an object; memory for all of it is taken at once.
    ///
    /// # Errors
    /// [`StoreError::Deadline`] when the time is over; at once what asking again cannot change.
    pub fn read(&self, name: &str, range: Range<u64>, stop: &Stop) -> Result<Vec<u8>, StoreError> {
        self.start_read(name, range).wait(stop)
    }

    /// Reads as [`Store::read`] does, within `deadline`.
    pub fn read_within(
        &self,
        name: &str,
        range: Range<u64>,
        deadline: Duration,
        stop: &Stop,
    ) -> Result<Vec<u8>, StoreError> {
        self.start(name, range, deadline).wait(stop)
    }

    /// Starts to read a range; dropping what comes back ends the request.
    pub fn start_read(&self, name: &str, range: Range<u64>) -> Pending<Vec<u8>> {
        self.start(name, range, self.shared.limits.deadline)
    }

    fn start(&self, name: &str, range: Range<u64>, deadline: Duration) -> Pending<Vec<u8>> {
        let owned = name.to_string();
        self.spawn(name, deadline, async move |shared| {
            fetch::read(&shared, &owned, range, deadline).await
        })
    }

    /// Returns the size of an object, within `deadline`.
    pub fn size(&self, name: &str, deadline: Duration, stop: &Stop) -> Result<u64, StoreError> {
        let owned = name.to_string();
        let pending = self.spawn(name, deadline, async move |shared| {
            let path = shared.path(&owned);
            fetch::ask(&shared, &owned, deadline, shared.limits.stall, || shared.store.head(&path))
                .await
        });
        Ok(pending.wait(stop)?.size)
    }

    /// Reads a whole object of at most `bytes_max` bytes.
    pub fn get(&self, name: &str, bytes_max: u64, stop: &Stop) -> Result<Vec<u8>, StoreError> {
        let bytes = self.size(name, self.shared.limits.deadline, stop)?;
        if bytes > bytes_max {
            let object = self.url_of(name);
            let why = format!("it has {bytes} bytes, more than the {bytes_max} that are read");
            return Err(StoreError::Unsupported { object, why });
        }
        self.read(name, 0..bytes, stop)
    }

    /// Reads a whole object of any length, piece by piece, each with a deadline of its own.
    pub fn read_long(self: &Arc<Self>, name: &str, stop: &Stop) -> Result<Vec<u8>, StoreError> {
        self.reader(name, stop)?.read_all()
    }

    /// Writes a whole object.
    pub fn put(&self, name: &str, bytes: Vec<u8>, stop: &Stop) -> Result<(), StoreError> {
        let owned = name.to_string();
        let deadline = PUT_DEADLINE.max(self.shared.limits.deadline);
        let patience = self.shared.limits.upload_patience(bytes.len() as u64);
        let payload = PutPayload::from(bytes);
        let pending = self.spawn(name, deadline, async move |shared| {
            let path = shared.path(&owned);
            let put = || shared.store.put(&path, payload.clone());
            fetch::ask(&shared, &owned, deadline, patience, put).await
        });
        pending.wait(stop).map(|_| ())
    }

    /// Lists the objects directly in the store's folder, by name.
    pub fn list(&self, stop: &Stop) -> Result<Vec<ObjectInfo>, StoreError> {
        // A page of a thousand names is a request.
        let deadline = LIST_DEADLINE.max(self.shared.limits.deadline);
        let pending = self.spawn("", deadline, async move |shared| {
            fetch::ask(&shared, "", deadline, deadline, || list(&shared)).await
        });
        pending.wait(stop)
    }

    /// Reads an object from its beginning to its end, some of it ahead.
    pub fn reader(self: &Arc<Self>, name: &str, stop: &Stop) -> Result<ObjectReader, StoreError> {
        let bytes = self.size(name, self.shared.limits.deadline, stop)?;
        Ok(ObjectReader::new(self.clone(), name.to_string(), bytes, stop.clone()))
    }

    pub(crate) fn spawn<T, W, F>(&self, name: &str, deadline: Duration, work: W) -> Pending<T>
    where
        T: Send + 'static,
        W: FnOnce(Arc<Shared>) -> F + Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (sender, answer) = sync_channel(1);
        let work = work(self.shared.clone());
        let task = self.handle.spawn(async move {
            // Nobody may be waiting any more.
            let _ = sender.send(work.await);
        });
        let object = self.url_of(name);
        Pending { answer, task: task.abort_handle(), object, deadline }
    }
}

async fn list(shared: &Shared) -> Result<Vec<ObjectInfo>, object_store::Error> {
    let mut found: Vec<ObjectInfo> = Vec::new();
    let folder = &shared.folder;
    let mut stream = shared.store.list(Some(folder));
    loop {
        let next = tokio::time::timeout(shared.limits.stall, stream.next()).await;
        let silent = |_| object_store::Error::Generic { store: "list", source: "no answer".into() };
        let Some(meta) = next.map_err(silent)? else { break };
        let meta = meta?;
        let Some(mut rest) = meta.location.prefix_match(folder) else { continue };
        if let (Some(name), None) = (rest.next(), rest.next()) {
            found.push(ObjectInfo { name: name.as_ref().to_string(), bytes: meta.size });
        }
        if found.len() > LISTED_MAX {
            return Err(object_store::Error::NotImplemented {
                operation: format!("listing more than {LISTED_MAX} objects"),
                implementer: "lacuna".to_string(),
            });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}
