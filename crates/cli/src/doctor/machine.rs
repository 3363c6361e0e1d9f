//! What a machine has: processor, memory that processes share, devices, networks.

use std::fs;
use std::path::Path;

use lacuna_cuda::{CudaError, Driver};
use lacuna_spec::units::{grouped, size};

use super::{Finding, Verdict, finding};

/// Open files that a coordinator of some hundred workers, or a loader of many shards, needs.
const FILES_MIN: u64 = 4096;
/// Shared memory through which two workers of one machine sum, bytes.
const SHARED_MIN: u64 = 64 << 20;
/// Below this a network holds most models back, Mb/s.
const NETWORK_MIN: u64 = 1000;
/// CUDA that the driver must serve for the libtorch that workers have, 2.11.0 for CUDA 13.0.
const CUDA_MIN: u32 = 13;
/// What NCCL is called where it is installed.
const NCCL: &str = "libnccl.so.2";

pub(super) fn files() -> Finding {
    use rustix::process::{Resource, getrlimit};
    match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < FILES_MIN => {
            let text = format!("{most} may be open; raise the limit to {FILES_MIN} (ulimit -Hn)");
            finding("open files", Verdict::Note, text)
        }
        most => {
            let most = most.map_or("any number".to_string(), |n| n.to_string());
            finding("open files", Verdict::Fine, format!("{most} may be open"))
        }
    }
}

pub(super) fn shared_memory() -> Finding {
    let place = "/dev/shm";
    match rustix::fs::statvfs(place) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let text = format!("{} free in {place}", size(free));
            let verdict = if free < SHARED_MIN { Verdict::Note } else { Verdict::Fine };
            let few = "; NCCL uses it between GPUs: a container needs --shm-size=1g";
            let advice = if free < SHARED_MIN { few } else { "" };
            finding("shared memory", verdict, text + advice)
        }
        Err(err) => {
            let text = format!("{place}: {err}; NCCL uses it between GPUs of a machine");
            finding("shared memory", Verdict::Note, text)
        }
    }
}

pub(super) fn processor() -> Finding {
    let n = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores = format!("{n} of this machine's cores may be used");
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("avx2") {
        let text = format!("{cores}; without AVX2, which the exact sums are built for");
        return finding("processor", Verdict::Bad, text);
    }
    finding("processor", Verdict::Fine, cores)
}

/// Asks the driver for its devices. A machine without any computes on its processor.
pub(super) fn devices() -> Vec<Finding> {
    match Driver::load(None) {
        Ok(driver) => vec![describe(&driver), nccl()],
        Err(error @ (CudaError::DriverMissing { .. } | CudaError::NoDevice { .. })) => {
            let why = match error {
                CudaError::NoDevice { .. } => "a driver, and no device for it",
                _ => "no NVIDIA driver",
            };
            vec![finding("GPU", Verdict::Fine, format!("{why}: workers compute on the processor"))]
        }
        Err(error) => {
            vec![finding("GPU", Verdict::Bad, lacuna_checkpoint::chain(&error))]
        }
    }
}

/// Tells whether a driver for this CUDA, `12.8`, runs the libtorch that workers have.
fn serves(cuda: &str) -> bool {
    let major = cuda.split('.').next().and_then(|major| major.parse::<u32>().ok());
    major.is_some_and(|major| major >= CUDA_MIN)
}

fn describe(driver: &Driver) -> Finding {
    let look = || -> Result<(String, String), CudaError> {
        let version = driver.version()?;
        let own = version.driver.map_or(String::new(), |own| format!("driver {own}, "));
        let device = |info: lacuna_cuda::DeviceInfo| {
            let (major, minor) = info.capability;
            format!("{} ({}, sm_{major}{minor})", info.name, size(info.memory_bytes))
        };
        let devices: Vec<String> = driver.devices()?.into_iter().map(device).collect();
        let text = format!("{own}CUDA {}: {}", version.cuda, devices.join(", "));
        Ok((version.cuda, text))
    };
    match look() {
        Ok((cuda, text)) if serves(&cuda) => finding("GPU", Verdict::Fine, text),
        Ok((_, text)) => finding(
            "GPU",
            Verdict::Bad,
            format!("{text}; workers on it need a driver for CUDA {CUDA_MIN} (580 or newer)"),
        ),
        Err(error) => finding("GPU", Verdict::Bad, lacuna_checkpoint::chain(&error)),
    }
}

