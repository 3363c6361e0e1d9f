//! Forms a group: accepts and dials until every pair of members is connected and proven.
//!
//! One thread, non-blocking sockets and `poll`, like the operations: a stranger that connects and
//! sends nothing costs a slot in a list, not a thread and not a wait. Of each pair, the higher
//! rank dials. A dial that fails or is refused is repeated until the deadline, since the other end
//! may still be in the generation before; only a wrong key or another list of members is final.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use lacuna_types::{Generation, RunId, WORLD_MAX};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::exchange::{TICK, sleep_on};
use crate::handshake::{
    HELLO_BYTES, Hello, Key, MESSAGE_BYTES_MAX, NONCE_BYTES, Nonce, PROOF_BYTES, Prover,
    REPLY_BYTES, Reply, prove,
};
use crate::link::Link;
use crate::share::share;
use crate::{AbortHandle, CollectiveError, MissingPeer, Refusal, TrainerListener};

mod stray;

use stray::Stray;

/// How long an accepted connection may take to prove itself. A dialer sends at once and answers
/// in one round trip; the rest is for machines with more ranks than cores.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// How long one attempt to reach an address may take: two retransmissions of the first packet.
const DIAL_DEADLINE: Duration = Duration::from_secs(4);
/// Pause before a failed dial is repeated: short beside the seconds a generation change may take,
/// long enough to cost nothing.
const REDIAL_PAUSE: Duration = Duration::from_millis(25);
/// Strangers whose connections are kept for a handshake, beside a whole group at once and as many
/// again. Beyond them the oldest goes: a member proves itself within milliseconds.
const STRANGERS_MAX: usize = 64;

/// One generation of a run, as one of its members needs it to connect.
#[derive(Clone)]
pub struct Group {
    /// The run.
    pub run: RunId,
    /// The generation; connections of others are refused.
    pub generation: Generation,
    /// This member's place in `members`, 0-based.
    pub rank: usize,
    /// Advertised addresses of all members, in rank order.
    pub members: Vec<SocketAddr>,
    /// Secret of this generation, from the coordinator.
    pub key: [u8; 32],
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key stays out of logs.
        f.debug_struct("Group")
            .field("run", &self.run)
            .field("generation", &self.generation)
            .field("rank", &self.rank)
            .field("members", &self.members)
            .finish_non_exhaustive()
    }
}

impl Group {
    fn check(&self) -> Result<(), CollectiveError> {
        let (rank, world) = (self.rank, self.members.len());
        let invalid = |reason: String| Err(CollectiveError::InvalidGroup { reason });
        if !(1..=WORLD_MAX as usize).contains(&world) {
            return invalid(format!("{world} members, allowed are 1 to {WORLD_MAX}"));
        }
        if rank >= world {
            return invalid(format!("rank {rank} in a world of {world}"));
        }
        for (idx, addr) in self.members.iter().enumerate() {
            if self.members[..idx].contains(addr) {
                return invalid(format!("two members at {addr}"));
            }
        }
        Ok(())
    }
}

/// Connects the group; returns the links to all other ranks, in rank order.
pub(crate) fn form(
    listener: &TrainerListener,
    group: &Group,
    abort: &AbortHandle,
    deadline: Instant,
) -> Result<Vec<Link>, CollectiveError> {
    abort.check()?;
    group.check()?;
    let _forming = match listener.forming.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            let reason = String::from("the listener is busy with another group");
            return Err(CollectiveError::InvalidGroup { reason });
        }
    };
    let mut forming = Forming::new(listener, group);
    loop {
        forming.advance()?;
        if forming.is_done() {
            let mut links: Vec<Link> = forming.into_links();
            share(&mut links, group, listener.shares_memory, abort, deadline)?;
            return Ok(links);
        }
        abort.check()?;
        let left: Duration = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CollectiveError::NotFormed { missing: forming.missing() });
        }
        forming.wait(left.min(TICK))?;
    }
}

