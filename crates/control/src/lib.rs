//! The membership protocol as two sans-io state machines, one for each end.
//!
//! Events and the time go in, commands come out, in order; a [`coordinator::Command::Persist`]
//! comes before whatever must not be seen before it is durable. There is no clock, no socket, no
//! thread and no random source here, and no generated wire type. Everything that sends, waits or
//! stores is a thin driver around these machines.
//!
//! `crates/sim` plays whole clusters of these machines over a simulated world.
//!
//! Start with [`message`] (what the two ends say), then [`coordinator::Coordinator::handle`], then
//! [`worker::Session::handle`].
#![forbid(unsafe_code)]

pub mod bad_samples;
pub mod coordinator;
pub mod invariants;
pub mod journal;
pub mod message;
pub mod plan;
pub mod timing;
pub mod worker;
