//! Functions and types of `nccl.h`.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `ncclComm_t`.
pub(crate) type RawComm = *mut c_void;
/// `ncclResult_t`.
pub(crate) type RawResult = c_int;
/// `cudaStream_t`.
type Stream = *mut c_void;

/// `NCCL_UNIQUE_ID_BYTES`.
pub(crate) const UNIQUE_ID_BYTES: usize = 128;

/// `ncclUniqueId`: passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawUniqueId {
    pub internal: [u8; UNIQUE_ID_BYTES],
}

/// `NCCL_CONFIG_UNDEF_INT`: the library decides.
pub(crate) const UNDEFINED: c_int = c_int::MIN;
/// `NCCL_API_MAGIC`.
const MAGIC: c_uint = 0xcafe_beef;
/// Version of the structure below: `NCCL_VERSION(2, 18, 0)`.
const CONFIG_VERSION: c_uint = 21_800;

/// `ncclConfig_t` as of NCCL 2.18.
///
/// Newer libraries take the fields behind it from their defaults: they read `size` bytes and look
/// at `version`.
#[repr(C)]
pub(crate) struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    pub blocking: c_int,
    pub cga_cluster_size: c_int,
    pub min_ctas: c_int,
    pub max_ctas: c_int,
    pub net_name: *const c_char,
    pub split_share: c_int,
}

impl RawConfig {
    /// `NCCL_CONFIG_INITIALIZER`.
    pub fn new() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: UNDEFINED,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    (
        required { $($field:ident: $symbol:literal ($($argument:ty),*) -> $output:ty;)* }
        optional { $($option:ident: $wish:literal ($($given:ty),*) -> $result:ty;)* }
    ) => {
        /// NCCL's functions, each with the signature of `nccl.h`.
        pub(crate) struct Api {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $output,)*
            $(pub $option: Option<unsafe extern "C" fn($($given),*) -> $result>,)*
        }

        impl Api {
            /// Looks all functions up; the error is the name of a required one that is missing.
            pub fn find(library: &libloading::os::unix::Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the one that `nccl.h` declares for this symbol.
                    let $field = unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($argument),*) -> $output>($symbol)
                            .map_err(|_| $symbol)?
                    };
                )*
                $(
                    // SAFETY: the type is the one that `nccl.h` declares for this symbol.
                    let $option = unsafe {
                        library
                            .get::<unsafe extern "C" fn($($given),*) -> $result>($wish)
                            .ok()
                            .map(|symbol| *symbol)
                    };
                )*
                Ok(Self { $($field,)* $($option,)* })
            }
        }
    };
}

functions! {
    required {
        get_version: "ncclGetVersion" (*mut c_int) -> RawResult;
        get_unique_id: "ncclGetUniqueId" (*mut RawUniqueId) -> RawResult;
        get_error_string: "ncclGetErrorString" (RawResult) -> *const c_char;
        get_last_error: "ncclGetLastError" (RawComm) -> *const c_char;
        comm_init: "ncclCommInitRankConfig"
            (*mut RawComm, c_int, RawUniqueId, c_int, *mut RawConfig) -> RawResult;
        comm_async_error: "ncclCommGetAsyncError" (RawComm, *mut RawResult) -> RawResult;
        comm_abort: "ncclCommAbort" (RawComm) -> RawResult;
        comm_finalize: "ncclCommFinalize" (RawComm) -> RawResult;
        comm_destroy: "ncclCommDestroy" (RawComm) -> RawResult;
        all_reduce: "ncclAllReduce"
            (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, Stream) -> RawResult;
        reduce_scatter: "ncclReduceScatter"
            (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, Stream) -> RawResult;
        all_gather: "ncclAllGather"
            (*const c_void, *mut c_void, usize, c_int, RawComm, Stream) -> RawResult;
        broadcast: "ncclBroadcast"
            (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, Stream) -> RawResult;
        send: "ncclSend" (*const c_void, usize, c_int, c_int, RawComm, Stream) -> RawResult;
        recv: "ncclRecv" (*mut c_void, usize, c_int, c_int, RawComm, Stream) -> RawResult;
        group_start: "ncclGroupStart" () -> RawResult;
        group_end: "ncclGroupEnd" () -> RawResult;
    }
    optional {
        comm_shrink: "ncclCommShrink"
            (RawComm, *mut c_int, c_int, *mut RawComm, *mut RawConfig, c_int) -> RawResult;
        comm_revoke: "ncclCommRevoke" (RawComm, c_int) -> RawResult;
        comm_grow: "ncclCommGrow"
            (RawComm, c_int, *const RawUniqueId, c_int, *mut RawComm, *mut RawConfig) -> RawResult;
    }
}
