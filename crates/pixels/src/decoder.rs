//! Bytes to pixels: PNG and JPEG, cut, resized and mirrored.
//!
//! The format is told by the first bytes, never by a file name. Orientation tags are not applied
//! and alpha is dropped, as in the reference recipe. 16-bit images keep their high byte, in grey
//! images too (Pillow clips those at 255, which turns nearly all of them white). One channel from
//! colour is Pillow's `L`: `(19595 R + 38470 G + 7471 B + 2^15) >> 16`.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::{ColorType, ImageDecoder, Limits};
use lacuna_recipe::augment::{CropBox, Size};
use serde::{Deserialize, Serialize};

/// Names the code that turns bytes into pixels; stored with a run, because another one gives other
/// pixels. The last part is raised when the code of this module changes a pixel.
pub const DECODER_ID: &str = "image-0.25+fir-6.1/1";

/// Most pixels of a source image. Beyond it lie mistakes and decompression bombs: at 8 bytes a
/// pixel (16-bit RGBA) this many take 512 MiB.
pub const PIXELS_MAX: u64 = 1 << 26;

/// Most bytes of an encoded image: four times what the largest 8-bit colour image takes raw is not
/// an image any more.
pub const IMAGE_BYTES_MAX: u64 = 256 << 20;

/// Most bytes that the PNG decoder may allocate for its own use (colour profiles, rows).
const PNG_ALLOC_MAX: u64 = 256 << 20;

/// Format of an encoded image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// Portable network graphics.
    Png = 1,
    /// JPEG, baseline or progressive.
    Jpeg = 2,
}

impl Codec {
    /// Returns the codec that a byte of an index means.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Codec::Png, Codec::Jpeg].into_iter().find(|&codec| codec as u8 == byte)
    }

    /// Returns the suffix of the codec's shard members.
    pub fn extension(self) -> &'static str {
        match self {
            Codec::Png => "png",
            Codec::Jpeg => "jpg",
        }
    }
}

/// What an image's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Format, by the first bytes.
    pub codec: Codec,
    /// Height and width.
    pub size: Size,
}

/// Height, width and channels of the images that a model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageShape {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// 1 (grey) or 3 (red, green, blue).
    pub channels: u32,
}

/// Largest side of a model's images: far above any model, and small enough for 32-bit sizes.
pub const SHAPE_SIDE_MAX: u32 = 8192;

impl ImageShape {
    /// Returns the bytes of one image.
    pub fn bytes(&self) -> usize {
        self.height as usize * self.width as usize * self.channels as usize
    }

    /// Returns height and width.
    pub fn size(&self) -> Size {
        Size { height: self.height, width: self.width }
    }

    /// Tells whether images of this shape can be made.
    pub fn is_supported(&self) -> bool {
        let sides = 1..=SHAPE_SIDE_MAX;
        sides.contains(&self.height)
            && sides.contains(&self.width)
            && matches!(self.channels, 1 | 3)
    }
}

/// Bytes that are no usable image.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Neither PNG nor JPEG.
    #[error("not a png or jpeg image: it starts with {0:02x?}")]
    UnknownFormat(Vec<u8>),
    /// The header ends early or makes no sense.
    #[error("the {codec:?} header is damaged at byte {at}")]
    Header {
        /// Format, by the first bytes.
        codec: Codec,
        /// Where reading stopped.
        at: usize,
    },
    /// More pixels than [`PIXELS_MAX`], or none.
    #[error("{}x{} pixels, accepted are 1 to {PIXELS_MAX}", size.width, size.height)]
    Pixels {
        /// Size by the header.
        size: Size,
    },
    /// The end of the image is missing.
    #[error("the {codec:?} data is cut off")]
    Truncated {
        /// Format, by the first bytes.
        codec: Codec,
    },
    /// The decoder refused the data.
    #[error("the {codec:?} data does not decode")]
    Data {
        /// Format, by the first bytes.
        codec: Codec,
        /// What the decoder said.
        #[source]
        source: image::ImageError,
    },
    /// The decoder failed in a way that is its own bug.
    #[error("the {codec:?} decoder panicked")]
    Panicked {
        /// Format, by the first bytes.
        codec: Codec,
    },
    /// The result could not be resized.
    #[error("resizing failed")]
    Resize(#[source] fast_image_resize::ResizeError),
}

