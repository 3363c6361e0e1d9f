//! A connection to another member, and how it is used: through the socket, or through shared memory
//! with the socket beside it for waking up and for noticing an end.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::PollFlags;

use crate::rings::Rings;

/// A proven connection to another member; its stream is non-blocking.
#[derive(Debug)]
pub(crate) struct Link {
    pub rank: usize,
    pub addr: SocketAddr,
    pub stream: TcpStream,
    /// Where the bytes go, on one machine.
    pub rings: Option<Rings>,
    /// Whether the other end has closed a stream that only wakes.
    closed: AtomicBool,
}

impl Link {
    pub fn new(rank: usize, addr: SocketAddr, stream: TcpStream) -> Self {
        Link { rank, addr, stream, rings: None, closed: AtomicBool::new(false) }
    }

    /// Sends what can be sent without waiting; the error is `WouldBlock` where that is nothing.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(rings) = &self.rings else { return (&self.stream).write_vectored(parts) };
        let mut n: usize = 0;
        for part in parts {
            let written = rings.write(part)?;
            n += written;
            if written < part.len() {
                break;
            }
        }
        if n == 0 {
            return Err(self.nothing_moved(ErrorKind::BrokenPipe));
        }
        if rings.wakes_reader() {
            self.wake();
        }
        Ok(n)
    }

    /// Receives what is there; `WouldBlock` where that is nothing, 0 bytes at the end.
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let Some(rings) = &self.rings else { return (&self.stream).read(out) };
        let n = rings.read(out)?;
        if n == 0 {
            // What was written before the end is read before it.
            return Err(self.nothing_moved(ErrorKind::UnexpectedEof));
        }
        if rings.wakes_writer() {
            self.wake();
        }
        Ok(n)
    }

    fn nothing_moved(&self, at_end: ErrorKind) -> io::Error {
        let closed = self.closed.load(Ordering::Relaxed);
        if closed { at_end.into() } else { ErrorKind::WouldBlock.into() }
    }

    /// Wakes the other end. Where that fails, it is awake or gone.
    fn wake(&self) {
        let _ = (&self.stream).write(&[1]);
    }

    /// Prepares to sleep until a direction of `interest` can move; returns the events to wait for,
    /// or nothing where one can already.
    pub fn prepare_sleep(&self, interest: PollFlags) -> io::Result<Option<PollFlags>> {
        let Some(rings) = &self.rings else { return Ok(Some(interest)) };
        let (to_read, to_write) =
            (interest.contains(PollFlags::IN), interest.contains(PollFlags::OUT));
        if self.closed.load(Ordering::Relaxed) || !rings.may_sleep(to_read, to_write)? {
            return Ok(None);
        }
        Ok(Some(PollFlags::IN | PollFlags::RDHUP))
    }

    /// Takes the wake-ups that have come, and notices the end.
    pub fn woken(&self) {
        if self.rings.is_none() {
            return;
        }
        let mut wakes = [0; 64];
        loop {
            match (&self.stream).read(&mut wakes) {
                Ok(0) => return self.closed.store(true, Ordering::Relaxed),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.closed.store(true, Ordering::Relaxed),
            }
        }
    }
}
