//! The table of fields: what each key means and whether it changes a run's result; digests and
//! differences are made from it.

use std::fmt;

use serde_json::Value;

use crate::run_spec::RunSpec;

/// What changing a field does to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The result changes: a resume must name the field to be allowed to change it.
    Maths,
    /// Only where, when and how fast the work is done changes.
    Placement,
    /// Only what people see changes.
    Display,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mark::Maths => "maths",
            Mark::Placement => "placement",
            Mark::Display => "display",
        })
    }
}

/// One key of a spec.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Dotted path, `train.batch`.
    pub path: &'static str,
    /// What changing it does.
    pub mark: Mark,
    /// Meaning, unit and range: a fragment.
    pub doc: &'static str,
    /// A value that is accepted, as TOML.
    pub example: &'static str,
}

impl Field {
    /// Returns the section, empty for `schema` and `name`.
    pub fn section(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(section, _)| section)
    }
}

const fn maths(path: &'static str, example: &'static str, doc: &'static str) -> Field {
    let mark = Mark::Maths;
    Field { path, mark, doc, example }
}

const fn placement(path: &'static str, example: &'static str, doc: &'static str) -> Field {
    let mark = Mark::Placement;
    Field { path, mark, doc, example }
}

const fn display(path: &'static str, example: &'static str, doc: &'static str) -> Field {
    let mark = Mark::Display;
    Field { path, mark, doc, example }
}

/// Returns every key, section by section, in the order in which specs are printed.
pub fn fields() -> &'static [Field] {
    FIELDS
}

const FIELDS: &[Field] = &[
    display("schema", "1", "version of this layout"),
    display("name", "\"my-run\"", "the run's name, unique on its coordinator"),
    maths(
        "model.img_size",
        "[224, 224]",
        "height and width of an image in pixels; one number means both",
    ),
    maths("model.patch_size", "16", "side of a square patch in pixels; divides both sides"),
    maths("model.channels", "3", "channels of an image"),
    maths("model.width", "768", "width of the encoder; a multiple of 4 and of `heads`"),
    maths("model.depth", "12", "blocks of the encoder"),
    maths("model.heads", "12", "attention heads of the encoder"),
    maths(
        "model.decoder_width",
        "512",
        "width of the decoder; a multiple of 4 and of `decoder_heads`",
    ),
    maths("model.decoder_depth", "8", "blocks of the decoder"),
    maths("model.decoder_heads", "16", "attention heads of the decoder"),
    maths("model.mlp_ratio", "4", "hidden width of an MLP as a multiple of the block's width"),
    maths(
        "model.mask_ratio",
        "0.75",
        "share of patches that the encoder does not see, between 0 and 1",
    ),
    maths("model.norm_pix_loss", "true", "whether each target patch is normalised"),
    // The place of the data is free; its content is checked by the fingerprint of its index.
    placement(
        "data.shards",
        "\"data/train\"",
        "folder or URL of the packed data, or its index file",
    ),
    maths(
        "data.order",
        "\"global\"",
        "order of samples in an epoch: auto, global, block, sequential",
    ),
    maths(
        "data.lanes",
        "256",
        "parts of order = \"block\" that a step reads side by side; divides `batch`",
    ),
    maths(
        "data.block",
        "1024",
        "samples of a block of order = \"block\", or \"auto\": four chunks, 2^18 / lanes or more",
    ),
    maths(
        "data.mean",
        "[0.485, 0.456, 0.406]",
        "mean of each channel, in units of full brightness",
    ),
    maths("data.std", "[0.229, 0.224, 0.225]", "standard deviation of each channel, same units"),
    maths(
        "data.crop_scale",
        "[0.2, 1.0]",
        "smallest and largest area of a crop, as a share of the image",
    ),
    maths(
        "data.crop_ratio",
        "[0.75, 1.3333333333333333]",
        "smallest and largest width / height of a crop",
    ),
    maths("data.flip", "0.5", "probability of a horizontal flip"),
    maths(
        "data.bad_samples",
        "\"substitute\"",
        "what an undecodable sample does: fail, substitute",
    ),
    placement(
        "data.bad_samples_max",
        "0.001",
        "share of an epoch's samples that may be bad before the run fails; under 10 never do",
    ),
    placement("data.threads", "4", "threads of a worker that decode, or \"auto\""),
    placement(
        "data.deadline_seconds",
        "50",
        "seconds that a read from a store is tried before the group forms again, up to 100",
    ),
    placement(
        "data.cache.dir",
        "\"/nvme/lacuna\"",
        "folder on a local disk for what was downloaded, and for decoded planes of JPEG",
    ),
    placement("data.cache.size", "\"500GB\"", "most that the cache of this data may take"),
    placement(
        "data.cache.mode",
        "\"auto\"",
        "what it keeps: jpeg (downloads), planes (those and decoded images), auto",
    ),
    maths("train.duration", "\"800ep\"", "length of the run in ep or step"),
    maths("train.batch", "4096", "samples of a step over all workers"),
    maths("train.slot_batch", "128", "samples of a slot, the unit of work; divides `batch`"),
    maths("train.precision", "\"f32\"", "arithmetic of the model: f32, bf16, tf32 (GPU)"),
    maths(
        "train.reduce",
        "\"exact\"",
        "sum of gradients: exact (same bits for any workers), exact32 (half the bytes), fast",
    ),
    maths("train.seed", "0", "key of every random draw"),
    placement(
        "train.max_nonfinite_steps",
        "3",
        "steps in a row with a non-finite gradient that fail the run",
    ),
    placement("train.digest_every", "100", "steps between two comparisons of the workers' state"),
    maths(
        "optim.base_lr",
        "1.5e-4",
        "learning rate at batch 256; the peak is base_lr * batch / 256",
    ),
    maths("optim.min_lr", "0.0", "learning rate at the end"),
    maths(
        "optim.warmup",
        "\"40ep\"",
        "linear rise of the learning rate, in ep or step, or \"none\"",
    ),
    maths("optim.weight_decay", "0.05", "decoupled weight decay of matrices"),
    maths("optim.betas", "[0.9, 0.95]", "decay of AdamW's two moments"),
    maths("optim.eps", "1e-8", "added to the root of AdamW's second moment"),
    maths("optim.decay_tokens", "true", "whether cls_token and mask_token are decayed"),
    placement("elastic.workers", "\"2:8\"", "fewest and most workers, \"min:max\""),
    placement(
        "elastic.spares",
        "0",
        "workers beyond the most that stand by warm, to take a lost one's place at once",
    ),
    placement("checkpoint.to", "\"runs\"", "folder or URL that holds the folder of the run"),
    placement(
        "checkpoint.every",
        "[\"15min\", \"1ep\"]",
        "when to save: a list of step, ep, s, min or h",
    ),
    placement("checkpoint.keep.last", "3", "newest checkpoints that are kept"),
    placement(
        "checkpoint.keep.every",
        "\"50ep\"",
        "checkpoints that are kept for good, in step, ep, s, min or h",
    ),
    placement(
        "checkpoint.resume",
        "\"auto\"",
        "what a run that has checkpoints does: auto (go on), never (refuse)",
    ),
    placement(
        "checkpoint.when_busy",
        "\"skip\"",
        "when the next is due and one is being written: skip, wait (stand still), cancel (the one)",
    ),
    placement(
        "checkpoint.max_write_mbps",
        "0",
        "megabytes a second at which a worker writes its part, 0 for no limit",
    ),
    placement(
        "checkpoint.max_failures",
        "0",
        "attempts in a row that may fail before the run does, 0 for any number",
    ),
    placement(
        "checkpoint.read_back",
        "false",
        "whether the coordinator reads each checkpoint back and marks it as verified",
    ),
    display(
        "track.every",
        "\"20step\"",
        "how often progress is recorded, in step, ep, s, min or h",
    ),
];

