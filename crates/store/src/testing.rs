//! A server of files on loopback, which delays, cuts, refuses and lies as it is told: HTTP with
//! ranges, and as much of S3 as a store of objects needs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

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
    /// The connection is closed before an answer.
    Reset,
    /// The answer's head promises everything; after this share of it, in percent, the connection is
    /// closed.
    Cut(u8),
    /// A status instead of the bytes.
    Status(u16),
    /// The bytes come in pieces of this many, each after this pause.
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

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
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

struct State {
    folder: PathBuf,
    latency: Duration,
    plan: Box<Plan>,
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
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            folder: folder.to_path_buf(),
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

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    range: Option<(u64, Option<u64>)>,
    body: Vec<u8>,
}

fn serve(state: &State, connection: TcpStream) -> io::Result<()> {
    connection.set_read_timeout(Some(IDLE))?;
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut out = connection;
    while let Some(request) = read_request(&mut reader)? {
        let n = state.n.fetch_add(1, Ordering::Relaxed);
        let fault = (state.plan)(n, &request.path);
        let range = request.range.map(|(from, to)| (from, to.unwrap_or(u64::MAX)));
        let (method, path) = (request.method.clone(), request.path.clone());
        let seen = Seen { method, path, range, fault };
        state.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        thread::sleep(state.latency);
        if !answer(state, &request, fault, &mut out)? {
            return out.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

fn read_request(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut head = reader.by_ref().take(HEAD_MAX);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_string);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = query.map(|(key, value)| (key.to_string(), decode(value))).collect();
    let path = decode(path);
    let (mut range, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("content-length", value) => length = value.parse().unwrap_or(0),
            ("range", value) => {
                let bounds = value.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
                range = bounds.and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok())));
            }
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, query, range, body }))
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
fn answer(state: &State, request: &Request, fault: Fault, out: &mut TcpStream) -> io::Result<bool> {
    match fault {
        Fault::Reset => return Ok(false),
        Fault::Hang(time) => {
            thread::sleep(time);
            return Ok(false);
        }
        Fault::Status(status) => return status_only(out, status),
        _ => {}
    }
    let name = request.path.trim_start_matches('/');
    if name.split('/').any(|part| part == "..") {
        return status_only(out, 400);
    }
    let path = state.folder.join(name);
    if request.method == "PUT" {
        path.parent().map(fs::create_dir_all).transpose()?;
        fs::write(path, &request.body)?;
        return bytes_of(out, "200 OK", "ETag: \"1\"\r\n", &[], false, Fault::None);
    }
    if request.query.contains_key("list-type") {
        let text = listing(&path, request.query.get("prefix").map_or("", String::as_str))?;
        return bytes_of(out, "200 OK", "", text.as_bytes(), false, Fault::None);
    }
    let Ok(content) = fs::read(&path) else { return status_only(out, 404) };
    let total = content.len() as u64;
    let is_head = request.method == "HEAD";
    let stamp = "ETag: \"1\"\r\nLast-Modified: Fri, 03 Jan 2020 10:00:00 GMT\r\n";
    match request.range {
        Some((from, to)) if fault != Fault::Whole => {
            let to = to.unwrap_or(u64::MAX).min(total.saturating_sub(1));
            if from > to {
                return status_only(out, 416);
            }
            let part = &content[from as usize..=to as usize];
            let head = format!("{stamp}Content-Range: bytes {from}-{to}/{total}\r\n");
            bytes_of(out, "206 Partial Content", &head, part, is_head, fault)
        }
        _ => bytes_of(out, "200 OK", stamp, &content, is_head, fault),
    }
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

/// Lists a bucket as S3 does.
fn listing(bucket: &Path, prefix: &str) -> io::Result<String> {
    let mut text = String::from("<?xml version=\"1.0\"?><ListBucketResult>");
    text += "<IsTruncated>false</IsTruncated>";
    let mut folders = vec![bucket.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let key = path.strip_prefix(bucket).expect("it lies in there").to_string_lossy();
            if key.starts_with(prefix) {
                let size = fs::metadata(&path)?.len();
                let key = key.replace('&', "&amp;");
                text += &format!(
                    "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>1</ETag>\
                     <LastModified>2020-01-03T10:00:00.000Z</LastModified></Contents>"
                );
            }
        }
    }
    Ok(text + "</ListBucketResult>")
}
