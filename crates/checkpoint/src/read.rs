//! Reading ranges of tensors: plan which bytes of which files, then read whole digest blocks and
//! compare each with the manifest before a byte of it is used.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lacuna_recipe::digest::Crc64;

use crate::json::Hex64;
use crate::layout::RunDir;
use crate::manifest::{FileEntry, Manifest};
use crate::storage::{FsError, Pages, ReadAt, Storage, chain};

mod lanes;

use self::lanes::Task;

/// Tensors that a message names before it only counts them.
const AFFECTED_SHOWN: usize = 6;

/// Elements of a tensor that a reader wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Name of the logical tensor.
    pub tensor: String,
    /// Elements in row-major order.
    pub range: Range<u64>,
}

/// A read of consecutive digest blocks of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOp {
    /// Index in the manifest's files.
    pub file: u32,
    /// Bytes to read; both ends are ends of blocks.
    pub bytes: Range<u64>,
    /// Where the wanted bytes go, by place in the file.
    pub copies: Vec<Copy>,
}

/// Bytes of a file that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Place in the file.
    pub at: Range<u64>,
    /// Index in the list of wanted ranges.
    pub wanted: usize,
    /// First byte in that range's buffer.
    pub dst: usize,
}

/// A range that the checkpoint does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No tensor has this name.
    #[error("checkpoint step {step} has no tensor `{tensor}`")]
    NoTensor {
        /// Which checkpoint.
        step: u64,
        /// The name asked for.
        tensor: String,
    },
    /// The tensor is smaller.
    #[error("checkpoint step {step}: `{tensor}` has no elements {}..{}", range.start, range.end)]
    Range {
        /// Which checkpoint.
        step: u64,
        /// The tensor.
        tensor: String,
        /// The elements asked for.
        range: Range<u64>,
    },
}

/// Plans the reads for `wanted`: per file, by place, neighbouring blocks in one read.
pub fn plan(manifest: &Manifest, wanted: &[Wanted]) -> Result<Vec<ReadOp>, PlanError> {
    let mut pieces: Vec<(u32, Copy)> = Vec::new();
    for (idx, want) in wanted.iter().enumerate() {
        let (step, tensor) = (manifest.step, want.tensor.clone());
        let Some(entry) = manifest.tensors.get(&tensor) else {
            return Err(PlanError::NoTensor { step, tensor });
        };
        let numel = entry.slices.last().map_or(0, |slice| slice.range[1]);
        let range = want.range.clone();
        if range.start > range.end || range.end > numel {
            return Err(PlanError::Range { step, tensor, range });
        }
        let width = entry.dtype.bytes();
        for slice in &entry.slices {
            let start = slice.range[0].max(range.start);
            let end = slice.range[1].min(range.end);
            if start < end {
                let from = slice.at[0] + (start - slice.range[0]) * width;
                let at = from..from + (end - start) * width;
                let dst = ((start - range.start) * width) as usize;
                pieces.push((slice.file, Copy { at, wanted: idx, dst }));
            }
        }
    }
    pieces.sort_by_key(|(file, copy)| (*file, copy.at.start, copy.at.end));
    let mut ops: Vec<ReadOp> = Vec::new();
    for (file, copy) in pieces {
        let bytes = covering(&manifest.files[file as usize], &copy.at);
        match ops.last_mut().filter(|op| op.file == file && bytes.start <= op.bytes.end) {
            Some(op) => {
                op.bytes.end = op.bytes.end.max(bytes.end);
                op.copies.push(copy);
            }
            None => ops.push(ReadOp { file, bytes, copies: vec![copy] }),
        }
    }
    Ok(ops)
}

/// Rounds a range of a file to its digest blocks.
fn covering(file: &FileEntry, at: &Range<u64>) -> Range<u64> {
    let start = at.start / file.block * file.block;
    let end = at.end.div_ceil(file.block).saturating_mul(file.block);
    start..end.min(file.bytes)
}

/// Elements that damage touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affected {
    /// The tensor.
    pub tensor: String,
    /// Its elements.
    pub elements: Range<u64>,
}

/// The tensors that some bytes of a file belong to, by place in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AffectedList(pub Vec<Affected>);

impl fmt::Display for AffectedList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("affects no tensor");
        }
        f.write_str("affects ")?;
        for (i, Affected { tensor, elements }) in self.0.iter().take(AFFECTED_SHOWN).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{tensor} elements {}..{}", elements.start, elements.end)?;
        }
        let more = self.0.len().saturating_sub(AFFECTED_SHOWN);
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

