//! NVRTC's symbols and the driver's for kernels: the one source that is known runs on the host, one
//! thread of a launch after the other.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::cuda::{self, INVALID_HANDLE, INVALID_VALUE, SUCCESS, stream, within};

type Handle = *mut c_void;

/// What stands for a cubin; a zero byte ends it.
const CUBIN: &[u8] = b"\x7fELF of the stand-in\0";
/// The source whose kernels run here.
const SOURCE: &str = include_str!("../../device/kernels/exact.cu");

const NOT_FOUND: c_int = 500;
const INVALID_IMAGE: c_int = 200;
const COMPILATION_ERROR: c_int = 6;
const INVALID_OPTION: c_int = 5;

unsafe extern "C" {
    /// Says which thread of how many the calling thread is from here on.
    safe fn lacuna_host_thread(thread: u64, threads: u64);
    fn lacuna_standin_quantise_add(
        grad: *const f32,
        sums: *mut i64,
        flags: *mut u32,
        n: u64,
        scale: f64,
        limit: f64,
    );
    fn lacuna_standin_mean_of(
        sums: *const i64,
        mean: *mut f32,
        max_bits: *mut u32,
        n: u64,
        scale: f64,
        slots: f64,
    );
    fn lacuna_standin_squares(values: *const f32, parts: *mut f64, n: u64, n_parts: u64);
    fn lacuna_standin_adamw(
        param: *mut f32,
        exp_avg: *mut f32,
        exp_avg_sq: *mut f32,
        grad: *const f32,
        n: u64,
        keep: f32,
        beta1: f32,
        rest1: f32,
        beta2: f32,
        rest2: f32,
        step_size: f32,
        root: f32,
        eps: f32,
    );
    fn lacuna_standin_crc64_pieces(
        bytes: *const u8,
        tables: *const u64,
        crcs: *mut u64,
        n: u64,
        piece: u64,
        n_pieces: u64,
    );
    fn lacuna_standin_normalise(
        pixels: *const u8,
        table: *const f32,
        values: *mut f32,
        n: u64,
        plane: u64,
        channels: u64,
    );
}

/// A kernel, by its place in [`NAMES`] plus 1: that is its handle.
const NAMES: [&CStr; 6] =
    [c"quantise_add", c"mean_of", c"squares", c"adamw", c"crc64_pieces", c"normalise"];

/// Reads argument `k` of a launch.
///
/// # Safety
/// `args` holds more than `k` addresses, and at this one is a `T`.
unsafe fn arg<T: Copy>(args: *mut *mut c_void, k: usize) -> T {
    // SAFETY: by the caller.
    unsafe { *(*args.add(k)).cast::<T>() }
}

/// Takes the arguments of a kernel and returns the work of one thread, of whichever
/// [`lacuna_host_thread`] was told.
///
/// # Safety
/// `args` are those of the kernel.
unsafe fn work(kernel: usize, args: *mut *mut c_void) -> Option<Box<dyn Fn() + Send>> {
    // SAFETY: by the caller; whoever launches answers for the memory until the stream passed it.
    unsafe {
        let at = |k: usize| arg::<u64>(args, k);
        let real = |k: usize| arg::<f64>(args, k);
        Some(match kernel {
            1 => {
                let (a, b, c, n, scale, limit) = (at(0), at(1), at(2), at(3), real(4), real(5));
                Box::new(move || {
                    lacuna_standin_quantise_add(a as _, b as _, c as _, n, scale, limit);
                })
            }
            2 => {
                let (a, b, c, n, scale, slots) = (at(0), at(1), at(2), at(3), real(4), real(5));
                Box::new(move || {
                    lacuna_standin_mean_of(a as _, b as _, c as _, n, scale, slots);
                })
            }
            3 => {
                let (a, b, n, parts) = (at(0), at(1), at(2), at(3));
                Box::new(move || lacuna_standin_squares(a as _, b as _, n, parts))
            }
            4 => {
                let (p, m, v, g, n) = (at(0), at(1), at(2), at(3), at(4));
                let s: [f32; 8] = std::array::from_fn(|k| arg::<f32>(args, 5 + k));
                Box::new(move || {
                    let [keep, b1, r1, b2, r2, size, root, eps] = s;
                    let (p, m, v, g) = (p as _, m as _, v as _, g as _);
                    lacuna_standin_adamw(p, m, v, g, n, keep, b1, r1, b2, r2, size, root, eps);
                })
            }
            5 => {
                let (a, b, c, n, piece, pieces) = (at(0), at(1), at(2), at(3), at(4), at(5));
                Box::new(move || {
                    lacuna_standin_crc64_pieces(a as _, b as _, c as _, n, piece, pieces);
                })
            }
            6 => {
                let (a, b, c, n, plane, channels) = (at(0), at(1), at(2), at(3), at(4), at(5));
                Box::new(move || {
                    lacuna_standin_normalise(a as _, b as _, c as _, n, plane, channels);
                })
            }
            _ => return None,
        })
    }
}

