//! Ports that stay free until somebody listens.

use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::bail;

/// Below those that Linux gives to outgoing connections by default: nobody takes one unasked.
const PORTS: Range<u16> = 20_000..32_000;

/// How many were given out by this process.
static GIVEN: AtomicU16 = AtomicU16::new(0);

/// Returns an address of this machine that nobody listens on, another one each time.
pub fn free_addr() -> anyhow::Result<SocketAddr> {
    let n_ports = u32::from(PORTS.end - PORTS.start);
    for _ in PORTS {
        // Processes that test at the same time begin at different places.
        let at = 61 * std::process::id() + u32::from(GIVEN.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + (at % n_ports) as u16;
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(addr).is_ok() {
            return Ok(addr);
        }
    }
    bail!("no free port from {} to {}", PORTS.start, PORTS.end)
}
