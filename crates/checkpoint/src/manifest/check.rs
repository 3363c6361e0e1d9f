//! What a manifest must satisfy beyond being the document that was written.

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::reduce::CHUNK_32;
use lacuna_recipe::state::{Section, TensorDigests, state_digest};

use super::{FileEntry, Manifest, TensorEntry};
use crate::json::Hex64;
use crate::layout::PartId;
use crate::partition::PARTITION;
use crate::state::{Dtype, EXPONENTS};

/// Largest accepted digest block: readers hold one in memory.
pub(crate) const BLOCK_BYTES_MAX: u64 = 256 << 20;

/// Places of elements and ends of blocks are multiples of this, so that no f32 lies in two blocks.
const ELEMENT_BYTES: u64 = 4;

/// A claim of a manifest that cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidManifest {
    /// Files, counts or names do not fit together.
    #[error("{0}")]
    Structure(String),
    /// A tensor's slices leave a hole, overlap, or are not where they are said to be.
    #[error("tensor `{tensor}`: {problem}")]
    Cover {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// The tensors and counters are not the state that the writers digested.
    #[error("tensors and counters have state digest {computed}, the writers reported {reported}")]
    StateDigest {
        /// Digest that follows from the tensors and counters.
        computed: Hex64,
        /// Digest that the manifest carries.
        reported: Hex64,
    },
}

type Check = Result<(), InvalidManifest>;

pub(super) fn check(manifest: &Manifest) -> Check {
    check_files(manifest)?;
    for (name, tensor) in &manifest.tensors {
        check_cover(manifest, tensor)
            .map_err(|problem| InvalidManifest::Cover { tensor: name.clone(), problem })?;
    }
    check_places(manifest)?;
    check_state(manifest)
}

fn ensure(holds: bool, problem: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(InvalidManifest::Structure(problem())) }
}

fn check_files(manifest: &Manifest) -> Check {
    let Manifest { world_size, files, attempt, generation, partition, .. } = manifest;
    ensure(partition == PARTITION, || {
        format!("partition `{}` is unknown", partition.escape_debug())
    })?;
    ensure(files.len() == *world_size as usize && *world_size > 0, || {
        format!("{} files for {world_size} writers", files.len())
    })?;
    ensure(attempt.generation.0 == *generation, || {
        format!("attempt {attempt} is not of generation {generation}")
    })?;
    for (rank, file) in (0u32..).zip(files) {
        let want = PartId { rank, world: *world_size }.file_name();
        ensure(file.name == want, || {
            format!("file {rank} is named `{}`, not `{want}`", file.name.escape_debug())
        })?;
        check_blocks(file)?;
    }
    Ok(())
}

fn check_blocks(file: &FileEntry) -> Check {
    let name = &file.name;
    ensure((1..=BLOCK_BYTES_MAX).contains(&file.block), || {
        format!("`{name}` has digest blocks of {} bytes", file.block)
    })?;
    ensure(file.block.is_multiple_of(ELEMENT_BYTES), || {
        format!("`{name}` has digest blocks of {} bytes, which cut elements", file.block)
    })?;
    let n_blocks = file.bytes.div_ceil(file.block);
    ensure(file.blocks.len() as u64 == n_blocks, || {
        format!("`{name}` has {} block digests for {n_blocks} blocks", file.blocks.len())
    })?;
    let whole = (0u64..).zip(&file.blocks).fold(Crc64::default(), |sum, (idx, value)| {
        let range = file.block_range(idx);
        sum.then(Crc64 { value: value.0, bytes: range.end - range.start })
    });
    ensure(whole.value == file.crc64.0, || {
        format!("`{name}` has CRC {}, its blocks {}", file.crc64, Hex64(whole.value))
    })
}

/// Returns the elements of a shape, if their bytes can be counted.
fn numel(tensor: &TensorEntry) -> Option<u64> {
    let numel = tensor.shape.iter().try_fold(1u64, |n, side| n.checked_mul(*side))?;
    numel.checked_mul(tensor.dtype.bytes()).map(|_| numel)
}

fn check_cover(manifest: &Manifest, tensor: &TensorEntry) -> Result<(), String> {
    let numel = numel(tensor).ok_or_else(|| format!("shape {:?} is too large", tensor.shape))?;
    let mut next: u64 = 0;
    let mut whole = Crc64::default();
    for slice in &tensor.slices {
        let ([start, end], [from, to]) = (slice.range, slice.at);
        if start != next {
            let what = if start > next { "no file has" } else { "more than one file has" };
            return Err(format!("{what} elements {}..{}", start.min(next), start.max(next)));
        }
        if end < start || end > numel || (end == start && numel > 0) {
            return Err(format!("elements {start}..{end} are not a range of {numel}"));
        }
        let file = manifest.files.get(slice.file as usize);
        let file = file.ok_or_else(|| format!("there is no file {}", slice.file))?;
        let bytes = (end - start) * tensor.dtype.bytes();
        let is_aligned = from.is_multiple_of(tensor.dtype.bytes().min(ELEMENT_BYTES));
        if from.checked_add(bytes) != Some(to) || to > file.bytes || !is_aligned {
            return Err(format!(
                "elements {start}..{end} cannot be bytes {from}..{to} of `{}`",
                file.name
            ));
        }
        whole = whole.then(Crc64 { value: slice.crc64.0, bytes });
        next = end;
    }
    if next != numel {
        return Err(format!("no file has elements {next}..{numel}"));
    }
    if whole.value != tensor.crc64.0 {
        return Err(format!("CRC is {}, that of its slices {}", tensor.crc64, Hex64(whole.value)));
    }
    Ok(())
}

