//! A state and the sums of a step, in a device's memory.

use std::ops::Range;
use std::sync::Arc;

use lacuna_cuda::{Arg, CudaError, Device, DeviceBuffer, Event, Function, PinnedBuffer, Stream};
use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::reduce::{CONTROL_LANES, ControlWord, exp2, slot_limit};
use lacuna_recipe::state::{Layout, Section, TensorDigests};

use crate::aside::Shelf;
use crate::crc;
use crate::kernels::Kernels;
use crate::wait::{DeviceError, drain};

/// Partial sums of squares: enough threads to read at a device's rate, few enough to add on the
/// host. Decides the bits of the norm.
const PARTS: usize = 1 << 15;
/// Bytes of which one thread computes the CRC.
const PIECE_BYTES: usize = 4096;
/// Size of the buffer through which sections travel to the host and back.
const STAGING_BYTES: usize = 16 << 20;

const F32: usize = size_of::<f32>();
const I64: usize = size_of::<i64>();
const U64: usize = size_of::<u64>();

/// Numbers of one update of the whole state.
#[derive(Clone, Copy, Debug)]
pub struct Updating<'a> {
    /// Constants of the optimizer.
    pub adamw: &'a AdamW,
    /// Learning rate.
    pub lr: f64,
    /// Number of the update, from 1.
    pub t: u64,
    /// Whether `cls_token` and `mask_token` are decayed.
    pub decay_tokens: bool,
}

/// Parameters, moments and sums on one device.
#[derive(Debug)]
pub struct DeviceState {
    kernels: Kernels,
    layout: Arc<Layout>,
    n_slots: u32,
    exponents: Vec<i32>,
    stream: Stream,
    event: Event,
    /// Parameters and both moments, flat f32 in layout order.
    sections: [DeviceBuffer; 3],
    /// Flat i64 in layout order, and the control word behind.
    sums: DeviceBuffer,
    /// Flat f32.
    mean: DeviceBuffer,
    /// One u32.
    flags: DeviceBuffer,
    /// Bits of the largest magnitude of each tensor, u32.
    max_bits: DeviceBuffer,
    /// f64.
    parts: DeviceBuffer,
    /// Eight tables of 256 u64.
    tables: DeviceBuffer,
    /// CRCs of pieces, u64.
    crcs: DeviceBuffer,
    host: PinnedBuffer,
    /// Memory of copies that were read.
    shelf: Shelf,
}

impl DeviceState {
    /// Allocates a state of zeros for steps of `n_slots` slots.
    ///
    /// It takes 28 bytes of the device's memory for each parameter.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], mostly because memory runs out.
    pub fn new(kernels: &Kernels, layout: Arc<Layout>, n_slots: u32) -> Result<Self, DeviceError> {
        let made = Self::allocate(kernels, layout, n_slots);
        let mut state =
            made.map_err(|source| DeviceError::Cuda { action: "allocate a state", source })?;
        for section in &mut state.sections {
            let filled = section.fill(0, &state.stream);
            filled.map_err(|source| DeviceError::Cuda { action: "clear a state", source })?;
        }
        let tables: Vec<u64> = crc::tables();
        state.host.bytes_mut()[..tables.len() * U64].copy_from_slice(bytemuck::cast_slice(&tables));
        // SAFETY: `wait` follows, and the buffers live as long as `state`.
        let loaded = unsafe { state.tables.load(&state.host, tables.len() * U64, &state.stream) };
        loaded.map_err(|source| DeviceError::Cuda { action: "load tables", source })?;
        state.wait("load tables")?;
        Ok(state)
    }

    fn allocate(kernels: &Kernels, layout: Arc<Layout>, n_slots: u32) -> Result<Self, CudaError> {
        let device: &Device = &kernels.device;
        let (n, n_blocks) = (layout.numel(), layout.n_blocks());
        let buffer = |n_bytes: usize| DeviceBuffer::new(device, n_bytes);
        Ok(Self {
            exponents: vec![0; n_blocks],
            stream: Stream::legacy(device),
            event: Event::new(device)?,
            sections: [buffer(n * F32)?, buffer(n * F32)?, buffer(n * F32)?],
            sums: buffer((n + CONTROL_LANES) * I64)?,
            mean: buffer(n * F32)?,
            flags: buffer(4)?,
            max_bits: buffer(n_blocks * 4)?,
            parts: buffer(PARTS * 8)?,
            tables: buffer(8 * 256 * U64)?,
            crcs: buffer((n * F32).div_ceil(PIECE_BYTES) * U64)?,
            host: PinnedBuffer::new(
                device,
                STAGING_BYTES.max((n * F32).div_ceil(PIECE_BYTES) * U64),
            )?,
            kernels: kernels.clone(),
            layout,
            n_slots,
            shelf: Shelf::default(),
        })
    }

