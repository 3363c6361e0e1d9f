//! A worker that learns as SimMIM does ("SimMIM: A Simple Framework for Masked Image Modeling",
//! Xie et al. 2021): removed patches enter the encoder as a learned token, one linear map predicts
//! their pixels, and the loss is the mean absolute error.
//!
//! ```text
//! cargo run --release -p lacuna-mae --example simmim -- --coordinator HOST:PORT
//! ```

use std::process::ExitCode;

use lacuna_mae::mae::PosTables;
use lacuna_mae::objective::{Objective, Slot, SlotLoss};
use lacuna_mae::patches::patchify;
use lacuna_mae::vit::{self, Block, LayerNorm, Linear};
use lacuna_mae::weights::Weights;
use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};
use tch::{Device, Kind, Tensor};

/// An encoder of whole images with a linear head.
#[derive(Debug)]
pub struct SimMim;

impl Objective for SimMim {
    /// The encoder's tensors keep their names: `lacuna ckpt export --encoder-only` takes them.
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        let (d, p) = (model.width as usize, model.patch_values());
        let is_decoders = |name: &str| name.starts_with("decoder") || name == "mask_token";
        let mut params: Vec<ParamSpec> = model.params();
        params.retain(|param| !is_decoders(&param.name));
        let param = |name: &str, shape: &[usize], init: Init| ParamSpec {
            name: name.to_string(),
            shape: shape.to_vec(),
            init,
        };
        let init = Init::XavierUniform { fan_in: model.width, fan_out: p as u32 };
        params.push(param("head.bias", &[p], Init::Zeros));
        params.push(param("head.weight", &[p, d], init));
        params.push(param("mask_token", &[1, 1, d], Init::Normal02));
        params.sort_by(|a, b| a.name.cmp(&b.name));
        params
    }

    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss> {
        let tables = PosTables::new(model, Kind::Float).to_device(device);
        Box::new(SimMimLoss { model: model.clone(), pos_1nd: tables.encoder_1nd().shallow_clone() })
    }
}

#[derive(Debug)]
struct SimMimLoss {
    model: ModelConfig,
    pos_1nd: Tensor,
}

impl SlotLoss for SimMimLoss {
    fn loss(&self, weights: &Weights, slot: &Slot<'_>) -> Tensor {
        let patches_blp = patchify(&slot.images_bchw, i64::from(self.model.patch_size));
        let mask_bl1 = slot.masks(&self.model).mask_bl().unsqueeze(-1);
        let pred_blp = self.predict(weights, &patches_blp, &mask_bl1);
        // Every sample has the same number of removed patches.
        let n_removed = (self.model.n_patches() - self.model.len_keep()) as f64;
        let error_blp = (pred_blp - &patches_blp).abs() * &mask_bl1;
        let error_b = error_blp.sum_dim_intlist([1, 2].as_slice(), false, None::<Kind>)
            / (n_removed * self.model.patch_values() as f64);
        (error_b * &slot.weights_b).mean(None::<Kind>)
    }
}

impl SimMimLoss {
    /// Predicts the pixels of all patches; `mask_bl1` is 1 for those that are removed.
    fn predict(&self, weights: &Weights, patches_blp: &Tensor, mask_bl1: &Tensor) -> Tensor {
        let embed = Linear::new(weights, "patch_embed.proj");
        let seen_bld = embed.forward(patches_blp) * (1.0 - mask_bl1);
        let x_bld: Tensor = seen_bld + weights.get("mask_token") * mask_bl1;
        let b = x_bld.size()[0];
        let cls_b1d = weights.get("cls_token").expand([b, -1, -1], false);
        let x_bnd = Tensor::cat(&[cls_b1d, x_bld], 1) + &self.pos_1nd;
        let heads = i64::from(self.model.heads);
        let block = |i: u32| Block::new(weights, &format!("blocks.{i}"), heads);
        let blocks: Vec<Block> = (0..self.model.depth).map(block).collect();
        let x_bnd = LayerNorm::new(weights, "norm").forward(&vit::run(&blocks, x_bnd));
        let n_patches = x_bnd.size()[1] - 1;
        Linear::new(weights, "head").forward(&x_bnd.narrow(1, 1, n_patches))
    }
}

fn main() -> ExitCode {
    lacuna_mae::worker::main(SimMim)
}
