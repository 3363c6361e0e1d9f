//! Real processes: the claim, faults, restarts, and bad input.

mod bad_input;
mod bad_samples;
mod cache;
mod chaos;
mod claim;
mod faults;
mod nccl;
mod remote;

use lacuna_tests::{Binaries, Fixture};

fn binaries() -> Binaries {
    Binaries {
        lacuna: env!("CARGO_BIN_EXE_lacuna-under-test").into(),
        worker: env!("CARGO_BIN_EXE_lacuna-fake-worker").into(),
    }
}

fn fixture() -> Fixture {
    Fixture::new(binaries(), 256, 8)
}
