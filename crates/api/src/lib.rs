//! The wire: generated gRPC code, its mapping to the words of the other crates, and the typed
//! client.
//!
//! Nothing else in Lacuna names a generated type except the coordinator's and the worker's drivers,
//! and they convert at once. Tensors never travel here.
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod tls;
pub mod wire;

/// Generated from `proto/` by `make proto`; committed, and checked to be current.
#[allow(missing_docs, clippy::all, rustdoc::all, rust_2018_idioms)]
pub mod v1 {
    include!("generated/lacuna.v1.rs");
}

/// The protos as `buf` and reflection know them; generated with the code.
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/lacuna.v1.bin");

/// Largest message either side accepts, 16 MiB: specs and receipts are far below it, and a larger
/// one is a mistake or an attack.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Largest picture that a worker sends: three images of a thousand pixels a side.
pub const PICTURE_BYTES_MAX: usize = 8 << 20;

/// Asks for as many open files as the system allows this process, because each connection is one;
/// processes that it starts inherit that. Returns why it did not work, if it did not.
pub fn raise_open_files() -> Result<(), String> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
        .map_err(|error| format!("the limit on open files stays as it is: {error}"))
}

/// Makes a `request_id` that nobody else has: 128 random bits.
pub fn new_request_id() -> String {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).expect("the system has a random source");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
