//! Agent and trainer: the processes that compute. Generic over [`engine::Engine`] and the
//! collective.
//!
//! An agent ([`agent`]) runs on each node and keeps one trainer process per device. A trainer has
//! three threads that matter: the step loop ([`trainer::step_loop`]), the saver
//! ([`trainer::saver`]) and the control session ([`trainer::session`]), which is the only one that
//! talks to the coordinator.
//!
//! No libtorch here: the torch engine lives in the `mae` crate; [`fake::FakeEngine`] is a real
//! regression in plain Rust for tests of processes. Start with [`entry::run`].

pub mod agent;
pub mod args;
pub mod conformance;
pub mod cpu_state;
mod devices;
pub mod engine;
pub mod entry;
pub mod fake;
pub mod host_math;
pub mod step_math;
pub mod trainer;
pub mod transport;
