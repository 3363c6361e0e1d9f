//! Kernels: loaded, found and started.

use std::ffi::{CString, c_uint, c_void};
use std::sync::Arc;

use crate::api::Handle;
use crate::{CudaError, Device, DeviceBuffer, Stream};

/// Compiled kernels on a device; cheap to clone, unloaded with its last function.
#[derive(Clone, Debug)]
pub struct Module {
    shared: Arc<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    device: Device,
    handle: Handle,
}

// SAFETY: the driver's calls on modules are thread-safe, and the handle never changes.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Module {
    /// Loads a cubin that was compiled for this device's architecture.
    ///
    /// # Errors
    /// [`CudaError::Call`], mostly because the cubin is for another architecture.
    pub fn load(device: &Device, cubin: &[u8]) -> Result<Self, CudaError> {
        let mut handle: Handle = std::ptr::null_mut();
        device.call("cuModuleLoadData", |api| {
            // SAFETY: the first argument points to a live handle; a cubin says its own size.
            unsafe { (api.module_load)(&raw mut handle, cubin.as_ptr().cast::<c_void>()) }
        })?;
        Ok(Self { shared: Arc::new(Loaded { device: device.clone(), handle }) })
    }

    /// Finds a kernel.
    ///
    /// # Errors
    /// [`CudaError::Call`] if there is none of this name.
    ///
    /// # Panics
    /// If the name holds a zero byte.
    pub fn function(&self, name: &str) -> Result<Function, CudaError> {
        let text = CString::new(name).expect("names of kernels hold no zero byte");
        let mut handle: Handle = std::ptr::null_mut();
        let Loaded { device, handle: module } = &*self.shared;
        device.call("cuModuleGetFunction", |api| {
            // SAFETY: the first argument points to a live handle; the name is a C string.
            unsafe { (api.module_function)(&raw mut handle, *module, text.as_ptr()) }
        })?;
        Ok(Function { module: self.clone(), handle })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: loaded by this value; all its functions are gone.
        self.device.release(|api| unsafe { (api.module_unload)(self.handle) });
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Function {
    module: Module,
    handle: Handle,
}

// SAFETY: the driver's calls on functions are thread-safe, and the handle never changes.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How many threads a kernel gets, in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Thread blocks.
    pub blocks: u32,
    /// Threads of each.
    pub threads: u32,
}

/// One argument of a kernel; its C type is that of the variant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// An address on the device.
    Address(u64),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
}

impl Arg {
    /// The address of byte `at` of a buffer.
    ///
    /// # Panics
    /// If it lies outside.
    pub fn of(buffer: &DeviceBuffer, at: usize) -> Self {
        assert!(at <= buffer.n_bytes(), "byte {at} lies outside of {} bytes", buffer.n_bytes());
        Self::Address(buffer.as_ptr() as u64 + at as u64)
    }
}

impl Function {
    /// Enqueues the kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and type. Until `stream` has passed
    /// it, all memory that it touches stays allocated, and nobody else writes it or reads what is
    /// written.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub unsafe fn launch(
        &self,
        grid: Grid,
        args: &[Arg],
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let place = |arg: &Arg| -> *mut c_void {
            match arg {
                Arg::Address(value) | Arg::U64(value) => {
                    std::ptr::from_ref(value).cast_mut().cast()
                }
                Arg::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::F64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            }
        };
        let mut places: Vec<*mut c_void> = args.iter().map(place).collect();
        let (blocks, threads): (c_uint, c_uint) = (grid.blocks, grid.threads);
        self.module.shared.device.call("cuLaunchKernel", |api| {
            // SAFETY: the driver copies the arguments before it returns; by the caller they are the
            // kernel's.
            unsafe {
                (api.launch)(
                    self.handle,
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    stream.as_raw(),
                    places.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        })
    }
}
