//! Connections to this rank that are none of its group's.

use std::io;
use std::net::SocketAddr;

use super::Group;
use crate::Refusal;

/// Why a connection to this rank was closed.
pub(super) enum Stray {
    Garbage,
    Silent,
    Crowded,
    Broken(io::Error),
    Refused { refusal: Refusal, generation: u64 },
}

impl From<io::Error> for Stray {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Stray {
    /// Logs the reason. Remains of other generations are ordinary after failures; the rest is not.
    pub(super) fn log(&self, addr: SocketAddr, group: &Group) {
        let (rank, generation) = (group.rank, group.generation);
        match self {
            Self::Broken(error) => {
                tracing::debug!(%addr, rank, %generation, %error, "connection broke in handshake");
            }
            Self::Refused { refusal: Refusal::OtherGeneration, generation: theirs } => {
                tracing::debug!(%addr, rank, %generation, theirs, "refused other generation");
            }
            Self::Refused { refusal, .. } => {
                tracing::warn!(%addr, rank, %generation, ?refusal, "refused connection");
            }
            Self::Garbage => {
                tracing::warn!(%addr, rank, %generation, "closed connection that sent garbage");
            }
            Self::Silent => {
                tracing::warn!(%addr, rank, %generation, "closed connection that kept silent");
            }
            Self::Crowded => {
                tracing::warn!(%addr, rank, %generation, "closed oldest of too many connections");
            }
        }
    }
}
