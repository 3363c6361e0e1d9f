//! Switches of libtorch that tch does not offer, through a small C++ file (`shim/context.cpp`).
//!
//! They belong to the process: set them before threads compute.

use std::ffi::{c_char, c_int, c_long};

/// Which kernels libtorch may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    /// Only kernels that give the same bits each time; an operation that has none fails.
    pub deterministic: bool,
    /// Matrix products of f32 may round their inputs to ten bits of mantissa.
    pub tf32: bool,
}

/// The kernels that the numerics of a run ask for: the same bits each time, f32 in full.
pub const EXACT: Kernels = Kernels { deterministic: true, tf32: false };

/// libtorch refused a switch.
#[derive(Debug, thiserror::Error)]
#[error("libtorch refuses to use {kernels:?}")]
pub struct KernelsError {
    /// What was asked for.
    pub kernels: Kernels,
}

const DETERMINISTIC: c_int = 1;
const TF32: c_int = 2;

/// Room for what libtorch says about its CUDA libraries; it takes a tenth of it.
const CONFIG_BYTES: usize = 4096;

unsafe extern "C" {
    safe fn lacuna_torch_set_flags(flags: c_int) -> c_int;
    safe fn lacuna_torch_flags() -> c_int;
    safe fn lacuna_torch_cuda_runtime() -> c_long;
    safe fn lacuna_torch_give_back_memory() -> c_int;
    fn lacuna_torch_cuda_config(out: *mut c_char, n: usize) -> c_long;
    safe fn _exit(code: c_int) -> !;
}

/// Ends the process at once. An ordinary end destroys what libtorch keeps for all threads, under
/// the feet of one that computes.
pub fn end_process(code: u8) -> ! {
    _exit(code.into())
}

/// Chooses the kernels of this process.
pub fn set_kernels(kernels: Kernels) -> Result<(), KernelsError> {
    let deterministic = if kernels.deterministic { DETERMINISTIC } else { 0 };
    let tf32 = if kernels.tf32 { TF32 } else { 0 };
    let done = lacuna_torch_set_flags(deterministic | tf32) == 0;
    if done && self::kernels() == Some(kernels) { Ok(()) } else { Err(KernelsError { kernels }) }
}

/// Returns the kernels of this process, or `None` where libtorch's switches contradict each other.
pub fn kernels() -> Option<Kernels> {
    let flags = lacuna_torch_flags();
    let kernels = Kernels { deterministic: flags & DETERMINISTIC != 0, tf32: flags & TF32 != 0 };
    (flags >= 0).then_some(kernels)
}

/// Gives memory of CUDA devices that libtorch keeps and does not use back to the driver. Does
/// nothing where its CUDA part is not loaded.
pub fn give_back_memory() {
    if lacuna_torch_give_back_memory() != 0 {
        tracing::debug!("libtorch keeps the memory that it does not use");
    }
}

/// Returns the version of the CUDA runtime, `13.0`, where libtorch's CUDA part is loaded.
pub fn cuda_runtime() -> Option<String> {
    let version = lacuna_torch_cuda_runtime();
    (version > 0).then(|| cuda_version(version as i64))
}

/// Returns what libtorch says about its CUDA libraries, where its CUDA part is loaded.
pub fn cuda_config() -> Option<String> {
    let mut text: Vec<u8> = vec![0; CONFIG_BYTES];
    // SAFETY: the function writes at most `text.len()` bytes to `text`.
    let n = unsafe { lacuna_torch_cuda_config(text.as_mut_ptr().cast::<c_char>(), text.len()) };
    text.truncate(usize::try_from(n).ok()?);
    Some(String::from_utf8_lossy(&text).trim().to_string())
}

/// Writes a version as people do: 13000 is `13.0`.
pub(crate) fn cuda_version(number: i64) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}
