//! A model that is only read: features of whole images and predictions of masked ones.

use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::Normalize;
use tch::{Kind, Tensor};

use crate::mae::{Mae, Masks, PosTables, mask_sizes};
use crate::runtime;
use crate::weights::{Weights, values};

/// A copy of a model's parameters, ready to compute without gradients.
#[derive(Debug)]
pub struct FrozenMae {
    model: ModelConfig,
    mae: Mae,
    normalize: Normalize,
    mean: Vec<f64>,
    std: Vec<f64>,
}

/// What the encoder says about images it sees whole, after its final norm. Row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// Class token, `[b, d]`: what timm returns and a linear probe reads.
    pub cls: Vec<f32>,
    /// Mean over the patch tokens, `[b, d]`.
    pub mean_patch: Vec<f32>,
    /// Class token, then patch tokens in raster order, `[b, 1 + l, d]`.
    pub tokens: Vec<f32>,
}

impl FrozenMae {
    /// Copies parameters, flat in [`Layout`] order.
    ///
    /// `mean` and `std` have one value per channel, in units of full brightness.
    ///
    /// # Panics
    /// If the model has problems or a length does not fit it.
    pub fn new(model: &ModelConfig, mean: &[f64], std: &[f64], params: &[f32]) -> Self {
        let problems = model.problems();
        assert!(problems.is_empty(), "the model cannot be built: {problems:?}");
        assert_eq!(mean.len(), model.channels as usize, "one mean per channel");
        let weights = Weights::copy_of(&Layout::new(model.params()), params);
        FrozenMae {
            mae: Mae::new(model, &PosTables::new(model, Kind::Float), &weights),
            model: model.clone(),
            normalize: Normalize::new(mean, std),
            mean: mean.to_vec(),
            std: std.to_vec(),
        }
    }

    /// Returns the sizes of the model.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// Returns mean and deviation of each channel, in units of full brightness.
    pub fn normalization(&self) -> (&[f64], &[f64]) {
        (&self.mean, &self.std)
    }

    /// Returns the bytes of one image.
    pub fn image_bytes(&self) -> usize {
        let [height, width] = self.model.img_size;
        (height * width * self.model.channels) as usize
    }

    /// Computes features of images `pixels` `[b, h, w, c]`; nothing is masked.
    ///
    /// # Panics
    /// If `pixels` does not hold whole images.
    pub fn features(&self, pixels: &[u8]) -> Features {
        runtime::pin_threads();
        tch::no_grad(|| {
            let tokens_bnd = self.mae.encode(&self.images(pixels));
            let n_patches = self.model.n_patches() as i64;
            let patches_bld = tokens_bnd.narrow(1, 1, n_patches);
            Features {
                cls: copy(&tokens_bnd.select(1, 0)),
                mean_patch: copy(&patches_bld.mean_dim(1, false, None::<Kind>)),
                tokens: copy(&tokens_bnd),
            }
        })
    }

    /// Predicts all patches of images `pixels` `[b, h, w, c]` from the kept ones.
    ///
    /// `ids_shuffle` `[b, l]` holds one permutation per image. Returns `[b, l, p]` in raster
    /// order, in the units of the loss: per-patch normalised when the model is trained so, else
    /// normalised pixels.
    ///
    /// # Panics
    /// If `pixels` or `ids_shuffle` do not hold whole images and permutations.
    pub fn predict(&self, pixels: &[u8], ids_shuffle: &[u32]) -> Vec<f32> {
        runtime::pin_threads();
        let (len_keep, n_patches) = mask_sizes(&self.model);
        let masks = Masks::from_shuffle(ids_shuffle, n_patches, len_keep);
        tch::no_grad(|| copy(&self.mae.predict(&self.images(pixels), &masks).pred_blp))
    }

    fn images(&self, pixels: &[u8]) -> Tensor {
        assert_eq!(pixels.len() % self.image_bytes(), 0, "whole images");
        let [height, width] = self.model.img_size;
        let mut normal: Vec<f32> = vec![0.0; pixels.len()];
        self.normalize.apply(pixels, (height * width) as usize, &mut normal);
        let shape = [-1, i64::from(self.model.channels), i64::from(height), i64::from(width)];
        Tensor::from_slice(&normal).view(shape)
    }
}

fn copy(tensor: &Tensor) -> Vec<f32> {
    values::<f32>(&tensor.contiguous()).to_vec()
}