/// Lists the elements that lie in some bytes of a file.
pub fn affected(manifest: &Manifest, file: u32, bytes: &Range<u64>) -> AffectedList {
    let mut found: Vec<(u64, Affected)> = Vec::new();
    for (name, tensor) in &manifest.tensors {
        let width = tensor.dtype.bytes();
        for slice in tensor.slices.iter().filter(|slice| slice.file == file) {
            let start = slice.at[0].max(bytes.start);
            let end = slice.at[1].min(bytes.end);
            if start < end {
                let element = |byte: u64| slice.range[0] + byte / width;
                let first = element(start - slice.at[0]);
                let last = element((end - slice.at[0]).next_multiple_of(width));
                let elements = first..last;
                found.push((start, Affected { tensor: name.clone(), elements }));
            }
        }
    }
    found.sort_by_key(|(at, _)| *at);
    AffectedList(found.into_iter().map(|(_, affected)| affected).collect())
}

/// A part that does not hold what the manifest says.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A block has other bytes.
    #[error(
        "checkpoint step {step}: {file} is damaged: bytes {}..{} have CRC {found}, manifest says \
         {want} ({affects})",
        bytes.start, bytes.end
    )]
    Damaged {
        /// Which checkpoint.
        step: u64,
        /// Which file.
        file: String,
        /// Which bytes.
        bytes: Range<u64>,
        /// Digest of what is there.
        found: Hex64,
        /// Digest of what was written.
        want: Hex64,
        /// The tensors that lie there.
        affects: AffectedList,
    },
    /// The file is not there, or has another size.
    #[error("checkpoint step {step}: {file} {problem} ({affects})")]
    Size {
        /// Which checkpoint.
        step: u64,
        /// Which file.
        file: String,
        /// What is wrong.
        problem: String,
        /// The tensors that lie in it.
        affects: AffectedList,
    },
    /// The device or file system failed.
    #[error("checkpoint step {step}: {file} cannot be read ({affects})")]
    Fs {
        /// Which checkpoint.
        step: u64,
        /// Which file.
        file: String,
        /// The tensors that were to be read.
        affects: AffectedList,
        /// The call that failed.
        #[source]
        source: FsError,
    },
}

impl ReadError {
    /// Tells whether another time or another user may succeed.
    fn is_passing(&self) -> bool {
        matches!(self, ReadError::Fs { source, .. } if source.is_passing())
    }
}

/// Tells what is wrong with a file's size, if anything.
fn size_problem(
    storage: &dyn Storage,
    path: &Path,
    entry: &FileEntry,
) -> Result<Option<String>, FsError> {
    Ok(match storage.size(path) {
        Ok(found) if found == entry.bytes => None,
        Ok(found) => Some(format!("has {found} bytes, manifest says {}", entry.bytes)),
        Err(e) if e.is_not_found() => Some("is missing".to_string()),
        Err(e) if e.is_passing() => return Err(e),
        Err(e) => Some(format!("cannot be read: {}", e.source)),
    })
}

/// Returns the first part that is not there with its size, and what is wrong with it.
pub(crate) fn first_missing(
    dir: &RunDir,
    manifest: &Manifest,
) -> Result<Option<(u32, String)>, FsError> {
    let place = dir.attempt(manifest.step(), manifest.attempt);
    for (idx, file) in (0u32..).zip(&manifest.files) {
        if let Some(problem) = size_problem(dir.storage(), &place.join(&file.name), file)? {
            return Ok(Some((idx, problem)));
        }
    }
    Ok(None)
}

/// Reads blocks of one part, each compared with its digest; holds one block in memory.
pub(crate) struct BlockReader<'a> {
    manifest: &'a Manifest,
    idx: u32,
    path: PathBuf,
    file: Box<dyn ReadAt>,
    block: Pages,
    held: Option<u64>,
}

impl<'a> BlockReader<'a> {
    /// Opens part `idx`, which must have the size that the manifest says.
    pub fn open(dir: &RunDir, manifest: &'a Manifest, idx: u32) -> Result<Self, ReadError> {
        let entry = &manifest.files[idx as usize];
        let path = dir.attempt(manifest.step(), manifest.attempt).join(&entry.name);
        let (step, name) = (manifest.step, entry.name.clone());
        let all = || affected(manifest, idx, &(0..entry.bytes));
        match size_problem(dir.storage(), &path, entry) {
            Ok(None) => {}
            Ok(Some(problem)) => {
                return Err(ReadError::Size { step, file: name, problem, affects: all() });
            }
            Err(source) => return Err(ReadError::Fs { step, file: name, affects: all(), source }),
        }
        let file = dir.storage().open(&path).map_err(|source| ReadError::Fs {
            step,
            file: name,
            affects: all(),
            source,
        })?;
        Ok(BlockReader { manifest, idx, path, file, block: Pages::default(), held: None })
    }

