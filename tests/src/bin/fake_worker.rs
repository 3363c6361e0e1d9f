//! The worker with the fake engine. `LACUNA_FAKE_SLOT_MS` gives a slot its length,
//! `LACUNA_FAKE_{HANG,CORRUPT,DIE,FAIL,DRIFT}_AT` break the device at a step.
use std::time::Duration;

use lacuna_worker::fake::{FakeBackend, Faults};

fn main() -> std::process::ExitCode {
    let number = |name: &str| -> Option<u64> {
        std::env::var(format!("LACUNA_FAKE_{name}")).ok()?.parse().ok()
    };
    let faults = Faults {
        hang_at: number("HANG_AT"),
        corrupt_at: number("CORRUPT_AT"),
        die_at: number("DIE_AT"),
        fail_at: number("FAIL_AT"),
        drift_at: number("DRIFT_AT"),
    };
    let slot_time = Duration::from_millis(number("SLOT_MS").unwrap_or(0));
    lacuna_worker::entry::run(FakeBackend { slot_time, faults })
}
