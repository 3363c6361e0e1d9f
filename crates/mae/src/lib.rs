//! The masked autoencoder on libtorch and the engine that trains it.
//!
//! The only crate that names `tch`. It computes losses, gradients, features and pictures; it does
//! not read data, talk to peers or decide when to step: [`lacuna_worker`] does, through
//! [`lacuna_worker::engine::Engine`]. The optimizer, the reduction and the initial weights are
//! plain Rust in [`lacuna_recipe`], so libtorch decides the bits of a gradient and of nothing
//! else.
//!
//! Start reading at [`mae`], which is the paper in code, then [`engine`]. docs/mae.md maps each
//! idea of the method to its file and its test. To learn something else, implement
//! [`objective::Objective`] and give it to [`worker::main`] (docs/extending.md).
#![deny(unsafe_op_in_unsafe_fn)]

pub mod autograd;
pub mod classify;
pub mod context;
pub mod cuda;
pub mod engine;
pub mod frozen;
pub mod mae;
pub mod objective;
pub mod patches;
pub mod pos_resize;
pub mod reconstruct;
pub mod runtime;
pub mod vit;
pub mod weights;
pub mod worker;
