//! A model that is only read: features of whole images and predictions of masked ones.

use std::borrow::Cow;

use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::Normalize;
use tch::{Device, Kind, Tensor};

use crate::mae::{Mae, Masks, PosTables, mask_sizes};
use crate::runtime;
use crate::weights::{Weights, values};

/// A copy of a model's parameters, ready to compute without gradients.
#[derive(Debug)]
pub struct FrozenMae {
    model: ModelConfig,
    weights: Weights,
    tables: PosTables,
    mae: Mae,
    device: Device,
    normalize: Normalize,
    mean: Vec<f64>,
    std: Vec<f64>,
    norm_after_mean: bool,
}

/// Position tables other than the sine-cosine ones, for the grid of the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnTables {
    /// The encoder's, `[1 + l, d]`, row-major; the first row is added to the class token.
    pub encoder: Option<Vec<f32>>,
    /// The decoder's, `[1 + l, e]`, row-major.
    pub decoder: Option<Vec<f32>>,
}

/// What of an encoded image is its feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The class token, `[d]`: what timm returns and a linear probe reads.
    Cls,
    /// The mean over the patch tokens, `[d]`.
    Mean,
    /// All tokens, `[1 + l, d]`.
    Tokens,
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
        FrozenMae::with_tables(model, mean, std, params, &OwnTables::default())
    }

    /// Copies parameters and position tables.
    ///
    /// # Panics
    /// As [`new`](Self::new) does, and if a table is not for the model's grid.
    pub fn with_tables(
        model: &ModelConfig,
        mean: &[f64],
        std: &[f64],
        params: &[f32],
        own: &OwnTables,
    ) -> Self {
        let problems = model.problems();
        assert!(problems.is_empty(), "the model cannot be built: {problems:?}");
        assert_eq!(mean.len(), model.channels as usize, "one mean per channel");
        let layout = Layout::new(model.params());
        let mut tables = PosTables::new(model, Kind::Float);
        let mut params = Cow::Borrowed(params);
        if let Some(table) = &own.encoder {
            // The model adds no position to its class token; the sum is the same.
            let cls = layout.range(layout.find("cls_token").expect("every model has one"));
            params.to_mut()[cls].iter_mut().zip(table).for_each(|(x, position)| *x += position);
            tables = tables.with_encoder(table);
        }
        if let Some(table) = &own.decoder {
            tables = tables.with_decoder(table);
        }
        let weights = Weights::copy_of(&layout, &params);
        FrozenMae {
            mae: Mae::new(model, &tables, &weights),
            weights,
            tables,
            device: Device::Cpu,
            model: model.clone(),
            normalize: Normalize::new(mean, std),
            mean: mean.to_vec(),
            std: std.to_vec(),
            norm_after_mean: false,
        }
    }

    /// Returns the same model with its last norm behind the mean of the patches, as `fc_norm` of
    /// timm is: [`Pool::Mean`] is then what timm's head reads, and [`Pool::Tokens`] come before it.
    #[must_use]
    pub fn norm_after_mean(self, after: bool) -> Self {
        FrozenMae { norm_after_mean: after, ..self }
    }

    /// Returns the same model on `device`; what goes in and comes out stays on the host.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        let (weights, tables) = (self.weights.to_device(device), self.tables.to_device(device));
        FrozenMae { mae: Mae::new(&self.model, &tables, &weights), weights, tables, device, ..self }
    }

    /// Returns the same model again for another thread; the parameters are shared.
    pub fn share(&self) -> Self {
        let (weights, tables) = (self.weights.share(), self.tables.share());
        FrozenMae {
            mae: Mae::new(&self.model, &tables, &weights),
            weights,
            tables,
            device: self.device,
            model: self.model.clone(),
            normalize: self.normalize.clone(),
            mean: self.mean.clone(),
            std: self.std.clone(),
            norm_after_mean: self.norm_after_mean,
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
            Features {
                cls: copy(&tokens_bnd.select(1, 0)),
                mean_patch: copy(&self.mean_patch(&tokens_bnd)),
                tokens: copy(&tokens_bnd),
            }
        })
    }

    /// Returns the shape of one image's feature.
    pub fn feature_shape(&self, pool: Pool) -> Vec<usize> {
        let width = self.model.width as usize;
        match pool {
            Pool::Cls | Pool::Mean => vec![width],
            Pool::Tokens => vec![1 + self.model.n_patches(), width],
        }
    }

    /// Computes one feature of each of the images `pixels` `[b, h, w, c]`, after the final norm;
    /// nothing is masked.
    ///
    /// # Panics
    /// If `pixels` does not hold whole images.
    pub fn pooled(&self, pixels: &[u8], pool: Pool) -> Vec<f32> {
        runtime::pin_threads();
        tch::no_grad(|| {
            let images_bchw = self.images(pixels);
            match (pool, self.norm_after_mean) {
                (Pool::Mean, true) => {
                    let mean_bd = self.mean_patch(&self.mae.tokens(&images_bchw));
                    copy(&self.mae.last_norm(&mean_bd))
                }
                (Pool::Tokens, true) => copy(&self.mae.tokens(&images_bchw)),
                (Pool::Cls, _) => copy(&self.mae.encode(&images_bchw).select(1, 0)),
                (Pool::Mean, false) => copy(&self.mean_patch(&self.mae.encode(&images_bchw))),
                (Pool::Tokens, false) => copy(&self.mae.encode(&images_bchw)),
            }
        })
    }

    fn mean_patch(&self, tokens_bnd: &Tensor) -> Tensor {
        let n_patches = self.model.n_patches() as i64;
        tokens_bnd.narrow(1, 1, n_patches).mean_dim(1, false, None::<Kind>)
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
        let masks = Masks::from_shuffle(ids_shuffle, n_patches, len_keep).to_device(self.device);
        tch::no_grad(|| copy(&self.mae.predict(&self.images(pixels), &masks).pred_blp))
    }

    fn images(&self, pixels: &[u8]) -> Tensor {
        assert_eq!(pixels.len() % self.image_bytes(), 0, "whole images");
        let [height, width] = self.model.img_size;
        let mut normal: Vec<f32> = vec![0.0; pixels.len()];
        self.normalize.apply(pixels, (height * width) as usize, &mut normal);
        let shape = [-1, i64::from(self.model.channels), i64::from(height), i64::from(width)];
        Tensor::from_slice(&normal).view(shape).to_device(self.device)
    }
}

fn copy(tensor: &Tensor) -> Vec<f32> {
    values::<f32>(&tensor.to_device(Device::Cpu).contiguous()).to_vec()
}