/// Returns the numbers below `n`, each once, in an order on which nothing can rely.
fn shuffled(n: u64) -> impl Iterator<Item = u64> {
    // Steps that have no factor in common with `n` meet all numbers before one comes again.
    let step = (n * 5 / 8..n).find(|step| gcd(*step, n) == 1).unwrap_or(1);
    (1..=n).map(move |k| k * step % n)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> c_int {
    // SAFETY: images of the stand-in end with a zero byte, and others are ELF files, which hold
    // one in their first line.
    let image = unsafe { CStr::from_ptr(image.cast::<c_char>()) };
    if image.to_bytes_with_nul() != CUBIN {
        return INVALID_IMAGE;
    }
    within(|| {
        // SAFETY: the caller passes a live handle.
        unsafe { *module = 1 as Handle };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(_module: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    _module: Handle,
    name: *const c_char,
) -> c_int {
    // SAFETY: the caller passes a C string.
    let name = unsafe { CStr::from_ptr(name) };
    let Some(at) = NAMES.iter().position(|known| *known == name) else { return NOT_FOUND };
    // SAFETY: the caller passes a live handle.
    unsafe { *function = (at + 1) as Handle };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    blocks: c_uint,
    _blocks_y: c_uint,
    _blocks_z: c_uint,
    threads: c_uint,
    _threads_y: c_uint,
    _threads_z: c_uint,
    _shared_bytes: c_uint,
    on: Handle,
    args: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_int {
    if blocks == 0 || threads == 0 || threads > 1024 {
        return INVALID_VALUE;
    }
    // SAFETY: the caller passes the kernel's arguments.
    let Some(work) = (unsafe { work(function as usize, args) }) else { return INVALID_HANDLE };
    let n_threads = u64::from(blocks) * u64::from(threads);
    within(|| match stream(on) {
        Some(stream) => {
            stream.enqueue(move || {
                for thread in shuffled(n_threads) {
                    lacuna_host_thread(thread, n_threads);
                    work();
                }
            });
            SUCCESS
        }
        None => INVALID_HANDLE,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(start: u64, byte: u8, n: usize, on: Handle) -> c_int {
    within(|| match stream(on) {
        Some(stream) => {
            // SAFETY: whoever enqueues it answers for the range until the stream has passed it.
            stream.enqueue(move || unsafe { std::ptr::write_bytes(start as *mut u8, byte, n) });
            SUCCESS
        }
        None => INVALID_HANDLE,
    })
}

/// Programs of NVRTC by their handle: what compiling said.
static PROGRAMS: LazyLock<Mutex<HashMap<usize, Program>>> = LazyLock::new(Mutex::default);

struct Program {
    known: bool,
    log: Vec<u8>,
}

fn programs() -> MutexGuard<'static, HashMap<usize, Program>> {
    PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: the caller passes live ints.
    unsafe { (*major, *minor) = (13, 0) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut Handle,
    source: *const c_char,
    _name: *const c_char,
    _n_headers: c_int,
    _headers: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    // SAFETY: the caller passes a C string.
    let known = unsafe { CStr::from_ptr(source) }.to_bytes() == SOURCE.as_bytes();
    let mut programs = programs();
    let number: usize = cuda::next_number();
    programs.insert(number, Program { known, log: vec![0] });
    // SAFETY: the caller passes a live handle.
    unsafe { *program = number as Handle };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: Handle,
    n_options: c_int,
    options: *const *const c_char,
) -> c_int {
    // SAFETY: the caller passes as many C strings.
    let option = |k: usize| unsafe { CStr::from_ptr(*options.add(k)) };
    let without_fma = (0..n_options as usize).any(|k| option(k) == c"--fmad=false");
    let mut programs = programs();
    let Some(program) = programs.get_mut(&(program as usize)) else { return INVALID_VALUE };
    match (without_fma, program.known) {
        (false, _) => INVALID_OPTION,
        (true, true) => SUCCESS,
        (true, false) => {
            program.log = b"the stand-in compiles one source only\0".to_vec();
            COMPILATION_ERROR
        }
    }
}

/// Hands out a text.
///
/// # Safety
/// `out` has room for it.
unsafe fn put(text: &[u8], out: *mut c_char) -> c_int {
    // SAFETY: by the caller.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), out.cast::<u8>(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: Handle, n: *mut usize) -> c_int {
    let programs = programs();
    let Some(program) = programs.get(&(program as usize)) else { return INVALID_VALUE };
    // SAFETY: the caller passes a live size.
    unsafe { *n = program.log.len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: Handle, out: *mut c_char) -> c_int {
    let programs = programs();
    let Some(program) = programs.get(&(program as usize)) else { return INVALID_VALUE };
    // SAFETY: the caller makes room for the size it was told.
    unsafe { put(&program.log, out) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(_program: Handle, n: *mut usize) -> c_int {
    // SAFETY: the caller passes a live size.
    unsafe { *n = CUBIN.len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(_program: Handle, out: *mut c_char) -> c_int {
    // SAFETY: the caller makes room for the size it was told.
    unsafe { put(CUBIN, out) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut Handle) -> c_int {
    // SAFETY: the caller passes a live handle.
    programs().remove(&(unsafe { *program } as usize));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetErrorString(code: c_int) -> *const c_char {
    match code {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        COMPILATION_ERROR => c"NVRTC_ERROR_COMPILATION",
        _ => c"NVRTC_ERROR unknown",
    }
    .as_ptr()
}

#[cfg(test)]
mod tests {
    use super::shuffled;

    #[test]
    fn every_thread_has_its_turn_and_they_are_not_in_order() {
        for n in [1, 2, 3, 35, 64, 256, 1000, 4096 * 256] {
            let mut order: Vec<u64> = shuffled(n).collect();
            assert!(n < 4 || !order.is_sorted() && !order.iter().rev().is_sorted(), "{n}");
            order.sort_unstable();
            assert!(order.into_iter().eq(0..n), "{n}");
        }
    }
}
