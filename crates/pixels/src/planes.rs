//! Decoded JPEG before its chroma is made as large as its luma: what a cache keeps.
//!
//! Entropy decoding and the DCT are most of the work and give the same planes each time; smoothing
//! chroma, colours and resizing are done for the crop alone. A cache stores bands of rows, so that
//! a crop reads only what it needs; in memory the planes are whole.

use std::ops::Range;

use lacuna_recipe::augment::{CropBox, Size};

/// Rows of luma in a band: whole rows of chroma, read in one piece.
pub const BAND_ROWS: u32 = 32;

/// Smaller images are not worth it, and libjpeg does not smooth the chroma of the smallest.
const SIDE_MIN: u32 = 16;

/// How chroma lies under luma.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Chroma {
    /// There is none.
    Grey = 1,
    /// 4:4:4, one for each pixel.
    Full = 2,
    /// 4:2:2, one for two pixels of a row.
    HalfWidth = 3,
    /// 4:2:0, one for two by two pixels.
    Quarter = 4,
    /// 4:4:0, one for two pixels of a column.
    HalfHeight = 5,
}

impl Chroma {
    /// Returns the chroma that a stored byte means.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Chroma::{Full, Grey, HalfHeight, HalfWidth, Quarter};
        [Grey, Full, HalfWidth, Quarter, HalfHeight].into_iter().find(|c| *c as u8 == byte)
    }

    /// Pixels of a row and of a column that share a chroma sample.
    fn shares(self) -> (u32, u32) {
        match self {
            Chroma::Grey | Chroma::Full => (1, 1),
            Chroma::HalfWidth => (2, 1),
            Chroma::Quarter => (2, 2),
            Chroma::HalfHeight => (1, 2),
        }
    }
}

/// Size of planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaneLayout {
    /// Height and width of the image.
    pub size: Size,
    /// How chroma lies.
    pub chroma: Chroma,
}

impl PlaneLayout {
    /// Tells whether planes of an image of this size are kept at all.
    pub fn is_worth(size: Size) -> bool {
        size.height >= SIDE_MIN && size.width >= SIDE_MIN
    }

    /// Returns the number of bands.
    pub fn n_bands(&self) -> u32 {
        self.size.height.div_ceil(BAND_ROWS)
    }

    /// Returns the bands that pixels in `crop` depend on.
    pub fn bands_of(&self, crop: CropBox) -> Range<u32> {
        let (_, shared) = self.chroma.shares();
        let bottom = crop.top + crop.height;
        // A shared chroma row looks at the one above and the one below.
        let (first, last) = match shared {
            1 => (crop.top, bottom - 1),
            _ => (crop.top.saturating_sub(2), (bottom + 1).min(self.size.height - 1)),
        };
        first / BAND_ROWS..last / BAND_ROWS + 1
    }

    /// Returns the size of a chroma plane.
    pub fn chroma_size(&self) -> Size {
        let Size { height, width } = self.size;
        match self.chroma {
            Chroma::Grey => Size { height: 0, width: 0 },
            chroma => {
                let (across, down) = chroma.shares();
                Size { height: height.div_ceil(down), width: width.div_ceil(across) }
            }
        }
    }

    /// Returns the bytes of luma and of each chroma plane that some bands hold.
    pub fn bytes_of(&self, bands: &Range<u32>) -> (usize, usize) {
        let end = (bands.end * BAND_ROWS).min(self.size.height);
        let rows = end - bands.start * BAND_ROWS;
        let (_, shared) = self.chroma.shares();
        let luma = rows as usize * self.size.width as usize;
        (luma, rows.div_ceil(shared) as usize * self.chroma_size().width as usize)
    }
}

/// Planes of some bands, or of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaneBuffers {
    /// Rows of luma.
    pub luma: Vec<u8>,
    /// Rows of the two chroma planes; empty for grey.
    pub chroma: [Vec<u8>; 2],
}

impl PlaneBuffers {
    /// Makes room for some bands.
    pub fn resize(&mut self, layout: &PlaneLayout, bands: &Range<u32>) {
        let (luma, chroma) = layout.bytes_of(bands);
        self.luma.resize(luma, 0);
        self.chroma.iter_mut().for_each(|plane| plane.resize(chroma, 0));
    }

    /// Copies planes whose rows are `strides` bytes apart.
    pub(crate) fn copy(&mut self, layout: &PlaneLayout, planes: [&[u8]; 3], strides: [usize; 3]) {
        self.resize(layout, &(0..layout.n_bands()));
        let [first, second] = &mut self.chroma;
        let chroma_width = layout.chroma_size().width;
        let widths = [layout.size.width, chroma_width, chroma_width];
        let all = [&mut self.luma, first, second].into_iter().zip(planes).zip(strides).zip(widths);
        for (((to, from), stride), width) in all.filter(|(_, width)| *width > 0) {
            let width = width as usize;
            for (to, from) in to.chunks_exact_mut(width).zip(from.chunks(stride)) {
                to.copy_from_slice(&from[..width]);
            }
        }
    }
}

