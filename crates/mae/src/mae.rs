//! The masked autoencoder: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021.
//!
//! A random quarter of an image's patches goes through a deep encoder. A shallow decoder sees the
//! encoded patches at their places, a learned token at all others, and predicts the pixels of the
//! removed ones. Names are those of the reference (`ids_shuffle`, `ids_restore`, `qkv`, `fc1`).
//!
//! Legend of the shape suffixes: b batch, c channels, h w pixels, l patches of an image, k kept
//! patches, r removed patches, n tokens of a sequence (the class token comes first), p values of a
//! patch, d encoder width, e decoder width, a heads, f width of a head.

use lacuna_recipe::mask;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::pos_embed;
use tch::{Device, Kind, Tensor};

use crate::patches::{self, normalize_patches, patchify, size3};
use crate::vit::{Block, LayerNorm, Linear, pick, run, run_to};
use crate::weights::Weights;

/// The model: parameters by role. Cheap to build; it shares the tensors of [`Weights`].
#[derive(Debug)]
pub struct Mae {
    patch_size: i64,
    norm_pix_loss: bool,
    patch_embed: Linear,
    cls_token_11d: Tensor,
    pos_embed_1nd: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    decoder_embed: Linear,
    mask_token_11e: Tensor,
    decoder_pos_embed_1ne: Tensor,
    decoder_blocks: Vec<Block>,
    decoder_norm: LayerNorm,
    decoder_pred: Linear,
}

/// What the decoder says about whole images.
#[derive(Debug)]
pub struct Prediction {
    /// Encoded class token and kept patches in shuffled order, `[b, 1 + k, d]`.
    pub latent_bnd: Tensor,
    /// Predicted values of all patches in raster order, `[b, l, p]`.
    pub pred_blp: Tensor,
}

impl Mae {
    /// Builds the model of `config` from its parameters.
    pub fn new(config: &ModelConfig, tables: &PosTables, weights: &Weights) -> Self {
        let linear = |name: &str| Linear::new(weights, name);
        let norm = |name: &str| LayerNorm::new(weights, name);
        let blocks = |prefix: &str, depth: u32, heads: u32| {
            let block = |i| Block::new(weights, &format!("{prefix}.{i}"), i64::from(heads));
            (0..depth).map(block).collect()
        };
        Mae {
            patch_size: i64::from(config.patch_size),
            norm_pix_loss: config.norm_pix_loss,
            patch_embed: linear("patch_embed.proj"),
            cls_token_11d: weights.get("cls_token"),
            pos_embed_1nd: tables.encoder_1nd.shallow_clone(),
            blocks: blocks("blocks", config.depth, config.heads),
            norm: norm("norm"),
            decoder_embed: linear("decoder_embed"),
            mask_token_11e: weights.get("mask_token"),
            decoder_pos_embed_1ne: tables.decoder_1ne.shallow_clone(),
            decoder_blocks: blocks("decoder_blocks", config.decoder_depth, config.decoder_heads),
            decoder_norm: norm("decoder_norm"),
            decoder_pred: linear("decoder_pred"),
        }
    }

    /// Computes the loss of a batch: the mean over samples of the mean squared error of the removed
    /// patches, with `weights_b` as in [`patches::loss`].
    ///
    /// Only removed patches are predicted, because the loss reads no others.
    pub fn loss(&self, images_bchw: &Tensor, masks: &Masks, weights_b: &Tensor) -> Tensor {
        let patches_blp = patchify(images_bchw, self.patch_size);
        let latent_bnd = self.encode_kept(&patches_blp, masks);
        let tokens_bne = self.decoder_tokens(&latent_bnd, masks);
        let removed_bre = run_to(&self.decoder_blocks, tokens_bne, &(&masks.ids_removed_br + 1));
        let target_brp = self.target(&pick(&patches_blp, &masks.ids_removed_br));
        patches::loss(&self.predict_pixels(&removed_bre), &target_brp, weights_b)
    }

    /// Predicts every patch from the kept ones.
    pub fn predict(&self, images_bchw: &Tensor, masks: &Masks) -> Prediction {
        let patches_blp = patchify(images_bchw, self.patch_size);
        let latent_bnd = self.encode_kept(&patches_blp, masks);
        let tokens_bne = run(&self.decoder_blocks, self.decoder_tokens(&latent_bnd, masks));
        let n_patches = tokens_bne.size()[1] - 1;
        let pred_blp = self.predict_pixels(&tokens_bne.narrow(1, 1, n_patches));
        Prediction { latent_bnd, pred_blp }
    }

