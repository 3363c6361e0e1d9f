//! The library, and what it says of itself and its devices.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::api::{Api, SUCCESS};
use crate::{CudaError, Device};

/// The driver's library; its number is that of the interface, not of a version.
const LIBRARY: &str = "libcuda.so.1";
/// Where the kernel's half of the driver says its version.
const VERSION_FILE: &str = "/proc/driver/nvidia/version";
/// Longer than any device's name.
const NAME_BYTES: usize = 256;

/// Numbers of `CUdevice_attribute`.
const MULTIPROCESSOR_COUNT: c_int = 16;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;

/// The NVIDIA driver of this machine; cheap to clone. Stays loaded until the process ends.
#[derive(Clone)]
pub struct Driver {
    shared: Arc<Shared>,
}

struct Shared {
    api: Api,
    library: String,
    /// Never closed: the driver has threads of its own.
    _handle: ManuallyDrop<libloading::Library>,
}

/// Versions that the driver names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverVersion {
    /// Newest CUDA that it serves, `13.0`.
    pub cuda: String,
    /// Its own version, `580.65.06`, where the system tells it.
    pub driver: Option<String>,
}

/// One device, as people know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name of the product.
    pub name: String,
    /// Size of its memory.
    pub memory_bytes: u64,
    /// Compute capability: (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

impl DeviceInfo {
    /// Writes the compute capability as people do, `9.0`.
    pub fn capability_text(&self) -> String {
        let (major, minor) = self.capability;
        format!("{major}.{minor}")
    }
}

impl Driver {
    /// Loads the driver, from `path` or from where the loader finds it, and initialises it.
    ///
    /// # Errors
    /// [`CudaError::DriverMissing`], [`CudaError::DriverTooOld`], and [`CudaError::NoDevice`] where
    /// the library is there and the machine has no device for it.
    pub fn load(path: Option<&Path>) -> Result<Self, CudaError> {
        let name: &Path = path.unwrap_or(Path::new(LIBRARY));
        // SAFETY: the initialisers of the driver are made to run in a process at any time.
        let handle = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
        let handle: libloading::Library =
            handle.map_err(|err| CudaError::DriverMissing { reason: reason(&err) })?.into();
        let library: String = name.display().to_string();
        let too_old = |symbol| CudaError::DriverTooOld { library: library.clone(), symbol };
        let api: Api = Api::find(&handle).map_err(too_old)?;
        let shared = Shared { api, library, _handle: ManuallyDrop::new(handle) };
        let driver = Self { shared: Arc::new(shared) };
        // SAFETY: the flags must be 0; any thread may call it, any number of times.
        let code: c_int = unsafe { (driver.api().init)(0) };
        /// `CUDA_ERROR_NO_DEVICE`.
        const NO_DEVICE: c_int = 100;
        if code == NO_DEVICE || (code == SUCCESS && driver.n_devices()? == 0) {
            return Err(no_device());
        }
        driver.check("cuInit", code)?;
        Ok(driver)
    }

    /// Returns the file that was loaded, as it was asked for.
    pub fn library(&self) -> &str {
        &self.shared.library
    }

    /// Returns the number of devices that this process may use.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn n_devices(&self) -> Result<u32, CudaError> {
        let mut n: c_int = 0;
        // SAFETY: the argument points to a live int.
        self.check("cuDeviceGetCount", unsafe { (self.api().device_count)(&raw mut n) })?;
        Ok(n.unsigned_abs())
    }

    /// Returns the driver's versions.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn version(&self) -> Result<DriverVersion, CudaError> {
        let mut number: c_int = 0;
        // SAFETY: the argument points to a live int.
        let code = unsafe { (self.api().driver_version)(&raw mut number) };
        self.check("cuDriverGetVersion", code)?;
        let cuda = format!("{}.{}", number / 1000, number % 1000 / 10);
        let text: String = std::fs::read_to_string(VERSION_FILE).unwrap_or_default();
        Ok(DriverVersion { cuda, driver: kernel_version(&text) })
    }

    /// Opens a device by its number among those that this process sees, from 0.
    ///
    /// # Errors
    /// [`CudaError::NoSuchDevice`], and [`CudaError::Call`] where the device is not usable.
    pub fn device(&self, ordinal: u32) -> Result<Device, CudaError> {
        let n_devices: u32 = self.n_devices()?;
        if ordinal >= n_devices {
            return Err(CudaError::NoSuchDevice { ordinal, n_devices });
        }
        Device::open(self, ordinal as c_int)
    }

    /// Describes all devices, in the driver's order.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError> {
        (0..self.n_devices()?).map(|ordinal| self.info(ordinal as c_int)).collect()
    }

    pub(crate) fn info(&self, ordinal: c_int) -> Result<DeviceInfo, CudaError> {
        let api: &Api = self.api();
        let mut device: c_int = 0;
        // SAFETY: the first argument points to a live int.
        self.check("cuDeviceGet", unsafe { (api.device_get)(&raw mut device, ordinal) })?;
        let mut name: [u8; NAME_BYTES] = [0; NAME_BYTES];
        let out: *mut c_char = name.as_mut_ptr().cast();
        // SAFETY: `out` has room for as many bytes as the call is told.
        let code = unsafe { (api.device_name)(out, NAME_BYTES as c_int, device) };
        self.check("cuDeviceGetName", code)?;
        let mut memory_bytes: usize = 0;
        // SAFETY: the first argument points to a live size.
        let code = unsafe { (api.device_memory)(&raw mut memory_bytes, device) };
        self.check("cuDeviceTotalMem", code)?;
        let attribute = |attribute: c_int| {
            let mut value: c_int = 0;
            // SAFETY: the first argument points to a live int.
            let code = unsafe { (api.device_attribute)(&raw mut value, attribute, device) };
            self.check("cuDeviceGetAttribute", code).map(|()| value.unsigned_abs())
        };
        let name: &CStr = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(DeviceInfo {
            name: name.to_string_lossy().into_owned(),
            memory_bytes: memory_bytes as u64,
            capability: (
                attribute(COMPUTE_CAPABILITY_MAJOR)?,
                attribute(COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(MULTIPROCESSOR_COUNT)?,
        })
    }

    pub(crate) fn api(&self) -> &Api {
        &self.shared.api
    }

    /// Turns a `CUresult` into a result.
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        let words = |find: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: the second argument points to a live pointer.
            unsafe { find(code, &raw mut text) };
            // SAFETY: where the driver knows the number it points to a constant C string.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into())
        };
        let name = words(self.api().error_name).unwrap_or_else(|| "unknown".to_string());
        let text = words(self.api().error_text).unwrap_or_else(|| "an unknown error".to_string());
        Err(CudaError::Call { call, name, text, code })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("library", &self.shared.library).finish_non_exhaustive()
    }
}

/// The loader's own words, without what wraps them.
fn reason(err: &libloading::Error) -> String {
    std::error::Error::source(err).map_or_else(|| err.to_string(), ToString::to_string)
}

fn no_device() -> CudaError {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES");
    let visible = visible.map_or_else(|_| "not set".to_string(), |value| format!("`{value}`"));
    CudaError::NoDevice { visible }
}

/// Finds the version in the driver's line: the first word of numbers and dots.
pub(crate) fn kernel_version(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_string)
}
