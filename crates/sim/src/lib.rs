//! Whole clusters in one thread: the two real machines of `control` over a simulated network,
//! clocks, disks and processes.
//!
//! A history is a [`script::Script`]: a setup, and what is done to the cluster when. A seed is a
//! history too ([`history::draw`]). Whatever happens, an observer checks every invariant of the
//! protocol after every event. There is no real clock, no thread and no socket here.
//!
//! Start with [`world::World`], then [`script`], then [`history`].
#![forbid(unsafe_code)]

pub mod action;
mod agent;
pub mod bugs;
mod catalogue;
mod comm;
mod commit;
pub mod coverage;
mod digest;
mod faults;
mod fence;
pub mod goodput;
pub mod history;
mod host;
mod net;
mod process;
mod rng;
mod saving;
pub mod script;
pub mod setup;
pub mod shrink;
mod steps;
pub mod world;
