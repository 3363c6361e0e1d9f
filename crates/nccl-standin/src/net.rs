//! How ranks find each other and move bytes: sockets of the loopback interface.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a wait looks whether the communicator was aborted.
const TICK: Duration = Duration::from_millis(2);
/// How long the drawer of an id waits for the members.
const RENDEZVOUS: Duration = Duration::from_secs(120);
/// Longest host name that two ranks compare.
const HOST_BYTES: usize = 64;
const HELLO_BYTES: usize = 8 + 4 + 4 + 2 + 4 + HOST_BYTES;

/// Why bytes did not arrive.
#[derive(Debug)]
pub enum Lost {
    Aborted,
    Peer(String),
    /// Two ranks use one device.
    SharedDevice(String),
}

impl From<io::Error> for Lost {
    fn from(err: io::Error) -> Self {
        Self::Peer(err.to_string())
    }
}

/// What a rank says of itself to the drawer of the id.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hello {
    token: u64,
    world: u32,
    rank: u32,
    port: u16,
    device: u32,
    host: [u8; HOST_BYTES],
}

impl Hello {
    fn to_bytes(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&self.token.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.world.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.rank.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.port.to_le_bytes());
        bytes[18..22].copy_from_slice(&self.device.to_le_bytes());
        bytes[22..].copy_from_slice(&self.host);
        bytes
    }

    fn from_bytes(bytes: &[u8; HELLO_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Self {
            token: u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")),
            world: word(8),
            rank: word(12),
            port: u16::from_le_bytes(bytes[16..18].try_into().expect("2 bytes")),
            device: word(18),
            host: bytes[22..].try_into().expect("the rest"),
        }
    }
}

/// Draws an id: where to meet, and a token.
pub fn draw_id() -> io::Result<[u8; 128]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port: u16 = listener.local_addr()?.port();
    let mut token = [0u8; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    let token: u64 = u64::from_le_bytes(token);
    let mut id = [0u8; 128];
    id[..4].copy_from_slice(b"LSTD");
    id[4..6].copy_from_slice(&port.to_le_bytes());
    id[6..14].copy_from_slice(&token.to_le_bytes());
    thread::spawn(move || {
        // Whoever does not get an answer times out or is aborted.
        let _ = meet(&listener, token);
    });
    Ok(id)
}

fn read_id(id: &[u8; 128]) -> Option<(u16, u64)> {
    let port = u16::from_le_bytes(id[4..6].try_into().ok()?);
    let token = u64::from_le_bytes(id[6..14].try_into().ok()?);
    (id[..4] == *b"LSTD").then_some((port, token))
}

/// Waits for all members and tells each where the others are.
fn meet(listener: &TcpListener, token: u64) -> Result<(), Lost> {
    let never = AtomicBool::new(false);
    let deadline = Instant::now() + RENDEZVOUS;
    let mut here: Vec<(Hello, TcpStream)> = Vec::new();
    loop {
        let mut stream: TcpStream = accept(listener, &never, deadline)?;
        let mut bytes = [0; HELLO_BYTES];
        read(&mut stream, &mut bytes, &never, deadline)?;
        let hello = Hello::from_bytes(&bytes);
        if hello.token != token || here.iter().any(|(other, _)| other.rank == hello.rank) {
            continue;
        }
        here.push((hello, stream));
        if here.len() == here[0].0.world as usize {
            break;
        }
    }
    here.sort_by_key(|(hello, _)| hello.rank);
    let table: Vec<u8> = here.iter().flat_map(|(hello, _)| hello.to_bytes()).collect();
    for (_, stream) in &mut here {
        // A member that went meanwhile is missed by the others.
        let _ = stream.write_all(&table);
    }
    Ok(())
}

/// The connections of one rank to all others.
pub struct Mesh {
    /// By rank; none for this one.
    peers: Vec<Option<Peer>>,
}

struct Peer {
    stream: TcpStream,
    frames: Mutex<Receiver<Vec<u8>>>,
}

/// Who connects to whom.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    pub id: &'a [u8; 128],
    pub world: usize,
    pub rank: usize,
    pub device: usize,
    pub abort: &'a AtomicBool,
}

impl Mesh {
    /// Meets the others and connects to them.
    pub fn connect(member: Member<'_>) -> Result<Self, Lost> {
        let Member { world, rank, abort, .. } = member;
        let never = Instant::now() + RENDEZVOUS;
        let (port, token) = read_id(member.id).ok_or_else(|| Lost::Peer("no id".to_string()))?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let hello = Hello {
            token,
            world: world as u32,
            rank: rank as u32,
            port: listener.local_addr()?.port(),
            device: member.device as u32,
            host: host(),
        };
        let mut root = dial(port)?;
        root.write_all(&hello.to_bytes())?;
        let mut table = vec![0; HELLO_BYTES * world];
        read(&mut root, &mut table, abort, never)?;
        let entry = |at: usize| &table[at * HELLO_BYTES..(at + 1) * HELLO_BYTES];
        let members: Vec<Hello> = (0..world)
            .map(|at| Hello::from_bytes(entry(at).try_into().expect("one entry")))
            .collect();
        check_devices(&members)?;
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        for other in &members[..rank] {
            let mut stream: TcpStream = dial(other.port)?;
            stream.write_all(&(rank as u32).to_le_bytes())?;
            streams[other.rank as usize] = Some(stream);
        }
        for _ in rank + 1..world {
            let mut stream: TcpStream = accept(&listener, abort, never)?;
            let mut number = [0; 4];
            read(&mut stream, &mut number, abort, never)?;
            streams[u32::from_le_bytes(number) as usize] = Some(stream);
        }
        let peers: io::Result<Vec<Option<Peer>>> =
            streams.into_iter().map(|stream| stream.map(Peer::new).transpose()).collect();
        Ok(Self { peers: peers? })
    }

