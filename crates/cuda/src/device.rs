//! A device and its primary context.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::sync::Arc;

use crate::api::{Api, Handle};
use crate::{CudaError, DeviceInfo, Driver};

/// Longer than any bus id.
const BUS_ID_BYTES: usize = 32;

/// A device that this process uses; cheap to clone. Its primary context, the one that the CUDA
/// runtime uses too, is held until the last clone is gone.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
}

struct Shared {
    driver: Driver,
    ordinal: c_int,
    device: c_int,
    context: Handle,
}

// SAFETY: a context is a handle that the driver lets any thread make current; `Shared` never
// changes it, and the driver's calls are thread-safe.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Device {
    pub(crate) fn open(driver: &Driver, ordinal: c_int) -> Result<Self, CudaError> {
        let api: &Api = driver.api();
        let mut device: c_int = 0;
        // SAFETY: the first argument points to a live int.
        driver.check("cuDeviceGet", unsafe { (api.device_get)(&raw mut device, ordinal) })?;
        let mut context: Handle = std::ptr::null_mut();
        // SAFETY: the first argument points to a live handle.
        let code = unsafe { (api.context_retain)(&raw mut context, device) };
        driver.check("cuDevicePrimaryCtxRetain", code)?;
        let shared = Shared { driver: driver.clone(), ordinal, device, context };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Returns the driver.
    pub fn driver(&self) -> &Driver {
        &self.shared.driver
    }

    /// Returns its number among the devices that this process sees, from 0.
    pub fn ordinal(&self) -> u32 {
        self.shared.ordinal.unsigned_abs()
    }

    /// Describes it.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn info(&self) -> Result<DeviceInfo, CudaError> {
        self.shared.driver.info(self.shared.ordinal)
    }

    /// Returns its place on this machine's bus, `0000:3b:00.0`: the same whatever number a process
    /// gives it.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn bus_id(&self) -> Result<String, CudaError> {
        let mut text: [u8; BUS_ID_BYTES] = [0; BUS_ID_BYTES];
        self.call("cuDeviceGetPCIBusId", |api| {
            let out: *mut c_char = text.as_mut_ptr().cast();
            // SAFETY: `out` has room for as many bytes as the call is told.
            unsafe { (api.device_bus_id)(out, BUS_ID_BYTES as c_int, self.shared.device) }
        })?;
        let text: &CStr = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        Ok(text.to_string_lossy().to_ascii_lowercase())
    }

    /// Makes the device's context current on this thread, as libraries that take no device expect.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self`.
        let code = unsafe { (self.api().context_set)(self.shared.context) };
        self.shared.driver.check("cuCtxSetCurrent", code)
    }

    /// Returns free and total memory in bytes.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let (mut free, mut total): (usize, usize) = (0, 0);
        self.call("cuMemGetInfo", |api| {
            // SAFETY: both arguments point to live sizes.
            unsafe { (api.memory_info)(&raw mut free, &raw mut total) }
        })?;
        Ok((free, total))
    }

    pub(crate) fn api(&self) -> &Api {
        self.shared.driver.api()
    }

    /// Makes a call with the device's context current.
    pub(crate) fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&Api) -> c_int,
    ) -> Result<(), CudaError> {
        self.make_current()?;
        self.shared.driver.check(name, call(self.api()))
    }

    /// Makes a call that frees something: a failure leaks it and is nobody's business.
    pub(crate) fn release(&self, free: impl FnOnce(&Api) -> c_int) {
        if self.make_current().is_ok() {
            free(self.api());
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: balances the retain of `open`; nothing of this crate uses the context any more,
        // since whatever does holds the device.
        unsafe { (self.driver.api().context_release)(self.device) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("ordinal", &self.shared.ordinal).finish_non_exhaustive()
    }
}
