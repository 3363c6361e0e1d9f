//! Images from nothing, for machines without data: shapes on a shaded ground, with texture.
//!
//! Image i is a pure function of (seed, i): only additions, products and roots are used, so the
//! bytes are the same on every machine. The class is the kind of shape; place, size, colours,
//! shading and texture vary freely, so that neither a mean nor a nearest neighbour in pixels gives
//! it away.

use lacuna_recipe::philox::{Draws, Tag};
use serde::{Deserialize, Serialize};

use lacuna_pixels::ImageShape;

/// Kinds of shape, hence classes: disc, box, ring, cross.
pub const N_CLASSES: u32 = 4;

/// Points of the shading per side; bilinear between them.
const GRID: usize = 4;

/// What decides the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyntheticSpec {
    /// Number of images.
    pub n_images: u64,
    /// Shape of each.
    pub shape: ImageShape,
    /// Selects the images.
    pub seed: u64,
}

/// A generated image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntheticImage {
    /// Rows of interleaved channels.
    pub pixels: Vec<u8>,
    /// Class, below [`N_CLASSES`].
    pub label: u32,
}

/// Draws numbers one after another; each image has its own stream.
struct Numbers {
    draws: Draws,
    next: u32,
}

impl Numbers {
    /// Returns a uniform number of `[low, high)`.
    fn between(&mut self, low: f32, high: f32) -> f32 {
        let unit = self.draws.unit_f32(self.next);
        self.next += 1;
        low + (high - low) * unit
    }
}

/// A shape: where it is and how it looks. Lengths are parts of the image's shorter side.
struct Figure {
    kind: u32,
    center: [f32; 2],
    radius: f32,
    /// Unit vector of the shape's own horizontal.
    axis: [f32; 2],
    color: [f32; 3],
    stripes: f32,
    contrast: f32,
}

/// Generates image number `i` of `spec`.
pub fn image(spec: &SyntheticSpec, i: u64) -> SyntheticImage {
    let ImageShape { height, width, channels } = spec.shape;
    assert!(spec.shape.is_supported(), "{:?} cannot be made", spec.shape);
    let mut numbers = Numbers { draws: Draws::new(spec.seed, Tag::User, 0, i), next: 0 };
    let label = (numbers.between(0.0, N_CLASSES as f32) as u32).min(N_CLASSES - 1);
    let mut ground: [[[f32; 3]; GRID]; GRID] = [[[0.0; 3]; GRID]; GRID];
    let base: [f32; 3] = std::array::from_fn(|_| numbers.between(0.1, 0.9));
    for point in ground.iter_mut().flatten() {
        *point = base.map(|level| level + numbers.between(-0.15, 0.15));
    }
    let figure = figure(label, base, &mut numbers);
    let grain = numbers.between(0.0, 0.06);
    let side = height.min(width) as f32;
    let noise = Draws::new(spec.seed, Tag::User, 1, i);
    let mut pixels: Vec<u8> = Vec::with_capacity(spec.shape.bytes());
    for y in 0..height {
        for x in 0..width {
            let place = [
                (x as f32 + 0.5 - width as f32 / 2.0) / side,
                (y as f32 + 0.5 - height as f32 / 2.0) / side,
            ];
            let shade = shading(&ground, x as f32 / width as f32, y as f32 / height as f32);
            let (cover, light) = figure.look(place, side);
            // Four pixels share a draw; the grain of 24-bit noise is one byte of it.
            let at = y * width + x;
            let byte = noise.word(at / 4).to_le_bytes()[(at % 4) as usize];
            let grain = grain * (f32::from(byte) / 255.0 - 0.5);
            let color: [f32; 3] = std::array::from_fn(|c| {
                let mixed = shade[c] + (figure.color[c] * light - shade[c]) * cover + grain;
                (mixed * 255.0).clamp(0.0, 255.0)
            });
            match channels {
                1 => pixels.push(((color[0] + color[1] + color[2]) / 3.0 + 0.5) as u8),
                _ => pixels.extend(color.map(|level| (level + 0.5) as u8)),
            }
        }
    }
    SyntheticImage { pixels, label }
}

fn figure(kind: u32, ground: [f32; 3], numbers: &mut Numbers) -> Figure {
    let (a, b) = (numbers.between(-1.0, 1.0), numbers.between(0.1, 1.0));
    let length = (a * a + b * b).sqrt();
    // At least 0.3 away from the ground in each channel, towards the side with more room.
    let away = ground.map(|level| {
        let step = numbers.between(0.3, 0.5);
        if level > 0.5 { level - step } else { level + step }
    });
    Figure {
        kind,
        center: [numbers.between(-0.2, 0.2), numbers.between(-0.2, 0.2)],
        radius: numbers.between(0.18, 0.34),
        axis: [a / length, b / length],
        color: away,
        stripes: numbers.between(4.0, 14.0),
        contrast: numbers.between(0.0, 0.5),
    }
}

impl Figure {
    /// Returns how much of a pixel the shape covers, and how light its texture is there.
    fn look(&self, place: [f32; 2], side: f32) -> (f32, f32) {
        let [dx, dy] = [place[0] - self.center[0], place[1] - self.center[1]];
        let u = dx * self.axis[0] + dy * self.axis[1];
        let v = dy * self.axis[0] - dx * self.axis[1];
        let r = self.radius;
        let boxed = |half_u: f32, half_v: f32| (u.abs() - half_u).max(v.abs() - half_v);
        // Distance to the edge, negative inside.
        let distance = match self.kind {
            0 => (u * u + v * v).sqrt() - r,
            1 => boxed(r * 0.85, r * 0.85),
            2 => ((u * u + v * v).sqrt() - r * 0.8).abs() - r * 0.22,
            _ => boxed(r, r * 0.3).min(boxed(r * 0.3, r)),
        };
        let cover = (0.5 - distance * side).clamp(0.0, 1.0);
        // A triangle wave along the shape's own axis.
        let wave = (u * self.stripes).rem_euclid(1.0);
        let light = 1.0 - self.contrast * (2.0 * (wave - 0.5).abs());
        (cover, light)
    }
}

/// Interpolates the ground between its points.
fn shading(ground: &[[[f32; 3]; GRID]; GRID], x: f32, y: f32) -> [f32; 3] {
    let split = |t: f32| {
        let scaled = t * (GRID - 1) as f32;
        let cell = (scaled as usize).min(GRID - 2);
        (cell, scaled - cell as f32)
    };
    let ((i, fx), (j, fy)) = (split(x), split(y));
    std::array::from_fn(|c| {
        let row = |j: usize| ground[j][i][c] + (ground[j][i + 1][c] - ground[j][i][c]) * fx;
        row(j) + (row(j + 1) - row(j)) * fy
    })
}

#[cfg(test)]
mod tests;
