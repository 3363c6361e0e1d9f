//! Real processes: the claim, faults, restarts, and bad input.

mod answers;
mod bad_disks;
mod bad_input;
mod bad_samples;
mod cache;
mod chaos;
mod claim;
mod damage;
mod ensemble;
mod face;
mod faults;
mod metrics;
mod nccl;
mod network;
mod objects;
mod remote;
mod schema;
mod slurm;
mod syscalls;
mod syscalls_run;

use std::path::{Path, PathBuf};

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

/// Makes a folder `photographs` in the fixture with ten copies of each of a few JPEG photographs.
fn photographs(fixture: &Fixture) -> PathBuf {
    let images = fixture.path("photographs");
    std::fs::create_dir(&images).unwrap();
    for copy in 0..10 {
        for name in ["photo-420", "photo-422", "photo-444", "progressive"] {
            let to = images.join(format!("{name}-{copy}.jpg"));
            std::fs::copy(golden_image(&format!("{name}.jpg")), to).unwrap();
        }
    }
    images
}

/// Returns the path of an image that the decoder's tests know.
fn golden_image(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/pixels/tests/golden").join(name)
}
