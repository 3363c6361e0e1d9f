//! What a step is: V slots, each a fixed range of positions of the epoch's order.

use lacuna_types::{SampleId, Slot, Step};
use serde::{Deserialize, Serialize};

/// How steps cut the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Samples of the data set.
    pub n_samples: u64,
    /// Samples of a step, over all workers.
    pub batch: u32,
    /// Samples of a slot; divides `batch`.
    pub slot_batch: u32,
}

/// A geometry that has no steps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The slot does not divide the batch.
    #[error("`slot_batch` = {slot_batch} must divide `batch` = {batch}; both must be positive")]
    Slots {
        /// Samples of a step.
        batch: u32,
        /// Samples of a slot.
        slot_batch: u32,
    },
    /// Fewer samples than one step needs.
    #[error("the data has {n_samples} samples, fewer than one step's `batch` = {batch}")]
    TooFewSamples {
        /// Samples of the data set.
        n_samples: u64,
        /// Samples of a step.
        batch: u32,
    },
}

impl Geometry {
    /// Checks that slots tile the batch and that an epoch has at least one step.
    pub fn check(&self) -> Result<(), GeometryError> {
        let Geometry { n_samples, batch, slot_batch } = *self;
        if batch == 0 || slot_batch == 0 || batch % slot_batch != 0 {
            return Err(GeometryError::Slots { batch, slot_batch });
        }
        if n_samples < u64::from(batch) {
            return Err(GeometryError::TooFewSamples { n_samples, batch });
        }
        Ok(())
    }

    /// Returns V, the slots of a step.
    pub fn n_slots(&self) -> u32 {
        self.batch / self.slot_batch
    }

    /// Returns the steps of an epoch; the samples that do not fill a step are dropped.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_samples / u64::from(self.batch)
    }

    /// Returns the epoch of a step and its place inside the epoch.
    pub fn place(&self, step: Step) -> (u32, u64) {
        let per_epoch = self.steps_per_epoch();
        let epoch = u32::try_from(step.0 / per_epoch).expect("runs end before 2^32 epochs");
        (epoch, step.0 % per_epoch)
    }

    /// Returns the positions, in the order of the slot's epoch, of the slot's samples.
    pub fn positions(&self, slot: Slot) -> std::ops::Range<u64> {
        let (_, t) = self.place(slot.step);
        let start = t * u64::from(self.batch) + u64::from(slot.index) * u64::from(self.slot_batch);
        start..start + u64::from(self.slot_batch)
    }
}

/// The samples of one slot, ready for an engine: plain bytes, no tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotBatch {
    /// Which slot.
    pub slot: Slot,
    /// Samples in slot order, `[b]`.
    pub samples: Vec<SampleId>,
    /// Class of each image, `[b]`, where the data has one; that of a stand-in where one is shown.
    pub labels: Vec<Option<u32>>,
    /// 1, or 0 for a bad sample that counts in the mean and adds nothing, `[b]`.
    pub weights: Vec<f32>,
    /// Pixels after crop, resize and flip, `[b, height, width, channel]`.
    pub pixels: Vec<u8>,
    /// Patches of each sample in shuffled order, `[b, n_patches]`; the first `len_keep` are kept.
    pub ids_shuffle: Vec<u32>,
}

/// Normalises pixels as `(x / 255 − mean) / std` and moves channels to the front.
#[derive(Clone, Debug)]
pub struct Normalize {
    // One value per channel and byte: exact, and faster than arithmetic.
    table: Vec<[f32; 256]>,
}

impl Normalize {
    /// Builds the tables; `mean` and `std` have one value per channel, in units of full brightness.
    pub fn new(mean: &[f64], std: &[f64]) -> Self {
        assert_eq!(mean.len(), std.len(), "one mean and one deviation per channel");
        let channel = |(m, s): (&f64, &f64)| {
            std::array::from_fn(|byte| ((byte as f64 / 255.0 - m) / s) as f32)
        };
        Normalize { table: mean.iter().zip(std).map(channel).collect() }
    }

    /// Returns the values of all bytes, 256 for each channel.
    pub fn tables(&self) -> &[f32] {
        self.table.as_flattened()
    }

    /// Converts `pixels` `[b, h, w, c]` to `out` `[b, c, h, w]`, `plane` = h · w.
    pub fn apply(&self, pixels: &[u8], plane: usize, out: &mut [f32]) {
        let channels = self.table.len();
        assert_eq!(pixels.len(), out.len(), "one output per pixel value");
        assert_eq!(pixels.len() % (plane * channels), 0, "whole images");
        let images = pixels.chunks_exact(plane * channels);
        for (image, out) in images.zip(out.chunks_exact_mut(plane * channels)) {
            for (c, (table, out)) in self.table.iter().zip(out.chunks_exact_mut(plane)).enumerate()
            {
                let values = image[c..].iter().step_by(channels);
                for (to, &byte) in out.iter_mut().zip(values) {
                    *to = table[byte as usize];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { n_samples: 1003, batch: 100, slot_batch: 25 };

    #[test]
    fn slots_tile_an_epoch_without_its_tail() {
        assert_eq!(GEOMETRY.check(), Ok(()));
        assert_eq!((GEOMETRY.n_slots(), GEOMETRY.steps_per_epoch()), (4, 10));
        let mut seen: Vec<u64> = Vec::new();
        for step in 10..20 {
            assert_eq!(GEOMETRY.place(Step(step)), (1, step - 10));
            for index in 0..4 {
                seen.extend(GEOMETRY.positions(Slot { step: Step(step), index }));
            }
        }
        assert_eq!(seen, (0..1000).collect::<Vec<u64>>());
    }

    #[test]
    fn geometries_without_steps_are_refused() {
        let uneven = Geometry { slot_batch: 33, ..GEOMETRY }.check().unwrap_err();
        assert!(uneven.to_string().contains("`slot_batch` = 33 must divide"), "{uneven}");
        let few = Geometry { n_samples: 99, ..GEOMETRY }.check().unwrap_err();
        assert!(few.to_string().contains("99 samples"), "{few}");
        assert!(Geometry { slot_batch: 0, ..GEOMETRY }.check().is_err());
    }

    #[test]
    fn channels_move_to_the_front() {
        let normalize = Normalize::new(&[0.0, 0.5], &[1.0, 0.25]);
        let mut out = [0.0; 8];
        normalize.apply(&[0, 255, 255, 0, 51, 51, 0, 0], 4, &mut out);
        assert_eq!(out[..4], [0.0, 1.0, 0.2, 0.0]);
        assert_eq!(out[4..], [2.0, -2.0, -1.2, -2.0]);
    }
}