    /// Returns the number of blocks.
    pub fn n_blocks(&self) -> u64 {
        self.entry().blocks.len() as u64
    }

    fn entry(&self) -> &'a FileEntry {
        &self.manifest.files[self.idx as usize]
    }

    /// Forgets the block that is held, so that it is read again.
    #[cfg(test)]
    pub fn forget(&mut self) {
        self.held = None;
    }

    /// Reads block `idx`, or returns it again.
    pub fn block(&mut self, idx: u64) -> Result<&[u8], ReadError> {
        if self.held != Some(idx) {
            self.held = None;
            let mut block = std::mem::take(&mut self.block);
            let read = self.read(idx, &mut block, &[]);
            self.block = block;
            read?;
            self.held = Some(idx);
        }
        Ok(self.block.bytes())
    }

    /// Reads block `idx` into `buffer`, which gets its size; returns the digests of `pieces` of it.
    fn read(
        &self,
        idx: u64,
        buffer: &mut Pages,
        pieces: &[Range<usize>],
    ) -> Result<Vec<Crc64>, ReadError> {
        let entry = self.entry();
        let bytes = entry.block_range(idx);
        buffer.resize((bytes.end - bytes.start) as usize);
        let (step, file) = (self.manifest.step, entry.name.clone());
        if let Err(e) = self.file.read_exact_at(buffer.bytes_mut(), bytes.start) {
            let source = FsError::new("read", &self.path, e);
            let affects = affected(self.manifest, self.idx, &bytes);
            return Err(ReadError::Fs { step, file, affects, source });
        }
        let (whole, digests) = digest_pieces(buffer.bytes(), pieces);
        let found = Hex64(whole.value);
        let want = entry.blocks[idx as usize];
        if found != want {
            let affects = affected(self.manifest, self.idx, &bytes);
            return Err(ReadError::Damaged { step, file, bytes, found, want, affects });
        }
        Ok(digests)
    }
}

/// Computes the digest of a block and those of `pieces` of it, from each byte once.
fn digest_pieces(block: &[u8], pieces: &[Range<usize>]) -> (Crc64, Vec<Crc64>) {
    if pieces.windows(2).any(|pair| pair[1].start < pair[0].end) {
        // Somebody wants some bytes twice.
        let digests = pieces.iter().map(|piece| Crc64::of(&block[piece.clone()])).collect();
        return (Crc64::of(block), digests);
    }
    let (mut whole, mut at) = (Crc64::default(), 0);
    let mut digests: Vec<Crc64> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let digest = Crc64::of(&block[piece.clone()]);
        whole = whole.then(Crc64::of(&block[at..piece.start])).then(digest);
        at = piece.end;
        digests.push(digest);
    }
    (whole.then(Crc64::of(&block[at..])), digests)
}

/// Reads a whole plan for `n_wanted` ranges and returns the digest of each.
///
/// `put` gets the bytes piece by piece, by place in the files: the index of the wanted range, the
/// first byte in it, and the bytes, which were compared with their block's digest. Digests are
/// computed as the bytes come, while the device is busy with later ones.
pub fn read_all(
    dir: &RunDir,
    manifest: &Manifest,
    ops: &[ReadOp],
    n_wanted: usize,
    mut put: impl FnMut(usize, usize, &[u8]),
) -> Result<Vec<Crc64>, ReadError> {
    let (tasks, places) = tasks(manifest, ops);
    let mut places = places.into_iter();
    let mut pieces: Vec<(usize, usize, Crc64)> = Vec::new();
    lanes::for_each(dir, manifest, &tasks, |task, read| {
        let block = read?;
        for (piece, digest) in task.pieces.iter().zip(block.digests) {
            let (wanted, dst) = places.next().expect("every piece has a place");
            put(wanted, dst, &block.bytes[piece.clone()]);
            pieces.push((wanted, dst, digest));
        }
        Ok(())
    })?;
    // Parts may hold a tensor's slices in any order.
    pieces.sort_by_key(|(wanted, dst, _)| (*wanted, *dst));
    let mut digests: Vec<Crc64> = vec![Crc64::default(); n_wanted];
    for (wanted, _, piece) in pieces {
        digests[wanted] = digests[wanted].then(piece);
    }
    Ok(digests)
}

