//! The kernels of `kernels/exact.cu`, compiled for a device.

use lacuna_cuda::{
    Architecture, CompileError, Compiler, CudaError, Device, Function, Grid, Module,
};

/// Their source.
pub const SOURCE: &str = include_str!("../kernels/exact.cu");
const NAME: &str = "exact.cu";

/// Threads of a block: a multiple of a warp that keeps every multiprocessor busy.
const THREADS: u32 = 256;
/// Most blocks of a launch: several for each multiprocessor of any device; threads loop.
const BLOCKS_MAX: usize = 4096;

/// The kernels on one device; cheap to clone.
#[derive(Clone, Debug)]
pub struct Kernels {
    pub(crate) device: Device,
    /// What all launches get, where it is not chosen by the number of elements.
    pub(crate) grid: Option<Grid>,
    pub(crate) quantise_add: Function,
    pub(crate) mean_of: Function,
    pub(crate) squares: Function,
    pub(crate) adamw: Function,
    pub(crate) crc64_pieces: Function,
    pub(crate) normalise: Function,
}

/// Kernels that a device does not get.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelsError {
    /// They do not compile: no NVRTC, or one that does not know the device.
    #[error("the kernels cannot be compiled")]
    Compile(#[source] CompileError),
    /// They do not load.
    #[error("the kernels cannot be loaded")]
    Load(#[source] CudaError),
}

impl Kernels {
    /// Compiles for a device and loads.
    ///
    /// # Errors
    /// [`KernelsError`].
    pub fn compile(device: &Device, compiler: &Compiler) -> Result<Self, KernelsError> {
        let info = device.info().map_err(KernelsError::Load)?;
        let architecture = Architecture::of(info.capability);
        let cubin = compiler.compile(NAME, SOURCE, &architecture).map_err(KernelsError::Compile)?;
        Self::load(device, &cubin).map_err(KernelsError::Load)
    }

    fn load(device: &Device, cubin: &[u8]) -> Result<Self, CudaError> {
        let module = Module::load(device, cubin)?;
        Ok(Self {
            device: device.clone(),
            grid: None,
            quantise_add: module.function("quantise_add")?,
            mean_of: module.function("mean_of")?,
            squares: module.function("squares")?,
            adamw: module.function("adamw")?,
            crc64_pieces: module.function("crc64_pieces")?,
            normalise: module.function("normalise")?,
        })
    }

    /// The same kernels, all launched with `grid`: no bit depends on it.
    pub(crate) fn with_grid(&self, grid: Option<Grid>) -> Self {
        Self { grid, ..self.clone() }
    }

    /// A thread for each of `n` elements, up to a device's worth.
    pub(crate) fn grid_for(&self, n: usize) -> Grid {
        let blocks = n.div_ceil(THREADS as usize).clamp(1, BLOCKS_MAX);
        self.grid.unwrap_or(Grid { blocks: blocks as u32, threads: THREADS })
    }
}
