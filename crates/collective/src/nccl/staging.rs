//! The way of host memory to the device and back.

use std::ffi::c_void;

use lacuna_cuda::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, Stream};

/// A piece of memory on both sides, and the stream on which it travels.
///
/// Dropping frees it: not before the stream has passed everything, or an abort has returned.
pub(super) struct Staging {
    stream: Stream,
    event: Event,
    host: PinnedBuffer,
    device: DeviceBuffer,
}

impl Staging {
    /// Size of a piece: large enough for any link's full rate, small beside any device. A multiple
    /// of every element's size.
    pub const BYTES: usize = 16 << 20;

    pub fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            stream: Stream::new(device)?,
            event: Event::new(device)?,
            host: PinnedBuffer::new(device, Self::BYTES)?,
            device: DeviceBuffer::new(device, Self::BYTES)?,
        })
    }

    /// Lets what is enqueued from here on wait until `other` has passed what it holds by now.
    pub fn follow(&self, other: &Stream) -> Result<(), CudaError> {
        self.event.record(other)?;
        self.stream.wait_for(&self.event)
    }

    /// Marks the end of what is enqueued.
    pub fn mark(&self) -> Result<(), CudaError> {
        self.event.record(&self.stream)
    }

    /// Enqueues the copy of a piece to the device.
    pub fn load(&mut self, piece: &[u8]) -> Result<(), CudaError> {
        self.host.bytes_mut()[..piece.len()].copy_from_slice(piece);
        // SAFETY: both buffers live as long as `self`, whose owner waits for `is_done` before it
        // loads again; after a fault it never does.
        unsafe { self.device.load(&self.host, piece.len(), &self.stream) }
    }

    /// Enqueues the copy of the first bytes back, and marks the end.
    pub fn store(&mut self, n_bytes: usize) -> Result<(), CudaError> {
        // SAFETY: as above; the bytes are read by `take`, which follows `is_done`.
        unsafe { self.device.store(&mut self.host, n_bytes, &self.stream) }?;
        self.mark()
    }

    /// Tells whether everything up to the last mark has passed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.event.is_done()
    }

    /// Copies what came back; only after [`is_done`](Self::is_done).
    pub fn take(&self, piece: &mut [u8]) {
        piece.copy_from_slice(&self.host.bytes()[..piece.len()]);
    }

    pub fn address(&self) -> *mut c_void {
        self.device.as_ptr()
    }

    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.as_raw()
    }
}
