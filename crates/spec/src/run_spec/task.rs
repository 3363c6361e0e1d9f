//! What a run learns beside filling in patches.

use std::fmt;

use serde::{Serialize, Serializer};

word! {
    /// What a run learns beside filling in patches.
    TaskKind {
        /// Classes, with every parameter of the encoder.
        Finetune = "finetune",
        /// Classes, with a linear map of what the encoder says, which stays as it is.
        Linear = "linear",
    }
}

word! {
    /// What of an encoder's tokens a head reads.
    Pool {
        /// The mean of the patches' tokens, normalised by a norm of its own (`fc_norm`).
        Avg = "avg",
        /// The class token after the last norm.
        Cls = "cls",
        /// No token: the pixels themselves, as a baseline of linear probes.
        Pixels = "pixels",
    }
}

word! {
    /// How parameters follow gradients in a task.
    Optimizer {
        /// AdamW with the constants of `[optim]`.
        AdamW = "adamw",
        /// Momentum 0.9, with the decay of `[optim]` in the gradient.
        Sgd = "sgd",
        /// The same with a rate by layer: for large batches of probes.
        Lars = "lars",
    }
}

/// Section `[task]`: learning to name the class of an image, from an encoder that was trained
/// before.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the table of fields documents each key once")]
pub struct TaskSpec {
    pub kind: TaskKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder: Option<String>,
    pub classes: u32,
    pub pool: Pool,
    pub optimizer: Optimizer,
    pub layer_decay: f64,
    pub drop_path: f64,
    pub mixup: f64,
    pub cutmix: f64,
    pub label_smoothing: f64,
    pub random_erasing: f64,
    pub rand_augment: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
}

/// What an encoder's place means for as long as the run lives that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderPin<'a> {
    /// The checkpoint of a run at this step: `RUN@STEP`.
    Step(u64),
    /// Weights with this digest: `PATH@blake3:HEX`.
    Content(&'a str),
}

/// Splits an encoder's place into that of its run, or weights, and what it is pinned to. What lies
/// at the whole place (`exists`) has no pin, whatever its name ends with.
pub fn encoder_at(
    place: &str,
    exists: impl FnOnce(&str) -> bool,
) -> (&str, Option<EncoderPin<'_>>) {
    if exists(place) {
        return (place, None);
    }
    let pinned = place.rsplit_once('@').and_then(|(path, pin)| {
        let content = pin.strip_prefix("blake3:").map(EncoderPin::Content);
        Some((path, content.or_else(|| pin.parse().ok().map(EncoderPin::Step))?))
    });
    pinned.map_or((place, None), |(path, pin)| (path, Some(pin)))
}

impl TaskSpec {
    /// Says what is wrong with learning this from data whose labels are below `n_classes`, 0 for
    /// data without any, and of which `n_unlabelled` samples have none.
    pub fn labels_problem(&self, n_classes: u32, n_unlabelled: u64) -> Option<String> {
        let classes = self.classes;
        match n_classes {
            0 => Some("`task.kind` needs labels, and the data has none".to_string()),
            _ if n_unlabelled > 0 => Some(format!(
                "`task.kind` needs labels, and {n_unlabelled} samples have none: \
                 `lacuna data subset DATA PART --label-fraction 1` keeps the others"
            )),
            n if n > classes => {
                Some(format!("`task.classes` = {classes}, and the data has labels of {n_classes}"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_encoders_have_pins() {
        let of = |place| encoder_at(place, |_| false);
        assert_eq!(of("runs/mae"), ("runs/mae", None));
        assert_eq!(of("runs/mae@700"), ("runs/mae", Some(EncoderPin::Step(700))));
        assert_eq!(of("s3://a/b@7"), ("s3://a/b", Some(EncoderPin::Step(7))));
        assert_eq!(of("me@home/mae"), ("me@home/mae", None));
        let weights = of("vit@384/w.safetensors@blake3:00ff");
        assert_eq!(weights, ("vit@384/w.safetensors", Some(EncoderPin::Content("00ff"))));
        assert_eq!(encoder_at("vit@384", |_| true), ("vit@384", None), "a folder of that name");
    }
}
