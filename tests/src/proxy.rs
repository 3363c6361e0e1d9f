//! A TCP proxy that misbehaves on command: delay, throttle, cut, reset.
//!
//! A cut behaves like a pulled cable: nothing arrives any more, nobody is told, and what was sent
//! meanwhile arrives once the cable is back. So a cut drops no byte of a stream; it holds them (up
//! to [`QUEUE`] pieces, then the sender's own buffers fill up), together with the end of a
//! connection. One thing differs from a cable: a connection that is opened during a cut looks open
//! to the dialer, since the kernel accepts it, and then nothing comes.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

/// Bytes read at once.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces on their way in one direction: 1 MiB, about what a socket's buffers hold too.
const QUEUE: usize = 64;
/// Connections at a time: far above what a run's members open; more are closed at once.
const CONNECTIONS_MAX: usize = 1024;
/// Longest time to reach the target.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// A throttled direction sends this many pieces a second, so that a change is heeded soon.
const THROTTLE_PIECES: u64 = 20;

/// Directions of a connection, as seen by who dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the dialer to the target.
    Up,
    /// From the target to the dialer.
    Down,
    /// Both.
    Both,
}

impl Way {
    fn covers(self, way: Way) -> bool {
        self == Way::Both || self == way
    }
}

/// What a proxy can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Let nothing through.
    Cut(Way),
    /// Hand everything over later by this much, both ways.
    Delay(Duration),
    /// Let only so many bytes a second through, each way.
    Throttle(u64),
    /// End every connection with a reset.
    Reset,
    /// Heal everything: what was held goes on its way.
    Resume,
}

impl FromStr for Order {
    type Err = String;

    /// Reads `cut up|down|both`, `delay MILLISECONDS`, `throttle BYTES`, `reset`, `resume`.
    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |text: &str| text.parse::<u64>().map_err(|err| format!("`{text}`: {err}"));
        Ok(match words.as_slice() {
            ["cut", "up"] => Order::Cut(Way::Up),
            ["cut", "down"] => Order::Cut(Way::Down),
            ["cut"] | ["cut", "both"] => Order::Cut(Way::Both),
            ["delay", ms] => Order::Delay(Duration::from_millis(number(ms)?)),
            ["throttle", bytes] => Order::Throttle(number(bytes)?.max(1)),
            ["reset"] => Order::Reset,
            ["resume"] => Order::Resume,
            _ => return Err(format!("`{text}`: no such order")),
        })
    }
}

/// What holds for all connections of a proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Weather {
    cut_up: bool,
    cut_down: bool,
    delay: Duration,
    bytes_per_second: Option<u64>,
}

impl Weather {
    fn cut(&self, way: Way) -> bool {
        (way.covers(Way::Up) && self.cut_up) || (way.covers(Way::Down) && self.cut_down)
    }
}

/// The thread that proxies live on.
#[derive(Debug)]
pub struct Network {
    runtime: tokio::runtime::Runtime,
}

impl Network {
    /// Starts the thread.
    pub fn new() -> io::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("proxies").enable_all().build()?;
        Ok(Network { runtime })
    }

    /// Opens a proxy in front of `target`, on a free port of its loopback address.
    pub fn open(&self, target: SocketAddr) -> io::Result<Proxy> {
        if !target.ip().is_loopback() {
            let text = format!("refusing to forward to {target}: not a loopback address");
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let listen = SocketAddr::new(target.ip(), 0);
        let listener = self.runtime.block_on(TcpListener::bind(listen))?;
        let addr = listener.local_addr()?;
        let (weather, weather_rx) = watch::channel(Weather::default());
        let (resets, resets_rx) = watch::channel(0);
        let counts = Arc::new(Counts::default());
        let side = Side { target, weather: weather_rx, resets: resets_rx, counts: counts.clone() };
        let task = self.runtime.spawn(side.accept(listener)).abort_handle();
        Ok(Proxy { addr, weather, resets, counts, task })
    }
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    bytes: [AtomicU64; 2],
}

/// One proxy; it ends, with its connections, when dropped.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    weather: watch::Sender<Weather>,
    resets: watch::Sender<u64>,
    counts: Arc<Counts>,
    task: AbortHandle,
}

impl Proxy {
    /// Returns where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns how many connections came so far.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// Returns how many bytes were handed over, up and down: never fewer than have arrived.
    pub fn bytes(&self) -> [u64; 2] {
        [0, 1].map(|way| self.counts.bytes[way].load(Ordering::Relaxed))
    }