    /// Returns the tensors of the state in canonical order.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        &self.kernels.device
    }

    pub(crate) fn section(&self, section: Section) -> &DeviceBuffer {
        &self.sections[section as usize]
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// Returns the address of a section on the device: flat f32 in layout order. It stays the same
    /// for the life of the state.
    pub fn address(&self, section: Section) -> u64 {
        self.sections[section as usize].as_ptr() as u64
    }

    /// Starts a step whose exponents are `exponents`.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn begin(&mut self, exponents: &[i32]) -> Result<(), DeviceError> {
        self.exponents.copy_from_slice(exponents);
        let cleared = self.sums.fill(0, &self.stream);
        let cleared = cleared.and_then(|()| self.flags.fill(0, &self.stream));
        cleared.map_err(|source| DeviceError::Cuda { action: "clear the sums", source })
    }

    /// Adds one slot's gradient of one tensor.
    ///
    /// # Safety
    /// At `gradient` the device holds one f32 for each element of the tensor, contiguous, until the
    /// legacy stream has passed the addition.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub unsafe fn add(&mut self, block: usize, gradient: u64) -> Result<(), DeviceError> {
        let range: Range<usize> = self.layout.range(block);
        let args = [
            Arg::Address(gradient),
            Arg::of(&self.sums, range.start * I64),
            Arg::of(&self.flags, 0),
            Arg::U64(range.len() as u64),
            Arg::F64(exp2(self.exponents[block])),
            Arg::F64(slot_limit(self.n_slots)),
        ];
        // SAFETY: the kernel's arguments, and ranges inside the buffers; the caller answers for
        // the gradient.
        unsafe { self.launch("add a gradient", &self.kernels.quantise_add, range.len(), &args) }
    }

    /// Puts the control word behind the sums, with what became of this rank's gradients, and
    /// returns the buffer to be summed over ranks.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn close(&mut self, word: &mut ControlWord) -> Result<&mut DeviceBuffer, DeviceError> {
        let flags: u32 = self.fetch::<u32>("read the flags", Which::Flags, 1)?[0];
        word.flag(flags & 1 != 0, flags & 2 != 0);
        let at: usize = self.layout.numel() * I64;
        let lanes: &[u8] = bytemuck::cast_slice(word.lanes());
        self.host.bytes_mut()[..lanes.len()].copy_from_slice(lanes);
        let n_bytes: usize = lanes.len();
        // SAFETY: `wait` follows before anybody touches the host's buffer again.
        let loaded = unsafe { self.sums.load_at(at, &self.host, n_bytes, &self.stream) };
        loaded.map_err(|source| DeviceError::Cuda { action: "write the control word", source })?;
        self.wait("write the control word")?;
        Ok(&mut self.sums)
    }

    /// Returns the control word of the summed buffer.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn word(&mut self) -> Result<ControlWord, DeviceError> {
        let lanes: Vec<i64> = self.fetch("read the control word", Which::Word, CONTROL_LANES)?;
        let lanes = lanes.try_into().expect("as many lanes as were asked for");
        Ok(ControlWord::of_sum(self.n_slots, lanes))
    }

    /// Computes the mean gradient of the summed buffer; returns its Euclidean norm and the largest
    /// magnitude of each tensor.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn mean(&mut self) -> Result<(f64, Vec<f32>), DeviceError> {
        const ACTION: &str = "compute the mean gradient";
        let failed = |source| DeviceError::Cuda { action: ACTION, source };
        self.max_bits.fill(0, &self.stream).map_err(failed)?;
        for block in 0..self.layout.n_blocks() {
            let range: Range<usize> = self.layout.range(block);
            let args = [
                Arg::of(&self.sums, range.start * I64),
                Arg::of(&self.mean, range.start * F32),
                Arg::of(&self.max_bits, block * 4),
                Arg::U64(range.len() as u64),
                Arg::F64(exp2(-self.exponents[block])),
                Arg::F64(f64::from(self.n_slots)),
            ];
            // SAFETY: the kernel's arguments, and ranges inside the buffers.
            unsafe { self.launch(ACTION, &self.kernels.mean_of, range.len(), &args) }?;
        }
        let args = [
            Arg::of(&self.mean, 0),
            Arg::of(&self.parts, 0),
            Arg::U64(self.layout.numel() as u64),
            Arg::U64(PARTS as u64),
        ];
        // SAFETY: the kernel's arguments, and whole buffers.
        unsafe { self.launch(ACTION, &self.kernels.squares, PARTS, &args) }?;
        let parts: Vec<f64> = self.fetch(ACTION, Which::Parts, PARTS)?;
        let bits: Vec<u32> = self.fetch(ACTION, Which::MaxBits, self.layout.n_blocks())?;
        let norm: f64 = parts.iter().sum::<f64>().sqrt();
        Ok((norm, bits.into_iter().map(f32::from_bits).collect()))
    }

    /// Returns the buffer to be summed over ranks, its numbers, and the stream that fills it.
    pub fn sums(&mut self) -> (&mut DeviceBuffer, usize, &Stream) {
        (&mut self.sums, self.layout.numel() + CONTROL_LANES, &self.stream)
    }

    /// Copies the buffer to be summed to the host.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn read_sums(&mut self) -> Result<Vec<i64>, DeviceError> {
        let mut sums: Vec<i64> = vec![0; self.layout.numel() + CONTROL_LANES];
        self.download("read the sums", Large::Sums, 0, bytemuck::cast_slice_mut(&mut sums))?;
        Ok(sums)
    }

    /// Overwrites the summed buffer.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn write_sums(&mut self, sums: &[i64]) -> Result<(), DeviceError> {
        assert_eq!(sums.len(), self.layout.numel() + CONTROL_LANES, "one sum per number");
        self.upload("write the sums", Large::Sums, 0, bytemuck::cast_slice(sums))
    }

    /// Overwrites the mean gradient.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn write_mean(&mut self, mean: &[f32]) -> Result<(), DeviceError> {
        assert_eq!(mean.len(), self.layout.numel(), "one gradient per element");
        self.upload("write the mean gradient", Large::Mean, 0, bytemuck::cast_slice(mean))
    }

    /// Waits until the device has done everything.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn finish(&mut self) -> Result<(), DeviceError> {
        self.wait("finish its work")
    }

    /// Applies one update with the mean gradient that was computed last.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn apply(&mut self, update: &Updating<'_>) -> Result<(), DeviceError> {
        for (block, spec) in self.layout.params().iter().enumerate() {
            let range: Range<usize> = self.layout.range(block);
            let decays: bool = spec.decays(update.decay_tokens);
            let scalars = update.adamw.update_f32(update.lr, update.t, decays).to_array();
            let at: usize = range.start * F32;
            let mut args: Vec<Arg> =
                self.sections.iter().chain([&self.mean]).map(|b| Arg::of(b, at)).collect();
            args.push(Arg::U64(range.len() as u64));
            args.extend(scalars.map(Arg::F32));
            // SAFETY: the kernel's arguments, and ranges inside the buffers.
            unsafe { self.launch("apply an update", &self.kernels.adamw, range.len(), &args) }?;
        }
        Ok(())
    }

    /// Copies `range` of a flat section to the host.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn read(
        &mut self,
        section: Section,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        assert_eq!(range.len(), out.len(), "one value per element");
        let (which, at) = (Large::Section(section), range.start * F32);
        self.download("read a section", which, at, bytemuck::cast_slice_mut(out))
    }

    /// Overwrites a flat section from element `at` on.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn write(
        &mut self,
        section: Section,
        at: usize,
        values: &[f32],
    ) -> Result<(), DeviceError> {
        let which = Large::Section(section);
        self.upload("write a section", which, at * F32, bytemuck::cast_slice(values))
    }

    /// Computes the digests of every tensor's sections, in canonical order.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn tensor_digests(&mut self) -> Result<Vec<TensorDigests>, DeviceError> {
        (0..self.layout.n_blocks())
            .map(|block| {
                let mut digests: TensorDigests = Default::default();
                for section in Section::ALL {
                    digests[section as usize] = self.digest(section, block)?;
                }
                Ok(digests)
            })
            .collect()
    }

    fn digest(&mut self, section: Section, block: usize) -> Result<Crc64, DeviceError> {
        const ACTION: &str = "compute a digest";
        let range: Range<usize> = self.layout.range(block);
        let n_bytes: usize = range.len() * F32;
        let n_pieces: usize = n_bytes.div_ceil(PIECE_BYTES);
        let args = [
            Arg::of(&self.sections[section as usize], range.start * F32),
            Arg::of(&self.tables, 0),
            Arg::of(&self.crcs, 0),
            Arg::U64(n_bytes as u64),
            Arg::U64(PIECE_BYTES as u64),
            Arg::U64(n_pieces as u64),
        ];
        // SAFETY: the kernel's arguments, and ranges inside the buffers.
        unsafe { self.launch(ACTION, &self.kernels.crc64_pieces, n_pieces, &args) }?;
        let crcs: Vec<u64> = self.fetch(ACTION, Which::Crcs, n_pieces)?;
        let piece = |(k, value): (usize, u64)| {
            let bytes = PIECE_BYTES.min(n_bytes - k * PIECE_BYTES) as u64;
            Crc64 { value, bytes }
        };
        let pieces = crcs.into_iter().enumerate().map(piece);
        Ok(pieces.fold(Crc64::default(), Crc64::then))
    }

    /// Copies bytes of a buffer from byte `at` on to the host.
    fn download(
        &mut self,
        action: &'static str,
        which: Large,
        mut at: usize,
        out: &mut [u8],
    ) -> Result<(), DeviceError> {
        for piece in out.chunks_mut(STAGING_BYTES) {
            let source: &DeviceBuffer = match which {
                Large::Section(section) => &self.sections[section as usize],
                Large::Sums => &self.sums,
                Large::Mean => &self.mean,
            };
            // SAFETY: `wait` follows before the host's buffer is read.
            let stored = unsafe { source.store_at(at, &mut self.host, piece.len(), &self.stream) };
            stored.map_err(|source| DeviceError::Cuda { action, source })?;
            self.wait(action)?;
            piece.copy_from_slice(&self.host.bytes()[..piece.len()]);
            at += piece.len();
        }
        Ok(())
    }

    /// Overwrites bytes of a buffer from byte `at` on.
    fn upload(
        &mut self,
        action: &'static str,
        which: Large,
        mut at: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        for piece in bytes.chunks(STAGING_BYTES) {
            self.host.bytes_mut()[..piece.len()].copy_from_slice(piece);
            let target: &mut DeviceBuffer = match which {
                Large::Section(section) => &mut self.sections[section as usize],
                Large::Sums => &mut self.sums,
                Large::Mean => &mut self.mean,
            };
            // SAFETY: `wait` follows before the host's buffer is written again.
            let loaded = unsafe { target.load_at(at, &self.host, piece.len(), &self.stream) };
            loaded.map_err(|source| DeviceError::Cuda { action, source })?;
            self.wait(action)?;
            at += piece.len();
        }
        Ok(())
    }

    /// Enqueues a kernel with a thread for each of `n` elements, up to a device's worth.
    ///
    /// # Safety
    /// See [`Function::launch`].
    unsafe fn launch(
        &self,
        action: &'static str,
        function: &Function,
        n: usize,
        args: &[Arg],
    ) -> Result<(), DeviceError> {
        if n == 0 {
            return Ok(());
        }
        let grid = self.kernels.grid_for(n);
        // SAFETY: by the caller.
        let launched = unsafe { function.launch(grid, args, &self.stream) };
        launched.map_err(|source| DeviceError::Cuda { action, source })
    }

    /// Waits for all work and reads numbers.
    fn fetch<T: bytemuck::Pod>(
        &mut self,
        action: &'static str,
        which: Which,
        n: usize,
    ) -> Result<Vec<T>, DeviceError> {
        let (buffer, at) = match which {
            Which::Flags => (&self.flags, 0),
            Which::Word => (&self.sums, self.layout.numel() * I64),
            Which::Parts => (&self.parts, 0),
            Which::MaxBits => (&self.max_bits, 0),
            Which::Crcs => (&self.crcs, 0),
        };
        let n_bytes: usize = n * size_of::<T>();
        if n_bytes == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: `wait` follows before the host's buffer is read.
        let stored = unsafe { buffer.store_at(at, &mut self.host, n_bytes, &self.stream) };
        stored.map_err(|source| DeviceError::Cuda { action, source })?;
        self.wait(action)?;
        let mut out: Vec<T> = vec![T::zeroed(); n];
        bytemuck::cast_slice_mut::<T, u8>(&mut out).copy_from_slice(&self.host.bytes()[..n_bytes]);
        Ok(out)
    }

    /// Waits until the stream has passed everything.
    fn wait(&self, action: &'static str) -> Result<(), DeviceError> {
        drain(&self.event, &self.stream, action)
    }
}

/// Buffers as large as the state.
#[derive(Clone, Copy, Debug)]
enum Large {
    Section(Section),
    Sums,
    Mean,
}

/// Small buffers that the host reads.
#[derive(Clone, Copy, Debug)]
enum Which {
    Flags,
    Word,
    Parts,
    MaxBits,
    Crcs,
}
