//! The worker with the fake engine. `LACUNA_FAKE_SLOT_MS` gives a slot its length,
//! `LACUNA_FAKE_{HANG,CORRUPT,DIE,FAIL,DRIFT}_AT` break the device at a step, and
//! `LACUNA_FAKE_DEVICE` puts state and sums on the device of `LACUNA_CUDA_LIBRARY`.
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
    // With a device the state lives there, behind the driver's library that the worker uses.
    let on_device = std::env::var_os("LACUNA_FAKE_DEVICE").is_some();
    let device_library = on_device.then(|| std::env::var_os("LACUNA_CUDA_LIBRARY")).flatten();
    let device_library = device_library.map(std::path::PathBuf::from);
    lacuna_worker::entry::run(FakeBackend { slot_time, faults, device_library })
}
