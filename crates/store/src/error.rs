//! What a store cannot do, and why.

use std::ops::Range;
use std::time::Duration;

/// A request that gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL names no store.
    #[error("`{url}` is not an address of a store: {why}")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such object.
    #[error("`{object}` is not there")]
    NotFound {
        /// The object's URL.
        object: String,
    },
    /// The store knows the object, or may, and does not give it.
    #[error("access to `{object}` was refused: {why}")]
    Refused {
        /// The object's URL.
        object: String,
        /// What the store said.
        why: String,
    },
    /// The object is shorter than it should be.
    #[error("`{object}` has {found} bytes where at least {expected} were expected")]
    Size {
        /// The object's URL.
        object: String,
        /// Bytes it has.
        found: u64,
        /// Bytes that a range asked for.
        expected: u64,
    },
    /// The store cannot do what was asked at all.
    #[error("`{object}`: {why}")]
    Unsupported {
        /// The object's URL.
        object: String,
        /// What the store cannot do.
        why: String,
    },
    /// The time is over.
    #[error(
        "`{object}`, bytes {} to {}: given up after {attempts} attempts in {waited:.1?} with \
         {received} bytes received; the last attempt: {last}",
        range.start, range.end
    )]
    Deadline {
        /// The object's URL.
        object: String,
        /// Bytes asked for.
        range: Range<u64>,
        /// Requests made.
        attempts: u32,
        /// How long it was tried.
        waited: Duration,
        /// Bytes that came.
        received: u64,
        /// What became of the last attempt.
        last: String,
    },
    /// A question about an object was not answered in time.
    #[error(
        "`{object}`: no answer in {waited:.1?} and {attempts} attempts; the last attempt: {last}"
    )]
    NoAnswer {
        /// The object's URL.
        object: String,
        /// Requests made.
        attempts: u32,
        /// How long it was tried.
        waited: Duration,
        /// What became of the last attempt.
        last: String,
    },
    /// The caller no longer wants it.
    #[error("reading `{object}` was stopped")]
    Stopped {
        /// The object's URL.
        object: String,
    },
}
