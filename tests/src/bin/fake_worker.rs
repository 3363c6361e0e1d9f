//! The worker with the fake engine. `LACUNA_FAKE_SLOT_MS` gives a slot its length.
use lacuna_worker::fake::FakeBackend;

fn main() -> std::process::ExitCode {
    let ms = std::env::var("LACUNA_FAKE_SLOT_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(0);
    lacuna_worker::entry::run(FakeBackend { slot_time: std::time::Duration::from_millis(ms) })
}
