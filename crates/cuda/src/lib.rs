//! The CUDA driver, opened at run time: devices, streams, events, memory and kernels.
//!
//! Nothing of CUDA is needed to build this crate, and a program that uses it starts on machines
//! without a driver: [`Driver::load`] says what is missing. The functions are those of `libcuda`,
//! the library that comes with the driver, not those of the CUDA runtime, which a program may
//! bring along as well (libtorch does): both act on the device's *primary context*, so memory and
//! streams of one are good for the other.
//!
//! What this crate deliberately does not do:
//! - **It never waits for a device.** There is no synchronise: whoever waits asks
//!   [`Event::is_done`] and decides itself how long, because a device that hangs or a peer that
//!   died must not take the thread along. (Freeing memory is the exception: the driver waits for
//!   work that uses it. Do not drop a [`DeviceBuffer`] that something hung may hold; leak it.)
//! - It does not check what a kernel or a copy touches. Enqueuing a copy is `unsafe`, and its
//!   contract is the usual one of asynchronous work: both ends stay valid and unobserved until the
//!   stream has passed it.
//!
//! # Threads
//! All types may be sent and shared. A context is current per thread; every method makes the
//! device's context current on the thread that calls it.
//!
//! Kernels are compiled at run time by NVRTC ([`Compiler`]), which is found the same way: neither a
//! build nor a test needs CUDA's own compiler.
//!
//! Start reading at [`Driver`] and [`Device`].
//!
//! Source of all signatures and numbers: NVIDIA's `cuda.h`, CUDA driver API, version 13.0.

#![warn(clippy::undocumented_unsafe_blocks)]

mod api;
mod device;
mod driver;
mod error;
mod kernel;
mod memory;
mod nvrtc;
mod stream;

pub use device::Device;
pub use driver::{DeviceInfo, Driver, DriverVersion};
pub use error::CudaError;
pub use kernel::{Arg, Function, Grid, Module};
pub use memory::{DeviceBuffer, PinnedBuffer};
pub use nvrtc::{Architecture, CompileError, Compiler};
pub use stream::{Event, Stream};

#[cfg(test)]
mod tests;
