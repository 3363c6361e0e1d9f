//! Connections that have to get somewhere: who connects and gets no request through is cut.
//!
//! The HTTP library bounds the time for headers once it knows the protocol, and TLS its handshake;
//! but who says half of what is needed, or nothing, would cost a file descriptor for as long as it
//! likes. So a connection has a deadline until a request on it was let in. And there are only so
//! many connections at a time, of which strangers have half, so that files can still be opened.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};
use tracing::warn;

/// Pause after a connection could not be accepted, for want of file descriptors as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Descriptors that are kept for files: the state, checkpoints, logs.
const FOR_FILES: u64 = 256;
/// Fewest connections, and most: what nobody's limit is meant to be.
const CONNECTIONS: (u64, u64) = (64, 1 << 20);
/// Shortest time between two complaints about too many connections.
const COMPLAINT_EVERY: Duration = Duration::from_secs(10);

/// A stream that fails where no request on it is let in for too long.
pub(crate) struct Guarded {
    stream: TcpStream,
    admitted: Arc<AtomicBool>,
    /// Until a request was let in: its deadline, and its place among strangers.
    stranger: Option<(Pin<Box<Sleep>>, OwnedSemaphorePermit)>,
    _place: OwnedSemaphorePermit,
}

/// How many connections there may be.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    all: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Places {
    /// As many as this process may have open files, less some for files.
    pub fn of_process() -> Self {
        use rustix::process::{Resource, getrlimit};
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(CONNECTIONS.1);
        Places::new(limit.saturating_sub(FOR_FILES).clamp(CONNECTIONS.0, CONNECTIONS.1) as usize)
    }

    /// `n` connections, of which half may be strangers'.
    pub fn new(n: usize) -> Self {
        let all = Arc::new(Semaphore::new(n));
        Places { all, strangers: Arc::new(Semaphore::new(n.div_ceil(2))) }
    }

    /// Returns a stranger's places, if there are any.
    fn take(&self) -> Option<[OwnedSemaphorePermit; 2]> {
        let place = |of: &Arc<Semaphore>| of.clone().try_acquire_owned().ok();
        Some([place(&self.strangers)?, place(&self.all)?])
    }
}

/// What is known of a request's connection.
#[derive(Clone, Debug)]
pub(crate) struct GuardInfo {
    /// Addresses.
    pub tcp: TcpConnectInfo,
    admitted: Arc<AtomicBool>,
}

impl GuardInfo {
    /// Lifts the deadline: a request was let in.
    pub fn admit(&self) {
        self.admitted.store(true, Ordering::Relaxed);
    }
}

/// Guards every connection: it has a place, and a request on it is let in within `patience`. Where
/// no place is left it is closed.
pub(crate) fn guarded(
    incoming: TcpIncoming,
    patience: Duration,
    places: Places,
) -> impl Stream<Item = io::Result<Guarded>> {
    let mut complained: Option<Instant> = None;
    let mut admit = move |stream: TcpStream| match places.take() {
        Some([stranger, place]) => {
            let stranger = Some((Box::pin(sleep(patience)), stranger));
            Some(Guarded { stream, admitted: Arc::default(), stranger, _place: place })
        }
        None => {
            if complained.is_none_or(|at| at.elapsed() >= COMPLAINT_EVERY) {
                complained = Some(Instant::now());
                let peer = stream.peer_addr().map(|peer| peer.to_string()).unwrap_or_default();
                warn!(peer, "too many connections: closing new ones (raise `ulimit -n`)");
            }
            None
        }
    };
    let accepted = incoming.then(async |accepted| {
        if let Err(error) = &accepted {
            warn!(%error, "a connection could not be accepted");
            sleep(ACCEPT_PAUSE).await;
        }
        accepted
    });
    accepted.filter_map(move |accepted| match accepted {
        Ok(stream) => admit(stream).map(Ok),
        Err(error) => Some(Err(error)),
    })
}

impl Connected for Guarded {
    type ConnectInfo = GuardInfo;

    fn connect_info(&self) -> GuardInfo {
        GuardInfo { tcp: self.stream.connect_info(), admitted: self.admitted.clone() }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.admitted.load(Ordering::Relaxed) {
            self.stranger = None;
        }
        let late = match &mut self.stranger {
            Some((deadline, _)) => deadline.as_mut().poll(cx).is_ready(),
            None => false,
        };
        if late {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair(patience: Duration) -> (TcpStream, Guarded) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let incoming = guarded(TcpIncoming::from(listener), patience, Places::new(2));
        let mut incoming = std::pin::pin!(incoming);
        let caller = TcpStream::connect(addr).await.unwrap();
        (caller, incoming.next().await.unwrap().unwrap())
    }

    #[tokio::test]
    async fn who_gets_no_request_through_is_cut() {
        let (mut caller, mut guarded) = pair(Duration::from_millis(50)).await;
        caller.write_all(b"GET / HTTP/1.1 and so on").await.unwrap();
        let mut buffer = Vec::new();
        let error = guarded.read_to_end(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn who_was_let_in_may_think() {
        let (mut caller, mut guarded) = pair(Duration::from_millis(50)).await;
        caller.write_all(&[7]).await.unwrap();
        assert_eq!(guarded.read_u8().await.unwrap(), 7);
        guarded.connect_info().admit();
        sleep(Duration::from_millis(100)).await;
        caller.write_all(&[8]).await.unwrap();
        assert_eq!(guarded.read_u8().await.unwrap(), 8);
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_taken_is_turned_away() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let patience = Duration::from_secs(60);
        let incoming = guarded(TcpIncoming::from(listener), patience, Places::new(4));
        let mut incoming = std::pin::pin!(incoming);
        let mut callers = Vec::new();
        let mut inside = Vec::new();
        for _ in 0..2 {
            callers.push(TcpStream::connect(addr).await.unwrap());
            inside.push(incoming.next().await.unwrap().unwrap());
        }
        // Two strangers have all places of strangers.
        let mut third = TcpStream::connect(addr).await.unwrap();
        let mut fourth = TcpStream::connect(addr).await.unwrap();
        callers[0].write_all(&[7]).await.unwrap();
        let first = &mut inside[0];
        first.connect_info().admit();
        let (next, read) = tokio::join!(incoming.next(), async {
            assert_eq!(third.read(&mut [0]).await.unwrap_or(0), 0, "closed");
            assert_eq!(first.read_u8().await.unwrap(), 7);
            // A stranger less, and there is a place for the next who comes.
            assert_eq!(fourth.read(&mut [0]).await.unwrap_or(0), 0, "closed");
            TcpStream::connect(addr).await.unwrap()
        });
        assert!(next.unwrap().is_ok() && read.peer_addr().is_ok());
    }
}
