//! The arithmetic that decides bits, on a CUDA device: the exact sum, AdamW, and digests.
//!
//! [`DeviceState`] holds a state (parameters and both moments) and the sums of a step in a device's
//! memory, and does to them what `recipe` does on the host, with the same bits: gradients are
//! rounded to integers where they were computed, integers are summed over ranks where they are, and
//! the update never leaves the device. What crosses the bus in a step is the control word, the
//! largest magnitude of each tensor, and the norm.
//!
//! The kernels are in `kernels/exact.cu`. They are compiled at run time ([`Kernels::compile`]), so
//! nothing of CUDA is needed to build, and they are C as well: the tests of this crate run the same
//! source on the host, behind a library that stands in for the driver, with few threads and many,
//! and compare bits.
//!
//! # Order of work
//! All work is enqueued on the legacy default stream, on which libtorch works too. Methods that
//! return numbers wait for them, under a deadline; the others return at once.

mod aside;
pub mod conformance;
mod crc;
mod kernels;
mod pixels;
mod state;
mod wait;

pub use aside::Aside;
pub use kernels::{Kernels, KernelsError, SOURCE};
pub use pixels::{Pixels, Shape};
pub use state::{DeviceState, Updating};
pub use wait::DeviceError;

#[cfg(test)]
mod tests;
