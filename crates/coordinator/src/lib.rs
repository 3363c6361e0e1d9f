//! The coordinator service: drives the control machines over gRPC, SQLite and timers.
//!
//! One task owns one run's machine ([`run`]); sessions and calls reach it through a bounded queue.
//! What must be durable goes through [`store::Store`] before anything that depends on it is sent.
//! It computes no tensors and is not on the path of a step.
//!
//! Start with [`service::Service::open`] and [`service::Service::serve`].
#![forbid(unsafe_code)]

mod account;
pub mod auth;
mod bans;
pub mod catalogue;
pub mod clock;
pub mod ensemble;
mod etcd;
mod grpc;
mod http;
mod opening;
#[cfg(feature = "otlp")]
mod otlp;
mod registry;
pub mod run;
pub mod service;
mod state_writer;
pub mod store;
mod times;
mod track;
mod waiting;

pub use auth::Security;
#[cfg(feature = "otlp")]
pub use otlp::{Otlp, OtlpError};
pub use service::{Options, Service, StartError};
