//! Pictures of the fake engine: what is removed is filled in with the mean of what is visible.

use lacuna_recipe::model::ModelConfig;

use crate::engine::Picture;

/// Draws `original | masked | filled in` of each image, `pixels` `[b, h, w, c]`.
pub(super) fn draw(model: &ModelConfig, pixels: &[u8], ids_shuffle: &[u32]) -> Vec<Picture> {
    let (c, p) = (model.channels as usize, model.patch_size as usize);
    let [height, width] = model.img_size.map(|side| side as usize);
    let images = pixels.chunks_exact(height * width * c);
    let draw = |(image, ids): (&[u8], &[u32])| {
        let kept = &ids[..model.len_keep()];
        let is_kept = |y: usize, x: usize| kept.contains(&((y / p * (width / p) + x / p) as u32));
        let places = || (0..height).flat_map(|y| (0..width).map(move |x| (y, x)));
        let value = |(y, x): (usize, usize)| image[(y * width + x) * c];
        let seen: Vec<u64> =
            places().filter(|&(y, x)| is_kept(y, x)).map(|at| u64::from(value(at))).collect();
        let mean = seen.iter().sum::<u64>().checked_div(seen.len() as u64).unwrap_or(0) as u8;
        let mut rgb: Vec<u8> = Vec::with_capacity(3 * 3 * height * width);
        for y in 0..height {
            for fill in [None, Some(128), Some(mean)] {
                for x in 0..width {
                    let gray = fill.filter(|_| !is_kept(y, x)).unwrap_or(value((y, x)));
                    rgb.extend([gray; 3]);
                }
            }
        }
        Picture { width: 3 * width as u32, height: height as u32, rgb }
    };
    images.zip(ids_shuffle.chunks_exact(model.n_patches())).map(draw).collect()
}