    /// Does what it is told.
    pub fn obey(&self, order: Order) {
        match order {
            Order::Cut(way) => self.weather.send_modify(|weather| {
                weather.cut_up |= way.covers(Way::Up);
                weather.cut_down |= way.covers(Way::Down);
            }),
            Order::Delay(delay) => self.weather.send_modify(|weather| weather.delay = delay),
            Order::Throttle(bytes) => {
                self.weather.send_modify(|weather| weather.bytes_per_second = Some(bytes));
            }
            Order::Reset => self.resets.send_modify(|resets| *resets += 1),
            Order::Resume => {
                self.weather.send_replace(Weather::default());
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the tasks of a proxy share.
#[derive(Clone)]
struct Side {
    target: SocketAddr,
    weather: watch::Receiver<Weather>,
    resets: watch::Receiver<u64>,
    counts: Arc<Counts>,
}

/// A piece of a stream, or how it ended.
enum Piece {
    Bytes(Vec<u8>),
    End,
    Broken,
}

impl Side {
    async fn accept(self, listener: TcpListener) {
        // Dropped with this task, which ends every connection.
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if connections.len() < CONNECTIONS_MAX => {
                        self.counts.connections.fetch_add(1, Ordering::Relaxed);
                        connections.spawn(self.clone().connection(stream));
                    }
                    Ok((stream, _)) => reset(&stream),
                    // Out of descriptors, or the connection is gone already: others may come.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn connection(mut self, mut dialer: TcpStream) {
        self.resets.mark_unchanged();
        let mut resets = self.resets.clone();
        let carried = async {
            let mut target = self.reach_target().await?;
            let done = self.carry(&mut dialer, &mut target).await;
            if done.is_err() {
                reset(&target);
            }
            done
        };
        let broken = tokio::select! {
            done = carried => done.is_err(),
            // The other end is dropped inside `carried`; a plain close there is as good.
            _ = resets.changed() => true,
        };
        if broken {
            reset(&dialer);
        }
    }

    /// Connects once nothing is cut: a handshake needs both ways.
    async fn reach_target(&self) -> io::Result<TcpStream> {
        self.clear(Way::Both).await?;
        let dial = tokio::time::timeout(DIAL_DEADLINE, TcpStream::connect(self.target));
        let target = dial.await.map_err(|_| io::Error::from(ErrorKind::TimedOut))??;
        target.set_nodelay(true)?;
        Ok(target)
    }

    async fn clear(&self, way: Way) -> io::Result<Weather> {
        let mut weather = self.weather.clone();
        let clear = weather.wait_for(|weather| !weather.cut(way)).await;
        clear.map(|weather| *weather).map_err(|_| ErrorKind::BrokenPipe.into())
    }

    async fn carry(&self, dialer: &mut TcpStream, target: &mut TcpStream) -> io::Result<()> {
        dialer.set_nodelay(true)?;
        let (dialer_read, dialer_write) = dialer.split();
        let (target_read, target_write) = target.split();
        let up = self.pump(dialer_read, target_write, Way::Up);
        let down = self.pump(target_read, dialer_write, Way::Down);
        tokio::try_join!(up, down).map(|_| ())
    }

    async fn pump(&self, from: ReadHalf<'_>, to: WriteHalf<'_>, way: Way) -> io::Result<()> {
        let (pieces, queue) = mpsc::channel(QUEUE);
        let read = async {
            self.read(from, pieces).await;
            Ok(())
        };
        tokio::try_join!(read, self.write(queue, to, way)).map(|_| ())
    }

    async fn read(&self, mut from: ReadHalf<'_>, pieces: mpsc::Sender<(Instant, Piece)>) {
        let mut buffer = vec![0u8; PIECE_BYTES];
        loop {
            let piece = match from.read(&mut buffer).await {
                Ok(0) => Piece::End,
                Ok(n) => Piece::Bytes(buffer[..n].to_vec()),
                Err(_) => Piece::Broken,
            };
            let last = !matches!(piece, Piece::Bytes(_));
            let due = Instant::now() + self.weather.borrow().delay;
            if pieces.send((due, piece)).await.is_err() || last {
                return;
            }
        }
    }

    async fn write(
        &self,
        mut queue: mpsc::Receiver<(Instant, Piece)>,
        mut to: WriteHalf<'_>,
        way: Way,
    ) -> io::Result<()> {
        while let Some((due, piece)) = queue.recv().await {
            tokio::time::sleep_until(due).await;
            let bytes = match piece {
                Piece::Bytes(bytes) => bytes,
                Piece::End => {
                    self.clear(way).await?;
                    return to.shutdown().await;
                }
                Piece::Broken => {
                    self.clear(way).await?;
                    return Err(ErrorKind::ConnectionReset.into());
                }
            };
            self.hand_over(&bytes, &mut to, way).await?;
        }
        Ok(())
    }

    async fn hand_over(
        &self,
        mut bytes: &[u8],
        to: &mut WriteHalf<'_>,
        way: Way,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let weather = self.clear(way).await?;
            let n = match weather.bytes_per_second {
                None => bytes.len(),
                Some(rate) => {
                    let n = bytes.len().min((rate / THROTTLE_PIECES).max(1) as usize);
                    tokio::time::sleep(Duration::from_secs_f64(n as f64 / rate as f64)).await;
                    n
                }
            };
            // Counted first, so that whoever has read a byte finds it counted.
            let idx = usize::from(way == Way::Down);
            self.counts.bytes[idx].fetch_add(n as u64, Ordering::Relaxed);
            to.write_all(&bytes[..n]).await?;
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

/// Makes the socket end with a reset when it is closed.
fn reset(stream: &TcpStream) {
    // Fails only where the socket is gone already.
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests;
