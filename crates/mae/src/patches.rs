//! What the decoder must predict, and how wrong it is.
//!
//! Legend: b batch, c channels, h w pixels, l patches of an image, r removed patches, p values of
//! a patch.

use lacuna_recipe::model::NORM_PIX_EPS;
use tch::{Kind, Tensor};

/// Splits images into flattened patches.
///
/// # Shapes
/// - `images_bchw`: `[b, c, h, w]`, with `h` and `w` multiples of `patch_size`
/// - returns `[b, l, p]` with `l = (h / patch_size) · (w / patch_size)` in raster order; within a
///   patch the order is row, column, channel
pub fn patchify(images_bchw: &Tensor, patch_size: i64) -> Tensor {
    let (b, c, h, w) = size4(images_bchw);
    let s = patch_size;
    images_bchw.view([b, c, h / s, s, w / s, s]).permute([0, 2, 4, 3, 5, 1]).reshape([
        b,
        (h / s) * (w / s),
        s * s * c,
    ])
}

/// Puts flattened patches together again: the inverse of [`patchify`].
///
/// # Shapes
/// - `patches_blp`: `[b, l, p]`; `grid` is the rows and columns of patches
/// - returns `[b, c, h, w]`
pub fn unpatchify(patches_blp: &Tensor, patch_size: i64, grid: [i64; 2]) -> Tensor {
    let (b, _, p) = size3(patches_blp);
    let ([rows, columns], s) = (grid, patch_size);
    let c = p / (s * s);
    patches_blp.view([b, rows, columns, s, s, c]).permute([0, 5, 1, 3, 2, 4]).reshape([
        b,
        c,
        rows * s,
        columns * s,
    ])
}

/// Normalises each patch: `(x − mean) / sqrt(var + 1e-6)`, with the **unbiased** variance of all
/// values of the patch, channels together.
///
/// A constant patch becomes zero. The variance is spelled out because libtorch's own takes one
/// slow pass.
pub fn normalize_patches(patches_brp: &Tensor) -> Tensor {
    let degrees = patches_brp.size()[2] - 1;
    let centered_brp = patches_brp - patches_brp.mean_dim(-1, true, None::<Kind>);
    let squares_br1 = centered_brp.square().sum_dim_intlist(-1, true, None::<Kind>);
    let scale_br1 = (squares_br1 / degrees as f64 + NORM_PIX_EPS).rsqrt();
    centered_brp * scale_br1
}

/// Averages the squared error of each sample's removed patches, then over the batch.
///
/// A sample of weight 0 adds nothing and still counts in the divisor. Every sample has the same
/// number of removed patches, so this is the reference's `sum(error · mask) / sum(mask)` for
/// weights of 1.
pub fn loss(pred_brp: &Tensor, target_brp: &Tensor, weights_b: &Tensor) -> Tensor {
    let error_b = (pred_brp - target_brp).square().mean_dim([1, 2].as_slice(), false, None::<Kind>);
    (error_b * weights_b).mean(None::<Kind>)
}

/// Returns the sizes of a tensor of rank 3.
pub(crate) fn size3(tensor: &Tensor) -> (i64, i64, i64) {
    tensor.size3().expect("callers pass tensors of rank 3")
}

fn size4(tensor: &Tensor) -> (i64, i64, i64, i64) {
    tensor.size4().expect("callers pass tensors of rank 4")
}
