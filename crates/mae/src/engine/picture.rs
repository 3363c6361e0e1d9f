//! Pictures of what the weights of an engine fill in.

use lacuna_recipe::philox::{Draws, Tag};
use lacuna_recipe::step::Normalize;
use lacuna_worker::engine::Picture;
use tch::Tensor;

use super::EngineSetup;
use super::slot::{SlotInput, SlotProgram};
use crate::reconstruct::{Scale, draw_each};
use crate::weights::Weights;

/// Draws images `pixels` `[b, h, w, c]`, of which `ids_shuffle` `[b, n_patches]` says what is
/// masked; `weights` are on the program's device. Nothing where the objective predicts no pixels.
pub(super) fn draw(
    slot: &SlotProgram,
    setup: &EngineSetup,
    weights: &Weights,
    pixels: &[u8],
    ids_shuffle: &[u32],
) -> Option<Vec<Picture>> {
    let n_images = ids_shuffle.len() / setup.model.n_patches();
    let [height, width] = setup.model.img_size;
    let mut normal: Vec<f32> = vec![0.0; pixels.len()];
    let normalize = Normalize::new(&setup.mean, &setup.std);
    normalize.apply(pixels, (height * width) as usize, &mut normal);
    let [_, channels, height, width] = slot.image_shape();
    let images_bchw = Tensor::from_slice(&normal).view([n_images as i64, channels, height, width]);
    let draws = (0..n_images as u64).map(|i| Draws::new(setup.seed, Tag::User, 0, i)).collect();
    let input = SlotInput {
        images_bchw: images_bchw.to_device(slot.device()),
        ids_shuffle,
        weights: &vec![1.0; n_images],
        draws,
        labels: &vec![None; n_images],
    };
    let pred_blp = slot.predict(weights, &input)?;
    let scale = Scale { model: &setup.model, mean: &setup.mean, std: &setup.std };
    let drawn = draw_each(scale, pixels, ids_shuffle, &pred_blp);
    let picture = |canvas: image::RgbImage| Picture {
        width: canvas.width(),
        height: canvas.height(),
        rgb: canvas.into_raw(),
    };
    Some(drawn.into_iter().map(picture).collect())
}
