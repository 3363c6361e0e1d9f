//! Which devices of its machine an agent uses.

use lacuna_cuda::{CudaError, Driver};
use lacuna_types::exit;

use crate::args::AgentArgs;
use crate::entry::CodedError;

/// Lists the devices that the command line asks for.
pub fn devices(args: &AgentArgs) -> Result<Vec<String>, CodedError> {
    let cuda = args.transport.cuda_library.as_deref();
    let n_cuda = || Driver::load(cuda).and_then(|driver| driver.n_devices());
    let wanted = match args.devices.as_str() {
        "all" => all_devices(n_cuda()),
        some => some,
    };
    parse_devices(wanted, n_cuda).map_err(|err| {
        let code = match &err {
            DevicesError::Bad(_) => exit::USAGE,
            DevicesError::Cuda(_) => exit::UNFIT,
        };
        CodedError { code, message: err.to_string() }
    })
}

/// Returns what `--devices all` stands for: a driver that is broken is not taken for none.
fn all_devices(n_cuda: Result<u32, CudaError>) -> &'static str {
    match n_cuda {
        Err(CudaError::DriverMissing { .. } | CudaError::NoDevice { .. }) | Ok(0) => "cpu",
        _ => "cuda",
    }
}

/// Most trainers of one agent: more than any node has devices.
const DEVICES_MAX: usize = 64;

/// Parses `--devices`; `n_cuda` counts the CUDA devices of this machine where that is asked for.
fn parse_devices<E>(
    text: &str,
    n_cuda: impl FnOnce() -> Result<u32, E>,
) -> Result<Vec<String>, DevicesError<E>> {
    let bad = |what: &str| DevicesError::Bad(format!("`--devices {text}`: {what}"));
    let (kind, numbers) = text.split_once(':').map_or((text, None), |(kind, n)| (kind, Some(n)));
    let devices: Vec<u32> = match (kind, numbers) {
        ("cpu", None) => vec![0],
        ("cpu", Some(n)) => (0..n.parse().unwrap_or(0)).take(DEVICES_MAX + 1).collect(),
        ("cuda", None) => (0..n_cuda().map_err(DevicesError::Cuda)?).collect(),
        ("cuda", Some(list)) => {
            let numbers: Result<Vec<u32>, _> = list.split(',').map(str::parse).collect();
            let numbers =
                numbers.map_err(|_| bad("after `cuda:` come numbers of devices, like 0,1"))?;
            let n = n_cuda().map_err(DevicesError::Cuda)?;
            // Another number may be a device that CUDA_VISIBLE_DEVICES hides: somebody else's.
            if let Some(beyond) = numbers.iter().find(|number| **number >= n) {
                let seen = std::env::var("CUDA_VISIBLE_DEVICES");
                let seen =
                    seen.map_or(String::new(), |v| format!(" (CUDA_VISIBLE_DEVICES is {v})"));
                return Err(bad(&format!(
                    "there is no device {beyond}: the driver shows {n}, from 0 on{seen}"
                )));
            }
            numbers
        }
        _ => return Err(bad("expected `all`, `cpu`, `cpu:N`, `cuda` or `cuda:I,J`")),
    };
    if !(1..=DEVICES_MAX).contains(&devices.len()) {
        return Err(bad(&format!("expected 1 to {DEVICES_MAX} devices")));
    }
    if let Some(twice) = devices.iter().enumerate().find(|(i, d)| devices[..*i].contains(d)) {
        return Err(bad(&format!("device {} is named twice; one trainer uses one", twice.1)));
    }
    Ok(devices.into_iter().map(|number| format!("{kind}{number}")).collect())
}

/// Devices that cannot be used.
#[derive(Debug, thiserror::Error)]
enum DevicesError<E> {
    /// The text means nothing.
    #[error("{0}")]
    Bad(String),
    /// The machine's devices cannot be counted.
    #[error(transparent)]
    Cuda(E),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<String>, String> {
        parse_devices(text, || Ok::<u32, String>(3)).map_err(|err| err.to_string())
    }

    #[test]
    fn devices() {
        assert_eq!(parse("cpu").unwrap(), ["cpu0"]);
        assert_eq!(parse("cpu:2").unwrap(), ["cpu0", "cpu1"]);
        assert_eq!(parse("cuda").unwrap(), ["cuda0", "cuda1", "cuda2"]);
        assert_eq!(parse("cuda:2,1").unwrap(), ["cuda2", "cuda1"]);
        let beyond = parse("cuda:0,3").unwrap_err();
        assert!(beyond.contains("there is no device 3: the driver shows 3, from 0 on"), "{beyond}");
        for bad in ["", "gpu", "cpu:0", "cpu:65", "cpu:x", "cuda:", "cuda:x", "cuda:1,", "tpu:0"] {
            assert!(parse(bad).unwrap_err().contains("--devices"), "{bad}");
        }
        let twice = "`--devices cuda:1,1`: device 1 is named twice; one trainer uses one";
        assert_eq!(parse("cuda:1,1").unwrap_err(), twice);
        let none = parse_devices("cuda", || Err("no NVIDIA driver"));
        assert_eq!(none.unwrap_err().to_string(), "no NVIDIA driver");
    }
    #[test]
    fn all_is_what_the_driver_shows() {
        let broken = CudaError::DriverTooOld { library: "x".to_string(), symbol: "y" };
        assert_eq!(all_devices(Ok(3)), "cuda");
        assert_eq!(all_devices(Err(broken)), "cuda", "it is told, and not worked around");
        let missing = CudaError::DriverMissing { reason: "x".to_string() };
        let hidden = CudaError::NoDevice { visible: "-1".to_string() };
        for none in [missing, hidden] {
            assert_eq!(all_devices(Err(none)), "cpu");
        }
    }
}
