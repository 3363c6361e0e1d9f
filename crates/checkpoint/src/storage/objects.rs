//! Checkpoints in an object store: what is created once is created on a condition, what is large
//! appears when its last part is there, and what is hidden is deleted.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lacuna_store::{Creation, Limits, Pending, Stop, Store, StoreError, Upload};

use super::{FsError, Published, ReadAt, Sink, Source, Storage};

/// How long a question or a small document may take: shorter than a client waits for the
/// coordinator, so that it is told what is wrong.
const SMALL_DEADLINE: Duration = Duration::from_secs(20);

/// How long each request of an upload may take, besides the time for its bytes.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(60);

/// Ranges asked for ahead of a reader in order: enough to hide a store's latency, little memory.
const AHEAD: usize = 3;

/// Bytes handed to an upload at once.
const PIECE_BYTES: usize = 1 << 20;

/// The objects below one URL as a place for checkpoints.
///
/// A folder is a common beginning of names, so folders are neither made nor empty.
#[derive(Clone, Debug)]
pub struct Objects {
    store: Arc<Store>,
    small: Duration,
    large: Duration,
    /// Bytes of a part, where they do not follow from the object's.
    part_bytes: Option<u64>,
}

impl Objects {
    /// Opens the store behind a URL (`s3://bucket/folder`); nothing is asked of it yet.
    ///
    /// # Errors
    /// The URL names no store, or one that cannot create on a condition (plain HTTP).
    pub fn open(url: &str) -> Result<Self, FsError> {
        Objects::open_with(url, &[], Limits::default())
    }

    /// Opens a store with options that win over the environment
    /// ([`lacuna_store::Store::open_with`]).
    pub fn open_with(url: &str, options: &[(&str, &str)], limits: Limits) -> Result<Self, FsError> {
        let failed = |error: io::Error| FsError::new("open", Path::new(url), error);
        let store = Store::open_with(url, options, limits).map_err(|e| failed(io_error(e)))?;
        if !store.takes_uploads() {
            let why = "plain HTTP cannot create a file only if its name is free: give an address \
                       of s3://, gs:// or az://";
            return Err(failed(io::Error::new(io::ErrorKind::Unsupported, why)));
        }
        let (small, large) = (SMALL_DEADLINE, UPLOAD_DEADLINE);
        Ok(Objects { store: Arc::new(store), small, large, part_bytes: None })
    }

    /// Uses smaller parts and shorter deadlines.
    #[cfg(test)]
    pub(crate) fn hurried(self, part_bytes: u64, deadline: Duration) -> Self {
        Objects { small: deadline, large: deadline, part_bytes: Some(part_bytes), ..self }
    }

    /// Returns the URL as the root of [`RunDir`](crate::layout::RunDir)s.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(self.store.url())
    }

    fn create(&self, path: &Path, text: &str) -> Result<Published, FsError> {
        let bytes = text.as_bytes().to_vec();
        self.call("create", path, |name, stop| self.store.create(name, bytes, self.small, stop))
            .map(published)
    }

    /// Makes a call about the object at `path`, below the store's URL.
    fn call<T>(
        &self,
        op: &'static str,
        path: &Path,
        call: impl FnOnce(&str, &Stop) -> Result<T, StoreError>,
    ) -> Result<T, FsError> {
        let failed = |error: io::Error| FsError::new(op, path, error);
        let name = path.to_str().and_then(|text| text.strip_prefix(self.store.url()));
        let name = name.and_then(|rest| rest.strip_prefix('/')).ok_or_else(|| {
            failed(io::Error::other(format!("it does not lie in `{}`", self.store.url())))
        })?;
        call(name, &Stop::default()).map_err(|error| failed(io_error(error)))
    }
}

fn published(creation: Creation) -> Published {
    match creation {
        Creation::Created => Published::Created,
        Creation::Exists => Published::Exists,
    }
}

fn io_error(error: StoreError) -> io::Error {
    let kind = match &error {
        StoreError::NotFound { .. } => io::ErrorKind::NotFound,
        StoreError::Refused { .. } => io::ErrorKind::PermissionDenied,
        StoreError::Size { .. } => io::ErrorKind::UnexpectedEof,
        StoreError::Deadline { .. } | StoreError::NoAnswer { .. } => io::ErrorKind::TimedOut,
        StoreError::Url { .. } | StoreError::Unsupported { .. } | StoreError::Stopped { .. } => {
            io::ErrorKind::Other
        }
    };
    io::Error::new(kind, error)
}

impl Storage for Objects {
    fn prepare(&self, _base: &Path, _folder: &Path) -> Result<(), FsError> {
        Ok(())
    }

    fn names(&self, folder: &Path) -> Result<Vec<String>, FsError> {
        self.call("list", folder, |name, stop| self.store.names(name, self.small, stop))
    }

