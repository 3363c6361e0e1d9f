//! NCCL's symbols.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cuda;
use crate::faults::{self, Abort, Faults, Finalize, Hang, Init, Operation as Fault};
use crate::group::take;
use crate::net::{Lost, Member, Mesh, draw_id};
use crate::run::{Data, Kind, Operation, Place, Reduce};
use crate::stream::Stream;

pub type Handle = *mut c_void;

pub const SUCCESS: c_int = 0;
const UNHANDLED_CUDA_ERROR: c_int = 1;
const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
pub const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;
const IN_PROGRESS: c_int = 7;

/// How long a communicator is "in progress" after its first operation, as the original is while it
/// makes connections.
const FIRST_OPERATION: Duration = Duration::from_millis(3);
/// How often waits look around.
const TICK: Duration = Duration::from_millis(1);

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    internal: [u8; 128],
}

/// The part of `ncclConfig_t` that is looked at.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// A communicator.
pub struct Comm {
    world: usize,
    rank: usize,
    device: usize,
    /// `ncclSuccess`, `ncclInProgress` or what failed.
    state: AtomicI32,
    words: Mutex<CString>,
    abort: AtomicBool,
    mesh: OnceLock<Mesh>,
    pub faults: Faults,
    n_operations: AtomicU64,
    /// Operations that were put into groups.
    pub n_grouped: AtomicU64,
    pub revoked: AtomicBool,
    in_flight: AtomicUsize,
    busy_until: Mutex<Option<Instant>>,
    forming: AtomicBool,
}

static COMMS: LazyLock<Mutex<HashMap<usize, Arc<Comm>>>> = LazyLock::new(Mutex::default);

thread_local! {
    /// Words on this thread's last failure without a communicator. The original has one text for a
    /// process; here a test does not read another's.
    static LAST_WORDS: Cell<&'static CStr> = const { Cell::new(c"") };
}

pub fn comms() -> MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    COMMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process: a caller broke a rule, and whatever followed would hide it.
pub fn misuse(what: &str) -> ! {
    eprintln!("nccl stand-in: {what}");
    std::process::abort();
}

pub fn comm(handle: Handle, call: &str) -> Arc<Comm> {
    let found = comms().get(&(handle as usize)).cloned();
    found.unwrap_or_else(|| misuse(&format!("{call} on a communicator that is not live")))
}

/// Fails a call that has no communicator.
fn fail(code: c_int, words: &'static CStr) -> c_int {
    LAST_WORDS.set(words);
    code
}

/// Never returns.
fn block(device: usize) -> ! {
    let _hang = Hang::on(device);
    loop {
        thread::park();
    }
}

impl Comm {
    fn fail(&self, code: c_int, words: &str) -> c_int {
        let words = CString::new(words).unwrap_or_default();
        *self.words.lock().unwrap_or_else(PoisonError::into_inner) = words;
        self.state.store(code, Ordering::Release);
        code
    }

    pub fn is_aborted(&self) -> bool {
        self.abort.load(Ordering::Acquire)
    }

    /// The state that a caller sees.
    fn seen(&self) -> c_int {
        let state: c_int = self.state.load(Ordering::Acquire);
        let busy = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        if state == SUCCESS && busy.is_some_and(|until| Instant::now() < until) {
            return IN_PROGRESS;
        }
        state
    }

    fn form(&self, id: &[u8; 128]) {
        match self.faults.init {
            Some(Init::Fails(code)) => {
                self.fail(code, "injected: init fails");
                return;
            }
            Some(Init::Hangs) => {
                self.hang();
                return;
            }
            Some(Init::Error(_) | Init::Blocks | Init::HoldsDriver) | None => {}
        }
        let (world, rank, device) = (self.world, self.rank, self.device);
        match Mesh::connect(Member { id, world, rank, device, abort: &self.abort }) {
            Ok(mesh) => {
                let _ = self.mesh.set(mesh);
                self.state.store(SUCCESS, Ordering::Release);
            }
            Err(Lost::Aborted) => {}
            Err(Lost::Peer(words)) => {
                self.fail(REMOTE_ERROR, &words);
            }
            Err(Lost::SharedDevice(words)) => {
                self.fail(INVALID_USAGE, &words);
            }
        }
    }

