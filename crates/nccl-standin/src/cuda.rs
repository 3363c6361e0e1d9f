//! The CUDA driver's symbols: devices that are host memory.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::faults::{self, wait_for_driver};
use crate::stream::{Event, Stream};

type Handle = *mut c_void;

pub const SUCCESS: c_int = 0;
pub const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const INVALID_DEVICE: c_int = 101;
const INVALID_CONTEXT: c_int = 201;
pub const INVALID_HANDLE: c_int = 400;
const NOT_READY: c_int = 600;
pub const ILLEGAL_ADDRESS: c_int = 700;

/// A context's handle is its device's ordinal plus 1, and this many times the number of the faults
/// for its first communicator: so they go with it to the thread that makes that one.
const DEVICES_MAX: usize = 1 << 10;

/// The error that every call returns once the device is lost.
static LOST: AtomicI32 = AtomicI32::new(SUCCESS);
/// Bytes allocated on all devices; one process uses one.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Handle of the current context; 0 is none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Everything that has a handle; a handle is a number that is never used twice.
#[derive(Default)]
struct Objects {
    last: usize,
    streams: HashMap<usize, Arc<Stream>>,
    /// Default streams by device.
    legacy: HashMap<usize, Arc<Stream>>,
    events: HashMap<usize, Arc<Event>>,
    /// Sizes and devices of allocations by address.
    memory: HashMap<usize, (usize, usize)>,
    /// Tasks that are not done, by device.
    pending: HashMap<usize, Arc<AtomicUsize>>,
}

static OBJECTS: LazyLock<Mutex<Objects>> = LazyLock::new(Mutex::default);

fn objects() -> MutexGuard<'static, Objects> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Objects {
    fn next(&mut self) -> usize {
        self.last += 1;
        self.last * 16
    }
}

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn n_devices() -> usize {
    number("LACUNA_STANDIN_DEVICES", 64)
}

fn memory_bytes() -> usize {
    number("LACUNA_STANDIN_MEMORY", 4 << 30)
}

/// Loses the device for good.
pub fn lose() {
    LOST.store(ILLEGAL_ADDRESS, Ordering::Release);
}

/// Returns the ordinal of the device that is current on this thread.
pub fn current_device() -> Option<usize> {
    (CURRENT.get() % DEVICES_MAX).checked_sub(1)
}

/// Returns the number of the faults that go with this thread's context; 0 is none.
pub fn current_faults() -> usize {
    CURRENT.get() / DEVICES_MAX
}

/// Finds a stream; null is the legacy default stream of the current device.
pub fn stream(handle: Handle) -> Option<Arc<Stream>> {
    let mut objects = objects();
    if !handle.is_null() {
        return objects.streams.get(&(handle as usize)).cloned();
    }
    let device: usize = current_device()?;
    if !objects.legacy.contains_key(&device) {
        let pending = Arc::clone(objects.pending.entry(device).or_default());
        objects.legacy.insert(device, Arc::new(Stream::new(pending)));
    }
    objects.legacy.get(&device).cloned()
}

/// Draws a handle that is never used twice.
pub fn next_number() -> usize {
    objects().next()
}

/// Checks what every call of a context checks.
fn context() -> c_int {
    match LOST.load(Ordering::Acquire) {
        SUCCESS if current_device().is_none() => INVALID_CONTEXT,
        code => code,
    }
}

