//! An object from its beginning to its end.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use crate::error::StoreError;
use crate::limits::Stop;
use crate::store::{Pending, Store};

/// Bytes of one request: large beside what a request costs, small beside memory.
const PIECE: u64 = 8 << 20;

/// Requests under way.
const AHEAD: usize = 3;

/// Reads an object in order, with a few requests ahead of the reader.
pub struct ObjectReader {
    store: Arc<Store>,
    name: String,
    bytes: u64,
    stop: Stop,
    asked: u64,
    coming: VecDeque<Pending<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
}

impl std::fmt::Debug for ObjectReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectReader({})", self.store.url_of(&self.name))
    }
}

impl ObjectReader {
    pub(crate) fn new(store: Arc<Store>, name: String, bytes: u64, stop: Stop) -> Self {
        let coming = VecDeque::with_capacity(AHEAD);
        ObjectReader { store, name, bytes, stop, asked: 0, coming, piece: Vec::new(), at: 0 }
    }

    /// Returns the object's size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads what is left of it.
    pub(crate) fn read_all(mut self) -> Result<Vec<u8>, StoreError> {
        let mut all: Vec<u8> = Vec::with_capacity(self.bytes as usize);
        while let Some(piece) = self.next_piece()? {
            all.extend(piece);
        }
        Ok(all)
    }

    fn next_piece(&mut self) -> Result<Option<Vec<u8>>, StoreError> {
        self.ask();
        let Some(pending) = self.coming.pop_front() else { return Ok(None) };
        let piece = pending.wait(&self.stop)?;
        self.ask();
        Ok(Some(piece))
    }

    fn ask(&mut self) {
        while self.coming.len() < AHEAD && self.asked < self.bytes {
            let end = self.bytes.min(self.asked + PIECE);
            self.coming.push_back(self.store.start_read(&self.name, self.asked..end));
            self.asked = end;
        }
    }
}

impl Read for ObjectReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            let Some(piece) = self.next_piece().map_err(io::Error::other)? else { return Ok(0) };
            (self.piece, self.at) = (piece, 0);
        }
        let n = out.len().min(self.piece.len() - self.at);
        out[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
