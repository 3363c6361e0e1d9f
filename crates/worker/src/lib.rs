//! Agent and trainer: the processes that compute. Generic over [`engine::Engine`] and the collective.
//!
//! No libtorch here: the torch engine lives in the `mae` crate; [`fake::FakeEngine`] is a real
//! regression in plain Rust for tests of processes.
#![forbid(unsafe_code)]

pub mod cpu_state;
pub mod engine;
