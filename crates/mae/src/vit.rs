//! The pieces of a vision transformer: pre-norm blocks, linear maps, layer norms.
//!
//! Legend: b batch, n tokens, d width, m hidden width of the MLP, a heads, f width of a head.

use lacuna_recipe::model::LAYER_NORM_EPS;
use tch::Tensor;

use crate::patches::size3;
use crate::weights::Weights;

/// Runs a stack of blocks.
pub fn run(blocks: &[Block], x_bnd: Tensor) -> Tensor {
    blocks.iter().fold(x_bnd, |x_bnd, block| block.forward(&x_bnd))
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
        let x_bnd = x_bnd + self.attention(&self.norm1.forward(x_bnd));
        let hidden_bnm = self.fc1.forward(&self.norm2.forward(&x_bnd)).gelu("none");
        x_bnd + self.fc2.forward(&hidden_bnm)
    }

    fn attention(&self, x_bnd: &Tensor) -> Tensor {
        let (b, n, d) = size3(x_bnd);
        let heads = |t_bnd: &Tensor| t_bnd.view([b, n, self.heads, d / self.heads]).transpose(1, 2);
        let qkv = self.qkv.forward(x_bnd).chunk(3, -1);
        let (q_banf, k_banf, v_banf) = (heads(&qkv[0]), heads(&qkv[1]), heads(&qkv[2]));
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