struct Forming<'a> {
    listener: &'a TrainerListener,
    group: &'a Group,
    /// What an acceptor expects, and what a dialer says but for its `acceptor` and `nonce`.
    plan: Hello,
    /// By rank; this rank's own stays empty.
    links: Vec<Option<TcpStream>>,
    /// One per lower rank.
    dials: Vec<Dial>,
    inbound: Vec<Inbound>,
}

impl<'a> Forming<'a> {
    fn new(listener: &'a TrainerListener, group: &'a Group) -> Self {
        let rank: u16 = wire_rank(group.rank);
        let plan = Hello {
            run_hash: *blake3::hash(group.run.as_str().as_bytes()).as_bytes(),
            generation: group.generation.0,
            world: wire_rank(group.members.len()),
            dialer: rank,
            acceptor: rank,
            nonce: [0; NONCE_BYTES],
        };
        Self {
            listener,
            group,
            plan,
            links: group.members.iter().map(|_| None).collect(),
            dials: (0..group.rank).map(|rank| Dial::new(rank, group.members[rank])).collect(),
            inbound: Vec::new(),
        }
    }

    fn advance(&mut self) -> Result<(), CollectiveError> {
        let now = Instant::now();
        for dial in self.dials.iter_mut().filter(|dial| dial.has_to_act(now)) {
            if let Some(stream) = dial.advance(now, &self.plan, &self.group.key)? {
                self.links[dial.rank] = Some(stream);
            }
        }
        if self.awaits_inbound() {
            self.accept(now)?;
        }
        let mut pending: Vec<Inbound> = Vec::with_capacity(self.inbound.len());
        for mut inbound in std::mem::take(&mut self.inbound) {
            if !inbound.has_to_act(now) {
                pending.push(inbound);
                continue;
            }
            match inbound.advance(now, &self.plan, &self.group.key) {
                Ok(None) => pending.push(inbound),
                Ok(Some(rank)) => self.links[rank] = Some(inbound.conn.stream),
                Err(stray) => stray.log(inbound.addr, self.group),
            }
        }
        self.inbound = pending;
        Ok(())
    }

