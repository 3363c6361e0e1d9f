//! What goes wrong, on demand.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicBool, Ordering};

/// Faults of one communicator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub init: Option<Init>,
    /// By number of the operation, from 1.
    pub operations: BTreeMap<u64, Operation>,
    pub abort: Option<Abort>,
    once: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    Error(c_int),
    Fails(c_int),
    Hangs,
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
            let operation = match (name, number, code) {
                ("init-error", None, Some(code)) => {
                    faults.init = Some(Init::Error(code));
                    continue;
                }
                ("init-fails", None, Some(code)) => {
                    faults.init = Some(Init::Fails(code));
                    continue;
                }
                ("init-hangs", None, None) => {
                    faults.init = Some(Init::Hangs);
                    continue;
                }
                ("abort-hangs", None, None) => {
                    faults.abort = Some(Abort::Hangs);
                    continue;
                }
                ("abort-error", None, Some(code)) => {
                    faults.abort = Some(Abort::Error(code));
                    continue;
                }
                ("once", None, None) => {
                    faults.once = true;
                    continue;
                }
                ("op-error", Some(_), Some(code)) => Operation::Error(code),
                ("op-fails", Some(_), Some(code)) => Operation::Fails(code),
                ("op-blocks", Some(_), None) => Operation::Blocks,
                ("op-hangs", Some(_), None) => Operation::Hangs,
                ("device-lost", Some(_), None) => Operation::DeviceLost,
                _ => return None,
            };
            faults.operations.insert(number?, operation);
        }
        Some(faults)
    }

    /// Returns what the communicator that this thread makes now suffers.
    pub fn take() -> Self {
        if let Some(faults) = NEXT.with_borrow_mut(Option::take) {
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

thread_local! {
    static NEXT: RefCell<Option<Faults>> = const { RefCell::new(None) };
}

/// Gives faults to the next communicator of this thread; false if the list cannot be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lacuna_standin_inject(list: *const c_char) -> bool {
    // SAFETY: the caller passes a C string.
    let list = unsafe { CStr::from_ptr(list) }.to_string_lossy();
    let faults: Option<Faults> = Faults::parse(&list);
    let accepted: bool = faults.is_some();
    NEXT.set(faults);
    accepted
}