/// A key whose values differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDiff {
    /// Dotted path.
    pub path: &'static str,
    /// The first spec's value as TOML; `unset` where there is none.
    pub old: String,
    /// The second spec's value.
    pub new: String,
    /// What the difference does to a run.
    pub mark: Mark,
}

impl fmt::Display for FieldDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FieldDiff { path, old, new, mark } = self;
        write!(f, "{path}: {old} -> {new} [{mark}]")
    }
}

/// Lists the fields in which two specs differ, in the order of [`fields`].
pub fn diff(old: &RunSpec, new: &RunSpec) -> Vec<FieldDiff> {
    let (old, new) = (old.to_json(), new.to_json());
    let differs = |field: &Field| {
        let text = |spec| lookup(spec, field.path).map_or("unset".to_string(), to_toml);
        let (old, new) = (text(&old), text(&new));
        let (path, mark) = (field.path, field.mark);
        (old != new).then_some(FieldDiff { path, old, new, mark })
    };
    FIELDS.iter().filter_map(differs).collect()
}

impl RunSpec {
    /// Returns the BLAKE3 of every field's canonical JSON: two specs are one when these agree.
    pub fn digest(&self) -> blake3::Hash {
        blake3::hash(self.canonical_json().as_bytes())
    }

    /// Returns the BLAKE3 of the canonical JSON of the fields marked [`Mark::Maths`]: on the same
    /// data, runs whose digests agree have the same result.
    pub fn maths_digest(&self) -> blake3::Hash {
        let json = self.to_json();
        let mut text = String::from("{");
        let mut paths: Vec<&Field> = FIELDS.iter().filter(|f| f.mark == Mark::Maths).collect();
        paths.sort_by_key(|field| field.path);
        for field in paths {
            if let Some(value) = lookup(&json, field.path) {
                push_member(&mut text, field.path, value);
            }
        }
        text.push('}');
        blake3::hash(text.as_bytes())
    }

    /// Returns the spec as JSON without spaces and with sorted keys: one text for one spec.
    pub fn canonical_json(&self) -> String {
        let mut text = String::new();
        push_canonical(&mut text, &self.to_json());
        text
    }
}

/// Returns the value at a dotted path of the effective spec.
pub(crate) fn lookup<'a>(spec: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(spec, |value, key| value.get(key))
}

/// Prints a value of the effective spec as TOML: JSON's text is also TOML's, but for spaces.
pub(crate) fn to_toml(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(to_toml).collect();
            format!("[{}]", items.join(", "))
        }
        Value::String(text) => toml_string(text),
        _ => value.to_string(),
    }
}

/// JSON's escapes are TOML's too, except that TOML also forbids a bare DEL.
fn toml_string(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Sorts by itself: the order of `serde_json`'s own maps depends on how the whole program is built.
fn push_canonical(out: &mut String, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            out.push('{');
            for key in keys {
                push_member(out, key, &map[key]);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                push_canonical(out, item);
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn push_member(out: &mut String, key: &str, value: &Value) {
    if !out.ends_with('{') {
        out.push(',');
    }
    out.push_str(&Value::from(key).to_string());
    out.push(':');
    push_canonical(out, value);
}

#[cfg(test)]
mod tests;
