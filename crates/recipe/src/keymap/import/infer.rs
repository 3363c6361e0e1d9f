//! The sizes of a model that a file was written from, as far as its tensors show them.

use super::{Foreign, Form, MapError, ours, recognise, shown};

/// Sizes of an encoder, and of a decoder if there is one. Attention heads cannot be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inferred {
    /// What the file was recognised as.
    pub form: Form,
    /// Side of a square patch.
    pub patch_size: u32,
    /// Image channels.
    pub channels: u32,
    /// Encoder width.
    pub width: u32,
    /// Encoder blocks.
    pub depth: u32,
    /// Hidden width of an MLP as a multiple of the encoder's width.
    pub mlp_ratio: u32,
    /// Rows of the encoder's position table: one a patch, and one for the class token.
    pub table_rows: Option<u64>,
    /// Width and blocks of the decoder.
    pub decoder: Option<[u32; 2]>,
}

/// What tensors show, one after another.
#[derive(Default)]
struct Seen {
    projection: Option<[u64; 4]>,
    hidden: Option<u64>,
    table_rows: Option<u64>,
    decoder_width: Option<u64>,
    depth: u64,
    decoder_depth: u64,
}

impl Seen {
    fn see(&mut self, name: &str, shape: &[u64]) {
        match (name, shape) {
            ("patch_embed.proj.weight", &[d, c, p, q]) => self.projection = Some([d, c, p, q]),
            ("pos_embed", &[1, rows, _]) => self.table_rows = Some(rows),
            ("decoder_embed.weight", &[width, _]) => self.decoder_width = Some(width),
            _ => {}
        }
        if let (true, &[hidden, _]) = (name == "blocks.0.mlp.fc1.weight", shape) {
            self.hidden = Some(hidden);
        }
        for (prefix, depth) in
            [("blocks.", &mut self.depth), ("decoder_blocks.", &mut self.decoder_depth)]
        {
            let rest = name.strip_prefix(prefix).and_then(|rest| rest.split_once('.'));
            if let Some(number) = rest.and_then(|(block, _)| block.parse::<u64>().ok()) {
                *depth = (*depth).max(number.saturating_add(1));
            }
        }
    }
}

/// Reads the sizes of a model out of the shapes of its tensors.
///
/// Whether the tensors fit each other is for [`plan`](super::plan) to say; sizes are not bounded
/// here either.
pub fn infer(tensors: &[Foreign<'_>]) -> Result<Inferred, MapError> {
    let form = recognise(tensors)?;
    let mut seen = Seen::default();
    for tensor in tensors {
        if let Some(mapped) = ours(tensor.name) {
            seen.see(&mapped.name, tensor.shape);
        }
    }
    let mut differences: Vec<String> = Vec::new();
    let mut number = |what: &str, value: Option<u64>| -> u32 {
        match value.map(u32::try_from) {
            Some(Ok(value)) => return value,
            Some(Err(_)) => differences.push(format!("{what} is too large")),
            None => differences.push(format!("{what} cannot be told: its tensor is missing")),
        }
        0
    };
    let projection = seen.projection;
    let out = Inferred {
        form,
        patch_size: number("the patch size", projection.map(|p| p[2])),
        channels: number("the number of channels", projection.map(|p| p[1])),
        width: number("the width", projection.map(|p| p[0])),
        depth: number("the number of blocks", Some(seen.depth).filter(|&depth| depth > 0)),
        mlp_ratio: number("the width of the MLP", seen.hidden),
        table_rows: seen.table_rows,
        decoder: match (seen.decoder_width, seen.decoder_depth) {
            (None, 0) => None,
            (width, depth) => Some([
                number("the decoder's width", width),
                number("the number of the decoder's blocks", Some(depth)),
            ]),
        },
    };
    if let Some([_, _, p, q]) = projection.filter(|[_, _, p, q]| p != q) {
        differences.push(format!("patches of {p}x{q} pixels are not square"));
    }
    if differences.is_empty() && (out.width == 0 || !out.mlp_ratio.is_multiple_of(out.width)) {
        let Inferred { mlp_ratio: hidden, width, .. } = out;
        differences.push(format!("an MLP of {hidden} is not a multiple of the width {width}"));
    }
    match differences.is_empty() {
        true => Ok(Inferred { mlp_ratio: out.mlp_ratio / out.width, ..out }),
        false => Err(MapError::Differences {
            differences: differences.iter().map(|text| shown(text)).collect(),
        }),
    }
}
