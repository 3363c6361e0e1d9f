//! What a process needs before it can form groups over NCCL.

use std::path::Path;

use lacuna_cuda::{CudaError, Device, Driver};
use lacuna_nccl::{Library, LoadError};

/// NCCL and a device, opened once in a process; cheap to clone.
#[derive(Clone, Debug)]
pub struct NcclSetup {
    pub(super) nccl: Library,
    pub(super) device: Device,
    /// Names the device among all of a cluster.
    pub(super) place: String,
}

/// Why a process cannot use NCCL.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// NCCL is missing, old or broken.
    #[error("NCCL cannot be used")]
    Nccl(#[source] LoadError),
    /// The driver or the device is.
    #[error("device cuda{ordinal} cannot be used")]
    Device {
        /// Number of the device among those that the process sees.
        ordinal: u32,
        /// What the driver said.
        #[source]
        source: CudaError,
    },
}

impl NcclSetup {
    /// Opens device `ordinal` and finds NCCL.
    ///
    /// A file that `nccl` names is taken, whatever else there is. Otherwise NCCL is the one whose
    /// symbols this process has already, and where it has none `libnccl.so.2`. The driver is
    /// `libcuda.so.1` unless `cuda` names a file.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn open(
        ordinal: u32,
        nccl: Option<&Path>,
        cuda: Option<&Path>,
    ) -> Result<Self, SetupError> {
        let failed = |source| SetupError::Device { ordinal, source };
        let device: Device =
            Driver::load(cuda).and_then(|driver| driver.device(ordinal)).map_err(failed)?;
        let nccl = nccl.map_or_else(|| Library::find(None), Library::open);
        let place: String = place_of(&device).map_err(failed)?;
        Ok(Self { nccl: nccl.map_err(SetupError::Nccl)?, device, place })
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Describes library and device for people: `NCCL 2.28.9 (this process), cuda0`.
    pub fn describe(&self) -> String {
        let (version, origin) = (self.nccl.version(), self.nccl.origin());
        format!("NCCL {version} ({origin}), cuda{}", self.device.ordinal())
    }
}

/// Names a device among all of a cluster: host and place on its bus.
///
/// `NCCL_HOSTID` names the host where it is set, as it does for NCCL: so several ranks share a card
/// in tests.
fn place_of(device: &Device) -> Result<String, CudaError> {
    let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let host = std::env::var("NCCL_HOSTID").unwrap_or_else(|_| {
        let boot = file("/proc/sys/kernel/random/boot_id");
        format!("{} (boot {})", file("/proc/sys/kernel/hostname").trim(), boot.trim())
    });
    Ok(format!("device {} of host {host}", device.bus_id()?))
}
