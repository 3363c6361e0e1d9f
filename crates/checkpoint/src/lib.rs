//! Sharded checkpoints in the format `lacuna-ckpt/1` (docs/formats.md): plan, write, commit, read,
//! export, import.
//!
//! State comes in and goes out as named byte slices. Every rank writes one part of a checkpoint; a
//! manifest, created last and only once, is the commit. Everything that is read back is compared
//! with the digests of the manifest, so damage is an error that names the file, the bytes and the
//! tensors, and never a wrong number.
//!
//! It deliberately has no tensor type, no clock and no async code, and it never overwrites a part
//! or a manifest. Who saves when is decided by the caller.
//!
//! Start reading at [`layout`] (where files lie), then [`partition`] (who writes what),
//! [`mod@write`], [`mod@commit`], [`load`] and [`catalog`]; [`storage`] is what they stand on.
#![forbid(unsafe_code)]

pub mod aside;
pub mod catalog;
pub mod commit;
pub mod doctor;
pub mod export;
pub mod import;
pub mod json;
pub mod layout;
pub mod load;
pub mod manifest;
pub mod pace;
pub mod partition;
pub mod read;
pub mod rebuild;
pub mod retain;
pub mod run_file;
pub mod state;
pub mod storage;
pub mod write;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
mod disk;
mod header;
#[cfg(test)]
mod testing;

pub use storage::{FsError, chain};
