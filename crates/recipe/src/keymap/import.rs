//! What a file of another library gives of a model's parameters: every tensor has its place, or
//! every difference is named.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

mod infer;

pub use infer::{Inferred, infer};

use super::{ENCODER_PREFIX, HfNames, Mapped, Part, RESAVED_DECODER, hf, ours};
use crate::model::ModelConfig;
use crate::state::Layout;

/// Element types that can be widened to f32, under the names of safetensors.
pub const DTYPES: [&str; 3] = ["F32", "BF16", "F16"];

/// What timm calls the last norm of a model that averages its patches.
const POOLED_NORM: &str = "fc_norm.";
/// The classifier of a model that was fine-tuned, under timm's names.
const HEADS: [&str; 1] = ["head."];
/// What transformers' `ViTForImageClassification` and `ViTModel` have behind their encoder.
const HF_HEADS: [&str; 3] = ["classifier.", "pooler.", "vit.pooler."];
/// Keys shown of a file that is no masked autoencoder.
const EXAMPLES: usize = 3;

/// A tensor as a file describes it.
#[derive(Clone, Copy, Debug)]
pub struct Foreign<'a> {
    /// Its key.
    pub name: &'a str,
    /// Element type, under the name of safetensors.
    pub dtype: &'a str,
    /// Shape.
    pub shape: &'a [u64],
}

/// Which layout a file must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Any that is known.
    Any,
    /// The reference's names, with or without a decoder.
    Mae,
    /// timm's names, without a decoder.
    Timm,
    /// Hugging Face's names of any generation.
    Hf,
}

/// What a file was recognised as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The reference's names, with a decoder.
    Mae,
    /// The reference's or timm's names, which are the same for the encoder alone.
    Timm,
    /// Names of transformers 4.x, or what 5.x writes.
    Hf4,
    /// Names that transformers 5.x holds in memory.
    Hf5,
    /// What transformers 5.23 writes when it saves: names of 4.x with another decoder.
    HfResaved,
    /// Names of a `ViTMAEModel` or `ViTModel` alone.
    HfEncoder,
}

impl Form {
    fn is_hf(self) -> bool {
        !matches!(self, Form::Mae | Form::Timm)
    }

    fn suits(self, wanted: Wanted) -> bool {
        match wanted {
            Wanted::Any => true,
            Wanted::Mae => !self.is_hf(),
            Wanted::Timm => self == Form::Timm,
            Wanted::Hf => self.is_hf(),
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::Mae => "the reference's names, with a decoder",
            Form::Timm => "the names of timm and the reference, the encoder alone",
            Form::Hf4 => "Hugging Face's names (transformers 4)",
            Form::Hf5 => "Hugging Face's names (transformers 5 in memory)",
            Form::HfResaved => "Hugging Face's names (as transformers 5 saves again)",
            Form::HfEncoder => "Hugging Face's names (ViTMAEModel or ViTModel alone)",
        })
    }
}

/// Where elements of one of our tensors come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Take {
    /// Key in the file; all of its elements are taken.
    pub source: String,
    /// Our tensor, by its place in the layout.
    pub block: usize,
    /// Elements of our tensor.
    pub elements: Range<usize>,
}

/// A position table that a file has. It is compared with ours and never taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Key in the file.
    pub source: String,
    /// Our name: `pos_embed` or `decoder_pos_embed`.
    pub ours: &'static str,
    /// Elements of a row.
    pub width: usize,
    /// Rows in the file.
    pub rows: u64,
    /// Whether that is one for each of this model's patches and one for the class token.
    pub fits: bool,
}

/// What a file gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What it was recognised as.
    pub form: Form,
    /// What is taken, in the order of our tensors.
    pub takes: Vec<Take>,
    /// The decoder's tensors, by their place in the layout, if the file has none of them.
    pub seeded: Vec<usize>,
    /// Position tables of the file.
    pub tables: Vec<Table>,
    /// Keys that are no part of the model and are left out: a classifier's, a pooler's.
    pub ignored: Vec<String>,
}

/// A file that does not give this model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// No key is known.
    #[error(
        "no key is one of a masked autoencoder's in the layouts mae, timm and hf; the file has {}",
        if examples.is_empty() { "none" } else { examples.as_str() }
    )]
    Unknown {
        /// Some of its keys.
        examples: String,
    },
    /// Keys of two libraries.
    #[error("`{reference}` is a key of the reference or timm, `{hf}` one of Hugging Face's")]
    Mixed {
        /// One of the first.
        reference: String,
        /// One of the second.
        hf: String,
    },
    /// The layout is known and not the one asked for.
    #[error("the file has {found}")]
    OtherLayout {
        /// What it has.
        found: Form,
    },
    /// The layout is known and the tensors are not this model's.
    #[error("{}", differences.join("\n  "))]
    Differences {
        /// All of them.
        differences: Vec<String>,
    },
}

