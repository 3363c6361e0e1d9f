//! Objects behind a URL (S3, HTTP, Google Cloud Storage, Azure), read in ranges and written once.
//!
//! What is promised: a read gives exactly the bytes of its range, or an error that names the object
//! and what was tried, before its deadline or little later. Connections that break, answers cut
//! short, servers that refuse for a while and bytes that only drip are met by asking again for what
//! is still missing. Which content is right is for the caller to check: this crate knows no
//! checksums.
//!
//! What is created is created once ([`Store::create`], [`Upload`]): a name that is taken stays as
//! it is, and an object whose answer was lost is known again by a random mark kept with it.
//!
//! Calls block the thread that makes them and may come from any thread, one of an async runtime
//! included: the requests run in a runtime of the store's own.
//!
//! Start reading at [`Store`]; the loop that asks again is in `fetch.rs`.
#![forbid(unsafe_code)]

mod conditional;
mod error;
mod fetch;
mod limits;
mod place;
mod put;
mod reader;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod upload;

pub use error::StoreError;
pub use limits::{Limits, Stop};
pub use place::is_url;
pub use put::Creation;
pub use reader::ObjectReader;
pub use store::{ObjectInfo, Pending, Store, StoreStats};
pub use upload::{PART_BYTES_MIN, Upload};

#[cfg(test)]
mod tests;
