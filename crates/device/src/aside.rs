//! Copies of parts of a state that are read while training goes on.
//!
//! The copy is made on the device, in the order of the state's own work: a step waits for no bus.
//! Whoever reads it does so from another thread, on another stream, through pinned memory.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_cuda::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, Stream};
use lacuna_recipe::state::Section;

use crate::state::DeviceState;
use crate::wait::{DeviceError, drain};

/// Bytes that travel to the host at a time.
const STAGING_BYTES: usize = 16 << 20;
/// Elements of a section are f32.
const F32: usize = size_of::<f32>();

/// Memory for one copy, and what it takes to read it.
#[derive(Debug)]
struct Room {
    there: DeviceBuffer,
    here: PinnedBuffer,
    stream: Stream,
    /// Marks that the copy is made, in the state's stream.
    made: Event,
    /// Marks that bytes have arrived, in the room's own.
    arrived: Event,
}

impl Room {
    fn new(device: &Device, n_bytes: usize) -> Result<Self, CudaError> {
        Ok(Room {
            there: DeviceBuffer::new(device, n_bytes)?,
            here: PinnedBuffer::new(device, STAGING_BYTES.min(n_bytes))?,
            stream: Stream::new(device)?,
            made: Event::new(device)?,
            arrived: Event::new(device)?,
        })
    }
}

/// A room that is free, used again by the next copy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shelf(Arc<Mutex<Option<Room>>>);

impl Shelf {
    fn put(&self, room: Option<Room>) -> Option<Room> {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), room)
    }
}

/// A copy of parts of a state.
#[derive(Debug)]
pub struct Aside {
    room: Option<Room>,
    shelf: Shelf,
    /// Bytes of each part in the room.
    parts: Vec<Range<usize>>,
}

impl DeviceState {
    /// Copies ranges of sections aside, as they are once the work enqueued so far is done. Returns
    /// at once; what is enqueued from here on does not change the copy.
    ///
    /// The copy takes as much of the device's memory as the ranges have, until it is dropped; one
    /// such memory is kept for the next copy.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`]; see [`DeviceError::is_out_of_memory`], after which the state is as
    /// good as before.
    pub fn set_aside(&mut self, ranges: &[(Section, Range<usize>)]) -> Result<Aside, DeviceError> {
        let failed = |source| DeviceError::Cuda { action: "copy a state aside", source };
        let mut parts: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        let mut end = 0;
        for (_, range) in ranges {
            let start = end;
            end += range.len() * F32;
            parts.push(start..end);
        }
        let shelf = self.shelf().clone();
        let mut room = match shelf.put(None).filter(|room| room.there.n_bytes() >= end) {
            Some(room) => room,
            None => Room::new(self.device(), end).map_err(failed)?,
        };
        for ((section, range), part) in ranges.iter().zip(&parts) {
            let source = (self.section(*section), range.start * F32);
            // SAFETY: sections live as long as the state and are written on its stream only. The
            // room is nobody else's, and freeing its memory waits for the device.
            unsafe { room.there.copy_at(part.start, source, part.len(), self.stream()) }
                .map_err(failed)?;
        }
        room.made.record(self.stream()).map_err(failed)?;
        room.stream.wait_for(&room.made).map_err(failed)?;
        Ok(Aside { room: Some(room), shelf, parts })
    }
}

impl Aside {
    /// Reads the bytes of part `part`, little-endian f32. From any thread.
    ///
    /// # Errors
    /// [`DeviceError`]: the device failed, or did not answer in time. Then nothing more can be
    /// read.
    ///
    /// # Panics
    /// If `out` has another length than the part.
    pub fn read(&mut self, part: usize, out: &mut [u8]) -> Result<(), DeviceError> {
        let range = self.parts[part].clone();
        assert_eq!(out.len(), range.len(), "the part's bytes");
        // Lost where a read failed: the device may still write into it.
        let mut room = self.room.take().ok_or(DeviceError::Timeout { action: "read a copy" })?;
        let mut at = range.start;
        for piece in out.chunks_mut(STAGING_BYTES) {
            let fetched = fetch(&mut room, at, piece);
            if let Err(error) = fetched {
                std::mem::forget(room);
                return Err(error);
            }
            at += piece.len();
        }
        self.room = Some(room);
        Ok(())
    }
}

/// Brings bytes of a room to the host.
fn fetch(room: &mut Room, at: usize, piece: &mut [u8]) -> Result<(), DeviceError> {
    const ACTION: &str = "read a copy of the state";
    // SAFETY: the host's memory is read behind `drain`, and leaked by the caller if that fails.
    let stored = unsafe { room.there.store_at(at, &mut room.here, piece.len(), &room.stream) };
    stored.map_err(|source| DeviceError::Cuda { action: ACTION, source })?;
    drain(&room.arrived, &room.stream, ACTION)?;
    piece.copy_from_slice(&room.here.bytes()[..piece.len()]);
    Ok(())
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Of two free rooms one is enough.
        drop(self.room.take().map(|room| self.shelf.put(Some(room))));
    }
}
