//! Memory of a device, and memory of the host that a device reads and writes by itself.

use std::ffi::{c_uint, c_void};

use crate::api::DevicePtr;
use crate::{CudaError, Device, Stream};

/// `CU_MEMHOSTALLOC_PORTABLE`: pinned for all contexts.
const PORTABLE: c_uint = 1;

/// Memory on a device, 256-byte aligned, not initialised.
///
/// Freeing waits for work on the device: leak it (`std::mem::forget`) where that may never end.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Device,
    start: DevicePtr,
    n_bytes: usize,
}

impl DeviceBuffer {
    /// Allocates; `n_bytes` of 0 becomes 1, which the driver insists on.
    ///
    /// # Errors
    /// [`CudaError::Call`]; see [`CudaError::is_out_of_memory`].
    pub fn new(device: &Device, n_bytes: usize) -> Result<Self, CudaError> {
        let (mut start, n_bytes): (DevicePtr, usize) = (0, n_bytes.max(1));
        device.call("cuMemAlloc", |api| {
            // SAFETY: the first argument points to a live address.
            unsafe { (api.memory_alloc)(&raw mut start, n_bytes) }
        })?;
        Ok(Self { device: device.clone(), start, n_bytes })
    }

    /// Returns its size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns its address on the device.
    pub fn as_ptr(&self) -> *mut c_void {
        self.start as *mut c_void
    }

    /// Enqueues that all bytes become `byte`.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn fill(&mut self, byte: u8, stream: &Stream) -> Result<(), CudaError> {
        self.device.call("cuMemsetD8Async", |api| {
            // SAFETY: the range is the buffer. Freeing it waits for the stream, as the driver does.
            unsafe { (api.fill)(self.start, byte, self.n_bytes, stream.as_raw()) }
        })
    }

    /// Enqueues a copy of the first `n_bytes` of `source` to the start of this buffer.
    ///
    /// # Safety
    /// Until `stream` has passed the copy both buffers stay allocated, `source` is not written, and
    /// no other stream touches this one.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    ///
    /// # Panics
    /// If either buffer is smaller.
    pub unsafe fn load(
        &mut self,
        source: &PinnedBuffer,
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        // SAFETY: by the caller.
        unsafe { self.load_at(0, source, n_bytes, stream) }
    }

    /// Enqueues a copy of the first `n_bytes` of `source` to this buffer from byte `at` on.
    ///
    /// # Safety
    /// See [`load`](Self::load).
    ///
    /// # Errors
    /// [`CudaError::Call`].
    ///
    /// # Panics
    /// If either buffer is smaller.
    pub unsafe fn load_at(
        &mut self,
        at: usize,
        source: &PinnedBuffer,
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let start: DevicePtr = self.range(at, n_bytes);
        assert!(n_bytes <= source.n_bytes, "the copy fits");
        self.device.call("cuMemcpyHtoDAsync", |api| {
            // SAFETY: both ranges lie inside their buffers; the caller answers for the rest.
            unsafe { (api.copy_to_device)(start, source.start, n_bytes, stream.as_raw()) }
        })
    }

    /// Enqueues a copy of the first `n_bytes` of this buffer to the start of `target`.
    ///
    /// # Safety
    /// Until `stream` has passed the copy both buffers stay allocated, `target` is neither read nor
    /// written, and no other stream writes this one.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    ///
    /// # Panics
    /// If either buffer is smaller.
    pub unsafe fn store(
        &self,
        target: &mut PinnedBuffer,
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        // SAFETY: by the caller.
        unsafe { self.store_at(0, target, n_bytes, stream) }
    }

    /// Enqueues a copy of `n_bytes` of this buffer from byte `at` on to the start of `target`.
    ///
    /// # Safety
    /// See [`store`](Self::store).
    ///
    /// # Errors
    /// [`CudaError::Call`].
    ///
    /// # Panics
    /// If either buffer is smaller.
    pub unsafe fn store_at(
        &self,
        at: usize,
        target: &mut PinnedBuffer,
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let start: DevicePtr = self.range(at, n_bytes);
        assert!(n_bytes <= target.n_bytes, "the copy fits");
        self.device.call("cuMemcpyDtoHAsync", |api| {
            // SAFETY: both ranges lie inside their buffers; the caller answers for the rest.
            unsafe { (api.copy_to_host)(target.start, start, n_bytes, stream.as_raw()) }
        })
    }

    /// Enqueues a copy of `n_bytes` of `source` from byte `from` on to this buffer from byte `at`
    /// on.
    ///
    /// # Safety
    /// Until `stream` has passed the copy both buffers stay allocated, no other stream writes
    /// `source`, and none touches this one.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    ///
    /// # Panics
    /// If either buffer is smaller.
    pub unsafe fn copy_at(
        &mut self,
        at: usize,
        (source, from): (&DeviceBuffer, usize),
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let (target, source) = (self.range(at, n_bytes), source.range(from, n_bytes));
        self.device.call("cuMemcpyDtoDAsync", |api| {
            // SAFETY: both ranges lie inside their buffers; the caller answers for the rest.
            unsafe { (api.copy_there)(target, source, n_bytes, stream.as_raw()) }
        })
    }

    /// Returns the address of byte `at`, from which `n_bytes` lie inside.
    fn range(&self, at: usize, n_bytes: usize) -> DevicePtr {
        let fits = at.checked_add(n_bytes).is_some_and(|end| end <= self.n_bytes);
        assert!(fits, "{n_bytes} bytes at {at} do not fit a buffer of {}", self.n_bytes);
        self.start + at as u64
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this value, and freed once.
        self.device.release(|api| unsafe { (api.memory_free)(self.start) });
    }
}

/// Page-locked memory of the host, which a device copies from and to by itself. Not initialised by
/// the driver, and zeroed here.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Device,
    start: *mut c_void,
    n_bytes: usize,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access only reads it.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Allocates zeroed memory; `n_bytes` of 0 becomes 1, which the driver insists on.
    ///
    /// # Errors
    /// [`CudaError::Call`]; see [`CudaError::is_out_of_memory`].
    pub fn new(device: &Device, n_bytes: usize) -> Result<Self, CudaError> {
        let (mut start, n_bytes): (*mut c_void, usize) = (std::ptr::null_mut(), n_bytes.max(1));
        device.call("cuMemHostAlloc", |api| {
            // SAFETY: the first argument points to a live address.
            unsafe { (api.host_alloc)(&raw mut start, n_bytes, PORTABLE) }
        })?;
        // SAFETY: the driver just allocated this many bytes there.
        unsafe { start.cast::<u8>().write_bytes(0, n_bytes) };
        Ok(Self { device: device.clone(), start, n_bytes })
    }

    /// Returns its size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Returns its bytes, for when no copy is under way (see [`DeviceBuffer::store`]).
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated, initialised, and borrowed through `self`; whoever enqueued a copy
        // answers for its time.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), self.n_bytes) }
    }

    /// Returns its bytes for writing, for when no copy is under way (see [`DeviceBuffer::load`]).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast::<u8>(), self.n_bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this value, and freed once.
        self.device.release(|api| unsafe { (api.host_free)(self.start) });
    }
}