/// Finds the place of every tensor of a file in the model.
pub fn plan(
    config: &ModelConfig,
    tensors: &[Foreign<'_>],
    wanted: Wanted,
) -> Result<Plan, MapError> {
    let form = recognise(tensors)?;
    if !form.suits(wanted) {
        return Err(MapError::OtherLayout { found: form });
    }
    let layout = Layout::new(config.params());
    let pooled = form == Form::Timm && wanted != Wanted::Mae;
    let heads: &[&str] = match pooled {
        true => &HEADS,
        false if form.is_hf() && !decodes(tensors) => &HF_HEADS,
        false => &[],
    };
    let mut planner = Planner {
        config,
        layout: &layout,
        pooled,
        heads,
        taken: BTreeMap::new(),
        out: Plan {
            form,
            takes: Vec::new(),
            seeded: Vec::new(),
            tables: Vec::new(),
            ignored: Vec::new(),
        },
        differences: Vec::new(),
    };
    tensors.iter().for_each(|tensor| planner.place(tensor));
    planner.finish()
}

/// Tells one of our names from its Hugging Face spelling: `None` for keys that are neither.
fn is_hf_name(name: &str) -> Option<bool> {
    match hf(name, HfNames::V4) {
        Some(_) => Some(false),
        None => ours(name).map(|_| true),
    }
}

fn recognise(tensors: &[Foreign<'_>]) -> Result<Form, MapError> {
    let known = |wanted: bool| {
        tensors.iter().map(|t| t.name).filter(move |name| is_hf_name(name) == Some(wanted))
    };
    match (known(false).next(), known(true).next()) {
        (Some(reference), Some(hf)) => {
            let (reference, hf) = (shown(reference), shown(hf));
            Err(MapError::Mixed { reference, hf })
        }
        (Some(_), None) => Ok(if decodes(tensors) { Form::Mae } else { Form::Timm }),
        (None, Some(_)) => Ok(hf_form(&known(true).collect::<Vec<&str>>())),
        (None, None) => {
            let some = tensors.iter().take(EXAMPLES).map(|t| format!("`{}`", shown(t.name)));
            let more = if tensors.len() > EXAMPLES { ", …" } else { "" };
            let examples = some.collect::<Vec<String>>().join(", ") + more;
            Err(MapError::Unknown { examples })
        }
    }
}

fn hf_form(names: &[&str]) -> Form {
    let any = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    if any(&|name| name.starts_with(RESAVED_DECODER)) {
        Form::HfResaved
    } else if !any(&|name| name.starts_with(ENCODER_PREFIX) || name.starts_with("decoder.")) {
        Form::HfEncoder
    } else if any(&|name| name.contains(".q_proj.") || name.starts_with("vit.layers.")) {
        Form::Hf5
    } else {
        Form::Hf4
    }
}

/// Tells whether a file has a decoder; a position table alone is none.
fn decodes(tensors: &[Foreign<'_>]) -> bool {
    let is_of_decoder = |name: &str| is_decoder(name) && name != "decoder_pos_embed";
    tensors.iter().filter_map(|t| ours(t.name)).any(|mapped| is_of_decoder(&mapped.name))
}

/// Tells whether one of our names is the decoder's.
fn is_decoder(ours: &str) -> bool {
    ours == "mask_token" || ours.starts_with("decoder_")
}

/// Makes a name from a file fit for a message.
fn shown(name: &str) -> String {
    name.escape_debug().to_string()
}

struct Planner<'a> {
    config: &'a ModelConfig,
    layout: &'a Layout,
    /// Whether `fc_norm` is the last norm.
    pooled: bool,
    /// How the keys begin that are left out.
    heads: &'a [&'a str],
    /// Which key gives which part of which of our tensors.
    taken: BTreeMap<(usize, Part), String>,
    out: Plan,
    differences: Vec<String>,
}

impl Planner<'_> {
    fn place(&mut self, tensor: &Foreign<'_>) {
        let name = tensor.name;
        if self.heads.iter().any(|head| name.starts_with(head)) {
            self.out.ignored.push(name.to_string());
            return;
        }
        let pooled = name.strip_prefix(POOLED_NORM).filter(|_| self.pooled);
        let mapped = match pooled {
            Some(leaf) => ours(&format!("norm.{leaf}")),
            None => ours(name),
        };
        let Some(mapped) = mapped else {
            return self.differ(tensor, "is not of a masked autoencoder");
        };
        match mapped.name.as_str() {
            "pos_embed" => self.table(tensor, "pos_embed", self.config.width),
            "decoder_pos_embed" => {
                self.table(tensor, "decoder_pos_embed", self.config.decoder_width);
            }
            _ => self.take(tensor, &mapped),
        }
    }

    fn take(&mut self, tensor: &Foreign<'_>, mapped: &Mapped) {
        let Some(block) = self.layout.find(&mapped.name) else {
            return self
                .differ(tensor, &format!("is not in this model{}", ours_is(tensor, mapped)));
        };
        let mut shape: Vec<u64> =
            self.layout.params()[block].shape.iter().map(|&n| n as u64).collect();
        let rows = mapped.part.rows(shape[0] as usize);
        let row_elements: u64 = shape[1..].iter().product();
        shape[0] = rows.len() as u64;
        if tensor.shape != shape {
            let text = format!("is not {shape:?}{}", ours_is(tensor, mapped));
            self.differ(tensor, &text);
        }
        self.check_dtype(tensor);
        if let Some(other) = self.taken.insert((block, mapped.part), tensor.name.to_string()) {
            let text = format!("gives the same as `{}`{}", shown(&other), ours_is(tensor, mapped));
            self.differ(tensor, &text);
        }
        let row_elements = row_elements as usize;
        self.out.takes.push(Take {
            source: tensor.name.to_string(),
            block,
            elements: rows.start * row_elements..rows.end * row_elements,
        });
    }

    fn table(&mut self, tensor: &Foreign<'_>, ours: &'static str, width: u32) {
        if self.out.tables.iter().any(|table| table.ours == ours) {
            return self.differ(tensor, &format!("is a second `{ours}`"));
        }
        let rows = match tensor.shape {
            [1, rows, columns] if *columns == u64::from(width) => *rows,
            _ => return self.differ(tensor, &format!("is not [1, any, {width}], our `{ours}`")),
        };
        self.check_dtype(tensor);
        let fits = rows == self.config.n_patches() as u64 + 1;
        let source = tensor.name.to_string();
        self.out.tables.push(Table { source, ours, width: width as usize, rows, fits });
    }

    fn check_dtype(&mut self, tensor: &Foreign<'_>) {
        if !DTYPES.contains(&tensor.dtype) {
            let text = format!("is {}, not {}", shown(tensor.dtype), DTYPES.join(", "));
            self.differences.push(format!("`{}` {text}", shown(tensor.name)));
        }
    }

    fn differ(&mut self, tensor: &Foreign<'_>, text: &str) {
        self.differences.push(format!("`{}` {:?} {text}", shown(tensor.name), tensor.shape));
    }

    /// Lists what is missing; a decoder may be, if all of it is.
    fn finish(mut self) -> Result<Plan, MapError> {
        let given: BTreeSet<usize> = self.taken.keys().map(|(block, _)| *block).collect();
        let params = self.layout.params();
        let has_decoder = given.iter().any(|&block| is_decoder(&params[block].name));
        for (block, param) in params.iter().enumerate() {
            if is_decoder(&param.name) && !has_decoder {
                self.out.seeded.push(block);
                continue;
            }
            for (key, part) in self.spelled(&param.name) {
                let whole = self.taken.contains_key(&(block, Part::Whole));
                if whole || self.taken.contains_key(&(block, part)) {
                    continue;
                }
                let mapped = Mapped { name: param.name.clone(), part };
                let ours = ours_is_of(&key, &mapped);
                self.differences.push(format!("`{key}` is missing{ours}"));
            }
        }
        if !self.differences.is_empty() {
            return Err(MapError::Differences { differences: self.differences });
        }
        self.out.takes.sort_by_key(|take| (take.block, take.elements.start));
        Ok(self.out)
    }

    /// Spells one of our names as the file does.
    fn spelled(&self, ours: &str) -> Vec<(String, Part)> {
        let form = self.out.form;
        if !form.is_hf() {
            return vec![(ours.to_string(), Part::Whole)];
        }
        let names = if form == Form::Hf5 { HfNames::V5 } else { HfNames::V4 };
        let mapped = hf(ours, names).expect("every parameter of the model has such a name");
        let spell = |target: Mapped| {
            let name = match form {
                Form::HfResaved => target.name.replace("decoder.decoder_layers.", RESAVED_DECODER),
                Form::HfEncoder => target.name.replacen(ENCODER_PREFIX, "", 1),
                _ => target.name,
            };
            (name, target.part)
        };
        mapped.into_iter().map(spell).collect()
    }
}

/// Says which of our tensors a key is, where that is not its own name.
fn ours_is(tensor: &Foreign<'_>, mapped: &Mapped) -> String {
    ours_is_of(tensor.name, mapped)
}

fn ours_is_of(key: &str, mapped: &Mapped) -> String {
    let part = match mapped.part {
        Part::Whole if mapped.name == key => return String::new(),
        Part::Whole => "",
        Part::Query => "first third of ",
        Part::Key => "second third of ",
        Part::Value => "last third of ",
    };
    format!(", our {part}`{}`", mapped.name)
}

#[cfg(test)]
mod tests;