/// Reads format and size from the first bytes, without decoding.
pub fn probe(bytes: &[u8]) -> Result<ImageInfo, DecodeError> {
    let info = if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        let field = |at: usize| -> Option<u32> {
            let raw: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_be_bytes(raw))
        };
        let codec = Codec::Png;
        let sides = (bytes.get(12..16) == Some(b"IHDR")).then(|| (field(20), field(16)));
        let Some((Some(height), Some(width))) = sides else {
            return Err(DecodeError::Header { codec, at: 8 });
        };
        let size = Size { height, width };
        ImageInfo { codec, size }
    } else if bytes.starts_with(&[0xFF, 0xD8, 0xFF]) {
        let (size, _) = walk_jpeg(bytes)?;
        let codec = Codec::Jpeg;
        ImageInfo { codec, size }
    } else {
        let head = bytes[..bytes.len().min(8)].to_vec();
        return Err(DecodeError::UnknownFormat(head));
    };
    let size = info.size;
    let pixels = u64::from(size.height) * u64::from(size.width);
    if !(1..=PIXELS_MAX).contains(&pixels) {
        return Err(DecodeError::Pixels { size });
    }
    Ok(info)
}

/// Walks a JPEG's segments; returns its size and where the first scan starts.
fn walk_jpeg(bytes: &[u8]) -> Result<(Size, usize), DecodeError> {
    let damaged = |at: usize| DecodeError::Header { codec: Codec::Jpeg, at };
    let two = |at: usize| -> Result<u32, DecodeError> {
        let pair = bytes.get(at..at + 2).ok_or(damaged(at))?;
        Ok(u32::from(pair[0]) << 8 | u32::from(pair[1]))
    };
    let mut size: Option<Size> = None;
    let mut at: usize = 2;
    loop {
        // Stray bytes between segments are passed over, as libjpeg does.
        while *bytes.get(at).ok_or(damaged(at))? != 0xFF {
            at += 1;
        }
        while *bytes.get(at).ok_or(damaged(at))? == 0xFF {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        match marker {
            0x00 | 0x01 | 0xD0..=0xD7 => continue,
            0xDA => break,
            0xD9 => return Err(damaged(at)),
            0xC4 | 0xC8 | 0xCC => {}
            0xC0..=0xCF => {
                let (height, width) = (two(at + 3)?, two(at + 5)?);
                size = Some(Size { height, width });
            }
            _ => {}
        }
        let length = two(at)? as usize;
        if length < 2 {
            return Err(damaged(at));
        }
        at += length;
    }
    Ok((size.ok_or(damaged(at))?, at))
}

/// Checks that a JPEG ends; decoders fill what is missing with grey and say nothing.
fn check_jpeg_end(bytes: &[u8]) -> Result<(), DecodeError> {
    let (_, scan) = walk_jpeg(bytes)?;
    let ended = bytes[scan..].windows(2).rev().any(|pair| pair == [0xFF, 0xD9]);
    let codec = Codec::Jpeg;
    ended.then_some(()).ok_or(DecodeError::Truncated { codec })
}

/// How decoded samples lie in memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha.
    channels: usize,
    /// Bytes of a channel: 1 or 2.
    depth: usize,
}

/// Decodes images one after another, reusing its buffers.
#[derive(Debug)]
pub struct Decoder {
    raw: Vec<u8>,
    size: Size,
    layout: Layout,
    cut: Vec<u8>,
    /// The cut image after the rows were resized.
    half: Vec<u8>,
    resizer: Resizer,
    options: ResizeOptions,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new()
    }
}