/// Checks that no two slices claim the same bytes of a file.
fn check_places(manifest: &Manifest) -> Check {
    let mut places: Vec<(u32, [u64; 2], &str)> = Vec::new();
    for (name, tensor) in &manifest.tensors {
        let real = tensor.slices.iter().filter(|slice| slice.at[0] < slice.at[1]);
        places.extend(real.map(|slice| (slice.file, slice.at, name.as_str())));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let (&(file, a, name), &(next_file, b, next)) = (&pair[0], &pair[1]);
        ensure(file != next_file || a[1] <= b[0], || {
            format!("`{name}` and `{next}` share bytes {}..{} of file {file}", b[0], a[1].min(b[1]))
        })?;
    }
    Ok(())
}

fn check_state(manifest: &Manifest) -> Check {
    let counters = &manifest.state.counters;
    ensure(counters.step == manifest.step, || {
        format!("counters are of step {}, not {}", counters.step, manifest.step)
    })?;
    let prefix = format!("{}/", Section::Param.prefix());
    let names: Vec<&str> =
        manifest.tensors.keys().filter_map(|name| name.strip_prefix(&prefix)).collect();
    let mut digests: Vec<TensorDigests> = Vec::new();
    for name in &names {
        digests.push(section_digests(manifest, name)?);
    }
    check_n_exponents(manifest, &names)?;
    check_exponents(manifest)?;
    let (computed, reported) = (Hex64(state_digest(&digests, counters)), manifest.state_digest);
    if computed == reported {
        return Ok(());
    }
    Err(InvalidManifest::StateDigest { computed, reported })
}

/// Returns the digests of a parameter's three sections, which must have one shape.
fn section_digests(manifest: &Manifest, name: &str) -> Result<TensorDigests, InvalidManifest> {
    let mut out = TensorDigests::default();
    let mut shape: Option<&Vec<u64>> = None;
    for (digest, section) in out.iter_mut().zip(Section::ALL) {
        let full = format!("{}/{name}", section.prefix());
        let Some(tensor) = manifest.tensors.get(&full) else {
            return Err(InvalidManifest::Structure(format!("there is no tensor `{full}`")));
        };
        let same = shape.is_none_or(|shape| *shape == tensor.shape);
        ensure(same && tensor.dtype == Dtype::F32, || {
            format!("`{full}` is {} {:?}", tensor.dtype.name(), tensor.shape)
        })?;
        shape = Some(&tensor.shape);
        let bytes: u64 = tensor.slices.iter().map(|slice| slice.at[1] - slice.at[0]).sum();
        *digest = Crc64 { value: tensor.crc64.0, bytes };
    }
    Ok(out)
}

/// Checks that there is an exponent for each parameter, or for each chunk of each parameter.
fn check_n_exponents(manifest: &Manifest, names: &[&str]) -> Check {
    let n = manifest.state.counters.exponents.len();
    let chunks = |name: &&str| {
        let shape = &manifest.tensors[&format!("{}/{name}", Section::Param.prefix())].shape;
        let numel = shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size));
        numel.map_or(u64::MAX, |numel| numel.div_ceil(CHUNK_32 as u64))
    };
    let n_chunks = names.iter().map(chunks).fold(0, u64::saturating_add);
    ensure(n == names.len() || n as u64 == n_chunks, || {
        format!("{n} exponents for {} parameters of {n_chunks} chunks", names.len())
    })
}

/// Checks that the tensor of exponents holds what the counters say.
fn check_exponents(manifest: &Manifest) -> Check {
    let counters = &manifest.state.counters;
    let Some(tensor) = manifest.tensors.get(EXPONENTS) else {
        return Err(InvalidManifest::Structure(format!("there is no tensor `{EXPONENTS}`")));
    };
    let bytes: Vec<u8> = counters.exponents.iter().flat_map(|e| e.to_le_bytes()).collect();
    let same = tensor.dtype == Dtype::I32
        && tensor.shape == [counters.exponents.len() as u64]
        && tensor.crc64.0 == Crc64::of(&bytes).value;
    ensure(same, || format!("`{EXPONENTS}` and the counters differ"))
}
