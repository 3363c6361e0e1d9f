//! What can go wrong, by what a caller can do about it.

use std::ffi::c_int;
use std::fmt;
use std::time::Duration;

use crate::Version;

/// Why NCCL cannot be used in this process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No library is there.
    #[error("no NCCL: {tried}")]
    Missing {
        /// Where it was looked for, and what the loader said.
        tried: String,
    },
    /// The library lacks a function that every supported version has.
    #[error("the NCCL in {origin} has no `{symbol}`: version {oldest} or newer is needed")]
    SymbolMissing {
        /// Where the library is.
        origin: String,
        /// Name of the function.
        symbol: &'static str,
        /// Oldest version that is supported.
        oldest: Version,
    },
    /// The library is older than what this crate's structures describe.
    #[error("the NCCL in {origin} is too old: it is {found}, needed is {oldest} or newer")]
    TooOld {
        /// Where the library is.
        origin: String,
        /// Its version.
        found: Version,
        /// Oldest version that is supported.
        oldest: Version,
    },
    /// The library does not say its version.
    #[error("the NCCL in {origin} does not tell its version")]
    Broken {
        /// Where the library is.
        origin: String,
        /// What it said instead.
        #[source]
        source: NcclError,
    },
}

/// A call that failed, or a communicator that did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NcclError {
    /// NCCL refused a call, or reports that the communicator failed since the one before.
    #[error("`{call}` failed: {text}{}", Detail(detail))]
    Call {
        /// The function, or `ncclCommGetAsyncError` for what happened in the background.
        call: &'static str,
        /// The result.
        code: ResultCode,
        /// NCCL's words for the code.
        text: String,
        /// NCCL's own last words on the error; empty where it has none.
        detail: String,
    },
    /// A wait's deadline passed; the communicator goes on and should be aborted.
    #[error("{what} did not complete within {waited:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// Whoever waited was asked to stop.
    #[error("stopped while waiting for {what}")]
    Stopped {
        /// What was waited for.
        what: &'static str,
    },
    /// A call before there is a communicator did not return, and was left to its thread. Calls that
    /// are made after [`Library::STUCK_FOR_GOOD`](crate::Library::STUCK_FOR_GOOD) are not begun.
    #[error("`{call}` did not return within {waited:?}")]
    Blocked {
        /// The function.
        call: &'static str,
        /// How long it was waited for, or for how long another has not returned.
        waited: Duration,
    },
    /// The communicator was aborted or closed; what its operations wrote is garbage.
    #[error("the communicator was aborted")]
    Aborted,
    /// An abort, or the end of closing, did not return: the process can use neither the
    /// communicator nor its buffers any more, and should end.
    #[error("`{call}` did not return within {waited:?}")]
    AbortHangs {
        /// The function.
        call: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The library that is loaded does not have the function.
    #[error("NCCL {found} has no `{symbol}`")]
    Unsupported {
        /// Name of the function.
        symbol: &'static str,
        /// Version of the library.
        found: Version,
    },
    /// An abort ended a call inside a group of calls, which stays open on this thread: NCCL would
    /// take whatever follows here for a part of it. Other threads can go on.
    #[error("an abort left a group of calls open on this thread")]
    GroupOpen,
    /// `NCCL_COMM_BLOCKING` makes calls wait for peers.
    #[error("`NCCL_COMM_BLOCKING` is set to 1, which makes calls of NCCL wait: unset it")]
    Blocking,
    /// This machine failed.
    #[error("a thread for NCCL failed: {reason}")]
    Thread {
        /// What the system said, or that it panicked.
        reason: String,
    },
}

/// A communicator that was not started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError<E: std::error::Error + 'static> {
    /// The thread that starts it could not get ready: what its caller gave it to do failed.
    #[error("the device is not ready")]
    Enter(#[source] E),
    /// NCCL failed.
    #[error(transparent)]
    Nccl(#[from] NcclError),
}

struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

/// `ncclResult_t`, without the two results that are no errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResultCode {
    /// A CUDA call inside NCCL failed; mostly the device is lost or memory ran out.
    UnhandledCudaError,
    /// A system call failed.
    SystemError,
    /// A bug in NCCL, or memory that was overwritten.
    InternalError,
    /// An argument is wrong.
    InvalidArgument,
    /// The calls do not fit each other, or two ranks are on one device.
    InvalidUsage,
    /// A peer failed or went.
    RemoteError,
    /// NCCL's own time-out.
    Timeout,
    /// A number that this crate does not know.
    Other(i32),
}

impl ResultCode {
    pub(crate) fn from_raw(raw: c_int) -> Self {
        match raw {
            1 => Self::UnhandledCudaError,
            2 => Self::SystemError,
            3 => Self::InternalError,
            4 => Self::InvalidArgument,
            5 => Self::InvalidUsage,
            6 => Self::RemoteError,
            8 => Self::Timeout,
            other => Self::Other(other),
        }
    }
}

impl NcclError {
    /// Returns NCCL's code, where the error has one.
    pub fn code(&self) -> Option<ResultCode> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }
}
