//! A run's state as named byte slices: what a rank writes, taken from views or from a snapshot.

use std::borrow::Cow;
use std::ops::Range;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::{Counters, Layout, Section, TensorDigests, state_digest};
use serde::{Deserialize, Serialize};

use crate::partition::{Partition, assign_leftovers};

const _: () = assert!(cfg!(target_endian = "little"), "files hold little-endian numbers");

/// Name of the tensor that holds the fixed-point exponents.
pub const EXPONENTS: &str = "reduce.exponents";
/// Name of the encoder's position table.
pub const POS_EMBED: &str = "buffer/pos_embed";
/// Name of the decoder's position table.
pub const DECODER_POS_EMBED: &str = "buffer/decoder_pos_embed";

/// Element type of a tensor, under the names of safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Byte.
    U8,
}

impl Dtype {
    /// Returns the bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::I64 => 8,
            Dtype::U8 => 1,
        }
    }

    /// Returns the name in files.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::I32 => "I32",
            Dtype::I64 => "I64",
            Dtype::U8 => "U8",
        }
    }
}

/// A slice that one rank writes: a range of elements of a logical tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSlice {
    /// Name of the logical tensor, `param/…`, `adamw.exp_avg/…` and so on.
    pub tensor: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of the whole tensor.
    pub shape: Vec<u64>,
    /// Elements in row-major order.
    pub range: Range<u64>,
    /// Where the elements come from.
    pub origin: Origin,
}

impl PartSlice {
    /// Returns the size of the slice in bytes.
    pub fn bytes(&self) -> u64 {
        (self.range.end - self.range.start) * self.dtype.bytes()
    }
}

/// Where the elements of a slice come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// One of the flat buffers: section and tensor of the layout.
    Flat(Section, usize),
    /// One of the tensors written whole, by its place in the list.
    Leftover(usize),
}

/// A tensor that one rank writes whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftoverSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
}

impl LeftoverSpec {
    fn numel(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Lists what `rank` writes, sorted by name: three sections of its range, and its leftovers.
pub fn plan_part(
    layout: &Layout,
    partition: &Partition,
    leftovers: &[LeftoverSpec],
    rank: u32,
) -> Vec<PartSlice> {
    let mut out: Vec<PartSlice> = Vec::new();
    for section in Section::ALL {
        out.extend(partition.rank_slices(rank).iter().map(|slice| {
            let param = &layout.params()[slice.block];
            PartSlice {
                tensor: format!("{}/{}", section.prefix(), param.name),
                dtype: Dtype::F32,
                shape: param.shape.iter().map(|&n| n as u64).collect(),
                range: slice.range.start as u64..slice.range.end as u64,
                origin: Origin::Flat(section, slice.block),
            }
        }));
    }
    let bytes: Vec<u64> = leftovers.iter().map(|l| l.numel() * l.dtype.bytes()).collect();
    let ranks = assign_leftovers(&bytes, partition.world());
    for (place, leftover) in leftovers.iter().enumerate().filter(|(i, _)| ranks[*i] == rank) {
        out.push(PartSlice {
            tensor: leftover.name.clone(),
            dtype: leftover.dtype,
            shape: leftover.shape.clone(),
            range: 0..leftover.numel(),
            origin: Origin::Leftover(place),
        });
    }
    out.sort_by(|a, b| a.tensor.cmp(&b.tensor));
    out
}

/// A slice together with its little-endian bytes.
#[derive(Clone, Debug)]
pub struct NamedSlice<'a> {
    /// What it is.
    pub spec: PartSlice,
    /// Its content, `spec.bytes()` long.
    pub bytes: &'a [u8],
}

/// A whole replicated state, borrowed.
#[derive(Clone, Debug)]
pub struct StateView<'a> {
    layout: &'a Layout,
    sections: [&'a [f32]; 3],
    specs: Vec<LeftoverSpec>,
    leftovers: Vec<Cow<'a, [u8]>>,
}

impl<'a> StateView<'a> {
    /// Views flat sections in [`Section::ALL`] order; the exponents become a leftover.
    pub fn new(layout: &'a Layout, sections: [&'a [f32]; 3], counters: &'a Counters) -> Self {
        let fits = sections.iter().all(|section| section.len() == layout.numel());
        assert!(fits, "one element per place of the layout");
        StateView { sections, ..StateView::leftovers_of(layout, counters) }
    }

    /// Views what is not in the flat sections; for a caller that copies those itself.
    pub fn leftovers_of(layout: &'a Layout, counters: &'a Counters) -> Self {
        let sections: [&[f32]; 3] = [&[], &[], &[]];
        let n = counters.exponents.len();
        let view = StateView { layout, sections, specs: Vec::new(), leftovers: Vec::new() };
        let spec =
            LeftoverSpec { name: EXPONENTS.to_string(), dtype: Dtype::I32, shape: vec![n as u64] };
        view.with_leftover(spec, Cow::Borrowed(bytemuck::cast_slice(&counters.exponents)))
    }

