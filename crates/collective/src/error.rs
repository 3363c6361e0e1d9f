//! What can go wrong, by what a caller can do about it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lacuna_cuda::CudaError;
use lacuna_nccl::{Library, NcclError, ResultCode};

/// A listener that could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The operating system refused the address.
    #[error("failed to bind trainer listener to {addr}")]
    Bind {
        /// Address asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The address can be reached from other machines and nothing protects it.
    #[error(
        "refused to bind trainer listener to {addr}: only loopback addresses are allowed while \
         workers have no tokens"
    )]
    NotLoopback {
        /// Address asked for.
        addr: SocketAddr,
    },
    /// Peers cannot connect to a wildcard address, so one to advertise must be given.
    #[error("trainer listener on wildcard address {addr} needs an address to advertise")]
    NothingToAdvertise {
        /// Address bound.
        addr: SocketAddr,
    },
}

/// A group that did not form, or a communicator that died.
///
/// Clonable, because every call after the first failure reports the same fault.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Somebody called `abort`: expected when a generation is revoked.
    #[error("collective aborted: {reason}")]
    Aborted {
        /// The reason given to the first `abort`.
        reason: String,
    },
    /// The deadline of an operation passed.
    #[error("operation {op_seq} timed out waiting for ranks {waiting_for:?}")]
    Timeout {
        /// Number of the operation, 1-based.
        op_seq: u64,
        /// Ranks that never entered the operation; if all did, those whose bytes are missing.
        waiting_for: Vec<usize>,
    },
    /// A connection broke. The named rank may be dead, or may have left the generation.
    #[error("lost rank {rank} at {addr} in operation {op_seq}")]
    PeerLost {
        /// Rank at the other end.
        rank: usize,
        /// Its address.
        addr: SocketAddr,
        /// Number of the operation, 1-based.
        op_seq: u64,
        /// What the socket said.
        source: Arc<io::Error>,
    },
    /// Two ranks are in different operations: a bug in the caller or differing builds.
    #[error("operations differ: this rank runs {ours}, rank {rank} runs {theirs}")]
    Mismatch {
        /// Rank at the other end.
        rank: usize,
        /// What this rank called.
        ours: OpDescription,
        /// What the other rank called.
        theirs: OpDescription,
    },
    /// A member refused this rank, or could not prove that it belongs to the group.
    #[error("handshake with rank {rank} at {addr} failed: {reason}")]
    Handshake {
        /// Rank at the other end.
        rank: usize,
        /// Its address.
        addr: SocketAddr,
        /// Why.
        reason: Refusal,
    },
    /// The deadline passed before all members were connected.
    #[error("group did not form in time: {}", Listed(missing))]
    NotFormed {
        /// Members without a connection.
        missing: Vec<MissingPeer>,
    },
    /// The plan describes no possible group, or the listener is busy with another.
    #[error("cannot form group: {reason}")]
    InvalidGroup {
        /// What is wrong.
        reason: String,
    },
    /// NCCL failed, and no member is seen to be gone.
    #[error("NCCL failed in operation {op_seq}")]
    Nccl {
        /// Number of the operation, 1-based; 0 while the group forms.
        op_seq: u64,
        /// What NCCL said.
        #[source]
        source: NcclError,
    },
    /// A call of NCCL that nothing can end did not return while the group formed, and was given up.
    #[error("`{call}` did not return within {waited:?}")]
    Blocked {
        /// The function.
        call: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// This rank's device failed.
    #[error("the device failed in operation {op_seq}")]
    Device {
        /// Number of the operation, 1-based; 0 while the group forms.
        op_seq: u64,
        /// What the driver said.
        #[source]
        source: CudaError,
    },
    /// Two members compute on one device, which NCCL refuses. The higher rank is the one too many.
    #[error("{device} is used by rank {rank} already")]
    SharedDevice {
        /// The rank that may keep it.
        rank: usize,
        /// Host and place of the device.
        device: String,
    },
    /// The communicator does not let go of the device: this process cannot go on.
    #[error("the communicator cannot be left, so this process must end")]
    Stuck {
        /// What was tried.
        #[source]
        source: NcclError,
    },
    /// This machine failed, not a peer.
    #[error("failed to {action}")]
    Local {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

impl CollectiveError {
    /// What calls say after this rank has left.
    pub(crate) fn left() -> Self {
        Self::Aborted { reason: "this rank has left the group".to_string() }
    }

    /// Returns the ranks this error speaks of, for a fault report; empty where none is to blame.
    pub fn suspects(&self) -> Vec<usize> {
        match self {
            Self::Timeout { waiting_for, .. } => waiting_for.clone(),
            Self::PeerLost { rank, .. }
            | Self::Mismatch { rank, .. }
            | Self::Handshake { rank, .. } => vec![*rank],
            Self::NotFormed { missing } => missing.iter().map(|peer| peer.rank).collect(),
            Self::Aborted { .. }
            | Self::InvalidGroup { .. }
            | Self::Nccl { .. }
            | Self::Blocked { .. }
            | Self::Device { .. }
            | Self::SharedDevice { .. }
            | Self::Stuck { .. }
            | Self::Local { .. } => Vec::new(),
        }
    }

    /// Tells whether this rank's device or process is broken, so that only a new process helps.
    pub fn ends_process(&self) -> bool {
        match self {
            Self::Stuck { .. } | Self::Device { .. } => true,
            Self::Nccl { source, .. } => source.code() == Some(ResultCode::UnhandledCudaError),
            Self::Blocked { waited, .. } => *waited >= Library::STUCK_FOR_GOOD,
            _ => false,
        }
    }
}

/// A member that did not connect in time, and the last thing that happened with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingPeer {
    /// Its rank.
    pub rank: usize,
    /// Its advertised address.
    pub addr: SocketAddr,
    /// The last thing that happened.
    pub detail: String,
}

struct Listed<'a>(&'a [MissingPeer]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (idx, MissingPeer { rank, addr, detail }) in self.0.iter().enumerate() {
            let separator = if idx == 0 { "" } else { "; " };
            write!(f, "{separator}rank {rank} at {addr}: {detail}")?;
        }
        Ok(())
    }
}

