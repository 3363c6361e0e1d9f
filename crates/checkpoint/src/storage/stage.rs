//! Writing past the page cache: pieces are gathered in aligned memory and written by threads of
//! their own, so that digests of the next piece are computed while the device is busy with one.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::pages::{ALIGN, Pages};
use super::posix::FsFile;

/// Bytes of a piece at most: enough for a disk's full rate, little next to a snapshot.
pub(super) const PIECE_BYTES: usize = 8 << 20;

/// Memory for one piece.
struct Piece {
    /// Room, in whole pages.
    memory: Pages,
    filled: usize,
    /// Where it goes.
    offset: u64,
}

impl Piece {
    fn new(bytes: usize) -> Self {
        Piece { memory: Pages::new(bytes), filled: 0, offset: 0 }
    }

    /// Takes as many of `bytes` as there is room for; returns how many.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.memory.bytes().len() - self.filled);
        let room = &mut self.memory.bytes_mut()[self.filled..];
        room[..n].copy_from_slice(&bytes[..n]);
        self.filled += n;
        n
    }

    /// Writes the piece, padded with zeros to whole pages; the file is cut to its size later.
    fn write(&mut self, file: &dyn FsFile) -> io::Result<()> {
        let padded = self.filled.next_multiple_of(ALIGN);
        self.memory.bytes_mut()[self.filled..padded].fill(0);
        let staged = &self.memory.bytes()[..padded];
        match file.write_all_at(staged, self.offset) {
            // Some file systems take the flag and refuse the write.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                file.set_direct(false)?;
                file.write_all_at(staged, self.offset)
            }
            other => other,
        }
    }
}

/// Appends to a file past the page cache, which a training process needs for its data.
///
/// Where the file system refuses, it writes through the cache. Memory is one piece more than there
/// are threads.
pub(super) struct Stage {
    file: Arc<dyn FsFile>,
    piece: Option<Piece>,
    piece_bytes: usize,
    /// Bytes in earlier pieces.
    begun: u64,
    lanes: Option<Lanes>,
}

/// The threads that write.
struct Lanes {
    full: SyncSender<Piece>,
    done: Receiver<io::Result<Piece>>,
    threads: Vec<JoinHandle<()>>,
    /// Pieces that exist.
    pieces: usize,
    /// Pieces that threads have.
    away: usize,
}

impl Stage {
    /// Writes `bytes` bytes to `file`, with so many threads; with none, in the caller's.
    pub fn new(file: Arc<dyn FsFile>, bytes: u64, threads: usize) -> io::Result<Self> {
        // Refused by tmpfs and some network file systems: then the cache it is.
        let _ = file.set_direct(true);
        let piece_bytes = bytes.clamp(1, PIECE_BYTES as u64) as usize;
        let piece_bytes = piece_bytes.next_multiple_of(ALIGN);
        // What fits one piece needs no other thread.
        let threads = if bytes > PIECE_BYTES as u64 { threads } else { 0 };
        let lanes = if threads > 0 { Some(Lanes::start(&file, threads)?) } else { None };
        Ok(Stage { file, piece: None, piece_bytes, begun: 0, lanes })
    }

    /// Appends `bytes`.
    pub fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut piece = match self.piece.take() {
                Some(piece) => piece,
                None => self.empty()?,
            };
            let n = piece.fill(bytes);
            bytes = &bytes[n..];
            if piece.filled == piece.memory.bytes().len() {
                self.send(piece)?;
            } else {
                self.piece = Some(piece);
            }
        }
        Ok(())
    }

    /// Writes what is left, waits for everything and gives the file its exact size.
    pub fn finish(mut self) -> io::Result<()> {
        if let Some(piece) = self.piece.take().filter(|piece| piece.filled > 0) {
            self.send(piece)?;
        }
        if let Some(lanes) = &mut self.lanes {
            while lanes.away > 0 {
                lanes.take_back()?;
            }
        }
        self.file.set_len(self.begun)
    }

    /// Returns a piece to fill, a used one if there is one.
    fn empty(&mut self) -> io::Result<Piece> {
        let mut piece = match &mut self.lanes {
            Some(lanes) if lanes.away == lanes.pieces && lanes.pieces > lanes.threads.len() => {
                lanes.take_back()?
            }
            Some(lanes) => {
                lanes.pieces += 1;
                Piece::new(self.piece_bytes)
            }
            None => Piece::new(self.piece_bytes),
        };
        (piece.filled, piece.offset) = (0, self.begun);
        Ok(piece)
    }

    fn send(&mut self, mut piece: Piece) -> io::Result<()> {
        self.begun += piece.filled as u64;
        let Some(lanes) = &mut self.lanes else {
            piece.write(self.file.as_ref())?;
            // Used again right away.
            (piece.filled, piece.offset) = (0, self.begun);
            self.piece = Some(piece);
            return Ok(());
        };
        lanes.away += 1;
        lanes.full.send(piece).map_err(|_| io::Error::other("the writing threads are gone"))
    }
}

impl Lanes {
    fn start(file: &Arc<dyn FsFile>, n: usize) -> io::Result<Self> {
        let (full, inbox) = sync_channel::<Piece>(n);
        let (give_back, done) = channel();
        let inbox = Arc::new(Mutex::new(inbox));
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        for i in 0..n {
            let (file, inbox, give_back) = (file.clone(), inbox.clone(), give_back.clone());
            let work = move || write_pieces(file.as_ref(), &inbox, &give_back);
            threads.push(Builder::new().name(format!("ckpt-write-{i}")).spawn(work)?);
        }
        Ok(Lanes { full, done, threads, pieces: 0, away: 0 })
    }

    /// Waits for a piece that is written; an error is that of any of them.
    fn take_back(&mut self) -> io::Result<Piece> {
        self.away -= 1;
        let gone = |_| Err(io::Error::other("the writing threads are gone"));
        self.done.recv().unwrap_or_else(gone)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(Lanes { full, threads, .. }) = self.lanes.take() {
            drop(full);
            for thread in threads {
                // A panic there was printed by the thread itself, and its piece never came back.
                let _ = thread.join();
            }
        }
    }
}

fn write_pieces(
    file: &dyn FsFile,
    inbox: &Mutex<Receiver<Piece>>,
    give_back: &Sender<io::Result<Piece>>,
) {
    loop {
        let next = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut piece) = next else { return };
        let written = piece.write(file).map(|()| piece);
        if give_back.send(written).is_err() {
            return;
        }
    }
}
