//! Images on their way from the loader's bytes to the model's input.

use lacuna_cuda::{Arg, CudaError, DeviceBuffer, Event, PinnedBuffer, Stream};

use crate::Kernels;
use crate::wait::{DeviceError, until_passed};

const F32: usize = size_of::<f32>();

/// The images of a slot: bytes cross the bus, and become values on the device.
#[derive(Debug)]
pub struct Pixels {
    kernels: Kernels,
    stream: Stream,
    /// Marks the end of the copy, after which the host's side may be filled again.
    pub(crate) copied: Event,
    host: PinnedBuffer,
    bytes: DeviceBuffer,
    table: DeviceBuffer,
    pub(crate) values: DeviceBuffer,
    shape: Shape,
}

/// Sizes of a slot's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub images: usize,
    /// Pixels of an image.
    pub plane: usize,
    /// Values of a pixel.
    pub channels: usize,
}

impl Shape {
    /// Returns the number of values.
    pub fn n_values(self) -> usize {
        self.images * self.plane * self.channels
    }
}

impl Pixels {
    /// Allocates for slots of one shape; `table` holds the values of all bytes, 256 a channel.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], mostly because memory runs out.
    pub fn new(kernels: &Kernels, table: &[f32], shape: Shape) -> Result<Self, DeviceError> {
        assert_eq!(table.len(), 256 * shape.channels, "one value per byte and channel");
        let failed = |source| DeviceError::Cuda { action: "allocate images", source };
        let mut pixels = Self::allocate(kernels, shape).map_err(failed)?;
        let bytes: &[u8] = bytemuck::cast_slice(table);
        let mut host = PinnedBuffer::new(&kernels.device, bytes.len()).map_err(failed)?;
        host.bytes_mut().copy_from_slice(bytes);
        // SAFETY: the wait below ends before `host` does.
        let loaded = unsafe { pixels.table.load(&host, bytes.len(), &pixels.stream) };
        loaded.and_then(|()| pixels.copied.record(&pixels.stream)).map_err(failed)?;
        until_passed(&pixels.copied, "load the table of values")?;
        Ok(pixels)
    }

    fn allocate(kernels: &Kernels, shape: Shape) -> Result<Self, CudaError> {
        let (device, n) = (&kernels.device, shape.n_values());
        Ok(Self {
            stream: Stream::legacy(device),
            copied: Event::new(device)?,
            host: PinnedBuffer::new(device, n)?,
            bytes: DeviceBuffer::new(device, n)?,
            table: DeviceBuffer::new(device, 256 * shape.channels * F32)?,
            values: DeviceBuffer::new(device, n * F32)?,
            kernels: kernels.clone(),
            shape,
        })
    }

    /// Returns the address of the values, `[b, c, h, w]`; it stays the same.
    pub fn address(&self) -> u64 {
        self.values.as_ptr() as u64
    }

    /// Enqueues that the values become those of `pixels`, `[b, h, w, c]`.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn load(&mut self, pixels: &[u8]) -> Result<(), DeviceError> {
        const ACTION: &str = "load images";
        let n: usize = self.shape.n_values();
        assert_eq!(pixels.len(), n, "the slot has its shape");
        let failed = |source| DeviceError::Cuda { action: ACTION, source };
        until_passed(&self.copied, ACTION)?;
        self.host.bytes_mut()[..n].copy_from_slice(pixels);
        // SAFETY: the host's side is not filled again before `copied` has been passed.
        unsafe { self.bytes.load(&self.host, n, &self.stream) }.map_err(failed)?;
        self.copied.record(&self.stream).map_err(failed)?;
        let args = [
            Arg::of(&self.bytes, 0),
            Arg::of(&self.table, 0),
            Arg::of(&self.values, 0),
            Arg::U64(n as u64),
            Arg::U64(self.shape.plane as u64),
            Arg::U64(self.shape.channels as u64),
        ];
        let grid = self.kernels.grid_for(n);
        // SAFETY: the kernel's arguments, and whole buffers.
        unsafe { self.kernels.normalise.launch(grid, &args, &self.stream) }.map_err(failed)
    }
}
