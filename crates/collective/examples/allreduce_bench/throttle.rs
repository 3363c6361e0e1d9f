//! A slow network between the members of a benchmark: every byte goes through a proxy in front of
//! its receiver, which lets so many bits a second pass.

use std::io::{Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that pass at once: 0.5 ms at 1 Gb/s.
const PIECE: usize = 64 << 10;

/// When the next byte may pass in one direction.
#[derive(Clone, Debug)]
struct Lane {
    bytes_per_second: f64,
    free_at: Arc<Mutex<Instant>>,
}

impl Lane {
    fn new(bits_per_second: f64) -> Self {
        let free_at = Arc::new(Mutex::new(Instant::now()));
        Lane { bytes_per_second: bits_per_second / 8.0, free_at }
    }

    /// Waits until `n` bytes have passed.
    fn pass(&self, n: usize) {
        let done = {
            let mut free_at = self.free_at.lock().expect("nobody panics with the lock");
            let took = Duration::from_secs_f64(n as f64 / self.bytes_per_second);
            *free_at = (*free_at).max(Instant::now()) + took;
            *free_at
        };
        thread::sleep(done.saturating_duration_since(Instant::now()));
    }
}

/// Puts a proxy in front of `member`; returns its address. All connections to the member share one
/// lane there and one back. Threads end with the process.
pub fn in_front_of(member: SocketAddr, bits_per_second: f64) -> Result<SocketAddr> {
    let listener = TcpListener::bind((member.ip(), 0))?;
    let address = listener.local_addr()?;
    let (there, back) = (Lane::new(bits_per_second), Lane::new(bits_per_second));
    thread::spawn(move || {
        for near in listener.incoming() {
            let Ok(near) = near else { continue };
            let Ok(far) = TcpStream::connect(member) else { continue };
            let both = near.try_clone().and_then(|n| far.try_clone().map(|f| (n, f)));
            let Ok((near_out, far_out)) = both else { continue };
            forward(near, far_out, there.clone());
            forward(far, near_out, back.clone());
        }
    });
    Ok(address)
}

fn forward(mut from: TcpStream, mut to: TcpStream, lane: Lane) {
    // Small packets go on at once, as on a wire.
    let _ = to.set_nodelay(true);
    thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(n) = from.read(&mut piece) {
            lane.pass(n);
            if n == 0 || to.write_all(&piece[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
