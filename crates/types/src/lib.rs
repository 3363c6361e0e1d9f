//! Words every part of Lacuna shares: ids, steps, generations and time.
//!
//! Standard library only; no clock is read here. [`Timestamp`] is a value that drivers make and
//! pure code receives.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A point of a process's own monotonic clock, in nanoseconds since an arbitrary start.
///
/// Pure code receives it as an argument. Two timestamps of different processes cannot be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Returns the time that passed since `earlier`, zero where `earlier` lies in the future.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Builds a timestamp from whole milliseconds; for tests and scripts.
    pub const fn from_millis(ms: u64) -> Self {
        Timestamp(ms * 1_000_000)
    }
}

impl std::ops::Add<Duration> for Timestamp {
    type Output = Timestamp;

    fn add(self, rhs: Duration) -> Timestamp {
        let nanos: u64 = u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX);
        Timestamp(self.0.saturating_add(nanos))
    }
}

/// Most members of one group, and so most workers that train one run at the same time.
///
/// Every pair of members is connected: a member holds a socket for each other one, and no more than
/// this were tried (docs/benchmarks/scale.md).
pub const WORLD_MAX: u32 = 1024;

/// Most threads that load samples in one process; no machine has more cores to spare.
pub const LOADER_THREADS_MAX: u32 = 512;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// Returns the next value.
            pub const fn next(self) -> Self {
                $name(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A formation of the group that trains a run. Persisted before any message names it; never
    /// reused.
    Generation
);
number!(
    /// Number of a training step, 0-based. A state "at step s" has had steps `0..s` behind it.
    Step
);
number!(
    /// Number of coordinator starts on one state store; higher wins.
    CoordEpoch
);
number!(
    /// Random number drawn at process start: tells two lives of one worker apart.
    Incarnation
);
number!(
    /// A sample's place in the data set's index, 0-based.
    SampleId
);
number!(
    /// A checkpoint attempt inside one generation; never reused.
    AttemptSeq
);

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Returns the text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name(text, $what)?;
                Ok($name(text.to_string()))
            }
        }
    };
}

name!(
    /// Stable, readable name of a worker, `node:device`.
    WorkerId,
    "worker id"
);
name!(
    /// Name of a run; unique on one coordinator.
    RunId,
    "run id"
);

/// Longest accepted name: it goes into file names, whose limit is 255 bytes on common file systems.
pub const NAME_BYTES_MAX: usize = 128;

/// A name from outside that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameError {
    what: &'static str,
    text: String,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, text } = self;
        write!(
            f,
            "{what} `{}` must be 1 to {NAME_BYTES_MAX} of the characters a-z A-Z 0-9 . _ : -",
            text.escape_debug()
        )
    }
}

impl std::error::Error for NameError {}

fn check_name(text: &str, what: &'static str) -> Result<(), NameError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-');
    let fits = (1..=NAME_BYTES_MAX).contains(&text.len()) && !text.starts_with('.');
    if fits && text.bytes().all(allowed) {
        return Ok(());
    }
    Err(NameError { what, text: text.to_string() })
}

/// One unit of work of a step: `slot_batch` samples that one device computes with fixed shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The step that the slot belongs to.
    pub step: Step,
    /// Place in the step, `0..V`.
    pub index: u32,
}

/// The fields of a `lacuna` build that must agree inside a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildId {
    /// Version of the package.
    pub version: String,
    /// Number of the wire protocol; raised when messages change incompatibly.
    pub protocol: u32,
    /// Number of the arithmetic; raised when the same spec would give other bits.
    pub numerics: u32,
}

impl BuildId {
    /// Returns the identity of this build.
    pub fn this() -> Self {
        BuildId { version: env!("CARGO_PKG_VERSION").to_string(), protocol: 6, numerics: 2 }
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, protocol, numerics } = self;
        write!(f, "lacuna {version} (protocol {protocol}, numerics {numerics})")
    }
}

/// Exit codes, the same for every command (docs/operations.md).
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed for a reason no other code names.
    pub const FAILED: u8 = 1;
    /// Bad usage or run specification; starting again cannot help.
    pub const USAGE: u8 = 2;
    /// `wait`: the run failed.
    pub const WAIT_FAILED: u8 = 20;
    /// The run was cancelled.
    pub const WAIT_CANCELLED: u8 = 21;
    /// Nobody read what was printed (a shell shows the same of a command that SIGPIPE ended).
    pub const NO_READER: u8 = 141;
    /// `wait`: the time was over first.
    pub const WAIT_TIMED_OUT: u8 = 124;
    /// The coordinator could not be reached.
    pub const UNREACHABLE: u8 = 69;
    /// A bug in Lacuna.
    pub const INTERNAL: u8 = 70;
    /// Reading data or a checkpoint, or writing one, failed; or a device did.
    pub const IO: u8 = 74;
    /// Drained cleanly; start again to go on.
    pub const DRAINED: u8 = 75;
    /// Versions or protocols differ.
    pub const VERSION: u8 = 76;
    /// Not authorised.
    pub const UNAUTHORISED: u8 = 77;
    /// This node is unfit: libtorch, driver, device or NCCL missing, wrong or taken.
    pub const UNFIT: u8 = 78;
    /// Interrupted twice.
    pub const INTERRUPTED: u8 = 130;
}

#[cfg(test)]
mod tests;