    /// Encodes whole images without a mask: final-norm class token, then all patches, `[b, 1 + l,
    /// d]`.
    pub fn encode(&self, images_bchw: &Tensor) -> Tensor {
        self.last_norm(&self.tokens(images_bchw))
    }

    /// Encodes whole images without a mask up to the last norm: class token, then all patches, `[b,
    /// 1 + l, d]`.
    pub fn tokens(&self, images_bchw: &Tensor) -> Tensor {
        let patches_blp = patchify(images_bchw, self.patch_size);
        let n_patches = patches_blp.size()[1];
        self.patch_tokens(&patches_blp, &self.pos_embed_1nd.narrow(1, 1, n_patches))
    }

    /// Applies the encoder's last norm to `[…, d]`.
    pub fn last_norm(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    /// Encodes the kept patches in shuffled order, each with the position it has in the image.
    fn encode_kept(&self, patches_blp: &Tensor, masks: &Masks) -> Tensor {
        let (b, l, _) = size3(patches_blp);
        let pos_ld = self.pos_embed_1nd.narrow(1, 1, l).squeeze_dim(0);
        let pos_bkd =
            pos_ld.index_select(0, &masks.ids_keep_bk.reshape(-1)).view([b, -1, pos_ld.size()[1]]);
        self.last_norm(&self.patch_tokens(&pick(patches_blp, &masks.ids_keep_bk), &pos_bkd))
    }

    fn patch_tokens(&self, patches_bkp: &Tensor, pos_bkd: &Tensor) -> Tensor {
        let x_bkd = self.patch_embed.forward(patches_bkp) + pos_bkd;
        // The class token's row of the table is zero, so nothing is added to it.
        let cls_b1d = self.cls_token_11d.expand([x_bkd.size()[0], -1, -1], false);
        let x_bnd = Tensor::cat(&[cls_b1d, x_bkd], 1);
        run(&self.blocks, x_bnd)
    }

    /// Puts encoded patches back in their places and fills the others with the mask token: what the
    /// decoder's blocks start from, `[b, 1 + l, e]`.
    fn decoder_tokens(&self, latent_bnd: &Tensor, masks: &Masks) -> Tensor {
        let tokens_bne = self.decoder_embed.forward(latent_bnd);
        // The residual stream is as precise as the tokens, in half precision too.
        let tokens_bne = tokens_bne.to_kind(self.mask_token_11e.kind());
        let x_bne = unshuffle(&tokens_bne, &self.mask_token_11e, &masks.ids_restore_bl);
        x_bne + &self.decoder_pos_embed_1ne
    }

    fn predict_pixels(&self, tokens_bre: &Tensor) -> Tensor {
        self.decoder_pred.forward(&self.decoder_norm.forward(tokens_bre))
    }

    fn target(&self, patches_brp: &Tensor) -> Tensor {
        if self.norm_pix_loss {
            normalize_patches(patches_brp)
        } else {
            patches_brp.shallow_clone()
        }
    }
}

/// Which patches of each sample are kept, as index tensors.
#[derive(Debug)]
pub struct Masks {
    /// Kept patches in shuffled order, `[b, k]`.
    pub ids_keep_bk: Tensor,
    /// Removed patches in shuffled order, `[b, r]`.
    pub ids_removed_br: Tensor,
    /// Place of each patch in the shuffled order, `[b, l]`.
    pub ids_restore_bl: Tensor,
}

impl Masks {
    /// Builds the indices from permutations `ids_shuffle` `[b, n_patches]`, of which the first
    /// `len_keep` patches are kept.
    pub fn from_shuffle(ids_shuffle: &[u32], n_patches: usize, len_keep: usize) -> Self {
        assert_eq!(ids_shuffle.len() % n_patches, 0, "whole permutations");
        let ids: Vec<i64> = ids_shuffle.iter().map(|&id| i64::from(id)).collect();
        let mut restore: Vec<i64> = vec![0; ids.len()];
        for (ids, restore) in ids.chunks(n_patches).zip(restore.chunks_mut(n_patches)) {
            for (place, &id) in ids.iter().enumerate() {
                restore[id as usize] = place as i64;
            }
        }
        let (l, k) = (n_patches as i64, len_keep as i64);
        let ids_shuffle_bl = Tensor::from_slice(&ids).view([-1, l]);
        Masks {
            ids_keep_bk: ids_shuffle_bl.narrow(1, 0, k),
            ids_removed_br: ids_shuffle_bl.narrow(1, k, l - k),
            ids_restore_bl: Tensor::from_slice(&restore).view([-1, l]),
        }
    }

