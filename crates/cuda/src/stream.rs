//! Order of work on a device, and marks in it.

use std::ffi::{c_int, c_uint, c_void};

use crate::api::{Api, Handle, NOT_READY};
use crate::{CudaError, Device};

/// `CU_STREAM_NON_BLOCKING`: no implicit order with the legacy default stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`: the event only marks a place.
const DISABLE_TIMING: c_uint = 2;

/// A queue of work on a device; what is enqueued runs in order.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    handle: Handle,
}

// SAFETY: the driver's calls on streams are thread-safe, and the handle never changes.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let mut handle: Handle = std::ptr::null_mut();
        device.call("cuStreamCreate", |api| {
            // SAFETY: the first argument points to a live handle.
            unsafe { (api.stream_create)(&raw mut handle, NON_BLOCKING) }
        })?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Returns the legacy default stream of the device's context, on which libraries work that are
    /// told no other, libtorch among them.
    pub fn legacy(device: &Device) -> Self {
        Self { device: device.clone(), handle: std::ptr::null_mut() }
    }

    /// Returns the driver's handle, a `CUstream`, which is the runtime's `cudaStream_t` too.
    pub fn as_raw(&self) -> *mut c_void {
        self.handle
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Tells whether everything enqueued so far has run.
    ///
    /// # Errors
    /// [`CudaError::Call`], also for faults of earlier work on the device.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is live.
        query(&self.device, "cuStreamQuery", |api| unsafe { (api.stream_query)(self.handle) })
    }

    /// Lets work enqueued from here on wait until `event` is done.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.device.call("cuStreamWaitEvent", |api| {
            // SAFETY: both handles are live.
            unsafe { (api.stream_wait)(self.handle, event.handle, 0) }
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.handle.is_null() {
            return;
        }
        // SAFETY: the handle is live and used by nobody any more. The driver frees a stream with
        // work in it once the work is done, and does not wait.
        self.device.release(|api| unsafe { (api.stream_destroy)(self.handle) });
    }
}

/// A mark in a stream, which can be asked whether the stream has passed it.
#[derive(Debug)]
pub struct Event {
    device: Device,
    handle: Handle,
}

// SAFETY: the driver's calls on events are thread-safe, and the handle never changes.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event that no stream holds yet, and which counts as done.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let mut handle: Handle = std::ptr::null_mut();
        device.call("cuEventCreate", |api| {
            // SAFETY: the first argument points to a live handle.
            unsafe { (api.event_create)(&raw mut handle, DISABLE_TIMING) }
        })?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Marks the place behind everything that `stream` holds by now.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.call("cuEventRecord", |api| {
            // SAFETY: both handles are live.
            unsafe { (api.event_record)(self.handle, stream.handle) }
        })
    }

    /// Tells whether the stream has passed the newest mark.
    ///
    /// # Errors
    /// [`CudaError::Call`], also for faults of earlier work on the device.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is live.
        query(&self.device, "cuEventQuery", |api| unsafe { (api.event_query)(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is live and used by nobody any more; the driver does not wait.
        self.device.release(|api| unsafe { (api.event_destroy)(self.handle) });
    }
}

fn query(
    device: &Device,
    name: &'static str,
    ask: impl FnOnce(&Api) -> c_int,
) -> Result<bool, CudaError> {
    let mut pending: bool = false;
    device.call(name, |api| match ask(api) {
        NOT_READY => {
            pending = true;
            0
        }
        code => code,
    })?;
    Ok(!pending)
}