    fn accept(&mut self, now: Instant) -> Result<(), CollectiveError> {
        // The bound keeps a flood of connections from starving the handshakes.
        let pending_max: usize = 2 * self.links.len() + STRANGERS_MAX;
        for _ in 0..pending_max {
            match self.listener.socket.accept() {
                Ok((stream, addr)) => {
                    if self.inbound.len() == pending_max {
                        let oldest = self.inbound.remove(0);
                        Stray::Crowded.log(oldest.addr, self.group);
                    }
                    match Inbound::new(stream, addr, now) {
                        Ok(inbound) => self.inbound.push(inbound),
                        Err(error) => Stray::Broken(error).log(addr, self.group),
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(()),
                    // The connection died in the queue; the next one may be fine.
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => {
                        let source = Arc::new(error);
                        return Err(CollectiveError::Local { action: "accept a peer", source });
                    }
                },
            }
        }
        Ok(())
    }

    fn awaits_inbound(&self) -> bool {
        self.links[self.group.rank + 1..].iter().any(Option::is_none)
    }

    fn is_done(&self) -> bool {
        let own: usize = self.group.rank;
        self.links.iter().enumerate().all(|(rank, link)| rank == own || link.is_some())
    }

    fn into_links(self) -> Vec<Link> {
        let ranked = self.links.into_iter().zip(&self.group.members).enumerate();
        let link = |(rank, (stream, addr)): (usize, (Option<TcpStream>, &SocketAddr))| {
            stream.map(|stream| Link::new(rank, *addr, stream))
        };
        ranked.filter_map(link).collect()
    }

    fn missing(&self) -> Vec<MissingPeer> {
        let mut missing: Vec<MissingPeer> = Vec::new();
        for (rank, addr) in self.group.members.iter().enumerate() {
            if rank == self.group.rank || self.links[rank].is_some() {
                continue;
            }
            let detail: String = match self.dials.get(rank) {
                Some(dial) => dial.last.clone(),
                None => String::from("it did not connect"),
            };
            missing.push(MissingPeer { rank, addr: *addr, detail });
        }
        missing
    }

    /// Sleeps until a connection can go on, and notes which: in a large group trying each of them
    /// after each event would be most of the work.
    fn wait(&mut self, timeout: Duration) -> Result<(), CollectiveError> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        let mut stirred: Vec<&mut bool> = Vec::new();
        let mut timeout: Duration = timeout;
        for Inbound { conn, stirs, .. } in &mut self.inbound {
            fds.push(PollFd::new(&conn.stream, PollFlags::IN));
            stirred.push(stirs);
        }
        for Dial { state, stirs, .. } in &mut self.dials {
            let (stream, events) = match state {
                DialState::Connecting { stream, .. } => (&*stream, PollFlags::OUT),
                DialState::Challenged { conn, .. } | DialState::Proven { conn } => {
                    (&conn.stream, PollFlags::IN)
                }
                DialState::Resting { .. } => {
                    timeout = timeout.min(REDIAL_PAUSE);
                    continue;
                }
                DialState::Done => continue,
            };
            fds.push(PollFd::new(stream, events));
            stirred.push(stirs);
        }
        let own: usize = self.group.rank;
        if self.links[own + 1..].iter().any(Option::is_none) {
            fds.push(PollFd::new(&self.listener.socket, PollFlags::IN));
        }
        sleep_on(&mut fds, timeout)?;
        for (stirs, fd) in stirred.into_iter().zip(&fds) {
            *stirs = !fd.revents().is_empty();
        }
        Ok(())
    }
}

/// A connection during its handshake, with the message that is coming in.
struct Conn {
    stream: TcpStream,
    message: [u8; MESSAGE_BYTES_MAX],
    filled: usize,
}

impl Conn {
    /// Takes over a stream and sets the options of a link.
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, message: [0; MESSAGE_BYTES_MAX], filled: 0 })
    }

    /// Returns the next message of `N` bytes once it is complete. Reads no byte beyond it.
    fn receive<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        while self.filled < N {
            match self.stream.read(&mut self.message[self.filled..N]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.filled += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        let mut message = [0; N];
        message.copy_from_slice(&self.message[..N]);
        Ok(Some(message))
    }

    /// Sends a message at once: it is the only one on its way, so the kernel has room for it.
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self.stream.write(message)? {
            n if n == message.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }
}

/// A connection that somebody opened to this rank.
struct Inbound {
    conn: Conn,
    addr: SocketAddr,
    expires: Instant,
    /// What was asked of the dialer, once its Hello was accepted.
    challenge: Option<(Hello, Nonce)>,
    /// Whether something may have come in since it was looked at.
    stirs: bool,
}

impl Inbound {
    fn new(stream: TcpStream, addr: SocketAddr, now: Instant) -> io::Result<Self> {
        let expires = now + HANDSHAKE_DEADLINE;
        Ok(Self { conn: Conn::new(stream)?, addr, expires, challenge: None, stirs: true })
    }

    fn has_to_act(&self, now: Instant) -> bool {
        self.stirs || now >= self.expires
    }

