//! What recovering from faults costs: seconds, steps, goodput, and the price of being able to.
//!
//! [`recovery`] times single faults, [`goodput`] whole runs under Poisson kills against a group
//! that restarts from checkpoints, [`overhead`] the undisturbed case.

pub mod goodput;
pub mod overhead;
pub mod plot;
pub mod recovery;
pub mod stats;
