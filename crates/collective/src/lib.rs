//! Collectives between workers: the trait, TCP with shared memory inside a machine, NCCL, and the
//! conformance suite.
//!
//! A *collective* connects the members of one generation of a run. It sums gradients
//! ([`Collective::all_reduce_i64`], [`Collective::all_reduce_f32`]) and hands state to joiners
//! ([`Collective::broadcast`]). Every call blocks its thread, has a deadline, and can be woken from
//! another thread through an [`AbortHandle`].
//!
//! What this crate deliberately does not do:
//! - **It never repairs a group.** After any error a communicator is dead for good; membership
//!   decides who belongs to the next generation, and the survivors form it over the same listener.
//! - **It never retries an operation.** The caller computes a failed step again whole.
//! - **It does not encrypt.** Members prove knowledge of the generation's key once per connection;
//!   the payload travels in clear and unauthenticated afterwards: the workers' network has to be a
//!   private one. A listener leaves loopback only with [`Exposure::Trusted`], for callers that
//!   authenticate workers.
//! - It has no async code, and starts no threads but for those that start NCCL, keep the time of
//!   its calls, and abort it. A call that starts NCCL and has not returned by the deadline is given
//!   up and keeps its thread: before there is a communicator nothing can end it.
//!
//! Start reading at `traits.rs` (the contract), then `exchange.rs` (how bytes move) and `link.rs`
//! (through what), `form.rs`, `handshake.rs` and `share.rs` (how a group forms), and `nccl.rs` with
//! `nccl/setup.rs` (what it needs). `conformance.rs` is the contract as tests.

#[cfg(target_endian = "big")]
compile_error!("elements travel as native bytes, which the wire format fixes to little-endian");

mod abort;
pub mod conformance;
mod error;
mod exchange;
mod form;
mod handshake;
mod link;
mod listener;
mod nccl;
mod reduce;
mod rings;
mod share;
mod tcp;
#[cfg(test)]
mod tests;
mod traits;

pub use abort::AbortHandle;
pub use error::{BindError, CollectiveError, MissingPeer, OpDescription, OpKind, Refusal};
pub use form::Group;
pub use listener::{Exposure, TrainerListener};
pub use nccl::{NcclCollective, NcclSetup, SetupError};
pub use tcp::TcpCollective;
pub use traits::{Collective, DeviceCollective, OpLedger, OpProgress};
