//! Objects behind a URL (S3, HTTP, Google Cloud Storage, Azure), read in ranges.
//!
//! What is promised: a read gives exactly the bytes of its range, or an error that names the object
//! and what was tried, before its deadline or little later. Connections that break, answers cut
//! short, servers that refuse for a while and bytes that only drip are met by asking again for what
//! is still missing. Which content is right is for the caller to check: this crate knows no
//! checksums.
//!
//! Calls block the thread that makes them and may come from any thread, one of an async runtime
//! included: the requests run in a runtime of the store's own.
//!
//! Start reading at [`Store`]; the loop that asks again is in `fetch.rs`.
#![forbid(unsafe_code)]

mod error;
mod fetch;
mod limits;
mod place;
mod reader;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use error::StoreError;
pub use limits::{Limits, Stop};
pub use place::is_url;
pub use reader::ObjectReader;
pub use store::{ObjectInfo, Pending, Store, StoreStats};

#[cfg(test)]
mod tests;
