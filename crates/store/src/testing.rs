//! A server of files on loopback, which delays, cuts, refuses, loses and lies as it is told: HTTP
//! with ranges, and as much of S3 as a store of objects needs to read and to write (`s3.rs`).

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

mod s3;

use s3::Buckets;

/// A connection that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(30);

/// Most connections; more are closed at once.
const CONNECTIONS_MAX: u64 = 256;

/// Most bytes of a request's head and of a line of it.
const HEAD_MAX: u64 = 64 << 10;

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The connection is closed before an answer; what was sent with the request is not read.
    Reset,
    /// After this share of what comes with the request, in percent, the connection is closed.
    CutBody(u8),
    /// The request is carried out, and the connection closed instead of an answer.
    Lost,
    /// The answer's head promises everything; after this share of it, in percent, the connection is
    /// closed.
    Cut(u8),
    /// A status instead of the bytes.
    Status(u16),
    /// The bytes come, or are taken, in pieces of this many, each after this pause.
    Drip {
        /// Bytes of a piece.
        bytes: usize,
        /// Pause before each.
        pause: Duration,
    },
    /// Nothing comes, and the connection stays open this long.
    Hang(Duration),
    /// The right number of bytes, some of them others; which ones differs each time.
    Garble,
    /// The range is passed over and the whole object sent.
    Whole,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Bytes of an object.
    Get,
    /// Its size and marks.
    Head,
    /// The names in a folder.
    List,
    /// To keep a whole object.
    Put,
    /// To begin an upload in parts.
    Begin,
    /// To keep a part.
    Part,
    /// To make an object of the parts.
    Complete,
    /// To forget the parts.
    Abort,
    /// To forget an object.
    Delete,
}

/// A request, as a plan sees it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its number, from 0.
    pub n: u64,
    /// What it asks for.
    pub kind: Kind,
    /// Path of the object.
    pub path: &'a str,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What it asked for.
    pub kind: Kind,
    /// `GET`, `HEAD`, `PUT`.
    pub method: String,
    /// Path of the object.
    pub path: String,
    /// Range asked for.
    pub range: Option<(u64, u64)>,
    /// What went wrong.
    pub fault: Fault,
}

/// Decides what goes wrong with the `n`-th request, from 0.
pub type Plan = dyn Fn(u64, &str) -> Fault + Send + Sync;

/// Decides what goes wrong with a request of some kind.
pub type KindPlan = dyn Fn(Asked<'_>) -> Fault + Send + Sync;

struct State {
    buckets: Buckets,
    latency: Duration,
    plan: Box<KindPlan>,
    n: AtomicU64,
    connections: AtomicU64,
    stop: AtomicBool,
    seen: Mutex<Vec<Seen>>,
}

/// Serves the files of a folder until it is dropped.
pub struct Server {
    address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.address)
    }
}

/// Makes a plan of faults that are mixed by a seed: of a hundred requests, so many get each.
pub fn mixed(seed: u64, shares: &[(u8, Fault)]) -> Box<Plan> {
    let shares = shares.to_vec();
    Box::new(move |n, _| {
        let mut draw = splitmix(seed.wrapping_add(n)) % 100;
        for &(share, fault) in &shares {
            match draw.checked_sub(u64::from(share)) {
                Some(rest) => draw = rest,
                None => return fault,
            }
        }
        Fault::None
    })
}

fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Server {
    /// Serves `folder`; every answer is `latency` late, and `plan` decides what goes wrong.
    pub fn start(folder: &Path, latency: Duration, plan: Box<Plan>) -> io::Result<Self> {
        Server::start_by_kind(folder, latency, Box::new(move |asked| plan(asked.n, asked.path)))
    }

    /// The same, by a plan that sees what is asked for.
    pub fn start_by_kind(
        folder: &Path,
        latency: Duration,
        plan: Box<KindPlan>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            buckets: Buckets::new(folder),
            latency,
            plan,
            n: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            seen: Mutex::new(Vec::new()),
        });
        let of_thread = state.clone();
        let thread = thread::spawn(move || {
            for connection in listener.incoming() {
                if of_thread.stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(connection) = connection else { continue };
                if of_thread.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                    of_thread.connections.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let state = of_thread.clone();
                thread::spawn(move || {
                    // A client that goes away is no failure of the server.
                    let _ = serve(&state, connection);
                    state.connections.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Ok(Server { address, state, thread: Some(thread) })
    }

    /// Serves `folder` without faults.
    pub fn plain(folder: &Path) -> io::Result<Self> {
        Server::start(folder, Duration::ZERO, Box::new(|_, _| Fault::None))
    }

    /// Returns the URL of the folder over HTTP.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the endpoint for S3, whose buckets are the folder's folders.
    pub fn s3_options(&self) -> Vec<(String, String)> {
        let pairs = [
            ("aws_endpoint", self.url()),
            ("aws_access_key_id", "key".to_string()),
            ("aws_secret_access_key", "secret".to_string()),
            ("aws_region", "us-east-1".to_string()),
            ("allow_http", "true".to_string()),
        ];
        pairs.map(|(key, value)| (key.to_string(), value)).into()
    }

    /// Lists so many names at a time, as S3 does with a thousand.
    pub fn set_page(&self, names: usize) {
        self.state.buckets.set_page(names);
    }

    /// Passes over the condition of writes from now on, as stores did that never heard of it.
    pub fn ignore_conditions(&self) {
        self.state.buckets.ignore_conditions();
    }

    /// Returns the number of uploads that were begun and neither completed nor aborted.
    pub fn n_uploads(&self) -> usize {
        self.state.buckets.n_uploads()
    }

    /// Returns the requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        // Wakes the thread; the connections' own end with their clients.
        let _ = TcpStream::connect(self.address);
        self.thread.take().map(JoinHandle::join);
    }
}

/// A request without what comes with it.
struct Head {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    range: Option<(u64, Option<u64>)>,
    /// The other headers, by names in lower case.
    headers: BTreeMap<String, String>,
    length: usize,
}

impl Head {
    fn kind(&self) -> Kind {
        let asks = |key: &str| self.query.contains_key(key);
        match self.method.as_str() {
            "PUT" if asks("partNumber") => Kind::Part,
            "PUT" => Kind::Put,
            "POST" if asks("uploads") => Kind::Begin,
            "POST" => Kind::Complete,
            "DELETE" if asks("uploadId") => Kind::Abort,
            "DELETE" => Kind::Delete,
            "HEAD" => Kind::Head,
            _ if asks("list-type") => Kind::List,
            _ => Kind::Get,
        }
    }
}

/// An answer.
struct Reply {
    status: &'static str,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: &'static str, head: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Reply { status, head: head.into(), body: body.into() }
    }
}

fn serve(state: &State, connection: TcpStream) -> io::Result<()> {
    connection.set_read_timeout(Some(IDLE))?;
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut out = connection;
    while let Some(head) = read_head(&mut reader)? {
        let n = state.n.fetch_add(1, Ordering::Relaxed);
        let kind = head.kind();
        let fault = (state.plan)(Asked { n, kind, path: &head.path });
        let range = head.range.map(|(from, to)| (from, to.unwrap_or(u64::MAX)));
        let (method, path) = (head.method.clone(), head.path.clone());
        let seen = Seen { kind, method, path, range, fault };
        state.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        thread::sleep(state.latency);
        if !answer(state, &head, fault, &mut reader, &mut out)? {
            return out.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

fn read_head(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Head>> {
    let mut lines = reader.by_ref().take(HEAD_MAX);
    let mut line = String::new();
    if lines.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_string);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let query = query.map(|(key, value)| (key.to_string(), decode(value))).collect();
    let path = decode(path);
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let length = headers.get("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
    let bounds = headers.get("range").and_then(|value| value.strip_prefix("bytes="));
    let bounds = bounds.and_then(|range| range.split_once('-'));
    let range = bounds.and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok())));
    Ok(Some(Head { method, path, query, range, headers, length }))
}

/// Undoes percent encoding.
fn decode(text: &str) -> String {
    let mut out: Vec<u8> = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let pair: String = match byte {
            b'%' => bytes.by_ref().take(2).map(char::from).collect(),
            _ => String::new(),
        };
        out.push(u8::from_str_radix(&pair, 16).unwrap_or(byte));
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Answers; returns whether the connection stays.
fn answer(
    state: &State,
    head: &Head,
    fault: Fault,
    reader: &mut BufReader<TcpStream>,
    out: &mut TcpStream,
) -> io::Result<bool> {
    match fault {
        Fault::Reset => return Ok(false),
        Fault::Hang(time) => {
            thread::sleep(time);
            return Ok(false);
        }
        Fault::CutBody(percent) => {
            read_body(reader, head.length * usize::from(percent.min(99)) / 100, fault)?;
            return Ok(false);
        }
        _ => {}
    }
    let body = read_body(reader, head.length, fault)?;
    if let Fault::Status(status) = fault {
        return status_only(out, status);
    }
    if head.path.split('/').any(|part| part == "..") {
        return status_only(out, 400);
    }
    let reply = state.buckets.carry_out(head, body, fault == Fault::Whole)?;
    if fault == Fault::Lost {
        return Ok(false);
    }
    let is_head = head.method == "HEAD";
    bytes_of(out, reply.status, &reply.head, &reply.body, is_head, fault)
}

/// Takes what comes with a request.
fn read_body(
    reader: &mut BufReader<TcpStream>,
    length: usize,
    fault: Fault,
) -> io::Result<Vec<u8>> {
    let mut body = vec![0; length];
    match fault {
        Fault::Drip { bytes, pause } => {
            for piece in body.chunks_mut(bytes.max(1)) {
                thread::sleep(pause);
                reader.read_exact(piece)?;
            }
        }
        _ => reader.read_exact(&mut body)?,
    }
    Ok(body)
}

fn status_only(out: &mut TcpStream, status: u16) -> io::Result<bool> {
    bytes_of(out, &format!("{status} Told"), "", b"refused as planned", false, Fault::None)
}

fn bytes_of(
    out: &mut TcpStream,
    status: &str,
    head: &str,
    body: &[u8],
    is_head: bool,
    fault: Fault,
) -> io::Result<bool> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{head}Content-Length: {length}\r\n\r\n");
    out.write_all(head.as_bytes())?;
    if is_head {
        return Ok(true);
    }
    match fault {
        Fault::Cut(percent) => {
            out.write_all(&body[..length * usize::from(percent.min(99)) / 100])?;
            return Ok(false);
        }
        Fault::Drip { bytes, pause } => {
            for piece in body.chunks(bytes.max(1)) {
                thread::sleep(pause);
                out.write_all(piece)?;
            }
        }
        Fault::Garble => {
            static GARBLED: AtomicU64 = AtomicU64::new(0);
            let mut other = body.to_vec();
            let at = GARBLED.fetch_add(1, Ordering::Relaxed) as usize % 89;
            other.iter_mut().skip(at).step_by(89).for_each(|byte| *byte ^= 0x55);
            out.write_all(&other)?;
        }
        _ => out.write_all(body)?,
    }
    Ok(true)
}
