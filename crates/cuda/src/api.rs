//! Functions of `libcuda`, looked up by name.

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};

use libloading::Library;

/// `CUdeviceptr`.
pub(crate) type DevicePtr = u64;
/// `CUcontext`, `CUstream`, `CUevent`: handles whose target only the driver knows.
pub(crate) type Handle = *mut c_void;

/// `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_NOT_READY`: no error, but the answer of a query.
pub(crate) const NOT_READY: c_int = 600;

macro_rules! functions {
    ($($field:ident: $symbol:literal ($($argument:ty),* $(,)?);)*) => {
        /// The driver's functions, each with the signature of `cuda.h`; all return a `CUresult`.
        pub(crate) struct Api {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Api {
            /// Looks all functions up; the error is the name of the one that is missing.
            pub fn find(library: &Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the one that `cuda.h` declares for this symbol.
                    let $field = unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol)
                            .map_err(|_| $symbol)?
                    };
                )*
                Ok(Self { $($field,)* })
            }
        }
    };
}

functions! {
    init: "cuInit" (c_uint);
    driver_version: "cuDriverGetVersion" (*mut c_int);
    device_count: "cuDeviceGetCount" (*mut c_int);
    device_get: "cuDeviceGet" (*mut c_int, c_int);
    device_name: "cuDeviceGetName" (*mut c_char, c_int, c_int);
    device_bus_id: "cuDeviceGetPCIBusId" (*mut c_char, c_int, c_int);
    device_memory: "cuDeviceTotalMem_v2" (*mut usize, c_int);
    device_attribute: "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    context_retain: "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
    context_release: "cuDevicePrimaryCtxRelease_v2" (c_int);
    context_set: "cuCtxSetCurrent" (Handle);
    stream_create: "cuStreamCreate" (*mut Handle, c_uint);
    stream_destroy: "cuStreamDestroy_v2" (Handle);
    stream_query: "cuStreamQuery" (Handle);
    stream_wait: "cuStreamWaitEvent" (Handle, Handle, c_uint);
    event_create: "cuEventCreate" (*mut Handle, c_uint);
    event_destroy: "cuEventDestroy_v2" (Handle);
    event_record: "cuEventRecord" (Handle, Handle);
    event_query: "cuEventQuery" (Handle);
    memory_alloc: "cuMemAlloc_v2" (*mut DevicePtr, usize);
    memory_free: "cuMemFree_v2" (DevicePtr);
    memory_info: "cuMemGetInfo_v2" (*mut usize, *mut usize);
    host_alloc: "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    host_free: "cuMemFreeHost" (*mut c_void);
    copy_to_device: "cuMemcpyHtoDAsync_v2" (DevicePtr, *const c_void, usize, Handle);
    copy_to_host: "cuMemcpyDtoHAsync_v2" (*mut c_void, DevicePtr, usize, Handle);
    copy_there: "cuMemcpyDtoDAsync_v2" (DevicePtr, DevicePtr, usize, Handle);
    fill: "cuMemsetD8Async" (DevicePtr, c_uchar, usize, Handle);
    module_load: "cuModuleLoadData" (*mut Handle, *const c_void);
    module_unload: "cuModuleUnload" (Handle);
    module_function: "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
    launch: "cuLaunchKernel" (
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
        *mut *mut c_void, *mut *mut c_void
    );
    error_name: "cuGetErrorName" (c_int, *mut *const c_char);
    error_text: "cuGetErrorString" (c_int, *mut *const c_char);
}
