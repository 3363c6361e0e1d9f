//! Groups of calls.

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::nccl::{Comm, Handle, INVALID_USAGE, SUCCESS, comm, comms, misuse, start};
use crate::run::{Kind, Operation};

thread_local! {
    static GROUP_DEPTH: Cell<usize> = const { Cell::new(0) };
    static GROUP: RefCell<Vec<(Arc<Comm>, usize, Operation)>> = const { RefCell::new(Vec::new()) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupStart() -> c_int {
    GROUP_DEPTH.set(GROUP_DEPTH.get() + 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupEnd() -> c_int {
    match GROUP_DEPTH.get() {
        0 => return INVALID_USAGE,
        depth => GROUP_DEPTH.set(depth - 1),
    }
    if GROUP_DEPTH.get() > 0 {
        return SUCCESS;
    }
    let mut operations = GROUP.take();
    // All sends first: nothing in a group waits for something else of it to start.
    operations.sort_by_key(|(.., operation)| !matches!(operation.kind, Kind::Send { .. }));
    let mut result: c_int = SUCCESS;
    for (comm, stream, operation) in operations {
        if !comms().values().any(|live| Arc::ptr_eq(live, &comm)) {
            misuse("ncclGroupEnd with an operation of a communicator that is not live");
        }
        let code = start(&comm, stream as Handle, operation);
        if comm.is_aborted() && !comm.revoked.load(Ordering::Acquire) {
            // The call was stuck, and an abort freed it.
            return SUCCESS;
        }
        result = if code == SUCCESS { result } else { code };
    }
    result
}

/// Takes an operation: into the thread's group if there is one, else onto its stream.
pub fn take(handle: Handle, stream: Handle, operation: Operation, call: &str) -> c_int {
    let comm: Arc<Comm> = comm(handle, call);
    if GROUP_DEPTH.get() == 0 {
        return start(&comm, stream, operation);
    }
    let number: u64 = comm.n_grouped.fetch_add(1, Ordering::AcqRel) + 1;
    if comm.faults.grouped == Some(number) {
        comm.hang();
        return SUCCESS;
    }
    GROUP.with_borrow_mut(|group| group.push((comm, stream as usize, operation)));
    SUCCESS
}