/// Lists the blocks of a plan, and where each piece of them goes: range and first byte in it.
fn tasks(manifest: &Manifest, ops: &[ReadOp]) -> (Vec<Task>, Vec<(usize, usize)>) {
    let (mut tasks, mut places) = (Vec::new(), Vec::new());
    for op in ops {
        let entry = &manifest.files[op.file as usize];
        let mut done = 0;
        for block in op.bytes.start / entry.block..op.bytes.end.div_ceil(entry.block) {
            let range = entry.block_range(block);
            let mut pieces: Vec<Range<usize>> = Vec::new();
            for (piece, wanted, dst) in wanted_of(op, &mut done, &range) {
                pieces.push(piece);
                places.push((wanted, dst));
            }
            tasks.push(Task { file: op.file, block, pieces });
        }
    }
    (tasks, places)
}

/// Lists what is wanted of a block that is `range` of its file: bytes of the block, index of the
/// wanted range, first byte in it. Copies before `done` lie in earlier blocks.
fn wanted_of<'a>(
    op: &'a ReadOp,
    done: &mut usize,
    range: &'a Range<u64>,
) -> impl Iterator<Item = (Range<usize>, usize, usize)> + 'a {
    while op.copies.get(*done).is_some_and(|copy| copy.at.end <= range.start) {
        *done += 1;
    }
    let near = op.copies[*done..].iter().take_while(|copy| copy.at.start < range.end);
    near.filter_map(|copy| {
        let (start, end) = (copy.at.start.max(range.start), copy.at.end.min(range.end));
        let piece = (start - range.start) as usize..end.saturating_sub(range.start) as usize;
        let dst = copy.dst + (start - copy.at.start) as usize;
        (start < end).then_some((piece, copy.wanted, dst))
    })
}

/// Reads ranges of a checkpoint in any order, keeping the last part open and its last block held.
pub struct Reader<'a> {
    dir: &'a RunDir,
    manifest: &'a Manifest,
    open: Option<BlockReader<'a>>,
}

impl<'a> Reader<'a> {
    /// Prepares to read; nothing is opened yet.
    pub fn new(dir: &'a RunDir, manifest: &'a Manifest) -> Self {
        Reader { dir, manifest, open: None }
    }

    /// Executes `ops`; `buffers` has one buffer per wanted range of the plan.
    pub fn read_into(
        &mut self,
        ops: &[ReadOp],
        buffers: &mut [&mut [u8]],
    ) -> Result<(), ReadError> {
        ops.iter().try_for_each(|op| self.execute(op, buffers))
    }

    fn execute(&mut self, op: &ReadOp, buffers: &mut [&mut [u8]]) -> Result<(), ReadError> {
        let reader = match self.open.take().filter(|reader| reader.idx == op.file) {
            Some(reader) => reader,
            None => BlockReader::open(self.dir, self.manifest, op.file)?,
        };
        let reader = self.open.insert(reader);
        let size = reader.entry().block;
        let mut done: usize = 0;
        for idx in op.bytes.start / size..op.bytes.end.div_ceil(size) {
            let range = reader.entry().block_range(idx);
            let block = reader.block(idx)?;
            for (piece, wanted, dst) in wanted_of(op, &mut done, &range) {
                buffers[wanted][dst..dst + piece.len()].copy_from_slice(&block[piece]);
            }
        }
        Ok(())
    }
}

/// What reading a whole checkpoint back found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes read.
    pub bytes: u64,
    /// Everything that is wrong, one line each; empty for a sound checkpoint.
    pub problems: Vec<String>,
    /// How many of them are of bytes that could not be read.
    pub n_unread: usize,
    /// How many of those may pass: they say nothing of the bytes.
    pub n_passing: usize,
}

impl Verified {
    fn add(&mut self, error: &ReadError) {
        self.problems.push(chain(error));
        self.n_unread += usize::from(matches!(error, ReadError::Fs { .. }));
        self.n_passing += usize::from(error.is_passing());
    }
}

/// Reads every byte of every part and lists all damage.
pub fn verify(dir: &RunDir, manifest: &Manifest) -> Verified {
    let mut out = Verified { bytes: 0, problems: Vec::new(), n_unread: 0, n_passing: 0 };
    let mut tasks: Vec<Task> = Vec::new();
    let task = |file: u32| move |block: u64| Task { file, block, pieces: Vec::new() };
    for idx in 0..manifest.world_size {
        match BlockReader::open(dir, manifest, idx) {
            Ok(reader) => tasks.extend((0..reader.n_blocks()).map(task(idx))),
            Err(error) => out.add(&error),
        }
    }
    let all = lanes::for_each(dir, manifest, &tasks, |_, read| {
        match read {
            Ok(block) => out.bytes += block.bytes.len() as u64,
            Err(error) => out.add(&error),
        }
        Ok(())
    });
    debug_assert!(all.is_ok(), "every error was put down");
    out
}

#[cfg(test)]
mod tests;
