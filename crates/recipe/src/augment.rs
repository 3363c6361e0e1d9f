//! Random resized crop and horizontal flip: where an image is cut and whether it is mirrored.
//!
//! Pixels are not touched here. A draw is addressed by (seed, epoch, sample), so it is the same on
//! every worker and after every retry. The distribution is that of torchvision's
//! `RandomResizedCrop` (`get_params`, 0.29); its random stream is not reproduced.

use serde::{Deserialize, Serialize};

use crate::philox::{Draws, Tag};

/// Version of the draws; raised when the same address would give another crop.
pub const AUGMENT_VERSION: u32 = 1;

/// Crops tried before the centre crop.
const TRIES: u32 = 10;

/// A rectangle of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CropBox {
    /// Rows above the box.
    pub top: u32,
    /// Columns left of the box.
    pub left: u32,
    /// Rows of the box, positive.
    pub height: u32,
    /// Columns of the box, positive.
    pub width: u32,
}

impl CropBox {
    /// Returns the box of `size` in the middle of an image, rounded towards the top left.
    pub fn centered(image: Size, size: Size) -> Self {
        assert!(size.height <= image.height && size.width <= image.width, "the box fits");
        CropBox {
            top: (image.height - size.height) / 2,
            left: (image.width - size.width) / 2,
            height: size.height,
            width: size.width,
        }
    }

    /// Returns the largest centred box with the proportions of `target`: what evaluation sees.
    pub fn largest_centered(image: Size, target: Size) -> Self {
        let [h, w, th, tw] =
            [image.height, image.width, target.height, target.width].map(u64::from);
        // Rounded to nearest, at least one pixel, in integers.
        let scaled = |a: u64, num: u64, den: u64| ((2 * a * num + den) / (2 * den)).max(1) as u32;
        let size = if w * th >= h * tw {
            let width = scaled(h, tw, th).min(image.width);
            Size { width, ..image }
        } else {
            let height = scaled(w, th, tw).min(image.height);
            Size { height, ..image }
        };
        CropBox::centered(image, size)
    }

    /// Returns the centred box whose sides are `part` of those of the largest one: 0.875 is about
    /// what is left where an image is resized to 256 pixels and 224 are cut out.
    ///
    /// `part` lies above 0 and is at most 1; sides are rounded to nearest, and at least a pixel.
    pub fn centered_part(image: Size, target: Size, part: f64) -> Self {
        assert!(part > 0.0 && part <= 1.0, "a part of an image");
        let CropBox { height, width, .. } = CropBox::largest_centered(image, target);
        let side = |whole: u32| ((f64::from(whole) * part).round() as u32).clamp(1, whole);
        CropBox::centered(image, Size { height: side(height), width: side(width) })
    }
}

/// Largest side of a model's images: far above any model, and small enough for 32-bit sizes.
pub const SIDE_MAX: u32 = 8192;

/// Height and width of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// How images are varied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Augment {
    /// Smallest and largest area of a crop, as a part of the image's.
    pub scale: (f64, f64),
    /// Smallest and largest width of a crop, divided by its height.
    pub ratio: (f64, f64),
    /// Probability of a mirrored image.
    pub flip: f64,
}

/// Ranges that cannot be drawn from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AugmentError {
    /// A range that is not ascending, finite and positive.
    #[error("`{field}` = [{low}, {high}] must be ascending, positive and at most {max}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// Lower end given.
        low: f64,
        /// Upper end given.
        high: f64,
        /// Largest value allowed.
        max: f64,
    },
    /// Not a probability.
    #[error("`flip` = {0} must be a probability, 0 to 1")]
    Flip(f64),
}

impl Augment {
    /// The pre-training recipe: area 0.2 to 1, proportions 3:4 to 4:3, every second image mirrored.
    ///
    /// Source: `main_pretrain.py` of facebookresearch/mae.
    pub const PRETRAIN: Augment =
        Augment { scale: (0.2, 1.0), ratio: (3.0 / 4.0, 4.0 / 3.0), flip: 0.5 };

    /// No variation: the largest centred square.
    pub const NONE: Augment = Augment { scale: (1.0, 1.0), ratio: (1.0, 1.0), flip: 0.0 };

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), AugmentError> {
        // Proportions beyond 1:1000 leave no whole pixel of any real image.
        for (field, (low, high), max) in [("scale", self.scale, 1.0), ("ratio", self.ratio, 1e3)] {
            if !(low > 0.0 && low <= high && high <= max) {
                return Err(AugmentError::Range { field, low, high, max });
            }
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(AugmentError::Flip(self.flip));
        }
        Ok(())
    }

    /// Draws the crop of one use of a sample, and whether the result is mirrored.
    ///
    /// Of try j, draw words 8j and on: area (two words), log of the proportions (two), top, left.
    pub fn draw(&self, seed: u64, epoch: u32, sample: u64, image: Size) -> (CropBox, bool) {
        assert!(image.height > 0 && image.width > 0, "an image has pixels");
        let crop = self.draw_crop(&Draws::new(seed, Tag::Crop, epoch, sample), image);
        let flip = Draws::new(seed, Tag::Flip, epoch, sample).unit_f64(0) < self.flip;
        (crop, flip)
    }

    fn draw_crop(&self, draws: &Draws, image: Size) -> CropBox {
        let Size { height, width } = image;
        let area = f64::from(height) * f64::from(width);
        let log_ratio = (libm::log(self.ratio.0), libm::log(self.ratio.1));
        for t in 0..TRIES {
            let target = area * between(self.scale, draws.unit_f64(4 * t));
            let ratio = libm::exp(between(log_ratio, draws.unit_f64(4 * t + 1)));
            let w = (target * ratio).sqrt().round_ties_even();
            let h = (target / ratio).sqrt().round_ties_even();
            if w >= 1.0 && w <= f64::from(width) && h >= 1.0 && h <= f64::from(height) {
                let (h, w) = (h as u32, w as u32);
                return CropBox {
                    top: draws.below(8 * t + 4, height - h + 1),
                    left: draws.below(8 * t + 5, width - w + 1),
                    height: h,
                    width: w,
                };
            }
        }
        self.fallback(image)
    }

    /// Returns the whole image, or its centre with the proportions brought into the range.
    fn fallback(&self, image: Size) -> CropBox {
        let (h, w) = (f64::from(image.height), f64::from(image.width));
        let pixels = |x: f64, max: u32| (x.round_ties_even() as u32).clamp(1, max);
        let size = if w / h < self.ratio.0 {
            Size { height: pixels(w / self.ratio.0, image.height), width: image.width }
        } else if w / h > self.ratio.1 {
            Size { height: image.height, width: pixels(h * self.ratio.1, image.width) }
        } else {
            image
        };
        CropBox::centered(image, size)
    }
}

fn between((low, high): (f64, f64), unit: f64) -> f64 {
    low + (high - low) * unit
}

#[cfg(test)]
mod tests;
