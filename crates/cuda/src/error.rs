//! What can go wrong, by what a caller can do about it.

/// Why a device cannot be used, or a call that the driver refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver is installed, or not where the loader looks.
    #[error("no NVIDIA driver: {reason}")]
    DriverMissing {
        /// The loader's words.
        reason: String,
    },
    /// The driver lacks a function.
    #[error("the NVIDIA driver in `{library}` is too old: it has no `{symbol}`")]
    DriverTooOld {
        /// File of the driver.
        library: String,
        /// Name of the function.
        symbol: &'static str,
    },
    /// The driver works and shows this process no device.
    #[error("the NVIDIA driver shows no device (CUDA_VISIBLE_DEVICES is {visible})")]
    NoDevice {
        /// Value of the variable that hides devices.
        visible: String,
    },
    /// There are devices, but not the one asked for.
    #[error("there is no CUDA device {ordinal}: the driver shows {n_devices}")]
    NoSuchDevice {
        /// Number asked for, from 0.
        ordinal: u32,
        /// Devices that the driver shows.
        n_devices: u32,
    },
    /// The driver refused a call, or reports that earlier work on the device failed.
    #[error("`{call}` failed: {text} ({name}, {code})")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// Name of the error, `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's words.
        text: String,
        /// The driver's number of the error.
        code: i32,
    },
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;

impl CudaError {
    /// Tells whether memory ran out, which leaves the device usable.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Call { code: OUT_OF_MEMORY, .. })
    }

    /// Tells whether the process has lost the device for good.
    ///
    /// After a fault of a kernel or of the device itself every call of the context fails the same
    /// way, and only a new process gets a new context (`cuda.h` says so of each of these numbers).
    pub fn is_sticky(&self) -> bool {
        // Illegal address, launch time-out, assert, stack error, illegal instruction, misaligned
        // address, invalid address space, invalid program counter, launch failure, and memory or
        // link errors that the hardware could not correct.
        const STICKY: [i32; 12] = [214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999];
        matches!(self, Self::Call { code, .. } if STICKY.contains(code))
    }
}