fn nccl() -> Finding {
    match lacuna_nccl::Library::open(Path::new(NCCL)) {
        Ok(library) => finding("NCCL", Verdict::Fine, format!("{} ({NCCL})", library.version())),
        Err(error) => {
            let why = lacuna_checkpoint::chain(&error);
            let text = format!("{why}; the one that comes with libtorch may serve all the same");
            finding("NCCL", Verdict::Note, text)
        }
    }
}

/// A network card.
#[derive(Debug, PartialEq, Eq)]
struct Card {
    name: String,
    /// Mb/s, where the driver says it.
    speed: Option<u64>,
    mtu: Option<u64>,
}

/// Looks at the cards that are up.
pub(super) fn network() -> Finding {
    judge_network(&cards(Path::new("/sys/class/net")))
}

fn cards(folder: &Path) -> Vec<Card> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let card = |entry: fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let name = entry.file_name().to_string_lossy().into_owned();
        let up = matches!(read("operstate")?.trim(), "up" | "unknown");
        (up && name != "lo").then(|| Card { name, speed: number("speed"), mtu: number("mtu") })
    };
    let mut cards: Vec<Card> = entries.filter_map(card).collect();
    cards.sort_by(|a, b| a.name.cmp(&b.name));
    cards
}

fn judge_network(cards: &[Card]) -> Finding {
    let text = |card: &Card| {
        let speed = card.speed.map_or(String::new(), |mbit| format!(", {} Mb/s", grouped(mbit)));
        let mtu = card.mtu.map_or(String::new(), |mtu| format!(", MTU {mtu}"));
        format!("{}{speed}{mtu}", card.name)
    };
    let all: Vec<String> = cards.iter().map(text).collect();
    let fastest = cards.iter().filter_map(|card| card.speed).max();
    match fastest {
        _ if cards.is_empty() => {
            let text = "no card is up: workers of this machine only";
            finding("network", Verdict::Note, text)
        }
        Some(mbit) if mbit < NETWORK_MIN => {
            let text = format!(
                "{}; slow: `train.reduce = \"exact32\"` halves what a step sends",
                all.join("; ")
            );
            finding("network", Verdict::Note, text)
        }
        _ => finding("network", Verdict::Fine, all.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_may_be_too_old() {
        assert!(serves("13.0") && serves("14.1"));
        assert!(!serves("12.8") && !serves("unknown"));
    }

    #[test]
    fn cards_that_are_up_are_listed_and_slow_ones_noted() {
        let folder = tempfile::tempdir().unwrap();
        let card = |name: &str, state: &str, speed: &str| {
            let dir = folder.path().join(name);
            fs::create_dir(&dir).unwrap();
            for (file, text) in [("operstate", state), ("speed", speed), ("mtu", "1500")] {
                fs::write(dir.join(file), format!("{text}\n")).unwrap();
            }
        };
        assert_eq!(judge_network(&cards(folder.path())).verdict, Verdict::Note);
        card("lo", "unknown", "-1");
        card("eth1", "down", "100000");
        card("eth0", "up", "100");
        let found = judge_network(&cards(folder.path()));
        assert_eq!(found.verdict, Verdict::Note);
        assert!(found.text.starts_with("eth0, 100 Mb/s, MTU 1500; slow"), "{}", found.text);
        card("ib0", "up", "200000");
        card("veth", "up", "-1");
        let found = judge_network(&cards(folder.path()));
        let text = "eth0, 100 Mb/s, MTU 1500; ib0, 200,000 Mb/s, MTU 1500; veth, MTU 1500";
        assert_eq!((found.verdict, found.text.as_str()), (Verdict::Fine, text));
    }
}
