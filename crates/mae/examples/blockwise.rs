//! A worker that masks large rectangles, as BEiT does ("BEiT: BERT Pre-Training of Image
//! Transformers", Bao et al. 2021, Algorithm 1), and is the masked autoencoder otherwise.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example blockwise -- --coordinator HOST:PORT
//! ```

use std::process::ExitCode;

use lacuna_mae::mae::{Mae, PosTables, mask_sizes};
use lacuna_mae::objective::{Objective, Slot, SlotLoss};
use lacuna_mae::weights::Weights;
use lacuna_recipe::model::{ModelConfig, ParamSpec};
use lacuna_recipe::philox::Draws;
use tch::{Device, Kind, Tensor};

/// Patches of a rectangle at least, where as many are still to be removed.
const AREA_MIN: f64 = 16.0;
/// Height to width of a rectangle: between this and its inverse.
const ASPECT_MIN: f64 = 0.3;
/// Rectangles that are tried; what is left then is removed patch by patch.
const TRIES_MAX: u32 = 64;

/// MAE with block-wise masks.
#[derive(Debug)]
pub struct Blockwise;

impl Objective for Blockwise {
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        model.params()
    }

    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss> {
        let tables = PosTables::new(model, Kind::Float).to_device(device);
        Box::new(BlockwiseLoss { model: model.clone(), tables })
    }
}

#[derive(Debug)]
struct BlockwiseLoss {
    model: ModelConfig,
    tables: PosTables,
}

impl SlotLoss for BlockwiseLoss {
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor {
        let (len_keep, n_patches) = mask_sizes(&self.model);
        let grid = self.model.grid();
        let order = |draws: &Draws| block_order(draws, grid, n_patches - len_keep);
        let ids_shuffle: Vec<u32> = slot.draws.iter().flat_map(order).collect();
        let masks = slot.masks_of(&self.model, &ids_shuffle);
        let mae = Mae::new(&self.model, &self.tables, weights);
        mae.loss(&slot.images_bchw, &masks, &slot.weights_b)
    }
}

/// Orders the patches of one sample: kept ones, then `n_removed` that lie in rectangles.
pub(crate) fn block_order(draws: &Draws, grid: [usize; 2], n_removed: usize) -> Vec<u32> {
    let [rows, columns] = grid;
    let mut removed: Vec<bool> = vec![false; rows * columns];
    let mut left = n_removed;
    for i in 0..TRIES_MAX {
        let uniform = |k: u32| draws.unit_f64(4 * i + k);
        // Areas and aspects are drawn evenly, the latter on a logarithmic scale.
        if left == 0 {
            break;
        }
        let most = left as f64;
        let area = AREA_MIN.min(most) + uniform(0) * (most - AREA_MIN).max(0.0);
        // Not `powf`, which is the C library's: machines may differ in its last bit.
        let aspect = libm::exp(libm::log(ASPECT_MIN) * (1.0 - 2.0 * uniform(1)));
        let side = |length: f64, max: usize| (length.round() as usize).clamp(1, max);
        let height = side((area * aspect).sqrt(), rows);
        let width = side((area / aspect).sqrt(), columns);
        let at = |unit: f64, n: usize| (unit * n as f64) as usize;
        let (top, first) = (at(uniform(2), rows - height + 1), at(uniform(3), columns - width + 1));
        for row in top..top + height {
            let start = row * columns + first;
            for patch in removed[start..start + width].iter_mut().filter(|patch| !**patch) {
                *patch = left > 0;
                left = left.saturating_sub(1);
            }
        }
    }
    // Rarely anything is left; the first kept patches go then.
    for patch in removed.iter_mut().filter(|patch| !**patch).take(left) {
        *patch = true;
    }
    let (kept, gone): (Vec<u32>, Vec<u32>) =
        (0..removed.len() as u32).partition(|&patch| !removed[patch as usize]);
    [kept, gone].concat()
}

fn main() -> ExitCode {
    lacuna_mae::worker::main(Blockwise)
}
