//! The pieces of a vision transformer: pre-norm blocks, linear maps, layer norms.
//!
//! Legend: b batch, n tokens, d width, m hidden width of the MLP, a heads, f width of a head.

use lacuna_recipe::model::LAYER_NORM_EPS;
use tch::{Kind, Tensor};

use crate::autograd::border;
use crate::patches::size3;
use crate::weights::Weights;

/// Runs a stack of blocks; a backward pass may be cut before each.
pub fn run(blocks: &[Block], x_bnd: Tensor) -> Tensor {
    blocks.iter().fold(x_bnd, |x_bnd, block| block.forward(&border(x_bnd)))
}

/// Runs a stack of blocks whose branches are scaled by `drops`, two `[b, 1, 1]` for each block:
/// stochastic depth.
pub fn run_dropped(blocks: &[Block], x_bnd: Tensor, drops: &[[Tensor; 2]]) -> Tensor {
    assert_eq!(blocks.len(), drops.len(), "two scales for each block");
    let step = |x_bnd: Tensor, (block, drops): (&Block, &[Tensor; 2])| {
        block.forward_dropped(&border(x_bnd), drops)
    };
    blocks.iter().zip(drops).fold(x_bnd, step)
}

/// Runs a stack of blocks and returns the tokens `ids_bi` of what comes out, `[b, i, d]`. The last
/// block computes no others: they would only have been seen by blocks after it.
pub fn run_to(blocks: &[Block], x_bnd: Tensor, ids_bi: &Tensor) -> Tensor {
    let Some((last, before)) = blocks.split_last() else { return pick(&x_bnd, ids_bi) };
    last.forward_at(&border(run(before, x_bnd)), ids_bi)
}

/// Picks rows: `out[b, i, :] = x[b, ids[b, i], :]`.
pub fn pick(x_bnd: &Tensor, ids_bi: &Tensor) -> Tensor {
    let (b, n, d) = size3(x_bnd);
    // Whole rows of one long list: a gather would move, and add in the pass back, single elements.
    let kind = (Kind::Int64, ids_bi.device());
    let first_b1 = Tensor::arange_start_step(0, b * n, n, kind).unsqueeze(-1);
    let rows = (ids_bi + first_b1).reshape(-1);
    x_bnd.reshape([b * n, d]).index_select(0, &rows).view([b, -1, d])
}

/// A pre-norm transformer block.
#[derive(Debug)]
pub struct Block {
    heads: i64,
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    /// Builds the block whose tensors are named `name.norm1.weight` and so on.
    pub fn new(weights: &Weights, name: &str, heads: i64) -> Self {
        Block {
            heads,
            norm1: LayerNorm::new(weights, &format!("{name}.norm1")),
            qkv: Linear::new(weights, &format!("{name}.attn.qkv")),
            proj: Linear::new(weights, &format!("{name}.attn.proj")),
            norm2: LayerNorm::new(weights, &format!("{name}.norm2")),
            fc1: Linear::new(weights, &format!("{name}.mlp.fc1")),
            fc2: Linear::new(weights, &format!("{name}.mlp.fc2")),
        }
    }

    /// Computes `[b, n, d]` to `[b, n, d]`.
    pub fn forward(&self, x_bnd: &Tensor) -> Tensor {
        let qkv = self.qkv.forward(&self.norm1.forward(x_bnd)).chunk(3, -1);
        self.mlp(x_bnd + self.attention(&qkv[0], &qkv[1], &qkv[2]))
    }

    /// Computes `[b, n, d]` to `[b, n, d]` with scaled branches.
    fn forward_dropped(&self, x_bnd: &Tensor, [attention_b11, mlp_b11]: &[Tensor; 2]) -> Tensor {
        let qkv = self.qkv.forward(&self.norm1.forward(x_bnd)).chunk(3, -1);
        let x_bnd = x_bnd + self.attention(&qkv[0], &qkv[1], &qkv[2]) * attention_b11;
        let branch_bnd = self.mlp_branch(&x_bnd) * mlp_b11;
        x_bnd + branch_bnd
    }

    /// Computes the tokens `ids_bi` only, `[b, i, d]`. They look at all others.
    fn forward_at(&self, x_bnd: &Tensor, ids_bi: &Tensor) -> Tensor {
        let normal_bnd = self.norm1.forward(x_bnd);
        let d = x_bnd.size()[2];
        let q_bid = self.qkv.rows(0, d).forward(&pick(&normal_bnd, ids_bi));
        let kv = self.qkv.rows(d, 2 * d).forward(&normal_bnd).chunk(2, -1);
        self.mlp(pick(x_bnd, ids_bi) + self.attention(&q_bid, &kv[0], &kv[1]))
    }

    fn mlp(&self, x_bnd: Tensor) -> Tensor {
        let branch_bnd = self.mlp_branch(&x_bnd);
        x_bnd + branch_bnd
    }

    fn mlp_branch(&self, x_bnd: &Tensor) -> Tensor {
        self.fc2.forward(&self.fc1.forward(&self.norm2.forward(x_bnd)).gelu("none"))
    }

    /// Lets each token of `q_bid` look at those of `k_bnd` and `v_bnd`.
    fn attention(&self, q_bid: &Tensor, k_bnd: &Tensor, v_bnd: &Tensor) -> Tensor {
        let heads = |t_bnd: &Tensor| {
            let (b, n, d) = size3(t_bnd);
            t_bnd.view([b, n, self.heads, d / self.heads]).transpose(1, 2)
        };
        let (q_banf, k_banf, v_banf) = (heads(q_bid), heads(k_bnd), heads(v_bnd));
        let (b, n, d) = size3(q_bid);
        let out_banf = Tensor::scaled_dot_product_attention(
            &q_banf,
            &k_banf,
            &v_banf,
            None::<Tensor>,
            0.0,
            false,
            None,
            false,
        );
        self.proj.forward(&out_banf.transpose(1, 2).reshape([b, n, d]))
    }
}

/// `x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// Builds the map whose tensors are `name.weight` and `name.bias`.
    ///
    /// A convolution whose stride is its kernel is a linear map of patches. Its weight is stored
    /// channel first and patches are flattened channel last, so it is turned here.
    pub fn new(weights: &Weights, name: &str) -> Self {
        let bias = weights.get(&format!("{name}.bias"));
        let stored = weights.get(&format!("{name}.weight"));
        let weight = match stored.dim() {
            4 => stored.permute([0, 2, 3, 1]).reshape([stored.size()[0], -1]),
            _ => stored,
        };
        Linear { weight, bias }
    }

    /// Returns the map to `n` outputs from output `from` on.
    fn rows(&self, from: i64, n: i64) -> Self {
        Linear { weight: self.weight.narrow(0, from, n), bias: self.bias.narrow(0, from, n) }
    }

    /// Computes in the weight's own precision, whatever comes in.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.to_kind(self.weight.kind()).linear(&self.weight, Some(&self.bias))
    }
}

/// Normalisation over the width, with the biased variance.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// Builds the norm whose tensors are `name.weight` and `name.bias`.
    pub fn new(weights: &Weights, name: &str) -> Self {
        let get = |part: &str| weights.get(&format!("{name}.{part}"));
        LayerNorm { weight: get("weight"), bias: get("bias") }
    }

    /// Normalises the last dimension.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let width = self.weight.size();
        x.layer_norm(width, Some(&self.weight), Some(&self.bias), LAYER_NORM_EPS, false)
    }
}

#[cfg(test)]
mod tests;
