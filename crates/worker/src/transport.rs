//! Which collective a trainer's groups use.

use std::time::Duration;

use lacuna_collective::{
    AbortHandle, Collective, CollectiveError, Group, NcclCollective, NcclSetup, SetupError,
    TcpCollective, TrainerListener,
};

use crate::args::{CollectiveKind, TransportArgs};

/// A way of forming groups, prepared once in a process.
#[derive(Clone, Debug)]
pub enum Transport {
    /// TCP between host memories.
    Tcp,
    /// NCCL between devices.
    Nccl(NcclSetup),
}

impl Transport {
    /// Prepares what `args` ask for on `device`, like `cpu1` or `cuda0`.
    ///
    /// # Errors
    /// [`SetupError`]: driver, device or NCCL are missing, too old or broken.
    pub fn open(args: &TransportArgs, device: &str) -> Result<Self, SetupError> {
        let kind = match args.collective {
            CollectiveKind::Auto if device.starts_with("cuda") => CollectiveKind::Nccl,
            CollectiveKind::Auto => CollectiveKind::Tcp,
            kind => kind,
        };
        if kind == CollectiveKind::Tcp {
            return Ok(Self::Tcp);
        }
        let (nccl, cuda) = (args.nccl_library.as_deref(), args.cuda_library.as_deref());
        let setup = NcclSetup::open(ordinal(device), nccl, cuda)?;
        tracing::info!(nccl = setup.describe(), "collective ready");
        Ok(Self::Nccl(setup))
    }
}

/// Number of a device among those that this process sees.
fn ordinal(device: &str) -> u32 {
    if device.starts_with("cuda") {
        // Its agent hides the others.
        return 0;
    }
    device.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0)
}

/// How this trainer meets its peers.
#[derive(Debug)]
pub struct Peers {
    /// Where they connect.
    pub listener: TrainerListener,
    /// What carries the sums.
    pub transport: Transport,
}

impl Peers {
    /// Forms a group.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn connect(
        &self,
        group: &Group,
        abort: AbortHandle,
        deadline: Duration,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        let listener = &self.listener;
        Ok(match &self.transport {
            Transport::Tcp => Box::new(TcpCollective::connect(listener, group, abort, deadline)?),
            Transport::Nccl(setup) => {
                Box::new(NcclCollective::connect(listener, group, setup, abort, deadline)?)
            }
        })
    }
}