/// Planes to render from.
#[derive(Clone, Copy, Debug)]
pub struct Planes<'a> {
    /// Of what.
    pub layout: PlaneLayout,
    /// The first band that is there.
    pub first_band: u32,
    /// The rows.
    pub rows: &'a PlaneBuffers,
}

/// A crop of planes with as much chroma as luma.
#[derive(Debug, Default)]
pub(crate) struct Smooth {
    pub chroma: [Vec<u8>; 2],
    /// Bytes of a row of each chroma plane.
    pub stride: usize,
    /// Where the crop begins in each row of chroma.
    pub skip: usize,
    /// Weighted sums of two rows of chroma, with one more on each side.
    sums: Vec<u16>,
}

impl Planes<'_> {
    /// Returns luma from the crop's first pixel on; its rows are as wide as the image.
    pub(crate) fn luma(&self, crop: CropBox) -> &[u8] {
        let row = (crop.top - self.first_band * BAND_ROWS) as usize;
        &self.rows.luma[row * self.layout.size.width as usize + crop.left as usize..]
    }

    /// Fills `out` with the crop's chroma, smoothed as libjpeg smooths it.
    ///
    /// # Panics
    /// If the bands do not hold the crop.
    pub(crate) fn smooth(&self, crop: CropBox, out: &mut Smooth) {
        let (across, _) = self.layout.chroma.shares();
        let first = crop.left / across;
        let end = (crop.left + crop.width).div_ceil(across);
        out.skip = (crop.left % across) as usize;
        out.stride = ((end - first) * across) as usize;
        for (plane, to) in out.chroma.iter_mut().enumerate() {
            to.resize(out.stride * crop.height as usize, 0);
            for (row, to) in (crop.top..).zip(to.chunks_exact_mut(out.stride)) {
                self.smooth_row(&self.rows.chroma[plane], row, first..end, &mut out.sums, to);
            }
        }
    }

    /// Writes one row of chroma samples `columns`, as many pixels wide as they cover.
    fn smooth_row(
        &self,
        plane: &[u8],
        row: u32,
        columns: Range<u32>,
        sums: &mut Vec<u16>,
        out: &mut [u8],
    ) {
        let Size { height, width } = self.layout.chroma_size();
        let (across, down) = self.layout.chroma.shares();
        let near = row / down;
        // The next row of chroma: above for the upper of two pixels, below for the lower.
        let far = match (down, row % 2) {
            (1, _) => near,
            (_, 0) => near.saturating_sub(1),
            _ => (near + 1).min(height - 1),
        };
        let first_row = self.first_band * BAND_ROWS / down;
        // One more column to each side, where there is one.
        let (left, right) = (columns.start.saturating_sub(1), (columns.end + 1).min(width));
        let at = |row: u32| {
            let row = (row - first_row) as usize * width as usize;
            &plane[row + left as usize..row + right as usize]
        };
        let (near, far) = (at(near), at(far));
        let n = (columns.end - columns.start) as usize;
        let inner = (columns.start - left) as usize;
        match (across, down) {
            (1, 1) => out.copy_from_slice(&near[inner..inner + n]),
            (1, _) => {
                let bias = 1 + row as u16 % 2;
                for ((to, near), far) in out.iter_mut().zip(&near[inner..]).zip(&far[inner..]) {
                    *to = ((u16::from(*near) * 3 + u16::from(*far) + bias) >> 2) as u8;
                }
            }
            _ => {
                sums.resize(n + 2, 0);
                // Sum k stands for column `columns.start + k - 1`; the outermost are repeated.
                let lead = 1 - inner;
                let held = &mut sums[lead..lead + near.len()];
                // One loop each: a condition inside would keep them from being vectorised.
                match down {
                    1 => held.iter_mut().zip(near).for_each(|(to, near)| *to = u16::from(*near)),
                    _ => {
                        for ((to, near), far) in held.iter_mut().zip(near).zip(far) {
                            *to = u16::from(*near) * 3 + u16::from(*far);
                        }
                    }
                }
                if lead == 1 {
                    sums[0] = sums[1];
                }
                if right == columns.end {
                    sums[n + 1] = sums[n];
                }
                match down {
                    1 => widen::<1, 2, 2>(sums, out),
                    _ => widen::<8, 7, 4>(sums, out),
                }
            }
        }
    }
}

/// Makes two pixels of each sum but the outer two: three parts of it and one of its neighbour.
fn widen<const LEFT: u16, const RIGHT: u16, const SHIFT: u16>(sums: &[u16], out: &mut [u8]) {
    let n = sums.len() - 2;
    let (before, here, after) = (&sums[..n], &sums[1..=n], &sums[2..]);
    let pairs = out.chunks_exact_mut(2).zip(before).zip(here).zip(after);
    for (((to, before), here), after) in pairs {
        let left = (here * 3 + before + LEFT) >> SHIFT;
        let right = (here * 3 + after + RIGHT) >> SHIFT;
        to.copy_from_slice(&(left | right << 8).to_le_bytes());
    }
}
