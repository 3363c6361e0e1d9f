//! Which patches the encoder sees.
//!
//! Noise is drawn per patch, patches are sorted by it, and the first [`len_keep`] are kept. It is
//! done on the host and travels with the batch, so a sample's mask depends on (seed, epoch, sample)
//! alone.

use crate::philox::{Draws, Tag};

/// Returns the number of kept patches, `int(n_patches · (1 − mask_ratio))` computed in f64.
///
/// Computed as the reference does, so (100, 0.9) keeps 9 and (10, 0.9) keeps none.
pub fn len_keep(n_patches: usize, mask_ratio: f64) -> usize {
    (n_patches as f64 * (1.0 - mask_ratio)) as usize
}

/// The order of one sample's patches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskOrder {
    /// Patch at each place of the shuffled order; the first `len_keep` are kept.
    pub ids_shuffle: Vec<u32>,
    /// Place of each patch in the shuffled order: the inverse permutation.
    pub ids_restore: Vec<u32>,
}

impl MaskOrder {
    /// Sorts patches by `noise`, ascending and stable.
    pub fn from_noise(noise: &[f32]) -> Self {
        // Noise above, patch below: integers sort faster, and equal noise stays in order.
        let key = |(patch, &noise): (usize, &f32)| u64::from(rank(noise)) << 32 | patch as u64;
        let mut keys: Vec<u64> = noise.iter().enumerate().map(key).collect();
        keys.sort_unstable();
        let ids_shuffle: Vec<u32> = keys.iter().map(|&key| key as u32).collect();
        let ids_restore = invert(&ids_shuffle);
        MaskOrder { ids_shuffle, ids_restore }
    }

    /// Draws the order of `n_patches` patches for one use of a sample.
    pub fn draw(seed: u64, epoch: u32, sample: u64, n_patches: usize) -> Self {
        let draws = Draws::new(seed, Tag::Mask, epoch, sample);
        let noise: Vec<f32> = (0..n_patches as u32).map(|i| draws.unit_f32(i)).collect();
        MaskOrder::from_noise(&noise)
    }

    /// Returns 1 for each removed patch and 0 for each kept one, in raster order.
    pub fn mask(&self, len_keep: usize) -> Vec<f32> {
        let removed = |&place: &u32| if place as usize >= len_keep { 1.0 } else { 0.0 };
        self.ids_restore.iter().map(removed).collect()
    }
}

/// Maps numbers to integers of the same order, that of [`f32::total_cmp`].
fn rank(value: f32) -> u32 {
    let bits = value.to_bits();
    if value.is_sign_negative() { !bits } else { bits | 1 << 31 }
}

fn invert(permutation: &[u32]) -> Vec<u32> {
    let mut out: Vec<u32> = vec![0; permutation.len()];
    for (place, &id) in permutation.iter().enumerate() {
        out[id as usize] = place as u32;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T3.
    #[test]
    fn order_from_known_noise() {
        let order = MaskOrder::from_noise(&[0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]);
        assert_eq!(order.ids_shuffle, [1, 5, 3, 7, 2, 4, 6, 0]);
        assert_eq!(order.ids_restore, [7, 0, 4, 2, 5, 1, 6, 3]);
        assert_eq!(len_keep(8, 0.75), 2);
        assert_eq!(order.mask(2), [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]);
    }

    /// T6, all rows of the golden table.
    #[test]
    fn len_keep_table() {
        let text = include_str!("../../../tests/golden/golden.json");
        let golden: serde_json::Value = serde_json::from_str(text).unwrap();
        let rows = golden["len_keep"].as_array().unwrap();
        assert!(rows.len() >= 13);
        for row in rows {
            let n = row["L"].as_u64().unwrap() as usize;
            let keep = len_keep(n, row["ratio"].as_f64().unwrap());
            assert_eq!(keep as u64, row["keep"].as_u64().unwrap(), "{row}");
        }
    }

    #[test]
    fn ties_keep_patch_order() {
        let order = MaskOrder::from_noise(&[0.5, 0.25, 0.5, 0.25]);
        assert_eq!(order.ids_shuffle, [1, 3, 0, 2]);
    }

    #[test]
    fn any_noise_is_sorted_by_total_order() {
        let noise = [0.5, -0.0, f32::NAN, -1.5, 0.0, f32::INFINITY, -2.0, 0.5, -1.5, 1e-45];
        let mut want: Vec<u32> = (0..noise.len() as u32).collect();
        want.sort_by(|&a, &b| noise[a as usize].total_cmp(&noise[b as usize]));
        assert_eq!(MaskOrder::from_noise(&noise).ids_shuffle, want);
    }

    #[test]
    fn draws_depend_on_every_part_of_the_address() {
        let base = MaskOrder::draw(1, 2, 3, 49);
        assert_eq!(base, MaskOrder::draw(1, 2, 3, 49));
        for other in [(0, 2, 3), (1, 3, 3), (1, 2, 4)] {
            assert_ne!(base, MaskOrder::draw(other.0, other.1, other.2, 49));
        }
    }
}
