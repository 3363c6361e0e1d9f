//! What a tracker is fed.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// One numbered update of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its number: at least 1, and higher than that of the record before.
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What it says.
    pub body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Figures of a step.
    Figures(Figures),
    /// Something that happened.
    Event {
        /// Short machine-readable word.
        kind: String,
        /// Whether a person should look.
        warning: bool,
        /// One sentence.
        text: String,
    },
    /// A picture of a step.
    Image {
        /// TensorBoard's name for the row of pictures that it belongs to.
        tag: String,
        /// Steps behind the state that it was made with.
        step: u64,
        /// The encoded picture.
        png: Vec<u8>,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA.
        channels: u32,
    },
}

/// Figures of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Steps behind the state after it.
    pub step: u64,
    /// Generation that applied it.
    pub generation: u64,
    /// Mean loss.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the mean gradient.
    pub grad_norm: f64,
    /// Samples a second of the group.
    pub images_per_second: f64,
    /// Share of time spent waiting for data.
    pub data_wait: f64,
    /// Steps skipped so far.
    pub skipped: u64,
    /// Steps computed again so far.
    pub redone: u64,
    /// Digest of the state, where it was computed.
    pub digest: Option<u64>,
    /// Memory in use on the device of the worker that reports, in bytes; 0 where not known.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Model FLOPs a second over what the group's devices reach in large matrix products.
    #[serde(default)]
    pub mfu: Option<f64>,
}

/// Longest text that is kept: an event is a sentence and a spec a page, and lines must stay short
/// enough to be read back whole.
pub(crate) const TEXT_BYTES_MAX: usize = 64 << 10;

/// Returns a text, or its beginning where it is too long.
pub(crate) fn shortened(text: &str) -> Cow<'_, str> {
    if text.len() <= TEXT_BYTES_MAX {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(TEXT_BYTES_MAX);
    Cow::Owned(format!("{}…", &text[..end]))
}