    fn read_small(&self, path: &Path, max: u64) -> Result<Vec<u8>, FsError> {
        self.call("read", path, |name, stop| {
            let bytes = self.store.size(name, self.small, stop)?;
            if bytes > max {
                let why = format!("larger than {max} bytes");
                return Err(StoreError::Unsupported { object: self.store.url_of(name), why });
            }
            self.store.read_within(name, 0..bytes, self.small, stop)
        })
    }

    fn size(&self, path: &Path) -> Result<u64, FsError> {
        self.call("inspect", path, |name, stop| self.store.size(name, self.small, stop))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn ReadAt>, FsError> {
        self.call("open", path, |name, stop| {
            let bytes = self.store.size(name, self.small, stop)?;
            let (store, name) = (self.store.clone(), name.to_string());
            Ok(Box::new(Object { store, name, bytes, ahead: Mutex::default() }) as Box<dyn ReadAt>)
        })
    }

    /// A store answers late and many at once.
    fn readers(&self) -> usize {
        4
    }

    fn create_small(&self, _via: &Path, path: &Path, text: &str) -> Result<Published, FsError> {
        self.create(path, text)
    }

    fn replace_small(&self, path: &Path, text: &str) -> Result<(), FsError> {
        let bytes = text.as_bytes().to_vec();
        self.call("write", path, |name, stop| self.store.replace(name, bytes, self.small, stop))
    }

    fn begin(&self, path: &Path, bytes: u64) -> Result<Box<dyn Sink>, FsError> {
        let upload = self.call("create", path, |name, _| match self.part_bytes {
            None => self.store.upload(name, bytes, self.large),
            Some(part) => self.store.upload_in_parts(name, bytes.min(part), part, self.large),
        })?;
        Ok(Box::new(PartObject { path: path.to_path_buf(), upload }))
    }

    /// Deletes: there is no renaming, and a copy would be a second step.
    fn hide(&self, path: &Path, _hidden: &Path) -> Result<(), FsError> {
        self.remove_file(path)
    }

    fn remove_file(&self, path: &Path) -> Result<(), FsError> {
        self.call("delete", path, |name, stop| self.store.delete(name, self.small, stop))
    }

    fn remove_folder(&self, path: &Path) -> Result<(), FsError> {
        self.call("delete", path, |name, stop| self.store.delete_folder(name, self.small, stop))
    }

    fn remove_empty_folder(&self, _path: &Path) {}
}

/// A part of a checkpoint on its way.
struct PartObject {
    path: PathBuf,
    upload: Upload,
}

impl Sink for PartObject {
    fn fill(&mut self, source: &dyn Source) -> Result<(), FsError> {
        let failed = |error: io::Error| FsError::new("write", &self.path, error);
        let mut piece = vec![0; PIECE_BYTES];
        let mut offset = 0;
        while offset < source.bytes() {
            let n = (source.bytes() - offset).min(PIECE_BYTES as u64) as usize;
            source.read(offset, &mut piece[..n]).map_err(failed)?;
            let sent = self.upload.write_all(&piece[..n], &Stop::default());
            sent.map_err(|error| failed(io_error(error)))?;
            offset += n as u64;
        }
        Ok(())
    }

    fn publish(self: Box<Self>) -> Result<Published, FsError> {
        let PartObject { path, upload } = *self;
        let found = upload.finish(&Stop::default());
        found.map(published).map_err(|e| FsError::new("write", &path, io_error(e)))
    }
}

/// An object that is read in ranges.
struct Object {
    store: Arc<Store>,
    name: String,
    bytes: u64,
    ahead: Mutex<Ahead>,
}

/// What was asked for before it was wanted.
#[derive(Default)]
struct Ahead {
    /// Where the last read ended.
    last: Option<u64>,
    coming: VecDeque<(Range<u64>, Pending<Vec<u8>>)>,
}

impl Object {
    /// Asks for a range, and for those behind it if the one before it was the last.
    fn ask(&self, range: Range<u64>) -> Pending<Vec<u8>> {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let is_next = ahead.last == Some(range.start);
        ahead.last = Some(range.end);
        let first = ahead.coming.pop_front().filter(|(coming, _)| *coming == range);
        let pending = match first {
            Some((_, pending)) => pending,
            None => {
                ahead.coming.clear();
                self.store.start_read(&self.name, range.clone())
            }
        };
        if is_next {
            let length = range.end - range.start;
            let mut from = ahead.coming.back().map_or(range.end, |(coming, _)| coming.end);
            while ahead.coming.len() < AHEAD && from < self.bytes {
                let next = from..self.bytes.min(from + length);
                from = next.end;
                let pending = self.store.start_read(&self.name, next.clone());
                ahead.coming.push_back((next, pending));
            }
        }
        pending
    }
}

impl ReadAt for Object {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        let pending = self.ask(offset..offset + buffer.len() as u64);
        let bytes = pending.wait(&Stop::default()).map_err(io_error)?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
}

#[cfg(test)]
mod peer;
#[cfg(test)]
mod tests;
