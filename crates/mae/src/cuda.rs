//! The CUDA half of libtorch, opened at run time.
//!
//! Binaries link the CPU half only and start on every machine. [`load`] adds the other half to a
//! running process. Nothing calls it unless a CUDA device is asked for.

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use lacuna_cuda::{DeviceInfo, Driver, DriverVersion};

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
    /// Versions of the driver.
    pub driver: DriverVersion,
    /// Devices in the order in which libtorch numbers them.
    pub devices: Vec<DeviceInfo>,
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
    /// The driver is missing, too old or broken, or shows this process no device.
    #[error(transparent)]
    Driver(#[from] lacuna_cuda::CudaError),
    /// The driver shows devices and libtorch does not see them.
    #[error(
        "libtorch sees {seen} devices and the NVIDIA driver shows {n_devices}: the driver is for \
         CUDA {driver} and older, libtorch for {runtime}; where that fits, something asked for \
         CUDA before its library was loaded"
    )]
    NotSeen {
        /// Devices that libtorch sees.
        seen: i64,
        /// Devices that the driver shows.
        n_devices: usize,
        /// Newest CUDA that the driver serves.
        driver: String,
        /// CUDA of libtorch's runtime.
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
    let found = Driver::load(None)?;
    let (driver, devices) = (found.version()?, found.devices()?);
    let runtime = context::cuda_runtime();
    let seen = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
    if seen != devices.len() as i64 {
        let runtime = runtime.map_or("an unknown one".into(), |version| format!("CUDA {version}"));
        let (n_devices, driver) = (devices.len(), driver.cuda);
        return Err(CudaError::NotSeen { seen, n_devices, driver, runtime });
    }
    let runtime = runtime.unwrap_or_else(|| "unknown".into());
    let config = context::cuda_config().unwrap_or_default();
    Ok(CudaLibrary { path, runtime, config, driver, devices })
}

/// Returns NVRTC's file where it came with libtorch.
pub fn nvrtc() -> Option<PathBuf> {
    nvrtc_near(&loaded(CPU_LIBRARY)?)
}

/// Wheels lie side by side, `torch/lib` and `nvidia/cu13/lib`; other packages of libtorch have all
/// libraries in one folder, some under names with a digest: `libnvrtc-….so.13`.
fn nvrtc_near(torch: &Path) -> Option<PathBuf> {
    let beside = torch.parent()?;
    let wheel = beside.parent()?.parent()?.join("nvidia/cu13/lib/libnvrtc.so.13");
    if wheel.is_file() {
        return Some(wheel);
    }
    let is_nvrtc = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let other = name.contains("builtins") || name.contains(".alt.");
        name.starts_with("libnvrtc") && name.contains(".so") && !other
    };
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(beside).ok()?.flatten().map(|e| e.path()).collect();
    found.sort();
    found.into_iter().find(is_nvrtc)
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
        open(path).map_err(broken)?;
        return Ok(path.clone());
    }
    match open(Path::new(LIBRARY)) {
        Ok(()) => Ok(loaded(LIBRARY).unwrap_or_else(|| PathBuf::from(LIBRARY))),
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

/// Opens a shared library for good, its symbols for all; the error is the loader's message.
fn open(path: &Path) -> Result<(), String> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| "the path holds a zero byte".to_string())?;
    // SAFETY: `name` is a C string. The initialisers of the library are libtorch's, made to run in
    // a process at any time.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
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
