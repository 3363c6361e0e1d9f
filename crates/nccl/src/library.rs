//! Finding NCCL, and what it can do.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use crate::api::{Api, RawComm, RawResult, RawUniqueId, UNIQUE_ID_BYTES};
use crate::keeper::ask;
use crate::{LoadError, NcclError, ResultCode};

/// The only name that NVIDIA's packages and wheels ship.
const NAME: &str = "libnccl.so.2";
/// Oldest version whose configuration structure this crate fills.
const OLDEST: Version = Version { major: 2, minor: 18, patch: 0 };

/// `ncclSuccess`.
pub(crate) const SUCCESS: RawResult = 0;
/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: RawResult = 7;

/// NCCL as this process has it; cheap to clone. Stays loaded until the process ends.
#[derive(Clone)]
pub struct Library {
    shared: Arc<Shared>,
}

struct Shared {
    api: Api,
    version: Version,
    origin: Origin,
    /// Calls that were given up and have not returned: number, and since when.
    stuck: Mutex<Vec<(u64, Instant)>>,
    /// Never closed: NCCL has threads of its own.
    _handle: ManuallyDrop<Handle>,
}

/// Where NCCL was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The process had its symbols already.
    Process,
    /// A library of this name or path was opened.
    File(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process => f.write_str("this process"),
            Self::File(path) => write!(f, "`{}`", path.display()),
        }
    }
}

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2, so far.
    pub major: u32,
    /// 28 of 2.28.9.
    pub minor: u32,
    /// 9 of 2.28.9.
    pub patch: u32,
}

impl Version {
    /// Reads `NCCL_VERSION_CODE`: 22809 is 2.28.9, and before 2.9 2708 was 2.7.8.
    pub fn from_code(code: u32) -> Self {
        if code < 10_000 {
            Self { major: code / 1000, minor: code % 1000 / 100, patch: code % 100 }
        } else {
            Self { major: code / 10_000, minor: code % 10_000 / 100, patch: code % 100 }
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What a library offers beyond the oldest supported version, told by its symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `ncclCommShrink`, since 2.27.
    pub shrink: bool,
    /// `ncclCommRevoke`, since 2.28.7.
    pub revoke: bool,
    /// `ncclCommGrow`, since 2.29.
    pub grow: bool,
}

/// Names a communicator that is about to be made: one rank draws it, all others get it from there.
///
/// It holds the address at which the drawing process waits for the others, so that process must
/// live until all are connected. Whoever knows the id can take part: treat it as a secret. One id
/// serves one communicator.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId {
    bytes: [u8; UNIQUE_ID_BYTES],
}

impl UniqueId {
    /// Size in bytes.
    pub const BYTES: usize = UNIQUE_ID_BYTES;

    /// Takes an id that another rank drew.
    pub fn from_bytes(bytes: [u8; UNIQUE_ID_BYTES]) -> Self {
        Self { bytes }
    }

    /// Returns the bytes for the other ranks.
    pub fn as_bytes(&self) -> &[u8; UNIQUE_ID_BYTES] {
        &self.bytes
    }

    pub(crate) fn to_raw(self) -> RawUniqueId {
        RawUniqueId { internal: self.bytes }
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The id is a secret and stays out of logs.
        f.debug_struct("UniqueId").finish_non_exhaustive()
    }
}

impl Library {
    /// Finds NCCL: among the symbols of this process, then as `libnccl.so.2`, and at `path` only
    /// where it is in neither. [`open`](Self::open) insists on a file.
    ///
    /// # Errors
    /// [`LoadError`]; `Missing` lists every place and what the loader said there.
    pub fn find(path: Option<&Path>) -> Result<Self, LoadError> {
        let process: Handle = Handle::this();
        // SAFETY: the symbol is looked up and not used.
        if unsafe { process.get::<*const ()>("ncclGetVersion") }.is_ok() {
            return Self::from_handle(process, Origin::Process);
        }
        let mut tried: Vec<String> = vec!["not in this process".to_string()];
        for place in std::iter::once(Path::new(NAME)).chain(path) {
            match open(place) {
                Ok(handle) => return Self::from_handle(handle, Origin::File(place.into())),
                Err(reason) => tried.push(reason),
            }
        }
        Err(LoadError::Missing { tried: tried.join("; ") })
    }

    /// Opens the library at `path`, whatever else there is.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let handle = open(path).map_err(|tried| LoadError::Missing { tried })?;
        Self::from_handle(handle, Origin::File(path.into()))
    }

