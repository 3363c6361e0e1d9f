//! The CUDA half of libtorch, opened at run time.
//!
//! Binaries link the CPU half only and start on every machine. [`load`] adds the other half to a
//! running process. Nothing calls it unless a CUDA device is asked for.

mod driver;

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

pub use driver::{CudaDevice, DriverInfo};

use crate::context;

const LIBRARY: &str = "libtorch_cuda.so";
const CPU_LIBRARY: &str = "libtorch_cpu.so";

/// CUDA as this process can use it. It stays loaded until the process ends.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaLibrary {
    /// File of the CUDA half.
    pub path: PathBuf,
    /// Version of the CUDA runtime that libtorch loaded, `13.0`.
    pub runtime: String,
    /// What libtorch says about its CUDA libraries, several lines.
    pub config: String,
    /// The driver.
    pub driver: DriverInfo,
    /// Devices in the order in which libtorch numbers them.
    pub devices: Vec<CudaDevice>,
}

/// Why a process cannot use CUDA.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// This libtorch has no CUDA half, or it lies where nothing looks.
    #[error(
        "no CUDA library: `libtorch_cuda.so` is not at {tried}, nor where the loader looks \
         (LD_LIBRARY_PATH)"
    )]
    LibraryMissing {
        /// Files that were looked for.
        tried: String,
    },
    /// The CUDA half is there and does not load, mostly because it misses a library.
    #[error("the CUDA library `{path}` does not load: {reason}")]
    LibraryBroken {
        /// The file.
        path: String,
        /// The loader's words.
        reason: String,
    },
    /// No driver is installed.
    #[error("no NVIDIA driver: {reason}")]
    DriverMissing {
        /// The loader's words.
        reason: String,
    },
    /// The driver refuses a call.
    #[error("the NVIDIA driver refuses `{call}`: {reason} ({code})")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The driver's words.
        reason: String,
        /// The driver's number of the error.
        code: i32,
    },
    /// The driver lacks a function that every driver for this libtorch has.
    #[error("the NVIDIA driver is too old: it has no `{symbol}`")]
    DriverTooOld {
        /// Name of the function.
        symbol: &'static str,
    },
    /// The driver works and has no device for this process.
    #[error("the NVIDIA driver shows no device (CUDA_VISIBLE_DEVICES is {visible})")]
    NoDevice {
        /// Value of the variable that hides devices.
        visible: String,
    },
    /// The driver shows devices and libtorch does not see them.
    #[error(
        "libtorch sees {seen} of the {n_devices} devices of the NVIDIA driver: the driver is older \
         than CUDA {runtime} needs, or something asked for CUDA before its library was loaded"
    )]
    NotSeen {
        /// Devices that libtorch sees.
        seen: i64,
        /// Devices that the driver shows.
        n_devices: usize,
        /// Version of libtorch's CUDA runtime.
        runtime: String,
    },
}

/// Loads the CUDA half of libtorch into this process and lists the devices.
///
/// Must run before anything asks libtorch about CUDA, `tch::Cuda::is_available` included: the
/// answer "none" of a process without the library is remembered for good. A second call finds
/// everything loaded.
///
/// The library is looked for beside the CPU half in use, in `$LIBTORCH/lib`, and where the loader
/// looks.
pub fn load() -> Result<CudaLibrary, CudaError> {
    let places = places(loaded(CPU_LIBRARY), std::env::var_os("LIBTORCH"));
    let path = open_library(&places)?;
    let (driver, devices) = driver::query()?;
    let runtime = context::cuda_runtime().unwrap_or_else(|| "unknown".into());
    let seen = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
    if seen != devices.len() as i64 {
        return Err(CudaError::NotSeen { seen, n_devices: devices.len(), runtime });
    }
    let config = context::cuda_config().unwrap_or_default();
    Ok(CudaLibrary { path, runtime, config, driver, devices })
}

/// Returns NVRTC's file where it came with libtorch: wheels lie side by side, `torch/lib` and
/// `nvidia/cu13/lib`.
pub fn nvrtc() -> Option<PathBuf> {
    let torch = loaded(CPU_LIBRARY)?;
    let wheels = torch.parent()?.parent()?.parent()?;
    let path = wheels.join("nvidia/cu13/lib/libnvrtc.so.13");
    path.is_file().then_some(path)
}

/// Lists where the CUDA half may lie: beside the CPU half, then in the libtorch of the environment.
fn places(cpu: Option<PathBuf>, libtorch: Option<OsString>) -> Vec<PathBuf> {
    let beside = cpu.map(|cpu| cpu.with_file_name(LIBRARY));
    let own = libtorch.map(|root| Path::new(&root).join("lib").join(LIBRARY));
    let mut places: Vec<PathBuf> = beside.into_iter().chain(own).collect();
    places.dedup();
    places
}

/// Opens the first library that is there, else asks the loader for the plain name.
fn open_library(places: &[PathBuf]) -> Result<PathBuf, CudaError> {
    if let Some(path) = places.iter().find(|path| path.exists()) {
        let broken = |reason| CudaError::LibraryBroken { path: path.display().to_string(), reason };
        open(path, libc::RTLD_NOW | libc::RTLD_GLOBAL).map_err(broken)?;
        return Ok(path.clone());
    }
    match open(Path::new(LIBRARY), libc::RTLD_NOW | libc::RTLD_GLOBAL) {
        Ok(_) => Ok(loaded(LIBRARY).unwrap_or_else(|| PathBuf::from(LIBRARY))),
        // The loader names the file it misses first; another name is a need of the library.
        Err(reason) if reason.starts_with(LIBRARY) => {
            let quoted: Vec<String> =
                places.iter().map(|path| format!("`{}`", path.display())).collect();
            Err(CudaError::LibraryMissing { tried: quoted.join(", ") })
        }
        Err(reason) => Err(CudaError::LibraryBroken { path: LIBRARY.into(), reason }),
    }
}

/// Returns the file of a shared library that this process has loaded.
fn loaded(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    find_mapping(&maps, name)
}

/// Finds the file `name` in the text of `/proc/self/maps`.
fn find_mapping(maps: &str, name: &str) -> Option<PathBuf> {
    let path_of = |line: &str| line.find('/').map(|start| PathBuf::from(&line[start..]));
    maps.lines().filter_map(path_of).find(|path| path.file_name().is_some_and(|file| file == name))
}

/// A library opened for good.
#[derive(Clone, Copy, Debug)]
struct Handle(*mut libc::c_void);

/// Opens a shared library; the error is the loader's message.
fn open(path: &Path, flags: libc::c_int) -> Result<Handle, String> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| "the path holds a zero byte".to_string())?;
    // SAFETY: `name` is a C string. The initialisers of the library are libtorch's or the driver's,
    // made to run in a process at any time.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if !handle.is_null() {
        return Ok(Handle(handle));
    }
    // SAFETY: called right after the failure on the same thread; the message is a C string that
    // lives until this thread's next call of the loader, and is copied before.
    let message = unsafe {
        let message = libc::dlerror();
        (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
    };
    Err(message.unwrap_or_else(|| "the loader gives no reason".into()))
}

#[cfg(test)]
mod tests;
