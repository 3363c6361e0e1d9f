//! How long a store tries, and how a caller stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long and how often is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// After this a read ends with an error, whatever was tried.
    pub deadline: Duration,
    /// After this without a byte, an attempt is given up.
    pub stall: Duration,
    /// After this an attempt is given up even while bytes drip in; what came is kept.
    pub attempt: Duration,
    /// Pause after a first failed attempt; doubled each time.
    pub backoff_first: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// Requests at a time; more wait.
    pub in_flight: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            deadline: Duration::from_secs(50),
            stall: Duration::from_secs(10),
            attempt: Duration::from_secs(20),
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            in_flight: 32,
        }
    }
}

/// Bytes a second below which an upload is given up and begun again: 4 Mbit/s for each request.
const UPLOAD_RATE_MIN: u64 = 512 << 10;

/// No request takes longer, however much it carries.
const UPLOAD_PATIENCE_MAX: Duration = Duration::from_secs(590);

impl Limits {
    /// Returns how long one attempt to send so many bytes may take.
    pub(crate) fn upload_patience(&self, bytes: u64) -> Duration {
        let sending = Duration::from_secs_f64(bytes as f64 / UPLOAD_RATE_MIN as f64);
        self.attempt.saturating_add(sending).min(UPLOAD_PATIENCE_MAX)
    }

    /// Returns these limits with a deadline of at most `deadline`.
    pub fn within(self, deadline: Duration) -> Self {
        Limits { deadline: self.deadline.min(deadline), ..self }
    }

    /// Returns the pause after the `failed`-th attempt in a row without progress, from 1; `key`
    /// spreads the pauses of readers that failed together.
    pub(crate) fn backoff(&self, failed: u32, key: u64) -> Duration {
        let doubled = self.backoff_first.saturating_mul(1 << failed.saturating_sub(1).min(16));
        let most = doubled.min(self.backoff_max);
        // Half of it is spread: equal pauses would meet again.
        let mixed = (key ^ u64::from(failed)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        most / 2 + (most / 2).mul_f64(mixed as f64 / (1u64 << 24) as f64)
    }
}

/// Raised by whoever no longer wants what others wait for.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Tells everybody who waits to give up.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Tells whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
