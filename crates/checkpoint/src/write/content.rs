//! What a part consists of, handed out piece by piece and digested on the way: each byte is read
//! once, by whichever thread writes it.

use std::io;
use std::sync::{Mutex, PoisonError};

use lacuna_recipe::digest::Crc64;

use crate::json::Hex64;
use crate::manifest::FileEntry;
use crate::pace::Pace;
use crate::state::{Dtype, NamedSlice};
use crate::storage::Source;
use crate::write::is_finite_f32;

/// Bytes that are digested, copied and looked at one after another, while a core's cache has them.
const PIECE_BYTES: usize = 128 << 10;

/// Bytes of a part that belong together: its header, or one slice.
struct Run<'a> {
    bytes: &'a [u8],
    /// Where they begin in the file.
    at: u64,
    is_f32: bool,
}

/// The content of a part, as a source for whatever writes it.
///
/// The digest of each stretch is kept until all are there; they combine in the order of the file,
/// so it does not matter in which order, or by whom, they were asked for.
pub(super) struct Content<'a> {
    runs: Vec<Run<'a>>,
    bytes: u64,
    block_bytes: u64,
    pace: &'a Pace,
    seen: Mutex<Seen>,
}

/// What is known of the bytes that were handed out.
#[derive(Default)]
struct Seen {
    stretches: Vec<Stretch>,
    found_not_finite: bool,
}

/// A digest of bytes of one block and one run.
#[derive(Clone, Copy)]
struct Stretch {
    at: u64,
    run: usize,
    crc: Crc64,
}

/// What a part turned out to be.
pub(super) struct Digested {
    /// Its blocks.
    pub blocks: Blocks,
    /// First byte and digest of each slice.
    pub slices: Vec<(u64, Crc64)>,
    /// Whether every float is finite.
    pub finite: bool,
}

impl<'a> Content<'a> {
    /// Takes the header and the slices behind it.
    pub fn new(
        head: &'a [u8],
        slices: &'a [NamedSlice<'a>],
        block_bytes: u64,
        pace: &'a Pace,
    ) -> Self {
        let mut runs = vec![Run { bytes: head, at: 0, is_f32: false }];
        let mut at = head.len() as u64;
        for NamedSlice { spec, bytes } in slices {
            assert_eq!(bytes.len() as u64, spec.bytes(), "bytes of `{}`", spec.tensor);
            runs.push(Run { bytes, at, is_f32: spec.dtype == Dtype::F32 });
            at += bytes.len() as u64;
        }
        Content { runs, bytes: at, block_bytes, pace, seen: Mutex::default() }
    }

    /// Combines the digests of everything that was handed out.
    pub fn digested(self) -> Digested {
        let Seen { mut stretches, found_not_finite } =
            self.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        stretches.sort_by_key(|stretch| stretch.at);
        let mut blocks = Blocks::new(self.block_bytes);
        let mut slices: Vec<(u64, Crc64)> =
            self.runs.iter().map(|run| (run.at, Crc64::default())).collect();
        for Stretch { at, run, crc } in stretches {
            assert_eq!(at, blocks.bytes(), "every byte is asked for once");
            blocks.add(crc);
            slices[run].1 = slices[run].1.then(crc);
        }
        assert_eq!(blocks.bytes(), self.bytes, "every byte is asked for once");
        slices.remove(0);
        Digested { blocks, slices, finite: !found_not_finite }
    }

    /// Copies bytes of one block and one run, from `start` of the run on, and looks at them.
    fn copy(&self, run: &Run<'_>, start: usize, into: &mut [u8]) -> io::Result<(Crc64, bool)> {
        let mut crc = Crc64::default();
        let mut finite = true;
        let mut at = start;
        for into in into.chunks_mut(PIECE_BYTES) {
            self.pace.pass(into.len() as u64)?;
            let end = at + into.len();
            into.copy_from_slice(&run.bytes[at..end]);
            crc = crc.then(Crc64::of(into));
            // Floats that begin here; the last may end in the next piece.
            let floats = at.next_multiple_of(4)..end.next_multiple_of(4);
            finite &= !run.is_f32 || is_finite_f32(&run.bytes[floats]);
            at = end;
        }
        Ok((crc, finite))
    }
}

impl Source for Content<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut all_finite = true;
        let mut at = offset;
        // The last run that begins there or before; those without bytes are passed over.
        let first = self.runs.partition_point(|run| run.at <= offset) - 1;
        for (i, run) in self.runs.iter().enumerate().skip(first) {
            while at < run.at + run.bytes.len() as u64 && !into.is_empty() {
                let start = (at - run.at) as usize;
                let block = self.block_bytes - at % self.block_bytes;
                let n = into.len().min(run.bytes.len() - start).min(block as usize);
                let (now, later) = into.split_at_mut(n);
                let (crc, finite) = self.copy(run, start, now)?;
                stretches.push(Stretch { at, run: i, crc });
                all_finite &= finite;
                at += n as u64;
                into = later;
            }
        }
        assert!(into.is_empty(), "nobody asks for more than there is");
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.stretches.append(&mut stretches);
        seen.found_not_finite |= !all_finite;
        Ok(())
    }
}

