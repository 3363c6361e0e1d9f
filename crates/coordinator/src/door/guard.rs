//! A connection that has to say something soon: who connects and stays silent is cut.
//!
//! The HTTP library bounds the time for headers once it knows the protocol, and TLS its handshake;
//! before that a connection costs a file descriptor for as long as its caller likes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// Bytes that tell the protocol: the preface of HTTP/2, and any request of HTTP/1.
const FIRST_BYTES: usize = 18;

/// A stream that fails where its first bytes take too long.
pub(crate) struct Guarded {
    stream: TcpStream,
    n_read: usize,
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Guards every connection: the first bytes come within `patience`.
pub(crate) fn guarded(
    incoming: TcpIncoming,
    patience: Duration,
) -> impl Stream<Item = io::Result<Guarded>> {
    incoming.map(move |stream| {
        let deadline = Some(Box::pin(sleep(patience)));
        stream.map(|stream| Guarded { stream, n_read: 0, deadline })
    })
}

impl Connected for Guarded {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.deadline.is_none() {
            return read;
        }
        if read.is_ready() {
            self.n_read += buf.filled().len() - before;
            if self.n_read >= FIRST_BYTES {
                self.deadline = None;
            }
            return read;
        }
        let late = self.deadline.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready());
        if late { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { Poll::Pending }
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
    async fn who_stays_silent_is_cut() {
        let (mut caller, mut guarded) = pair(Duration::from_millis(50)).await;
        caller.write_all(b"GET ").await.unwrap();
        let mut buffer = Vec::new();
        let error = guarded.read_to_end(&mut buffer).await.unwrap_err();
        assert_eq!((error.kind(), &buffer[..]), (io::ErrorKind::TimedOut, &b"GET "[..]));
    }

    #[tokio::test]
    async fn who_has_spoken_may_think() {
        let (mut caller, mut guarded) = pair(Duration::from_millis(50)).await;
        caller.write_all(&[7; FIRST_BYTES]).await.unwrap();
        let mut buffer = [0; FIRST_BYTES];
        guarded.read_exact(&mut buffer).await.unwrap();
        sleep(Duration::from_millis(100)).await;
        caller.write_all(&[8]).await.unwrap();
        assert_eq!(guarded.read_u8().await.unwrap(), 8);
    }
}
