//! Learned position tables for images of other sizes.
//!
//! A sine-cosine table is not resized but computed for the new grid
//! ([`lacuna_recipe::pos_embed`]). Others are resampled as the library does that they come from,
//! and the two differ: by up to 0.09 from a 4 x 4 grid to 3 x 3.

use tch::{Kind, Tensor};

/// How a table is resampled. Both are bicubic, with pixel centres at half numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Without antialiasing, a = -0.75: the reference and transformers.
    Plain,
    /// With antialiasing, a = -0.5: timm.
    Antialias,
}

/// Resizes a table from the grid `from` (rows, columns) to `to`.
///
/// # Shapes
/// - `table`: `[1 + l, width]`, row-major, the class token's row first
/// - returns `[1 + l', width]`; the class token's row is the same
///
/// # Panics
/// If the table is not one of `from`, or a grid is empty.
pub fn resize_table(
    table: &[f32],
    width: usize,
    from: [usize; 2],
    to: [usize; 2],
    resample: Resample,
) -> Vec<f32> {
    assert_eq!(table.len(), (1 + from[0] * from[1]) * width, "a table of the grid {from:?}");
    assert!(from.iter().chain(&to).all(|&side| side > 0), "grids have patches");
    if from == to {
        return table.to_vec();
    }
    let [rows, columns] = from.map(|side| side as i64);
    let (class_row, patches) = table.split_at(width);
    let grid_1dhw =
        Tensor::from_slice(patches).view([1, rows, columns, width as i64]).permute([0, 3, 1, 2]);
    let size = to.map(|side| side as i64);
    let resized_1dhw = match resample {
        Resample::Plain => grid_1dhw.upsample_bicubic2d(size, false, None, None),
        Resample::Antialias => grid_1dhw.internal_upsample_bicubic2d_aa(size, false, None, None),
    };
    let flat = resized_1dhw.permute([0, 2, 3, 1]).contiguous().view(-1);
    let mut out: Vec<f32> = vec![0.0; (1 + to[0] * to[1]) * width];
    out[..width].copy_from_slice(class_row);
    flat.to_kind(Kind::Float).copy_data(&mut out[width..], to[0] * to[1] * width);
    out
}