impl Decoder {
    /// Builds a decoder with empty buffers.
    pub fn new() -> Self {
        // Catmull–Rom is the bicubic filter with a = −0.5; as a convolution it is antialiased.
        let algorithm = ResizeAlg::Convolution(FilterType::CatmullRom);
        Decoder {
            raw: Vec::new(),
            size: Size { height: 0, width: 0 },
            layout: Layout { channels: 1, depth: 1 },
            cut: Vec::new(),
            half: Vec::new(),
            resizer: Resizer::new(),
            options: ResizeOptions::new().resize_alg(algorithm).use_alpha(false),
        }
    }

    /// Decodes an image, keeps its pixels for [`render`](Decoder::render) and returns its size.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Size, DecodeError> {
        let ImageInfo { codec, size } = probe(bytes)?;
        if codec == Codec::Jpeg {
            check_jpeg_end(bytes)?;
        }
        self.size = Size { height: 0, width: 0 };
        let raw = &mut self.raw;
        // Decoders are other people's code that reads other people's bytes: a panic is a bad image.
        let decoded = catch_unwind(AssertUnwindSafe(|| decode_into(codec, bytes, raw)));
        let (got, layout) = decoded.map_err(|_| DecodeError::Panicked { codec })??;
        if got != size {
            return Err(DecodeError::Header { codec, at: 0 });
        }
        (self.size, self.layout) = (size, layout);
        Ok(size)
    }

    /// Cuts, resizes and mirrors the decoded image into `out`, rows of interleaved channels.
    ///
    /// A crop of the wanted size is copied, not resampled.
    ///
    /// # Panics
    /// If `crop` leaves the image, or `out` is not one image of `shape`.
    pub fn render(
        &mut self,
        crop: CropBox,
        flip: bool,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        assert!(shape.is_supported(), "{shape:?} cannot be made");
        assert_eq!(out.len(), shape.bytes(), "one image");
        let Size { height, width } = self.size;
        assert!(
            crop.height > 0
                && crop.width > 0
                && u64::from(crop.top) + u64::from(crop.height) <= u64::from(height)
                && u64::from(crop.left) + u64::from(crop.width) <= u64::from(width),
            "{crop:?} lies inside {height}x{width}"
        );
        let channels = shape.channels as usize;
        if (crop.height, crop.width) == (shape.height, shape.width) {
            cut(&self.raw, self.size, self.layout, crop, channels, out);
        } else {
            let bytes = crop.height as usize * crop.width as usize * channels;
            self.cut.resize(bytes, 0);
            cut(&self.raw, self.size, self.layout, crop, channels, &mut self.cut);
            self.resize(crop, shape, out).map_err(DecodeError::Resize)?;
        }
        if flip {
            mirror(out, shape);
        }
        Ok(())
    }

    fn resize(
        &mut self,
        crop: CropBox,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), fast_image_resize::ResizeError> {
        let pixel = match shape.channels {
            1 => PixelType::U8,
            _ => PixelType::U8x3,
        };
        let sized = "the buffers were sized for the crop and the shape";
        let mut from = ImageRef::new(crop.width, crop.height, &self.cut, pixel).expect(sized);
        if crop.width != shape.width && crop.height != shape.height {
            // Rows first, as Pillow does when it shrinks; left to itself the crate starts with
            // columns.
            let bytes = shape.width as usize * crop.height as usize * shape.channels as usize;
            self.half.resize(bytes, 0);
            let (width, height) = (shape.width, crop.height);
            let mut half = Image::from_slice_u8(width, height, &mut self.half, pixel).expect(sized);
            self.resizer.resize(&from, &mut half, &self.options)?;
            from = ImageRef::new(width, height, &self.half, pixel).expect(sized);
        }
        let mut to = Image::from_slice_u8(shape.width, shape.height, out, pixel).expect(sized);
        self.resizer.resize(&from, &mut to, &self.options)
    }

    /// Returns the whole decoded image with `channels` (1 or 3) channels, not resized.
    pub fn whole(&mut self, channels: u32) -> &[u8] {
        assert!(matches!(channels, 1 | 3), "grey or colour");
        let Size { height, width } = self.size;
        let bytes = height as usize * width as usize * channels as usize;
        self.cut.resize(bytes, 0);
        let crop = CropBox { top: 0, left: 0, height, width };
        cut(&self.raw, self.size, self.layout, crop, channels as usize, &mut self.cut);
        &self.cut
    }
}

