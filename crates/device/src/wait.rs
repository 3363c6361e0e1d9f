//! Waiting for a device without giving the thread away.

use std::thread;
use std::time::{Duration, Instant};

use lacuna_cuda::{CudaError, Event, Stream};

/// Longest wait for the device: far above what any of these kernels takes.
const DEADLINE: Duration = Duration::from_secs(120);
/// Pauses between two looks at the device.
const PAUSE_MIN: Duration = Duration::from_micros(5);
const PAUSE_MAX: Duration = Duration::from_micros(200);

/// A device that failed or does not answer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// CUDA refused something, or reports that earlier work failed.
    #[error("failed to {action} on the device")]
    Cuda {
        /// What was done.
        action: &'static str,
        /// What the driver said.
        #[source]
        source: CudaError,
    },
    /// Work did not come to its end.
    #[error("the device did not {action} within {DEADLINE:?}")]
    Timeout {
        /// What was done.
        action: &'static str,
    },
}

impl DeviceError {
    /// Tells whether the device had no memory left, and nothing else is wrong.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::Cuda { source, .. } if source.is_out_of_memory())
    }
}

/// Waits until `stream` has passed everything that it holds by now.
pub(crate) fn drain(
    event: &Event,
    stream: &Stream,
    action: &'static str,
) -> Result<(), DeviceError> {
    event.record(stream).map_err(|source| DeviceError::Cuda { action, source })?;
    until_passed(event, action)
}

/// Waits until the mark of `event` is passed.
pub(crate) fn until_passed(event: &Event, action: &'static str) -> Result<(), DeviceError> {
    let (deadline, mut pause) = (Instant::now() + DEADLINE, PAUSE_MIN);
    while !event.is_done().map_err(|source| DeviceError::Cuda { action, source })? {
        if Instant::now() >= deadline {
            return Err(DeviceError::Timeout { action });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
    Ok(())
}
