//! NCCL and the CUDA driver without a GPU: their symbols over host memory and sockets.
//!
//! Tests load the shared library that this crate builds ([`path`]) in place of `libnccl.so.2` and
//! of `libcuda.so.1`, so the code that runs is the code that runs on a GPU: streams pass work in
//! order on threads of their own, communicators form in the background, calls say "in progress",
//! peers die, hang and come late, and an aborted operation looks like a finished one and leaves
//! garbage, as the real library does (measured with NCCL 2.28.9; `docs/benchmarks/gpu.md`).
//!
//! It is stricter than the original where that finds mistakes: a communicator used after it was
//! freed ends the process with a message.
//!
//! The kernels of `lacuna-device` run too: their source is C as well, and this crate compiles it
//! for the host. NVRTC's symbols take that source and no other.
//!
//! What it deliberately does not do: be fast, or promise anything about the real libraries beyond
//! what was measured.
//!
//! # Faults
//! [`inject`] gives faults to the first communicator on the device that this thread opens next; the
//! environment variable `LACUNA_STANDIN_FAULTS` gives them to every communicator of a process. A
//! comma-separated list of
//!
//! | fault | effect |
//! |---|---|
//! | `init-error=CODE` | making a communicator fails at once |
//! | `init-fails=CODE` | it fails in the background |
//! | `init-hangs` | it never becomes ready |
//! | `init-blocks` | the call that makes it does not return |
//! | `init-holds-driver` | it does not return, and allocations on its device do not either |
//! | `op-error@N=CODE` | the call of operation N (from 1) fails |
//! | `op-blocks@N` | the call of operation N does not return before an abort |
//! | `op-hangs@N` | operation N never completes on its stream |
//! | `op-fails@N=CODE` | operation N fails in the background |
//! | `device-lost@N` | the device reports an illegal address from operation N on, for good |
//! | `group-blocks@N` | call N of an operation inside groups does not return before an abort |
//! | `finalize-hangs` | closing never comes to its end in the background |
//! | `finalize-blocks` | `ncclCommFinalize` does not return before an abort |
//! | `destroy-hangs` | `ncclCommDestroy` does not return |
//! | `abort-hangs` | `ncclCommAbort` does not return |
//! | `abort-error=CODE` | `ncclCommAbort` returns an error |
//! | `once` | the list holds for the first communicator of the process only |
//!
//! [`hanging`] tells that something hangs or blocks.
//!
//! Drawing an id belongs to no device: [`id_fault`] makes a whole copy of the library fail there.
//!
//! Other variables: `LACUNA_STANDIN_DEVICES` (number, 64), `LACUNA_STANDIN_MEMORY` (bytes of each
//! device, 4 GiB), `LACUNA_STANDIN_NCCL` (version code, 22809) and `NCCL_HOSTID`: two ranks on one
//! device of one host are refused, as NCCL does.

mod cuda;
mod faults;
mod group;
mod kernels;
mod nccl;
mod net;
mod run;
mod stream;

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const FILE: &str = "liblacuna_nccl_standin.so";

/// Returns the shared library, which Cargo puts beside the tests of every crate that depends on
/// this one.
///
/// # Panics
/// If it is not there.
pub fn path() -> PathBuf {
    let program = std::env::current_exe().expect("a program knows its file");
    let folder = program.parent().expect("a file lies in a folder");
    let places = [folder.join(FILE), folder.join("deps").join(FILE)];
    let found = places.iter().find(|place| place.is_file());
    found.unwrap_or_else(|| panic!("no {FILE} in {}", folder.display())).clone()
}

/// Gives faults to the first communicator on the device that this thread opens next, with the
/// library at [`path`]; which thread makes that one does not matter.
///
/// # Panics
/// If the list cannot be read.
pub fn inject(list: &str) {
    let list = CString::new(list).expect("a list holds no zero byte");
    // SAFETY: the symbol has the named type, and the argument is a C string.
    let accepted = unsafe {
        let inject: unsafe extern "C" fn(*const c_char) -> bool = symbol("lacuna_standin_inject");
        inject(list.as_ptr())
    };
    assert!(accepted, "{list:?} is not a list of faults");
}

/// Makes every drawing of an id fail with a code of NCCL's, or never return, with the library at
/// `copy`: a copy of the one at [`path`], since all tests of a process share that one.
///
/// # Panics
/// If there is no such library.
pub fn id_fault(copy: &Path, code: Option<i32>) {
    // SAFETY: the library is this crate's, and the symbol has the named type.
    unsafe {
        let library = libloading::Library::new(copy).expect("the copy loads");
        let symbol = library.get::<unsafe extern "C" fn(c_int)>("lacuna_standin_id_fault");
        symbol.expect("the library is this crate's")(code.unwrap_or(-1));
        std::mem::forget(library);
    }
}

/// Returns how many calls and operations hang on a device by a fault, with the library at [`path`].
///
/// # Panics
/// If the library is not there.
pub fn hanging(device: usize) -> usize {
    static HANGING: OnceLock<unsafe extern "C" fn(usize) -> usize> = OnceLock::new();
    // SAFETY: the symbol has the named type.
    let hanging = *HANGING.get_or_init(|| unsafe { symbol("lacuna_standin_hanging") });
    // SAFETY: it takes any number.
    unsafe { hanging(device) }
}

/// Finds a function of the library at [`path`].
///
/// # Safety
/// `T` is the type of the function.
unsafe fn symbol<T: Copy>(name: &str) -> T {
    // SAFETY: the library is this crate's own; the caller answers for the type.
    unsafe {
        let library = libloading::Library::new(path()).expect("the library loads");
        let found: T = *library.get::<T>(name).expect("the library is this crate's");
        // Its threads outlive this call.
        std::mem::forget(library);
        found
    }
}

#[cfg(test)]
mod tests;
