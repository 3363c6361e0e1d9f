//! NCCL, NVIDIA's library of collectives between GPUs, as a program that must survive needs it.
//!
//! - **Opened at run time.** No header, no library and no CUDA is needed to build, and a program
//!   starts where none is installed: [`Library::find`] says what is missing. It takes symbols that
//!   the process has already (libtorch brings NCCL along) before it opens a file;
//!   [`Library::open`] takes the file that is named, whatever else there is.
//! - **No call waits without a deadline.** Communicators are made with `blocking = 0`: calls return
//!   with what they know ([`Progress`]), and what waits takes a deadline and a way to stop. Where
//!   NCCL itself gets stuck in a call, an abort ends it in time ([`Communicator::until`]); before
//!   there is a communicator to abort, the call is left to a thread of its own. Opening a library
//!   is the dynamic loader's work, and takes what it takes.
//! - **It can be aborted** at any moment of a communicator's life, from any thread, while another
//!   thread is inside a call, and the abort itself has a deadline ([`Aborter`]).
//! - **Every error is a [`Result`]** with NCCL's code and its own last words ([`NcclError`]).
//!   Nothing panics on what the library or a peer does.
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # use lacuna_nccl::{CommConfig, Communicator, DataType, Library, ReduceOp, Seat};
//! # fn f(seat: Seat, buffer: *mut std::ffi::c_void, n: usize, stream: *mut std::ffi::c_void,
//! #      make_device_current: fn() -> Result<(), std::io::Error>)
//! #      -> Result<(), Box<dyn std::error::Error>> {
//! let library = Library::find(None)?;
//! let deadline = Instant::now() + Duration::from_secs(30);
//! let config = CommConfig::default();
//! let (comm, ()) =
//!     Communicator::start(&library, seat, config, make_device_current, deadline, || false)?;
//! comm.wait(deadline, || false)?;
//! // SAFETY: `buffer` holds `n` floats on this device until the stream has passed the sum.
//! unsafe { comm.all_reduce(buffer, buffer, n, DataType::F32, ReduceOp::Sum, stream)? };
//! comm.wait(deadline, || false)?;
//! # Ok(()) }
//! ```
//!
//! # What NCCL does and does not promise
//! - **Units.** Counts are elements of the [`DataType`], not bytes. Ranks and roots are 0-based.
//! - **Order.** All ranks must make the same calls in the same order with the same counts. NCCL
//!   does not check it: a difference hangs or gives garbage. Compare descriptions beforehand.
//! - **Completion.** A call enqueues work on a stream; the sum is there when the stream has passed
//!   it. [`Progress::Done`] of [`Communicator::poll`] means that nothing is left to *start*.
//! - **An aborted operation looks like a finished one**: the stream passes it and reports no error,
//!   and the buffer holds garbage (measured with 2.28.9). Ask whether the communicator was aborted
//!   before reading a result.
//! - **Calls return at once, unless NCCL itself gets stuck.** An abort frees a call that is, as
//!   NCCL means it to; one that stays even so is for whoever watches the process. Before there is a
//!   communicator nothing can be aborted, and drawing an id and starting look for networks and set
//!   CUDA up. A call of these two that was given up may hold the driver: freeing and allocating
//!   device memory may wait for it ([`Library::stuck_for`] tells).
//! - **The environment counts.** `NCCL_COMM_BLOCKING=1`, there or in NCCL's `nccl.conf`, makes
//!   calls wait for peers. The variable is refused; with the file, the deadlines above hold.
//! - **After any fault only [`Aborter::abort`] is safe.** Destroying waits for peers. Dropping a
//!   [`Communicator`] that was not closed aborts it.
//!
//! # Threads
//! A [`Communicator`] may move between threads and is used by one at a time: its type is not
//! [`Sync`]. Aborters are `Send`, `Sync` and `Clone`. The CUDA device of the communicator must be
//! current on the thread that makes calls. Each communicator has a thread beside its owner's, which
//! made it and keeps its time until it is freed: up to NCCL 2.26 the background works in memory of
//! that thread. For the same reason an owner's thread lives until what its calls started in the
//! background is done, or an abort has returned.
//!
//! # Safety
//! The crate cannot know what a device address points to, so operations on buffers are `unsafe`
//! with one contract ([`Communicator::all_reduce`]). Making, polling, aborting and closing
//! communicators is safe.
//!
//! # Sources
//! Signatures and numbers: `nccl.h` of NCCL 2.18 to 2.30 (<https://github.com/NVIDIA/nccl>).
//! Behaviour of aborts, revocation and asynchronous errors: NCCL's user guide, "Communicator
//! Creation and Management Functions" and "Fault Tolerance"
//! (<https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/>), and measurements on 2.28.9.
//! Threads: `group.cc` of 2.18 to 2.30.
//!
//! Start reading at [`Library`], then [`Communicator`].

mod abort;
mod api;
mod comm;
mod error;
mod keeper;
mod library;
mod operations;

pub use abort::Aborter;
pub use comm::{CommConfig, Communicator, Progress, Seat};
pub use error::{LoadError, NcclError, ResultCode, StartError};
pub use keeper::Armed;
pub use library::{Capabilities, Library, Origin, UniqueId, Version};
pub use operations::{Batch, DataType, RawStream, ReduceOp};

#[cfg(test)]
mod tests;
