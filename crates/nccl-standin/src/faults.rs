//! What goes wrong, on demand.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cuda;

/// Faults of one communicator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub init: Option<Init>,
    /// By number of the operation, from 1.
    pub operations: BTreeMap<u64, Operation>,
    /// By number of the operation within groups of calls, from 1: that call blocks.
    pub grouped: Option<u64>,
    pub finalize: Option<Finalize>,
    pub destroy_hangs: bool,
    pub abort: Option<Abort>,
    once: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    Error(c_int),
    Fails(c_int),
    Hangs,
    Blocks,
    /// Blocks, and allocations on its device block with it.
    HoldsDriver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Error(c_int),
    Blocks,
    Hangs,
    Fails(c_int),
    DeviceLost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finalize {
    Hangs,
    Blocks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    Hangs,
    Error(c_int),
}

impl Faults {
    /// Reads a list; nothing where a word means nothing.
    pub fn parse(list: &str) -> Option<Self> {
        let mut faults = Self::default();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (name, code) = match word.split_once('=') {
                Some((name, code)) => (name, Some(code.parse::<c_int>().ok()?)),
                None => (word, None),
            };
            let (name, number) = match name.split_once('@') {
                Some((name, number)) => (name, Some(number.parse::<u64>().ok()?)),
                None => (name, None),
            };
            let mut on = |number: u64, fault: Operation| {
                faults.operations.insert(number, fault);
            };
            match (name, number, code) {
                ("op-error", Some(n), Some(code)) => on(n, Operation::Error(code)),
                ("op-fails", Some(n), Some(code)) => on(n, Operation::Fails(code)),
                ("op-blocks", Some(n), None) => on(n, Operation::Blocks),
                ("op-hangs", Some(n), None) => on(n, Operation::Hangs),
                ("device-lost", Some(n), None) => on(n, Operation::DeviceLost),
                ("init-error", None, Some(code)) => faults.init = Some(Init::Error(code)),
                ("init-fails", None, Some(code)) => faults.init = Some(Init::Fails(code)),
                ("init-hangs", None, None) => faults.init = Some(Init::Hangs),
                ("init-blocks", None, None) => faults.init = Some(Init::Blocks),
                ("init-holds-driver", None, None) => faults.init = Some(Init::HoldsDriver),
                ("group-blocks", Some(number), None) => faults.grouped = Some(number),
                ("finalize-hangs", None, None) => faults.finalize = Some(Finalize::Hangs),
                ("finalize-blocks", None, None) => faults.finalize = Some(Finalize::Blocks),
                ("destroy-hangs", None, None) => faults.destroy_hangs = true,
                ("abort-hangs", None, None) => faults.abort = Some(Abort::Hangs),
                ("abort-error", None, Some(code)) => faults.abort = Some(Abort::Error(code)),
                ("once", None, None) => faults.once = true,
                _ => return None,
            }
        }
        Some(faults)
    }

    /// Returns what the communicator suffers that is made now in this thread's context.
    pub fn take() -> Self {
        if let Some(faults) = locked(&INJECTED).remove(&cuda::current_faults()) {
            return faults;
        }
        static USED: AtomicBool = AtomicBool::new(false);
        let list: String = std::env::var("LACUNA_STANDIN_FAULTS").unwrap_or_default();
        let Some(faults) = Self::parse(&list) else {
            crate::nccl::misuse(&format!("LACUNA_STANDIN_FAULTS=`{list}` cannot be read"));
        };
        let first: bool = !USED.swap(true, Ordering::AcqRel);
        if faults.once && !first { Self::default() } else { faults }
    }
}

/// Faults that no communicator suffers yet, by number from 1.
static INJECTED: Mutex<BTreeMap<usize, Faults>> = Mutex::new(BTreeMap::new());
/// How much hangs, by device.
static HANGING: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// Number of the faults that this thread's next context gets; 0 is none.
    static NEXT: Cell<usize> = const { Cell::new(0) };
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands out the number of the faults for a context that this thread makes.
pub fn for_context() -> usize {
    NEXT.take()
}

/// Gives faults to the first communicator of the context that this thread makes next; false if the
/// list cannot be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lacuna_standin_inject(list: *const c_char) -> bool {
    static LAST: AtomicUsize = AtomicUsize::new(0);
    // SAFETY: the caller passes a C string.
    let list = unsafe { CStr::from_ptr(list) }.to_string_lossy();
    let Some(faults) = Faults::parse(&list) else { return false };
    let number: usize = LAST.fetch_add(1, Ordering::AcqRel) + 1;
    locked(&INJECTED).insert(number, faults);
    NEXT.set(number);
    true
}

/// Devices whose driver is held by a call that never returns.
static HELD: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// Keeps the driver of a device for good.
pub fn hold_driver(device: usize) {
    locked(&HELD).insert(device);
}

/// Waits for the driver of a device, for ever where it is held.
pub fn wait_for_driver(device: usize) {
    while locked(&HELD).contains(&device) {
        std::thread::park();
    }
}

/// How every drawing of an id goes: 0 well, below 0 it never returns, else it fails with that code.
static ID_FAULT: AtomicI32 = AtomicI32::new(0);

/// Sets how every drawing of an id goes.
#[unsafe(no_mangle)]
pub extern "C" fn lacuna_standin_id_fault(code: c_int) {
    ID_FAULT.store(code, Ordering::Release);
}

pub fn of_ids() -> c_int {
    ID_FAULT.load(Ordering::Acquire)
}

/// Something that hangs on a device, as long as this value lives.
pub struct Hang {
    device: usize,
}

impl Hang {
    pub fn on(device: usize) -> Self {
        *locked(&HANGING).entry(device).or_default() += 1;
        Self { device }
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        if let Some(n) = locked(&HANGING).get_mut(&self.device) {
            *n -= 1;
        }
    }
}

/// Returns how many calls and operations hang on a device by one of these faults.
#[unsafe(no_mangle)]
pub extern "C" fn lacuna_standin_hanging(device: usize) -> usize {
    locked(&HANGING).get(&device).copied().unwrap_or_default()
}