/// Decodes into `raw`, grown as needed; returns what lies there.
fn decode_into(
    codec: Codec,
    bytes: &[u8],
    raw: &mut Vec<u8>,
) -> Result<(Size, Layout), DecodeError> {
    let bad = |source| DecodeError::Data { codec, source };
    match codec {
        Codec::Png => {
            let mut limits = Limits::no_limits();
            limits.max_alloc = Some(PNG_ALLOC_MAX);
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(bad)?;
            read_pixels(decoder, raw).map_err(bad)
        }
        Codec::Jpeg => {
            let decoder = JpegDecoder::new(Cursor::new(bytes)).map_err(bad)?;
            read_pixels(decoder, raw).map_err(bad)
        }
    }
}

fn read_pixels(
    decoder: impl ImageDecoder,
    raw: &mut Vec<u8>,
) -> Result<(Size, Layout), image::ImageError> {
    let (width, height) = decoder.dimensions();
    let color: ColorType = decoder.color_type();
    let channels = usize::from(color.channel_count());
    let depth = usize::from(color.bytes_per_pixel()) / channels;
    // The header was checked against `PIXELS_MAX`, so this is at most 512 MiB.
    raw.resize(decoder.total_bytes() as usize, 0);
    decoder.read_image(raw)?;
    let size = Size { height, width };
    Ok((size, Layout { channels, depth }))
}

/// Copies a box of `raw` into `out` with 1 or 3 channels.
fn cut(raw: &[u8], size: Size, layout: Layout, crop: CropBox, channels: usize, out: &mut [u8]) {
    let Layout { channels: from, depth } = layout;
    let pixel = from * depth;
    let row_bytes = size.width as usize * pixel;
    let start = crop.left as usize * pixel;
    let end = start + crop.width as usize * pixel;
    // 16-bit samples lie in the machine's byte order.
    let high = if cfg!(target_endian = "little") { depth - 1 } else { 0 };
    let rows = raw.chunks_exact(row_bytes).skip(crop.top as usize).map(|row| &row[start..end]);
    for (row, out) in rows.zip(out.chunks_exact_mut(crop.width as usize * channels)) {
        let pixels = row.chunks_exact(pixel).map(|p| &p[high..]);
        match (from >= 3, channels) {
            _ if depth == 1 && from == channels => out.copy_from_slice(row),
            (false, 1) => pixels.zip(out).for_each(|(p, to)| *to = p[0]),
            (false, _) => pixels.zip(out.chunks_exact_mut(3)).for_each(|(p, to)| to.fill(p[0])),
            (true, 1) => {
                pixels.zip(out).for_each(|(p, to)| *to = luma(p[0], p[depth], p[2 * depth]))
            }
            (true, _) => pixels
                .zip(out.chunks_exact_mut(3))
                .for_each(|(p, to)| to.copy_from_slice(&[p[0], p[depth], p[2 * depth]])),
        }
    }
}

fn luma(r: u8, g: u8, b: u8) -> u8 {
    let sum = u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000;
    (sum >> 16) as u8
}

/// Mirrors an image from left to right.
fn mirror(image: &mut [u8], shape: ImageShape) {
    let channels = shape.channels as usize;
    for row in image.chunks_exact_mut(shape.width as usize * channels) {
        row.reverse();
        if channels > 1 {
            row.chunks_exact_mut(channels).for_each(<[u8]>::reverse);
        }
    }
}

#[cfg(test)]
mod tests;