/// Why a connection was not let into a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The other end forms a group of another run.
    OtherRun,
    /// The other end forms another generation; goes away when both have the same plan.
    OtherGeneration,
    /// The two ends disagree on the world or on who has which rank.
    OtherGroup,
    /// The other end does not know this generation's key.
    WrongKey,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherRun => "it forms a group of another run",
            Self::OtherGeneration => "it forms another generation",
            Self::OtherGroup => "it has another list of members",
            Self::WrongKey => "the generation keys differ",
        })
    }
}

/// Kind of a collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Sum of i64 elements.
    AllReduceI64,
    /// Sum of i32 elements.
    AllReduceI32,
    /// Sum of f32 elements.
    AllReduceF32,
    /// Copy from one rank to all.
    Broadcast,
    /// No data.
    Barrier,
    /// Sum of i64 elements where they are on the devices, in one piece: the host's sums go in
    /// several, and NCCL would wait for the rest for ever.
    AllReduceI64There,
}

impl OpKind {
    /// Returns the name used in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduceI64 => "all_reduce_i64",
            Self::AllReduceI32 => "all_reduce_i32",
            Self::AllReduceF32 => "all_reduce_f32",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::AllReduceI64There => "all_reduce_i64_there",
        }
    }
}

/// What a rank says of an operation when it enters it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpDescription {
    /// Number of the operation since the group formed, 1-based.
    pub op_seq: u64,
    /// Kind of the operation.
    pub kind: OpKind,
    /// Rank that sends a broadcast; 0 for other kinds.
    pub root: u16,
    /// Size of the buffer in bytes.
    pub bytes: u64,
}

impl fmt::Display for OpDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op_seq, kind, root, bytes } = self;
        write!(f, "operation {op_seq}, {} of {bytes} bytes", kind.name())?;
        if *kind == OpKind::Broadcast { write!(f, " from rank {root}") } else { Ok(()) }
    }
}