    fn from_handle(handle: Handle, origin: Origin) -> Result<Self, LoadError> {
        let found = Api::find(&handle);
        let api: Api = found.map_err(|symbol| LoadError::SymbolMissing {
            origin: origin.to_string(),
            symbol,
            oldest: OLDEST,
        })?;
        let mut code: c_int = 0;
        // SAFETY: the argument points to a live int.
        let raw: RawResult = unsafe { (api.get_version)(&raw mut code) };
        let version = Version::from_code(code.unsigned_abs());
        let handle = ManuallyDrop::new(handle);
        let (stuck, origin_of) = (Mutex::default(), origin.clone());
        let shared = Shared { api, version, origin: origin_of, stuck, _handle: handle };
        let library = Self { shared: Arc::new(shared) };
        if raw != SUCCESS {
            let source: NcclError = library.error("ncclGetVersion", raw, std::ptr::null_mut());
            return Err(LoadError::Broken { origin: origin.to_string(), source });
        }
        if version < OLDEST {
            let origin: String = origin.to_string();
            return Err(LoadError::TooOld { origin, found: version, oldest: OLDEST });
        }
        Ok(library)
    }

    /// Returns the version.
    pub fn version(&self) -> Version {
        self.shared.version
    }

    /// Returns where it was found.
    pub fn origin(&self) -> &Origin {
        &self.shared.origin
    }

    /// Returns what it offers beyond the oldest supported version.
    pub fn capabilities(&self) -> Capabilities {
        let api: &Api = self.api();
        Capabilities {
            shrink: api.comm_shrink.is_some(),
            revoke: api.comm_revoke.is_some(),
            grow: api.comm_grow.is_some(),
        }
    }

    /// Time after which a call that was given up is no longer taken for a slow one: such calls
    /// mostly take milliseconds, and the first one of a process seconds. Others are refused from
    /// then on.
    pub const STUCK_FOR_GOOD: Duration = Duration::from_secs(10);

    /// Returns for how long the oldest call that was given up has not returned.
    pub fn stuck_for(&self) -> Option<Duration> {
        self.stuck().iter().map(|(_, since)| since.elapsed()).max()
    }

    pub(crate) fn stuck(&self) -> MutexGuard<'_, Vec<(u64, Instant)>> {
        self.shared.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws the id of a new communicator, and starts to wait for its members in the background.
    ///
    /// NCCL looks for a network before it returns, and nothing can end that: the call runs on a
    /// thread of its own, which is left to itself at `deadline` or once `stop` says so.
    ///
    /// # Errors
    /// [`NcclError::Call`], mostly because no network interface is usable; [`NcclError::Timeout`]
    /// where no time is left, [`NcclError::Blocked`], [`NcclError::Stopped`],
    /// [`NcclError::Thread`].
    pub fn unique_id(
        &self,
        deadline: Instant,
        stop: impl Fn() -> bool,
    ) -> Result<UniqueId, NcclError> {
        let library: Self = self.clone();
        ask("ncclGetUniqueId", self, deadline, stop, move |answer| {
            // Whoever gave it up does not need it.
            let _ = answer.give(library.draw());
        })?
    }

    fn draw(&self) -> Result<UniqueId, NcclError> {
        let mut id = RawUniqueId { internal: [0; UNIQUE_ID_BYTES] };
        // SAFETY: the argument points to a live id.
        let raw: RawResult = unsafe { (self.api().get_unique_id)(&raw mut id) };
        if raw != SUCCESS {
            return Err(self.error("ncclGetUniqueId", raw, std::ptr::null_mut()));
        }
        Ok(UniqueId { bytes: id.internal })
    }

    /// Returns this library as if it had nothing beyond the oldest supported version.
    #[cfg(test)]
    pub(crate) fn without_options(mut self) -> Self {
        let shared = Arc::get_mut(&mut self.shared).expect("nobody else has it");
        (shared.api.comm_shrink, shared.api.comm_revoke, shared.api.comm_grow) = (None, None, None);
        self
    }

    pub(crate) fn api(&self) -> &Api {
        &self.shared.api
    }

    /// Describes a result that is an error; `comm` may be null.
    pub(crate) fn error(&self, call: &'static str, raw: RawResult, comm: RawComm) -> NcclError {
        // SAFETY: any number is allowed; the answer is a constant C string.
        let text: String = unsafe { copied((self.api().get_error_string)(raw)) };
        // SAFETY: the communicator is live or null, as the caller's own call needed it.
        let detail: String = unsafe { copied((self.api().get_last_error)(comm)) };
        let detail: String = detail.trim().to_string();
        NcclError::Call { call, code: ResultCode::from_raw(raw), text, detail }
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("version", &self.shared.version)
            .field("origin", &self.shared.origin)
            .finish_non_exhaustive()
    }
}

/// Opens a library; the error is the loader's message.
fn open(path: &Path) -> Result<Handle, String> {
    // SAFETY: the initialisers of NCCL are made to run in a process at any time.
    let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    handle.map_err(|err| {
        std::error::Error::source(&err).map_or_else(|| err.to_string(), ToString::to_string)
    })
}

/// # Safety
/// `text` is null or a C string that lives during the call.
unsafe fn copied(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