/// The digests of a file's blocks, computed in the order of the file.
pub(crate) struct Blocks {
    block_bytes: u64,
    block: Crc64,
    full: Vec<Hex64>,
    whole: Crc64,
}

impl Blocks {
    /// Begins a file of blocks of `block_bytes`.
    pub fn new(block_bytes: u64) -> Self {
        assert!(block_bytes > 0, "blocks have bytes");
        let (block, whole) = (Crc64::default(), Crc64::default());
        Blocks { block_bytes, block, full: Vec::new(), whole }
    }

    /// Returns how many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.whole.bytes + self.block.bytes
    }

    /// Appends bytes; returns their digest.
    pub fn digest(&mut self, mut bytes: &[u8]) -> Crc64 {
        let mut sum = Crc64::default();
        while !bytes.is_empty() {
            let room = (self.block_bytes - self.block.bytes).min(bytes.len() as u64) as usize;
            let (now, later) = bytes.split_at(room);
            let crc = Crc64::of(now);
            self.add(crc);
            sum = sum.then(crc);
            bytes = later;
        }
        sum
    }

    /// Appends bytes with this digest, which end no later than the block.
    fn add(&mut self, crc: Crc64) {
        self.block = self.block.then(crc);
        assert!(self.block.bytes <= self.block_bytes, "bytes of one block");
        if self.block.bytes == self.block_bytes {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        self.full.push(Hex64(self.block.value));
        self.whole = self.whole.then(self.block);
        self.block = Crc64::default();
    }

    /// Describes the file.
    pub fn describe(mut self, name: String) -> FileEntry {
        if self.block.bytes > 0 {
            self.end_block();
        }
        FileEntry {
            name,
            bytes: self.whole.bytes,
            crc64: Hex64(self.whole.value),
            block: self.block_bytes,
            blocks: self.full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::PartSlice;

    /// Whoever asks for which bytes in whatever order, the digests are those of the file.
    #[test]
    fn pieces_in_any_order_give_the_digests_of_the_file() {
        let head: Vec<u8> = (0..100).collect();
        let floats: Vec<u8> = (0..300u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let slices = [
            slice("a", Dtype::U8, &[1, 2, 3]),
            slice("b", Dtype::F32, &floats),
            slice("c", Dtype::F32, &[]),
            slice("d", Dtype::I64, &[9; 80]),
        ];
        let file: Vec<u8> =
            head.iter().chain(slices.iter().flat_map(|s| s.bytes)).copied().collect();
        for (block, piece) in [(64, 100), (100, 64), (7, 500), (4096, 1), (1, 4096)] {
            let pace = Pace::free();
            let content = Content::new(&head, &slices, block, &pace);
            assert_eq!(content.bytes(), file.len() as u64);
            let mut starts: Vec<usize> = (0..file.len()).step_by(piece).collect();
            starts.reverse();
            for start in starts {
                let expected = &file[start..file.len().min(start + piece)];
                let mut found = vec![0; expected.len()];
                content.read(start as u64, &mut found).unwrap();
                assert_eq!(found, expected);
            }
            let digested = content.digested();
            let mut in_order = Blocks::new(block);
            in_order.digest(&file);
            let [ours, expected] =
                [digested.blocks, in_order].map(|blocks| blocks.describe("x".to_string()));
            assert_eq!(ours, expected);
            assert_eq!(expected.crc64, Hex64(Crc64::of(&file).value));
            let slices: Vec<(u64, Crc64)> = [(100, 3), (103, 1200), (1303, 0), (1303, 80)]
                .map(|(at, n)| (at as u64, Crc64::of(&file[at..at + n])))
                .to_vec();
            assert_eq!(digested.slices, slices);
            assert!(digested.finite);
        }
    }

    /// One that is not finite is seen wherever a piece cuts it.
    #[test]
    fn a_float_that_is_cut_is_looked_at() {
        let mut floats = [1.0f32; 8];
        floats[3] = f32::INFINITY;
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        for (piece, block) in (1..40).map(|n| (n, 64)).chain((1..40).map(|n| (64, n))) {
            let slices = [slice("a", Dtype::U8, &[0; 3]), slice("b", Dtype::F32, &bytes)];
            let pace = Pace::free();
            let content = Content::new(&[], &slices, block, &pace);
            for start in (0..35).step_by(piece) {
                let mut found = vec![0; piece.min(35 - start)];
                content.read(start as u64, &mut found).unwrap();
            }
            assert!(!content.digested().finite, "{piece} bytes at once, blocks of {block}");
        }
    }

    fn slice<'a>(name: &str, dtype: Dtype, bytes: &'a [u8]) -> NamedSlice<'a> {
        let n = bytes.len() as u64 / dtype.bytes();
        let origin = crate::state::Origin::Leftover(0);
        let tensor = name.to_string();
        NamedSlice { spec: PartSlice { tensor, dtype, shape: vec![n], range: 0..n, origin }, bytes }
    }
}