/// Runs `body` in a context.
pub fn within(body: impl FnOnce() -> c_int) -> c_int {
    match context() {
        SUCCESS => body(),
        error => error,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    if n_devices() == 0 { NO_DEVICE } else { SUCCESS }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller passes a live int.
    unsafe { *version = 13_000 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: the caller passes a live int.
    unsafe { *count = n_devices() as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if ordinal < 0 || ordinal as usize >= n_devices() {
        return INVALID_DEVICE;
    }
    // SAFETY: the caller passes a live int.
    unsafe { *device = ordinal };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, _device: c_int) -> c_int {
    let text = b"stand-in\0";
    if (room as usize) < text.len() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller says that there is room.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast::<u8>(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(
    text: *mut c_char,
    room: c_int,
    device: c_int,
) -> c_int {
    let name = format!("0000:{device:02X}:00.0\0");
    if (room as usize) < name.len() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller says that there is room.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr(), text.cast::<u8>(), name.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    // SAFETY: the caller passes a live size.
    unsafe { *bytes = memory_bytes() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _device: c_int,
) -> c_int {
    let known = match attribute {
        16 => 132,
        75 => 9,
        76 => 0,
        _ => return INVALID_VALUE,
    };
    // SAFETY: the caller passes a live int.
    unsafe { *value = known };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> c_int {
    let handle: usize = faults::for_context() * DEVICES_MAX + device as usize + 1;
    // SAFETY: the caller passes a live handle.
    unsafe { *context = handle as Handle };
    LOST.load(Ordering::Acquire)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: Handle) -> c_int {
    CURRENT.set(context as usize);
    LOST.load(Ordering::Acquire)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(handle: *mut Handle, _flags: c_uint) -> c_int {
    within(|| {
        let mut objects = objects();
        let number: usize = objects.next();
        let device: usize = current_device().expect("there is a context");
        let pending = Arc::clone(objects.pending.entry(device).or_default());
        objects.streams.insert(number, Arc::new(Stream::new(pending)));
        // SAFETY: the caller passes a live handle.
        unsafe { *handle = number as Handle };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(handle: Handle) -> c_int {
    match objects().streams.remove(&(handle as usize)) {
        Some(_) => SUCCESS,
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(handle: Handle) -> c_int {
    within(|| match stream(handle) {
        Some(stream) if stream.is_idle() => SUCCESS,
        Some(_) => NOT_READY,
        None => INVALID_HANDLE,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(handle: Handle, event: Handle, _flags: c_uint) -> c_int {
    let event = objects().events.get(&(event as usize)).cloned();
    within(|| match (stream(handle), event) {
        (Some(stream), Some(event)) => {
            event.hold(&stream);
            SUCCESS
        }
        _ => INVALID_HANDLE,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(handle: *mut Handle, _flags: c_uint) -> c_int {
    within(|| {
        let mut objects = objects();
        let number: usize = objects.next();
        objects.events.insert(number, Arc::default());
        // SAFETY: the caller passes a live handle.
        unsafe { *handle = number as Handle };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(handle: Handle) -> c_int {
    match objects().events.remove(&(handle as usize)) {
        Some(_) => SUCCESS,
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: Handle, handle: Handle) -> c_int {
    let event = objects().events.get(&(event as usize)).cloned();
    within(|| match (stream(handle), event) {
        (Some(stream), Some(event)) => {
            event.record(&stream);
            SUCCESS
        }
        _ => INVALID_HANDLE,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(handle: Handle) -> c_int {
    let event = objects().events.get(&(handle as usize)).cloned();
    within(|| match event {
        Some(event) if event.is_done() => SUCCESS,
        Some(_) => NOT_READY,
        None => INVALID_HANDLE,
    })
}

/// Allocates zeroed memory whose content is not zero, as a device's is not.
fn allocate(n_bytes: usize) -> usize {
    let memory: Box<[u64]> = vec![0xa5a5_a5a5_a5a5_a5a5_u64; n_bytes.div_ceil(8)].into();
    let start: usize = Box::into_raw(memory).cast::<u64>() as usize;
    let device: usize = current_device().expect("there is a context");
    objects().memory.insert(start, (n_bytes, device));
    start
}

/// Frees what [`allocate`] gave, once the device is idle; returns its size.
fn free(start: usize) -> Option<usize> {
    let (n_bytes, device): (usize, usize) = objects().memory.remove(&start)?;
    let pending = objects().pending.get(&device).cloned();
    while pending.as_ref().is_some_and(|pending| pending.load(Ordering::Acquire) > 0) {
        thread::sleep(Duration::from_micros(50));
    }
    let words = std::ptr::slice_from_raw_parts_mut(start as *mut u64, n_bytes.div_ceil(8));
    // SAFETY: made by `allocate` from a box of this many words, and freed once.
    drop(unsafe { Box::from_raw(words) });
    Some(n_bytes)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(start: *mut u64, n_bytes: usize) -> c_int {
    within(|| {
        current_device().into_iter().for_each(wait_for_driver);
        if n_bytes == 0 {
            return INVALID_VALUE;
        }
        let before: usize = ALLOCATED.fetch_add(n_bytes, Ordering::AcqRel);
        if before + n_bytes > memory_bytes() {
            ALLOCATED.fetch_sub(n_bytes, Ordering::AcqRel);
            return OUT_OF_MEMORY;
        }
        // SAFETY: the caller passes a live address.
        unsafe { *start = allocate(n_bytes) as u64 };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(start: u64) -> c_int {
    match free(start as usize) {
        Some(n_bytes) => {
            ALLOCATED.fetch_sub(n_bytes, Ordering::AcqRel);
            SUCCESS
        }
        None => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    within(|| {
        let used: usize = ALLOCATED.load(Ordering::Acquire);
        // SAFETY: the caller passes live sizes.
        unsafe {
            *total = memory_bytes();
            *free = memory_bytes().saturating_sub(used);
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    start: *mut *mut c_void,
    n_bytes: usize,
    _flags: c_uint,
) -> c_int {
    within(|| {
        current_device().into_iter().for_each(wait_for_driver);
        if n_bytes == 0 {
            return INVALID_VALUE;
        }
        // SAFETY: the caller passes a live address.
        unsafe { *start = allocate(n_bytes) as *mut c_void };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(start: *mut c_void) -> c_int {
    if free(start as usize).is_some() { SUCCESS } else { INVALID_VALUE }
}

/// Enqueues a copy.
fn copy(from: usize, to: usize, n_bytes: usize, handle: Handle) -> c_int {
    within(|| {
        let Some(stream) = stream(handle) else { return INVALID_HANDLE };
        stream.enqueue(move || {
            // SAFETY: whoever enqueues a copy answers for both ranges until the stream passed it.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, n_bytes) };
        });
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    n_bytes: usize,
    stream: Handle,
) -> c_int {
    copy(from as usize, to as usize, n_bytes, stream)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    n_bytes: usize,
    stream: Handle,
) -> c_int {
    copy(from as usize, to as usize, n_bytes, stream)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    n_bytes: usize,
    stream: Handle,
) -> c_int {
    copy(from as usize, to as usize, n_bytes, stream)
}

/// Names and words of the errors that occur here.
const ERRORS: [(c_int, &[u8], &[u8]); 9] = [
    (SUCCESS, b"CUDA_SUCCESS\0", b"no error\0"),
    (INVALID_VALUE, b"CUDA_ERROR_INVALID_VALUE\0", b"invalid argument\0"),
    (OUT_OF_MEMORY, b"CUDA_ERROR_OUT_OF_MEMORY\0", b"out of memory\0"),
    (NO_DEVICE, b"CUDA_ERROR_NO_DEVICE\0", b"no CUDA-capable device is detected\0"),
    (INVALID_DEVICE, b"CUDA_ERROR_INVALID_DEVICE\0", b"invalid device ordinal\0"),
    (INVALID_CONTEXT, b"CUDA_ERROR_INVALID_CONTEXT\0", b"invalid device context\0"),
    (INVALID_HANDLE, b"CUDA_ERROR_INVALID_HANDLE\0", b"invalid resource handle\0"),
    (NOT_READY, b"CUDA_ERROR_NOT_READY\0", b"device not ready\0"),
    (
        ILLEGAL_ADDRESS,
        b"CUDA_ERROR_ILLEGAL_ADDRESS\0",
        b"an illegal memory access was encountered\0",
    ),
];

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: c_int, text: *mut *const c_char) -> c_int {
    let Some((_, name, _)) = ERRORS.iter().find(|(known, ..)| *known == code) else {
        return INVALID_VALUE;
    };
    // SAFETY: the caller passes a live pointer; the text is a constant that ends in a zero byte.
    unsafe { *text = name.as_ptr().cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int {
    let Some((.., words)) = ERRORS.iter().find(|(known, ..)| *known == code) else {
        return INVALID_VALUE;
    };
    // SAFETY: the caller passes a live pointer; the text is a constant that ends in a zero byte.
    unsafe { *text = words.as_ptr().cast() };
    SUCCESS
}