    /// Adds a tensor that one rank writes whole.
    pub fn with_leftover(mut self, spec: LeftoverSpec, bytes: Cow<'a, [u8]>) -> Self {
        let want = spec.numel() * spec.dtype.bytes();
        assert_eq!(bytes.len() as u64, want, "bytes of `{}`", spec.name);
        self.specs.push(spec);
        self.leftovers.push(bytes);
        self
    }

    /// Adds the two position tables of a model.
    pub fn with_tables(self, config: &ModelConfig) -> Self {
        let tables = [(POS_EMBED, config.width), (DECODER_POS_EMBED, config.decoder_width)];
        tables.into_iter().fold(self, |view, (name, width)| {
            let table = sincos_2d(width as usize, config.grid());
            let shape = vec![1, config.n_patches() as u64 + 1, u64::from(width)];
            let spec = LeftoverSpec { name: name.to_string(), dtype: Dtype::F32, shape };
            view.with_leftover(spec, Cow::Owned(bytemuck::cast_slice(&table).to_vec()))
        })
    }

    /// Returns the tensors that are written whole.
    pub fn leftovers(&self) -> &[LeftoverSpec] {
        &self.specs
    }

    /// Returns the bytes of leftover number `place`, in the order of [`StateView::leftovers`].
    pub fn leftover_bytes(&self, place: usize) -> &[u8] {
        &self.leftovers[place]
    }

    /// Returns what `rank` writes, with its bytes.
    pub fn part(&self, partition: &Partition, rank: u32) -> Vec<NamedSlice<'_>> {
        let specs = plan_part(self.layout, partition, &self.specs, rank);
        specs.into_iter().map(|spec| NamedSlice { bytes: self.bytes(&spec), spec }).collect()
    }

    fn bytes(&self, slice: &PartSlice) -> &[u8] {
        let (start, end) = (slice.range.start as usize, slice.range.end as usize);
        match slice.origin {
            Origin::Flat(section, block) => {
                let at = self.layout.range(block).start;
                bytemuck::cast_slice(&self.sections[section as usize][at + start..at + end])
            }
            Origin::Leftover(place) => {
                let width = slice.dtype.bytes() as usize;
                &self.leftovers[place][start * width..end * width]
            }
        }
    }
}

/// Computes the digest of a state from its flat sections.
pub fn digest_state(layout: &Layout, sections: [&[f32]; 3], counters: &Counters) -> u64 {
    let of_tensor = |block: usize| -> TensorDigests {
        sections.map(|section| Crc64::of_f32(&section[layout.range(block)]))
    };
    let tensors: Vec<TensorDigests> = (0..layout.n_blocks()).map(of_tensor).collect();
    state_digest(&tensors, counters)
}

/// Memory that holds a rank's slices while training goes on; allocated once, filled per checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    specs: Vec<PartSlice>,
    starts: Vec<usize>,
    bytes: Vec<u8>,
}

impl Snapshot {
    /// Makes room for `specs`; memory that is already there is used again.
    pub fn prepare(&mut self, specs: Vec<PartSlice>) {
        self.starts.clear();
        let mut end: usize = 0;
        for spec in &specs {
            self.starts.push(end);
            end += spec.bytes() as usize;
        }
        self.starts.push(end);
        self.specs = specs;
        self.bytes.resize(end, 0);
    }

    /// Copies slices in.
    pub fn take(&mut self, slices: &[NamedSlice<'_>]) {
        self.prepare(slices.iter().map(|slice| slice.spec.clone()).collect());
        for (i, slice) in slices.iter().enumerate() {
            self.bytes_mut(i).copy_from_slice(slice.bytes);
        }
    }

    /// Returns the slices that the memory holds.
    pub fn specs(&self) -> &[PartSlice] {
        &self.specs
    }

    /// Returns the place of slice `i`, for whoever copies from a device.
    pub fn bytes_mut(&mut self, i: usize) -> &mut [u8] {
        &mut self.bytes[self.starts[i]..self.starts[i + 1]]
    }

    /// Returns the slices with their content.
    pub fn slices(&self) -> Vec<NamedSlice<'_>> {
        let places = self.specs.iter().zip(self.starts.windows(2));
        let slice = |(spec, at): (&PartSlice, &[usize])| NamedSlice {
            spec: spec.clone(),
            bytes: &self.bytes[at[0]..at[1]],
        };
        places.map(slice).collect()
    }
}
