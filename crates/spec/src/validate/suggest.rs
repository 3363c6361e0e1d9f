//! What to write instead.

use crate::fields::{Field, Kind, fields};

/// What other training programs call our keys.
const FOREIGN_NAMES: &[(&str, &str)] = &[
    ("accum_iter", "train.slot_batch"),
    ("amp", "train.precision"),
    ("batch_size", "train.batch"),
    ("blr", "optim.base_lr"),
    ("data_path", "data.shards"),
    ("decoder_embed_dim", "model.decoder_width"),
    ("decoder_num_heads", "model.decoder_heads"),
    ("dtype", "train.precision"),
    ("embed_dim", "model.width"),
    ("encoder_depth", "model.depth"),
    ("encoder_heads", "model.heads"),
    ("encoder_width", "model.width"),
    ("epochs", "train.duration"),
    ("extends", "base"),
    ("global_batch_size", "train.batch"),
    ("image_size", "model.img_size"),
    ("in_chans", "model.channels"),
    ("input_size", "model.img_size"),
    ("keep_every", "checkpoint.keep.every"),
    ("keep_last", "checkpoint.keep.last"),
    ("learning_rate", "optim.base_lr"),
    ("lr", "optim.base_lr"),
    ("max_steps", "train.duration"),
    ("max_workers", "elastic.workers"),
    ("min_workers", "elastic.workers"),
    ("micro_batch", "train.slot_batch"),
    ("num_heads", "model.heads"),
    ("num_workers", "data.threads"),
    ("output_dir", "checkpoint.to"),
    ("preset", "base"),
    ("steps", "train.duration"),
    ("warmup_epochs", "optim.warmup"),
    ("warmup_steps", "optim.warmup"),
    ("world_size", "elastic.workers"),
];

/// Parts of keys that hold secrets.
const SECRET_WORDS: &[&str] =
    &["password", "passwd", "secret", "access_key", "token", "credential"];

/// Says what to do about a key that nobody knows.
pub(super) fn instead_of(parent: &str, key: &str) -> String {
    if parent == "optim" && matches!(key, "name" | "optimizer" | "type") {
        return "remove it: pre-training follows AdamW, and a [task] has `task.optimizer`"
            .to_string();
    }
    if parent.is_empty() && matches!(key, "optimizer" | "optimiser") {
        return "did you mean the section `optim`?".to_string();
    }
    if !parent.is_empty() && matches!(key, "schema" | "name" | "base") {
        return format!("write `{key}` above the first [section]");
    }
    if let Some(known) = suggest(parent, key) {
        return format!("did you mean `{known}`?");
    }
    let lower = key.to_lowercase();
    if SECRET_WORDS.iter().any(|word| lower.contains(word)) {
        return "remove it: secrets belong into the environment, a spec is stored and printed"
            .to_string();
    }
    let siblings: Vec<&str> = keys_of(parent).collect();
    match parent {
        "" => format!("the keys at the top are {}", siblings.join(", ")),
        _ => format!("the keys of [{parent}] are {}", siblings.join(", ")),
    }
}

/// Tells whether an unknown key is most likely meant to be the base.
pub(super) fn is_base(parent: &str, key: &str) -> bool {
    suggest(parent, key) == Some("base")
}

/// Lists the keys right below a table, and `base` at the top.
fn keys_of(parent: &str) -> impl Iterator<Item = &'static str> {
    let prefix = if parent.is_empty() { String::new() } else { format!("{parent}.") };
    let below = fields().iter().filter_map(move |field| field.path.strip_prefix(&prefix));
    let first = below.map(|rest| rest.split('.').next().unwrap_or(rest));
    let mut names: Vec<&'static str> = first.collect();
    names.dedup();
    if parent.is_empty() {
        names.push("base");
    }
    names.into_iter()
}

/// Says how to write a table whose name was given another value.
pub(super) fn how_to_nest(path: &str) -> String {
    match path.rsplit_once('.') {
        None => format!("write [{path}] on a line of its own and its keys below"),
        Some((section, key)) => {
            let inside = fields().iter().filter(|field| {
                field.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))
            });
            let entry = |field: &Field| {
                let inner = field.path.rsplit('.').next().unwrap_or(field.path);
                format!("{inner} = {}", field.example)
            };
            let entries: Vec<String> = inside.map(entry).collect();
            format!("write `{key} = {{ {} }}` in [{section}]", entries.join(", "))
        }
    }
}

/// Says how to write a key that is missing.
pub(super) fn how_to_add(field: &Field) -> String {
    let (section, key, example) = (field.section(), field.key(), field.example);
    match section {
        "" => format!("add `{key} = {example}` at the top"),
        _ => format!("add `{key} = {example}` to [{section}]"),
    }
}

/// Returns an example of one value with a unit.
pub(super) fn quantity_example(field: &Field) -> &'static str {
    match field.kind {
        Kind::Cadences => "\"15min\"",
        _ => field.example,
    }
}

/// Lists words as `"a" or "b"`.
pub(super) fn quoted(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(" or ")
}

/// Slips that a suggestion bridges: one in a short word, a third of the letters in a long one.
fn slips_max(word: &str) -> usize {
    (word.chars().count() / 3).max(1)
}

/// Returns the closest of the `known` words, if one is close.
pub(crate) fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Distances cost length squared; nothing that long resembles a key.
    if word.len() > 64 {
        return None;
    }
    let word = word.to_lowercase();
    let distance = |known: &&str| strsim::damerau_levenshtein(&word, known);
    let best = known.min_by_key(distance)?;
    (distance(&best) <= slips_max(&word)).then_some(best)
}

/// Finds the key that was meant: in the same table first, then in others.
fn suggest(parent: &str, key: &str) -> Option<&'static str> {
    let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
    let paths = || fields().iter().map(|field| field.path);
    let sections = || fields().iter().map(Field::section).filter(|name| !name.is_empty());
    let siblings = paths().filter(|path| path.rsplit_once('.').map_or("", |(p, _)| p) == parent);
    let find = |word: &str, paths: &mut dyn Iterator<Item = &'static str>| {
        let paths: Vec<&'static str> = paths.collect();
        let best = closest(word, paths.iter().map(|path| last(path)))?;
        paths.into_iter().find(|path| last(path) == best)
    };
    let foreign = FOREIGN_NAMES.iter().find(|(name, _)| *name == key);
    if let Some((_, path)) = foreign {
        return Some(path);
    }
    if let Some(path) = find(key, &mut { siblings }) {
        return Some(path);
    }
    if parent.is_empty()
        && let Some(section) = closest(key, sections().chain(["base"]))
    {
        return Some(section);
    }
    find(key, &mut paths().chain(["base"]))
}