    /// Goes on with the handshake; returns the dialer's rank once it is proven.
    fn advance(&mut self, now: Instant, plan: &Hello, key: &Key) -> Result<Option<usize>, Stray> {
        if self.challenge.is_none() {
            let Some(message) = self.conn.receive::<HELLO_BYTES>()? else {
                return self.unless_late(now);
            };
            let hello: Hello = Hello::decode(&message).ok_or(Stray::Garbage)?;
            if let Err(refusal) = hello.check(plan) {
                // The stranger may be gone already; it is refused either way.
                let _ = self.conn.send(&Reply::Refuse(refusal).encode());
                return Err(Stray::Refused { refusal, generation: hello.generation });
            }
            let nonce: Nonce = fresh_nonce()?;
            let proof = *prove(key, Prover::Acceptor, &hello, &nonce).as_bytes();
            self.conn.send(&Reply::Challenge { nonce, proof }.encode())?;
            self.challenge = Some((hello, nonce));
        }
        let Some(proof) = self.conn.receive::<PROOF_BYTES>()? else {
            return self.unless_late(now);
        };
        let Some((hello, nonce)) = &self.challenge else {
            return Err(Stray::Garbage);
        };
        if prove(key, Prover::Dialer, hello, nonce) != blake3::Hash::from_bytes(proof) {
            let refusal = Refusal::WrongKey;
            let generation = hello.generation;
            let _ = self.conn.send(&Reply::Refuse(refusal).encode());
            return Err(Stray::Refused { refusal, generation });
        }
        let rank = usize::from(hello.dialer);
        self.conn.send(&Reply::Welcome.encode())?;
        Ok(Some(rank))
    }

    fn unless_late(&self, now: Instant) -> Result<Option<usize>, Stray> {
        if now < self.expires { Ok(None) } else { Err(Stray::Silent) }
    }
}

/// The way to one lower rank.
struct Dial {
    rank: usize,
    addr: SocketAddr,
    state: DialState,
    /// The last thing that happened, for the report when time is up.
    last: String,
    /// Whether its connection may have gone on since it was looked at.
    stirs: bool,
}

enum DialState {
    Resting {
        until: Instant,
    },
    Connecting {
        stream: TcpStream,
        expires: Instant,
    },
    /// The Hello is sent. Waits as long as the group may form: the peer accepts when its own
    /// plan arrives.
    Challenged {
        conn: Conn,
        hello: Hello,
    },
    Proven {
        conn: Conn,
    },
    Done,
}

/// What an attempt's failure means.
enum DialFault {
    Again(String),
    Final(Refusal),
}

impl From<io::Error> for DialFault {
    fn from(error: io::Error) -> Self {
        Self::Again(error.to_string())
    }
}

impl Dial {
    fn new(rank: usize, addr: SocketAddr) -> Self {
        let state = DialState::Resting { until: Instant::now() };
        Self { rank, addr, state, last: String::from("not tried"), stirs: true }
    }

    fn has_to_act(&self, now: Instant) -> bool {
        match self.state {
            DialState::Resting { until: at } => now >= at,
            DialState::Connecting { expires: at, .. } => self.stirs || now >= at,
            DialState::Challenged { .. } | DialState::Proven { .. } => self.stirs,
            DialState::Done => false,
        }
    }

    /// Goes on; returns the stream once both ends are proven.
    fn advance(
        &mut self,
        now: Instant,
        plan: &Hello,
        key: &Key,
    ) -> Result<Option<TcpStream>, CollectiveError> {
        let (rank, addr) = (self.rank, self.addr);
        loop {
            let state = std::mem::replace(&mut self.state, DialState::Done);
            match self.step(state, now, plan, key) {
                Ok(Step::Wait(state)) => {
                    self.state = state;
                    return Ok(None);
                }
                Ok(Step::Next(state)) => self.state = state,
                Ok(Step::Connected(stream)) => return Ok(Some(stream)),
                Ok(Step::Over) => return Ok(None),
                Err(DialFault::Final(reason)) => {
                    return Err(CollectiveError::Handshake { rank, addr, reason });
                }
                Err(DialFault::Again(reason)) => {
                    if reason != self.last {
                        tracing::debug!(rank, %addr, reason, "dial failed");
                    }
                    self.last = reason;
                    self.state = DialState::Resting { until: now + REDIAL_PAUSE };
                    return Ok(None);
                }
            }
        }
    }

