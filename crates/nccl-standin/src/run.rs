//! What operations do, once their stream reaches them.

use std::ffi::c_int;
use std::sync::atomic::AtomicBool;

use crate::net::{Lost, Mesh};

/// An operation as a stream keeps it; addresses are numbers, so that it can move to a thread.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub kind: Kind,
    pub from: usize,
    pub to: usize,
    pub count: usize,
    pub data: Data,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    AllReduce(Reduce),
    ReduceScatter(Reduce),
    AllGather,
    Broadcast { root: usize },
    Send { peer: usize },
    Recv { peer: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
    Min,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    U8,
    I32,
    I64,
    F32,
    Bf16,
}

impl Data {
    pub fn from_raw(raw: c_int) -> Option<Self> {
        Some(match raw {
            0 | 1 => Self::U8,
            2 => Self::I32,
            4 => Self::I64,
            7 => Self::F32,
            9 => Self::Bf16,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

impl Reduce {
    pub fn from_raw(raw: c_int) -> Option<Self> {
        Some(match raw {
            0 => Self::Sum,
            2 => Self::Max,
            3 => Self::Min,
            _ => return None,
        })
    }
}

/// Where an operation takes place.
pub struct Place<'a> {
    pub mesh: &'a Mesh,
    pub world: usize,
    pub rank: usize,
    pub abort: &'a AtomicBool,
}

impl Operation {
    /// Elements that it writes.
    fn n_written(&self, world: usize) -> usize {
        match self.kind {
            Kind::AllGather => self.count * world,
            Kind::Send { .. } => 0,
            _ => self.count,
        }
    }

    /// Leaves what an operation leaves that was cut off: a buffer that is partly written.
    pub fn leave_garbage(&self, world: usize) {
        let n_bytes: usize = self.n_written(world) * self.data.bytes();
        // SAFETY: whoever enqueued the operation answers for the buffer until its abort is over.
        unsafe { std::ptr::write_bytes(self.to as *mut u8, 0x5a, n_bytes / 2) };
    }

    /// Does it.
    pub fn run(&self, place: &Place<'_>) -> Result<(), Lost> {
        let Self { kind, from, to, count, data } = *self;
        let (world, rank) = (place.world, place.rank);
        let piece: usize = count * data.bytes();
        match kind {
            Kind::AllReduce(op) => {
                let parts = place.exchange(|_| bytes(from, piece).to_vec(), piece)?;
                write(to, &reduce(data, op, &parts));
            }
            Kind::ReduceScatter(op) => {
                let part = |peer: usize| bytes(from + peer * piece, piece).to_vec();
                let parts = place.exchange(part, piece)?;
                write(to, &reduce(data, op, &parts));
            }
            Kind::AllGather => {
                let parts = place.exchange(|_| bytes(from, piece).to_vec(), piece)?;
                write(to, &parts.concat());
            }
            Kind::Broadcast { root } if root == rank => {
                let content: Vec<u8> = bytes(from, piece).to_vec();
                for peer in (0..world).filter(|peer| *peer != rank) {
                    place.mesh.send(peer, &content, place.abort)?;
                }
                write(to, &content);
            }
            Kind::Broadcast { root } => write(to, &place.recv(root, piece)?),
            Kind::Send { peer } => place.mesh.send(peer, bytes(from, piece), place.abort)?,
            Kind::Recv { peer } => write(to, &place.recv(peer, piece)?),
        }
        Ok(())
    }
}

impl Place<'_> {
    /// Sends everybody a part and returns what everybody sent here, in rank order.
    fn exchange(
        &self,
        part: impl Fn(usize) -> Vec<u8>,
        n_bytes: usize,
    ) -> Result<Vec<Vec<u8>>, Lost> {
        let others = || (0..self.world).filter(|peer| *peer != self.rank);
        for peer in others() {
            self.mesh.send(peer, &part(peer), self.abort)?;
        }
        (0..self.world)
            .map(|peer| if peer == self.rank { Ok(part(peer)) } else { self.recv(peer, n_bytes) })
            .collect()
    }

    /// Receives a part; one of another size is an operation that does not match, which hangs.
    fn recv(&self, peer: usize, n_bytes: usize) -> Result<Vec<u8>, Lost> {
        loop {
            let frame: Vec<u8> = self.mesh.recv(peer, self.abort)?;
            if frame.len() == n_bytes {
                return Ok(frame);
            }
        }
    }
}

fn bytes<'a>(start: usize, n_bytes: usize) -> &'a [u8] {
    if n_bytes == 0 {
        return &[];
    }
    // SAFETY: whoever enqueued the operation answers for the buffer until the stream has passed it.
    unsafe { std::slice::from_raw_parts(start as *const u8, n_bytes) }
}

fn write(start: usize, content: &[u8]) {
    // SAFETY: whoever enqueued the operation answers for the buffer until the stream has passed it.
    unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), start as *mut u8, content.len()) };
}

/// Reduces parts of equal size in rank order.
pub fn reduce(data: Data, op: Reduce, parts: &[Vec<u8>]) -> Vec<u8> {
    let mut sum: Vec<u8> = parts[0].clone();
    for part in &parts[1..] {
        for (a, b) in sum.chunks_exact_mut(data.bytes()).zip(part.chunks_exact(data.bytes())) {
            combine(data, op, a, b);
        }
    }
    sum
}

fn combine(data: Data, op: Reduce, a: &mut [u8], b: &[u8]) {
    macro_rules! with {
        ($type:ty, $sum:expr) => {{
            let read = |bytes: &[u8]| <$type>::from_le_bytes(bytes.try_into().expect("an element"));
            let (x, y) = (read(a), read(b));
            let result: $type = match op {
                Reduce::Sum => $sum(x, y),
                Reduce::Max => {
                    if x > y {
                        x
                    } else {
                        y
                    }
                }
                Reduce::Min => {
                    if x < y {
                        x
                    } else {
                        y
                    }
                }
            };
            a.copy_from_slice(&result.to_le_bytes());
        }};
    }
    match data {
        Data::U8 => with!(u8, u8::wrapping_add),
        Data::I32 => with!(i32, i32::wrapping_add),
        Data::I64 => with!(i64, i64::wrapping_add),
        Data::F32 => with!(f32, |x: f32, y: f32| x + y),
        Data::Bf16 => {
            let wide = |bytes: &[u8]| f32::from_le_bytes([0, 0, bytes[0], bytes[1]]);
            let (x, y) = (wide(a), wide(b));
            let result: f32 = match op {
                Reduce::Sum => x + y,
                Reduce::Max => x.max(y),
                Reduce::Min => x.min(y),
            };
            // Round to nearest, ties to even.
            let bits: u32 = result.to_bits();
            let rounded: u32 = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            a.copy_from_slice(&(rounded as u16).to_le_bytes());
        }
    }
}