    /// Copies the indices to `device`.
    pub fn to_device(&self, device: Device) -> Self {
        Masks {
            ids_keep_bk: self.ids_keep_bk.to_device(device),
            ids_removed_br: self.ids_removed_br.to_device(device),
            ids_restore_bl: self.ids_restore_bl.to_device(device),
        }
    }

    /// Returns 1 for each removed patch and 0 for each kept one, in raster order, `[b, l]`.
    pub fn mask_bl(&self) -> Tensor {
        self.ids_restore_bl.ge(self.ids_keep_bk.size()[1]).to_kind(Kind::Float)
    }
}

/// The fixed position tables of encoder and decoder.
#[derive(Debug)]
pub struct PosTables {
    encoder_1nd: Tensor,
    decoder_1ne: Tensor,
}

impl PosTables {
    /// Computes the tables of `config` as tensors of `kind`.
    pub fn new(config: &ModelConfig, kind: Kind) -> Self {
        let table = |width: u32| {
            let flat = pos_embed::sincos_2d(width as usize, config.grid());
            Tensor::from_slice(&flat).view([1, -1, i64::from(width)]).to_kind(kind)
        };
        PosTables { encoder_1nd: table(config.width), decoder_1ne: table(config.decoder_width) }
    }

    /// Takes other patch rows for the encoder: `table` is `[1 + l, d]`, row-major. Its first row is
    /// not used: the class token's is zero.
    pub fn with_encoder(self, table: &[f32]) -> Self {
        let encoder_1nd = Tensor::from_slice(table).view_as(&self.encoder_1nd);
        PosTables { encoder_1nd, ..self }
    }

    /// Takes another table for the decoder: `table` is `[1 + l, e]`, row-major.
    pub fn with_decoder(self, table: &[f32]) -> Self {
        let decoder_1ne = Tensor::from_slice(table).view_as(&self.decoder_1ne);
        PosTables { decoder_1ne, ..self }
    }

    /// Returns the same tables again, without copying them.
    pub fn share(&self) -> Self {
        PosTables {
            encoder_1nd: self.encoder_1nd.shallow_clone(),
            decoder_1ne: self.decoder_1ne.shallow_clone(),
        }
    }

    /// Returns the encoder's table, `[1, 1 + l, d]`; the class token's row is zero.
    pub fn encoder_1nd(&self) -> &Tensor {
        &self.encoder_1nd
    }

    /// Copies the tables to `device`.
    pub fn to_device(&self, device: Device) -> Self {
        PosTables {
            encoder_1nd: self.encoder_1nd.to_device(device),
            decoder_1ne: self.decoder_1ne.to_device(device),
        }
    }
}

/// Returns how many patches of `config` are kept and how many there are, as the masks need them.
pub fn mask_sizes(config: &ModelConfig) -> (usize, usize) {
    (mask::len_keep(config.n_patches(), config.mask_ratio), config.n_patches())
}

/// Moves tokens from shuffled order to their places in the image.
///
/// # Shapes
/// - `tokens_bne`: `[b, 1 + k, e]`, the class token and the kept patches in shuffled order
/// - `ids_restore_bl`: place of each patch in the shuffled order; from place k on it was removed
/// - returns `[b, 1 + l, e]`: the class token, then per patch its token, or the mask token
pub fn unshuffle(tokens_bne: &Tensor, mask_token_11e: &Tensor, ids_restore_bl: &Tensor) -> Tensor {
    let (b, n, _) = size3(tokens_bne);
    // One mask token behind the kept patches stands for every removed one.
    let mask_token_b1e = mask_token_11e.expand([b, -1, -1], false);
    let tokens_bne = Tensor::cat(&[tokens_bne, &mask_token_b1e], 1);
    let kept = n - 1;
    let ids_cls_b1 = Tensor::zeros([b, 1], (Kind::Int64, ids_restore_bl.device()));
    pick(&tokens_bne, &Tensor::cat(&[ids_cls_b1, ids_restore_bl.clamp_max(kept) + 1], 1))
}