    fn step(
        &mut self,
        state: DialState,
        now: Instant,
        plan: &Hello,
        key: &Key,
    ) -> Result<Step, DialFault> {
        match state {
            DialState::Resting { until } if now < until => Ok(Step::Wait(state)),
            DialState::Resting { .. } => {
                let stream: TcpStream = start_connect(self.addr)?;
                Ok(Step::Next(DialState::Connecting { stream, expires: now + DIAL_DEADLINE }))
            }
            DialState::Connecting { stream, expires } => {
                sockopt::socket_error(&stream)
                    .map_err(io::Error::from)?
                    .map_err(io::Error::from)?;
                if stream.peer_addr().is_err() {
                    if now >= expires {
                        return Err(DialFault::Again(String::from("no answer")));
                    }
                    return Ok(Step::Wait(DialState::Connecting { stream, expires }));
                }
                let mut conn = Conn::new(stream)?;
                let acceptor: u16 = wire_rank(self.rank);
                let hello = Hello { acceptor, nonce: fresh_nonce()?, ..plan.clone() };
                conn.send(&hello.encode())?;
                self.last = String::from("connected, but it does not accept");
                Ok(Step::Next(DialState::Challenged { conn, hello }))
            }
            DialState::Challenged { mut conn, hello } => match receive_reply(&mut conn)? {
                None => Ok(Step::Wait(DialState::Challenged { conn, hello })),
                Some(Reply::Challenge { nonce, proof }) => {
                    let expected = prove(key, Prover::Acceptor, &hello, &nonce);
                    if expected != blake3::Hash::from_bytes(proof) {
                        return Err(DialFault::Final(Refusal::WrongKey));
                    }
                    conn.send(prove(key, Prover::Dialer, &hello, &nonce).as_bytes())?;
                    Ok(Step::Next(DialState::Proven { conn }))
                }
                Some(Reply::Welcome) => Err(DialFault::Again(String::from("early welcome"))),
                Some(Reply::Refuse(refusal)) => Err(refused(refusal)),
            },
            DialState::Proven { mut conn } => match receive_reply(&mut conn)? {
                None => Ok(Step::Wait(DialState::Proven { conn })),
                Some(Reply::Welcome) => Ok(Step::Connected(conn.stream)),
                Some(Reply::Challenge { .. }) => {
                    Err(DialFault::Again(String::from("second challenge")))
                }
                Some(Reply::Refuse(refusal)) => Err(refused(refusal)),
            },
            DialState::Done => Ok(Step::Over),
        }
    }
}

/// What a dial does after a step.
enum Step {
    Wait(DialState),
    Next(DialState),
    Connected(TcpStream),
    Over,
}

fn receive_reply(conn: &mut Conn) -> Result<Option<Reply>, DialFault> {
    match conn.receive::<REPLY_BYTES>()? {
        None => Ok(None),
        Some(message) => match Reply::decode(&message) {
            Some(reply) => Ok(Some(reply)),
            None => Err(DialFault::Again(String::from("it speaks another protocol"))),
        },
    }
}

/// Sorts a refusal: another run or generation passes when the peer gets its plan.
fn refused(refusal: Refusal) -> DialFault {
    match refusal {
        Refusal::OtherRun | Refusal::OtherGeneration => DialFault::Again(refusal.to_string()),
        Refusal::OtherGroup | Refusal::WrongKey => DialFault::Final(refusal),
    }
}

/// Starts a connection without waiting for it, so that the wait can be aborted.
fn start_connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &addr) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

fn fresh_nonce() -> io::Result<Nonce> {
    let mut nonce = [0; NONCE_BYTES];
    // Requests of up to 256 bytes are never cut short.
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    Ok(nonce)
}

fn wire_rank(rank: usize) -> u16 {
    u16::try_from(rank).expect("ranks are checked against WORLD_MAX")
}
