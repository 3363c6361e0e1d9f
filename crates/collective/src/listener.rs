//! The socket on which a trainer waits for its peers.

use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;

use crate::BindError;

/// Which addresses a listener may bind to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// Loopback only.
    Loopback,
    /// Any address: for callers that know that workers authenticate with tokens.
    Trusted,
}

/// A bound socket that lives as long as the trainer, across generations.
///
/// Between generations nobody accepts: connections of eager peers wait in the kernel's queue, and
/// forming the next group sorts them out.
#[derive(Debug)]
pub struct TrainerListener {
    pub(crate) socket: TcpListener,
    advertised: SocketAddr,
    /// Whether members at the same address may share memory.
    pub(crate) shares_memory: bool,
    /// Held while a group forms: two at once would take each other's connections.
    pub(crate) forming: Mutex<()>,
}

impl TrainerListener {
    /// Binds to `addr` (port 0: any free port) and listens.
    ///
    /// `advertise` is what peers connect to, where that differs from the bound address (a
    /// container, a wildcard bind); its port 0 stands for the bound port. Who is reached elsewhere
    /// shares no memory with others at that address.
    ///
    /// # Errors
    /// [`BindError`] names the address and the reason.
    pub fn bind(
        addr: SocketAddr,
        advertise: Option<SocketAddr>,
        exposure: Exposure,
    ) -> Result<Self, BindError> {
        if exposure == Exposure::Loopback && !addr.ip().is_loopback() {
            return Err(BindError::NotLoopback { addr });
        }
        if addr.ip().is_unspecified() && advertise.is_none() {
            return Err(BindError::NothingToAdvertise { addr });
        }
        let failed = |source| BindError::Bind { addr, source };
        let socket = TcpListener::bind(addr).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let bound: SocketAddr = socket.local_addr().map_err(failed)?;
        let mut advertised: SocketAddr = advertise.unwrap_or(bound);
        if advertised.port() == 0 {
            advertised.set_port(bound.port());
        }
        tracing::info!(%bound, %advertised, "trainer listener bound");
        let shares_memory = advertise.is_none();
        Ok(Self { socket, advertised, shares_memory, forming: Mutex::new(()) })
    }

    /// Returns the address that peers connect to.
    pub fn advertised(&self) -> SocketAddr {
        self.advertised
    }
}
