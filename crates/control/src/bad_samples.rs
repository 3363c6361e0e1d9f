//! Samples that could not be decoded and were replaced, as workers report them.

use std::fmt;

use lacuna_types::{SampleId, Step};

/// Longest text of a report, in characters: the names and errors of sound programs are shorter, and
/// a damaged shard can give a name of any length.
pub const TEXT_CHARS_MAX: usize = 300;

/// Bad samples that one message names at most: well below what a message may hold.
pub const REPORT_SAMPLES_MAX: usize = 256;

/// Bad samples of one epoch that a worker met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSamples {
    /// The epoch.
    pub epoch: u32,
    /// The samples.
    pub samples: Vec<BadSample>,
    /// How many more it met in the epoch than it could keep, since it last said so; it may have
    /// met one of them twice.
    pub dropped: u64,
}

/// A bad sample and what took its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// The step that wanted it.
    pub step: Step,
    /// The bad one.
    pub sample: SampleId,
    /// Its name in the shard, where that gives names and they can be read.
    pub key: Option<String>,
    /// Its shard.
    pub shard: String,
    /// First byte of the image in the shard.
    pub offset: u64,
    /// Why it is bad, for people.
    pub error: String,
    /// The sample that took its place.
    pub stand_in: SampleId,
}

impl BadSample {
    /// Cuts every text to [`TEXT_CHARS_MAX`], and takes out what a terminal would obey.
    ///
    /// Of names and paths the end is kept, which tells them apart.
    pub fn bounded(self) -> Self {
        BadSample {
            key: self.key.as_deref().map(tail),
            shard: tail(&self.shard),
            error: head(&self.error),
            ..self
        }
    }
}

impl fmt::Display for BadSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sample, key, shard, offset, .. } = self;
        write!(f, "sample {sample} (")?;
        if let Some(key) = key {
            write!(f, "`{key}` at ")?;
        }
        write!(f, "byte {offset} of shard `{shard}`)")
    }
}

fn plain(c: char) -> char {
    if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }
}

fn head(text: &str) -> String {
    let mut chars = text.chars().map(plain);
    let kept: String = chars.by_ref().take(TEXT_CHARS_MAX).collect();
    if chars.next().is_some() { kept + "…" } else { kept }
}

fn tail(text: &str) -> String {
    let n = text.chars().count();
    let cut = n.saturating_sub(TEXT_CHARS_MAX);
    let kept = text.chars().skip(cut).map(plain);
    if cut > 0 { std::iter::once('…').chain(kept).collect() } else { kept.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_any_length_are_cut_and_harmless() {
        let bad = BadSample {
            step: Step(1),
            sample: SampleId(2),
            key: Some("é".repeat(5000) + "a\x1b[2J.jpg"),
            shard: "/".repeat(5000) + "s.tar",
            offset: 512,
            error: "e\n".repeat(5000),
            stand_in: SampleId(3),
        };
        let bounded = bad.bounded();
        let key = bounded.key.clone().unwrap();
        assert_eq!(key.chars().count(), TEXT_CHARS_MAX + 1);
        assert!(key.starts_with('…') && key.ends_with("a\u{fffd}[2J.jpg"), "{key}");
        assert!(bounded.shard.ends_with("s.tar"), "{}", bounded.shard);
        assert!(bounded.error.ends_with('…') && !bounded.error.contains('\n'));
        assert_eq!(bounded.clone().bounded(), bounded);
    }
}
