//! Names and sizes of devices, asked of the NVIDIA driver: tch cannot tell them.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::path::Path;

use super::{CudaError, Handle, open};
use crate::context::cuda_version;

const LIBRARY: &str = "libcuda.so.1";
/// Where the kernel's half of the driver says its version.
const VERSION_FILE: &str = "/proc/driver/nvidia/version";
/// Longer than any device's name.
const NAME_BYTES: usize = 256;

/// Numbers of `CUdevice_attribute` in `cuda.h`.
const MULTIPROCESSOR_COUNT: c_int = 16;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;

/// The installed driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverInfo {
    /// Newest CUDA that it serves, `13.0`.
    pub cuda: String,
    /// Its own version, `580.65.06`, where the system tells it.
    pub version: Option<String>,
}

/// One CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Name of the product.
    pub name: String,
    /// Size of its memory.
    pub memory_bytes: u64,
    /// Compute capability, `9.0`.
    pub capability: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

/// Asks the driver about itself and its devices.
pub(super) fn query() -> Result<(DriverInfo, Vec<CudaDevice>), CudaError> {
    let driver = Driver::open()?;
    driver.check("cuInit", (driver.init)(0))?;
    let mut number: c_int = 0;
    driver.check("cuDriverGetVersion", (driver.version)(&raw mut number))?;
    let text = std::fs::read_to_string(VERSION_FILE).unwrap_or_default();
    let info = DriverInfo { cuda: cuda_version(number.into()), version: kernel_version(&text) };
    let mut n_devices: c_int = 0;
    driver.check("cuDeviceGetCount", (driver.count)(&raw mut n_devices))?;
    if n_devices == 0 {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES");
        let visible = visible.map_or_else(|_| "not set".into(), |value| format!("`{value}`"));
        return Err(CudaError::NoDevice { visible });
    }
    let devices: Result<Vec<CudaDevice>, CudaError> =
        (0..n_devices).map(|ordinal| driver.device(ordinal)).collect();
    Ok((info, devices?))
}

/// Finds the version in the driver's line: the first word of numbers and dots.
pub(super) fn kernel_version(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_string)
}

/// Functions of `cuda.h`, each with its C signature. `CUresult` and `CUdevice` are C ints.
///
/// The types are safe to call because every use in this file passes pointers to live values of the
/// named types; nothing outside it can.
struct Driver {
    init: extern "C" fn(c_uint) -> c_int,
    version: extern "C" fn(*mut c_int) -> c_int,
    count: extern "C" fn(*mut c_int) -> c_int,
    get: extern "C" fn(*mut c_int, c_int) -> c_int,
    name: extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    memory: extern "C" fn(*mut usize, c_int) -> c_int,
    attribute: extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    error_text: extern "C" fn(c_int, *mut *const c_char) -> c_int,
}

impl Driver {
    fn open() -> Result<Self, CudaError> {
        let handle = open(Path::new(LIBRARY), libc::RTLD_NOW)
            .map_err(|reason| CudaError::DriverMissing { reason })?;
        // SAFETY: each field has the C signature that `cuda.h` declares for its symbol, and the
        // library stays loaded.
        unsafe {
            Ok(Driver {
                init: symbol(handle, "cuInit")?,
                version: symbol(handle, "cuDriverGetVersion")?,
                count: symbol(handle, "cuDeviceGetCount")?,
                get: symbol(handle, "cuDeviceGet")?,
                name: symbol(handle, "cuDeviceGetName")?,
                memory: symbol(handle, "cuDeviceTotalMem_v2")?,
                attribute: symbol(handle, "cuDeviceGetAttribute")?,
                error_text: symbol(handle, "cuGetErrorString")?,
            })
        }
    }

    fn device(&self, ordinal: c_int) -> Result<CudaDevice, CudaError> {
        let mut device: c_int = 0;
        self.check("cuDeviceGet", (self.get)(&raw mut device, ordinal))?;
        let mut name: [u8; NAME_BYTES] = [0; NAME_BYTES];
        let out = name.as_mut_ptr().cast::<c_char>();
        self.check("cuDeviceGetName", (self.name)(out, NAME_BYTES as c_int, device))?;
        let mut memory: usize = 0;
        self.check("cuDeviceTotalMem", (self.memory)(&raw mut memory, device))?;
        let attribute = |attribute: c_int| {
            let mut value: c_int = 0;
            let code = (self.attribute)(&raw mut value, attribute, device);
            self.check("cuDeviceGetAttribute", code).map(|()| value)
        };
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        let (major, minor) =
            (attribute(COMPUTE_CAPABILITY_MAJOR)?, attribute(COMPUTE_CAPABILITY_MINOR)?);
        Ok(CudaDevice {
            name: name.to_string_lossy().into_owned(),
            memory_bytes: memory as u64,
            capability: format!("{major}.{minor}"),
            multiprocessors: attribute(MULTIPROCESSOR_COUNT)?.unsigned_abs(),
        })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let mut text: *const c_char = std::ptr::null();
        (self.error_text)(code, &raw mut text);
        let reason = if text.is_null() {
            "an unknown error".to_string()
        } else {
            // SAFETY: the driver points to a constant C string of its own.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Err(CudaError::Driver { call, reason, code })
    }
}

/// Looks a function up.
///
/// # Safety
/// `F` must be an `extern "C"` function pointer with the symbol's signature.
unsafe fn symbol<F: Copy>(library: Handle, symbol: &'static str) -> Result<F, CudaError> {
    assert_eq!(size_of::<F>(), size_of::<*mut libc::c_void>(), "`F` is a function pointer");
    let name = CString::new(symbol).expect("names of functions hold no zero byte");
    // SAFETY: the handle is open and the name is a C string.
    let address = unsafe { libc::dlsym(library.0, name.as_ptr()) };
    if address.is_null() {
        return Err(CudaError::DriverTooOld { symbol });
    }
    // SAFETY: the address is a function of the caller's signature, and `F` is as large as it.
    Ok(unsafe { std::mem::transmute_copy::<*mut libc::c_void, F>(&address) })
}
