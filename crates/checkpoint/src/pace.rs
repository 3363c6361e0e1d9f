//! How fast a part is written, and giving it up half-way.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest sleep before it is looked whether to go on.
const NAP: Duration = Duration::from_millis(50);

/// Lets bytes of any number of threads pass at a limited rate altogether, until told to stop.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<NonZeroU64>,
    stop: Arc<AtomicBool>,
    began: Instant,
    passed: AtomicU64,
}

impl Pace {
    /// Lets bytes pass at most at this rate, until `stop` is set.
    pub fn new(bytes_per_second: Option<NonZeroU64>, stop: Arc<AtomicBool>) -> Self {
        Pace { bytes_per_second, stop, began: Instant::now(), passed: AtomicU64::new(0) }
    }

    /// Lets everything pass.
    pub fn free() -> Self {
        Pace::new(None, Arc::default())
    }

    /// Waits until `bytes` more are allowed.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn pass(&self, bytes: u64) -> io::Result<()> {
        let passed = self.passed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return Err(io::Error::other("the attempt was given up"));
            }
            let Some(rate) = self.bytes_per_second else { return Ok(()) };
            let due = Duration::from_secs_f64(passed as f64 / rate.get() as f64);
            let ahead = due.saturating_sub(self.began.elapsed());
            if ahead.is_zero() {
                return Ok(());
            }
            std::thread::sleep(ahead.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_no_faster_than_allowed() {
        let pace = Pace::new(NonZeroU64::new(1_000_000), Arc::default());
        let began = Instant::now();
        (0..10).for_each(|_| pace.pass(10_000).unwrap());
        assert!(began.elapsed() >= Duration::from_millis(100));
    }

    #[test]
    fn who_waits_is_told_to_stop() {
        let stop = Arc::new(AtomicBool::new(false));
        let pace = Pace::new(NonZeroU64::new(1), stop.clone());
        let waits = std::thread::spawn(move || pace.pass(1 << 40));
        stop.store(true, Ordering::Release);
        let error = waits.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the attempt was given up");
    }
}
