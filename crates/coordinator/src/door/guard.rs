//! Connections that have to get somewhere: who connects and gets no request through is cut.
//!
//! The HTTP library bounds the time for headers once it knows the protocol, and TLS its handshake;
//! but who says half of what is needed, or nothing, would cost a file descriptor for as long as it
//! likes. So a connection has a deadline until a request on it was let in.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};
use tracing::warn;

/// Pause after a connection could not be accepted, for want of file descriptors as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A stream that fails where no request on it is let in for too long.
pub(crate) struct Guarded {
    stream: TcpStream,
    admitted: Arc<AtomicBool>,
    deadline: Option<Pin<Box<Sleep>>>,
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

/// Guards every connection: a request on it is let in within `patience`.
pub(crate) fn guarded(
    incoming: TcpIncoming,
    patience: Duration,
) -> impl Stream<Item = io::Result<Guarded>> {
    incoming.then(move |accepted| async move {
        match accepted {
            Ok(stream) => {
                let deadline = Some(Box::pin(sleep(patience)));
                Ok(Guarded { stream, admitted: Arc::default(), deadline })
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                Err(error)
            }
        }
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
            self.deadline = None;
        }
        let late = self.deadline.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready());
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
        let mut incoming = std::pin::pin!(guarded(TcpIncoming::from(listener), patience));
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
}