    /// Sends a frame.
    pub fn send(&self, to: usize, bytes: &[u8], abort: &AtomicBool) -> Result<(), Lost> {
        let peer = self.peers[to].as_ref().expect("a rank does not send to itself");
        let length = (bytes.len() as u64).to_le_bytes();
        write(&peer.stream, &length, abort)?;
        write(&peer.stream, bytes, abort)
    }

    /// Receives the next frame of a rank.
    pub fn recv(&self, from: usize, abort: &AtomicBool) -> Result<Vec<u8>, Lost> {
        let peer = self.peers[from].as_ref().expect("a rank does not receive from itself");
        let frames = peer.frames.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if abort.load(Ordering::Acquire) {
                return Err(Lost::Aborted);
            }
            match frames.recv_timeout(TICK) {
                Ok(frame) => return Ok(frame),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Lost::Peer(format!("rank {from} closed its connection")));
                }
            }
        }
    }

    pub fn close(&self) {
        for peer in self.peers.iter().flatten() {
            // Fails only where the peer closed first.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Peer {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(TICK))?;
        stream.set_read_timeout(None)?;
        let mut source: TcpStream = stream.try_clone()?;
        let (sender, frames) = channel();
        thread::spawn(move || {
            let mut length = [0; 8];
            while source.read_exact(&mut length).is_ok() {
                let mut frame = vec![0; u64::from_le_bytes(length) as usize];
                if source.read_exact(&mut frame).is_err() || sender.send(frame).is_err() {
                    break;
                }
            }
        });
        Ok(Self { stream, frames: Mutex::new(frames) })
    }
}

/// The name that ranks of one host share.
fn host() -> [u8; HOST_BYTES] {
    let name = std::env::var("NCCL_HOSTID").unwrap_or_else(|_| "this".to_string());
    let mut host = [0; HOST_BYTES];
    let n: usize = name.len().min(HOST_BYTES);
    host[..n].copy_from_slice(&name.as_bytes()[..n]);
    host
}

fn check_devices(members: &[Hello]) -> Result<(), Lost> {
    for (idx, one) in members.iter().enumerate() {
        let same = |other: &&Hello| other.device == one.device && other.host == one.host;
        if let Some(other) = members[..idx].iter().find(same) {
            return Err(Lost::SharedDevice(format!(
                "Duplicate GPU detected : rank {} and rank {} both on CUDA device {}",
                other.rank, one.rank, one.device
            )));
        }
    }
    Ok(())
}

fn dial(port: u16) -> io::Result<TcpStream> {
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&addr, Duration::from_secs(5))
}

fn accept(
    listener: &TcpListener,
    abort: &AtomicBool,
    deadline: Instant,
) -> Result<TcpStream, Lost> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(err) if err.kind() == ErrorKind::WouldBlock => pause(abort, deadline)?,
            Err(err) => return Err(err.into()),
        }
    }
}

fn pause(abort: &AtomicBool, deadline: Instant) -> Result<(), Lost> {
    if abort.load(Ordering::Acquire) {
        return Err(Lost::Aborted);
    }
    if Instant::now() >= deadline {
        return Err(Lost::Peer("the others never came".to_string()));
    }
    thread::sleep(TICK);
    Ok(())
}

fn read(
    stream: &mut TcpStream,
    mut into: &mut [u8],
    abort: &AtomicBool,
    deadline: Instant,
) -> Result<(), Lost> {
    stream.set_read_timeout(Some(TICK))?;
    while !into.is_empty() {
        match stream.read(into) {
            Ok(0) => return Err(Lost::Peer("a connection was closed".to_string())),
            Ok(n) => into = &mut into[n..],
            Err(err) if is_wait(&err) => pause(abort, deadline)?,
            Err(err) => return Err(err.into()),
        }
    }
    Ok(())
}

fn write(mut stream: &TcpStream, mut bytes: &[u8], abort: &AtomicBool) -> Result<(), Lost> {
    while !bytes.is_empty() {
        if abort.load(Ordering::Acquire) {
            return Err(Lost::Aborted);
        }
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(err) if is_wait(&err) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(())
}

fn is_wait(err: &io::Error) -> bool {
    matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