    fn wait_for_abort(&self) {
        while !self.is_aborted() {
            thread::sleep(TICK);
        }
    }

    pub fn hang(&self) {
        let _hang = Hang::on(self.device);
        self.wait_for_abort();
    }

    /// Runs an operation where its stream reaches it.
    fn run(&self, number: u64, operation: &Operation) {
        let mesh = self.mesh.get().expect("operations are taken once the mesh is there");
        let place = Place { mesh, world: self.world, rank: self.rank, abort: &self.abort };
        let lost = match self.faults.operations.get(&number) {
            Some(Fault::Hangs) => {
                self.hang();
                Err(Lost::Aborted)
            }
            Some(Fault::Fails(code)) => {
                self.fail(*code, &format!("injected: operation {number} fails"));
                Err(Lost::Aborted)
            }
            Some(Fault::DeviceLost) => {
                cuda::lose();
                self.fail(UNHANDLED_CUDA_ERROR, "Cuda failure 700 'an illegal memory access'");
                Err(Lost::Aborted)
            }
            _ => operation.run(&place),
        };
        let Err(lost) = lost else { return };
        if let Lost::Peer(words) = lost {
            self.fail(REMOTE_ERROR, &words);
        }
        // The kernel spins until it is told to stop; then the stream goes on as if all were well.
        self.wait_for_abort();
        operation.leave_garbage(self.world);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    let code = std::env::var("LACUNA_STANDIN_NCCL").ok().and_then(|text| text.parse().ok());
    // SAFETY: the caller passes a live int.
    unsafe { *version = code.unwrap_or(22_809) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    match faults::of_ids() {
        0 => {}
        code if code > 0 => return fail(code, c"injected: no id"),
        _ => loop {
            thread::park();
        },
    }
    match draw_id() {
        Ok(internal) => {
            // SAFETY: the caller passes a live id.
            unsafe { *id = UniqueId { internal } };
            SUCCESS
        }
        Err(_) => fail(SYSTEM_ERROR, c"the loopback interface cannot be used"),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text: &[u8] = match code {
        SUCCESS => b"no error\0",
        UNHANDLED_CUDA_ERROR => b"unhandled cuda error\0",
        SYSTEM_ERROR => b"unhandled system error\0",
        3 => b"internal error\0",
        INVALID_ARGUMENT => b"invalid argument\0",
        INVALID_USAGE => b"invalid usage\0",
        REMOTE_ERROR => b"remote process exited or there was a network error\0",
        IN_PROGRESS => b"NCCL operation in progress\0",
        _ => b"unknown result code\0",
    };
    text.as_ptr().cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(handle: Handle) -> *const c_char {
    if handle.is_null() {
        return LAST_WORDS.get().as_ptr();
    }
    let comm: Arc<Comm> = comm(handle, "ncclGetLastError");
    let words = comm.words.lock().unwrap_or_else(PoisonError::into_inner);
    // Kept for good: the caller may read it at any time.
    words.clone().into_raw()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    handle: *mut Handle,
    world: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> c_int {
    // SAFETY: the caller passes a live configuration.
    let Config { magic, blocking, .. } = unsafe { &*config };
    if *magic != 0xcafe_beef || *blocking != 0 || rank < 0 || rank >= world {
        return fail(INVALID_ARGUMENT, c"a wrong configuration, or a rank outside the world");
    }
    let Some(device) = cuda::current_device() else {
        return fail(UNHANDLED_CUDA_ERROR, c"Cuda failure 201 'invalid device context'");
    };
    let faults = Faults::take();
    match faults.init {
        Some(Init::Error(code)) => return fail(code, c"injected: init error"),
        Some(Init::Blocks) => block(device),
        Some(Init::HoldsDriver) => {
            faults::hold_driver(device);
            block(device)
        }
        _ => {}
    }
    let comm = Arc::new(Comm {
        world: world as usize,
        rank: rank as usize,
        device,
        state: AtomicI32::new(IN_PROGRESS),
        words: Mutex::default(),
        abort: AtomicBool::new(false),
        mesh: OnceLock::new(),
        faults,
        n_operations: AtomicU64::new(0),
        n_grouped: AtomicU64::new(0),
        revoked: AtomicBool::new(false),
        in_flight: AtomicUsize::new(0),
        busy_until: Mutex::new(None),
        forming: AtomicBool::new(true),
    });
    let number: usize = register(&comm);
    // SAFETY: the caller passes a live handle.
    unsafe { *handle = number as Handle };
    thread::spawn(move || {
        comm.form(&id.internal);
        comm.forming.store(false, Ordering::Release);
    });
    IN_PROGRESS
}

/// Gives a communicator a handle that is never used twice.
fn register(comm: &Arc<Comm>) -> usize {
    static LAST: AtomicUsize = AtomicUsize::new(0);
    let number: usize = LAST.fetch_add(64, Ordering::AcqRel) + 64;
    comms().insert(number, Arc::clone(comm));
    number
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(handle: Handle, state: *mut c_int) -> c_int {
    let seen: c_int = comm(handle, "ncclCommGetAsyncError").seen();
    // SAFETY: the caller passes a live int.
    unsafe { *state = seen };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(handle: Handle) -> c_int {
    let comm: Arc<Comm> = comm(handle, "ncclCommAbort");
    if comm.faults.abort == Some(Abort::Hangs) {
        block(comm.device);
    }
    release(handle, &comm);
    match comm.faults.abort {
        Some(Abort::Error(code)) => code,
        _ => SUCCESS,
    }
}

/// Stops everything of a communicator and forgets it.
fn release(handle: Handle, comm: &Comm) {
    comm.abort.store(true, Ordering::Release);
    if let Some(mesh) = comm.mesh.get() {
        mesh.close();
    }
    let busy =
        || comm.in_flight.load(Ordering::Acquire) > 0 || comm.forming.load(Ordering::Acquire);
    while busy() {
        thread::sleep(TICK);
    }
    comms().remove(&(handle as usize));
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(handle: Handle) -> c_int {
    let comm: Arc<Comm> = comm(handle, "ncclCommFinalize");
    if comm.seen() != SUCCESS || comm.revoked.load(Ordering::Acquire) {
        return INVALID_ARGUMENT;
    }
    if comm.faults.finalize == Some(Finalize::Blocks) {
        comm.hang();
        return SUCCESS;
    }
    comm.state.store(IN_PROGRESS, Ordering::Release);
    if comm.faults.finalize == Some(Finalize::Hangs) {
        return IN_PROGRESS;
    }
    thread::spawn(move || {
        while comm.in_flight.load(Ordering::Acquire) > 0 && !comm.is_aborted() {
            thread::sleep(TICK);
        }
        let _ =
            comm.state.compare_exchange(IN_PROGRESS, SUCCESS, Ordering::AcqRel, Ordering::Acquire);
    });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(handle: Handle) -> c_int {
    let comm: Arc<Comm> = comm(handle, "ncclCommDestroy");
    if comm.faults.destroy_hangs {
        block(comm.device);
    }
    release(handle, &comm);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommRevoke(handle: Handle, _flags: c_int) -> c_int {
    let comm: Arc<Comm> = comm(handle, "ncclCommRevoke");
    let state: c_int = comm.state.load(Ordering::Acquire);
    if !matches!(state, SUCCESS | IN_PROGRESS) {
        return state;
    }
    if comm.revoked.swap(true, Ordering::AcqRel) {
        return INVALID_USAGE;
    }
    comm.abort.store(true, Ordering::Release);
    comm.state.store(IN_PROGRESS, Ordering::Release);
    thread::spawn(move || {
        while comm.in_flight.load(Ordering::Acquire) > 0 {
            thread::sleep(TICK);
        }
        let _ =
            comm.state.compare_exchange(IN_PROGRESS, SUCCESS, Ordering::AcqRel, Ordering::Acquire);
    });
    IN_PROGRESS
}

/// There to be found by its name, like the next one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommShrink(
    _handle: Handle,
    _left_out: *mut c_int,
    _n_left_out: c_int,
    _shrunk: *mut Handle,
    _config: *mut Config,
    _flags: c_int,
) -> c_int {
    INVALID_USAGE
}

/// The version that is stood in for does not have it yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGrow(
    _handle: Handle,
    _world: c_int,
    _id: *const UniqueId,
    _rank: c_int,
    _grown: *mut Handle,
    _config: *mut Config,
) -> c_int {
    INVALID_USAGE
}

pub fn start(comm: &Arc<Comm>, stream: Handle, operation: Operation) -> c_int {
    if comm.revoked.load(Ordering::Acquire) {
        return INVALID_USAGE;
    }
    match comm.state.load(Ordering::Acquire) {
        SUCCESS => {}
        IN_PROGRESS => return INVALID_ARGUMENT,
        error => return error,
    }
    let Some(stream): Option<Arc<Stream>> = cuda::stream(stream) else { return INVALID_ARGUMENT };
    let number: u64 = comm.n_operations.fetch_add(1, Ordering::AcqRel) + 1;
    match comm.faults.operations.get(&number) {
        Some(Fault::Error(code)) => {
            let words = CString::new(format!("injected: call of operation {number}"));
            let mut last = comm.words.lock().unwrap_or_else(PoisonError::into_inner);
            *last = words.unwrap_or_default();
            return *code;
        }
        Some(Fault::Blocks) => {
            comm.hang();
            return SUCCESS;
        }
        _ => {}
    }
    comm.in_flight.fetch_add(1, Ordering::AcqRel);
    let running: Arc<Comm> = Arc::clone(comm);
    stream.enqueue(move || {
        running.run(number, &operation);
        running.in_flight.fetch_sub(1, Ordering::AcqRel);
    });
    if number > 1 {
        return SUCCESS;
    }
    let until = Instant::now() + FIRST_OPERATION;
    *comm.busy_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    IN_PROGRESS
}

/// Reads what calls have in common.
fn operation(
    kind: Option<Kind>,
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data: c_int,
) -> Option<Operation> {
    let (from, to) = (from as usize, to as usize);
    Some(Operation { kind: kind?, from, to, count, data: Data::from_raw(data)? })
}

fn checked(handle: Handle, stream: Handle, operation: Option<Operation>, call: &str) -> c_int {
    operation.map_or(INVALID_ARGUMENT, |operation| take(handle, stream, operation, call))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data: c_int,
    op: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let kind = Reduce::from_raw(op).map(Kind::AllReduce);
    checked(comm, stream, operation(kind, from, to, count, data), "ncclAllReduce")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data: c_int,
    op: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let kind = Reduce::from_raw(op).map(Kind::ReduceScatter);
    checked(comm, stream, operation(kind, from, to, count, data), "ncclReduceScatter")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let all = operation(Some(Kind::AllGather), from, to, count, data);
    checked(comm, stream, all, "ncclAllGather")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data: c_int,
    root: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let kind = usize::try_from(root).ok().map(|root| Kind::Broadcast { root });
    checked(comm, stream, operation(kind, from, to, count, data), "ncclBroadcast")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    data: c_int,
    peer: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let kind = usize::try_from(peer).ok().map(|peer| Kind::Send { peer });
    checked(comm, stream, operation(kind, from, std::ptr::null_mut(), count, data), "ncclSend")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    data: c_int,
    peer: c_int,
    comm: Handle,
    stream: Handle,
) -> c_int {
    let kind = usize::try_from(peer).ok().map(|peer| Kind::Recv { peer });
    checked(comm, stream, operation(kind, std::ptr::null(), to, count, data), "ncclRecv")
}
