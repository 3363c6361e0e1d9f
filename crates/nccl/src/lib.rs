//! NCCL, NVIDIA's library of collectives between GPUs, as a program that must survive needs it.
//!
//! - **Opened at run time.** No header, no library and no CUDA is needed to build, and a program
//!   starts where none is installed: [`Library::find`] says what is missing. It takes symbols that
//!   the process has already (libtorch brings NCCL along) before it opens a file;
//!   [`Library::open`] takes the file that is named, whatever else there is.
//! - **It never waits.** Communicators are made with `blocking = 0`. Every call returns with what
//!   it knows ([`Progress`]), and what waits takes a deadline and a way to stop.
//! - **It can be aborted** at any moment of a communicator's life, from any thread, while another
//!   thread is inside a call, and the abort itself has a deadline ([`Aborter`]).
//! - **Every error is a [`Result`]** with NCCL's code and its own last words ([`NcclError`]).
//!   Nothing panics on what the library or a peer does.
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # use lacuna_nccl::{CommConfig, Communicator, DataType, Library, ReduceOp, UniqueId};
//! # fn f(world: usize, rank: usize, id: UniqueId, buffer: *mut std::ffi::c_void, n: usize,
//! #      stream: *mut std::ffi::c_void) -> Result<(), Box<dyn std::error::Error>> {
//! let library = Library::find(None)?;
//! let deadline = Instant::now() + Duration::from_secs(30);
//! let comm = Communicator::start(&library, &id, world, rank, &CommConfig::default())?;
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
//! - **Calls return at once, unless NCCL itself gets stuck.** An abort frees a call that is. Before
//!   there is a communicator nothing can be aborted, and drawing an id and starting look for
//!   networks and set CUDA up. Whoever cannot wait for these two makes them on another thread, and
//!   leaves it to itself.
//! - **After any fault only [`Aborter::abort`] is safe.** Destroying waits for peers. Dropping a
//!   [`Communicator`] that was not closed aborts it.
//!
//! # Threads
//! A [`Communicator`] may move between threads and is used by one at a time: its type is not
//! [`Sync`]. Aborters are `Send`, `Sync` and `Clone`. The CUDA device of the communicator must be
//! current on the thread that makes calls. A thread lives until what its calls started in the
//! background is done, or an abort has returned: up to NCCL 2.26 the background works in memory of
//! that thread.
//!
//! # Safety
//! The crate cannot know what a device address points to, so operations on buffers are `unsafe`
//! with one contract ([`Communicator::all_reduce`]). Making, polling, aborting and closing
//! communicators is safe.
//!
//! # Sources
//! Signatures and numbers: `nccl.h` of NCCL 2.18 to 2.30. Behaviour of aborts and asynchronous
//! errors: NCCL's user guide, "Fault Tolerance", and measurements on 2.28.9. Threads: `group.cc` of
//! 2.18 to 2.30.
//!
//! Start reading at [`Library`], then [`Communicator`].

mod abort;
mod api;
mod comm;
mod error;
mod library;
mod operations;

pub use abort::Aborter;
pub use comm::{CommConfig, Communicator, Progress};
pub use error::{LoadError, NcclError, ResultCode};
pub use library::{Capabilities, Library, Origin, UniqueId, Version};
pub use operations::{Batch, DataType, RawStream, ReduceOp};

#[cfg(test)]
mod tests;
