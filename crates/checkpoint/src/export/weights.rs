//! Tensors of a checkpoint streamed into a safetensors file.

use std::borrow::Cow;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use lacuna_recipe::state::Section;

use super::{ExportDtype, ExportError, ExportOptions, Item, Source};
use crate::disk::{self, Partial};
use crate::header::{self, HeaderTensor};
use crate::import::{ABOUT_KEY, About};
use crate::layout::RunDir;
use crate::manifest::Manifest;
use crate::read::{self, Reader, Wanted};

/// Bytes gathered before a write.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Elements in memory at a time, 16 MiB: two blocks of a part, so that few are read twice.
const PIECE_ELEMENTS: u64 = 4 << 20;

/// Writes files of one export.
pub(super) struct Writer<'a> {
    manifest: &'a Manifest,
    dtype: ExportDtype,
    /// What the files say of the model, JSON.
    about: String,
    /// Names of the classes, a JSON array; nothing where they are unknown.
    classes: Option<String>,
    reader: Reader<'a>,
}

impl<'a> Writer<'a> {
    /// Writes tensors of one checkpoint; the files say `about` of the model.
    pub fn new(
        dir: &'a RunDir,
        manifest: &'a Manifest,
        options: &ExportOptions,
        about: &About,
    ) -> Self {
        let about = serde_json::to_string(about).expect("numbers and names are JSON");
        let names = |names| serde_json::to_string(names).expect("text is JSON");
        let classes = (!options.classes.is_empty()).then(|| names(&options.classes));
        Writer {
            manifest,
            dtype: options.dtype,
            about,
            classes,
            reader: Reader::new(dir, manifest),
        }
    }

    /// Writes `items` into a file that does not have its name yet; returns it and its digest.
    pub fn write(&mut self, items: &[Item], path: &Path) -> Result<(Partial, String), ExportError> {
        let head = self.head(items);
        let width = self.dtype.bytes();
        disk::remove_stale_partial(path)?;
        let partial = Partial::create(path)?;
        let bytes = items.iter().map(|item| item.numel() * width).sum::<u64>();
        partial.reserve(head.len() as u64 + bytes)?;
        let failed = |e: std::io::Error| partial.error("write", e);
        let mut hasher = blake3::Hasher::new();
        let mut file = BufWriter::with_capacity(WRITE_BUFFER_BYTES, partial.writer());
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            file.write_all(bytes).map_err(failed)
        };
        put(&head)?;
        for item in items {
            for start in (0..item.numel()).step_by(PIECE_ELEMENTS as usize) {
                let piece = start..item.numel().min(start + PIECE_ELEMENTS);
                let values = self.read(item, piece)?;
                match self.dtype {
                    ExportDtype::F32 => put(bytemuck::cast_slice(&values))?,
                    ExportDtype::Bf16 => {
                        let rounded: Vec<u16> = values.iter().map(|x| bf16(*x)).collect();
                        put(bytemuck::cast_slice(&rounded))?;
                    }
                }
            }
        }
        file.flush().map_err(failed)?;
        drop(file);
        Ok((partial, format!("blake3:{}", hasher.finalize().to_hex())))
    }

    fn head(&self, items: &[Item]) -> Vec<u8> {
        let tensor = |item: &Item| HeaderTensor {
            name: item.name.clone(),
            dtype: self.dtype.name(),
            shape: item.shape.clone(),
            bytes: item.numel() * self.dtype.bytes(),
        };
        let tensors: Vec<HeaderTensor> = items.iter().map(tensor).collect();
        let step = self.manifest.step.to_string();
        let mut metadata = vec![
            // Readers of PyTorch models refuse files without it.
            ("format", "pt"),
            ("lacuna.manifest", self.manifest.seal.as_str()),
            (ABOUT_KEY, self.about.as_str()),
            ("lacuna.run", self.manifest.run.as_str()),
            ("lacuna.step", step.as_str()),
        ];
        metadata.extend(self.classes.as_deref().map(|classes| ("lacuna.classes", classes)));
        header::render(&metadata, &tensors)
    }

    /// Reads elements `piece` of an item.
    fn read<'b>(
        &mut self,
        item: &'b Item,
        piece: Range<u64>,
    ) -> Result<Cow<'b, [f32]>, ExportError> {
        if let Source::Table(table) = &item.source {
            return Ok(Cow::Borrowed(&table[piece.start as usize..piece.end as usize]));
        }
        let tensor = format!("{}/{}", Section::Param.prefix(), item.ours);
        let mut values: Vec<f32> = vec![0.0; (piece.end - piece.start) as usize];
        let range = item.elements.start + piece.start..item.elements.start + piece.end;
        let ops = read::plan(self.manifest, &[Wanted { tensor, range }])?;
        self.reader.read_into(&ops, &mut [bytemuck::cast_slice_mut(&mut values)])?;
        Ok(Cow::Owned(values))
    }
}

/// Rounds to bfloat16, ties to even; a NaN stays one.
pub(super) fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let tie = (bits >> 16) & 1;
    // Values beyond the largest bfloat16 become infinite; the sum cannot leave 32 bits.
    ((bits + 0x7fff + tie) >> 16) as u16
}
