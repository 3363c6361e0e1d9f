//! What an encoded image is by its first bytes, and what can be wrong with it.

use std::error::Error;

pub use lacuna_recipe::augment::SIDE_MAX as SHAPE_SIDE_MAX;
use lacuna_recipe::augment::Size;
use serde::{Deserialize, Serialize};

/// Most pixels of a source image. Beyond it lie mistakes and decompression bombs: at 8 bytes a
/// pixel (16-bit RGBA) this many take 512 MiB.
pub const PIXELS_MAX: u64 = 1 << 26;

/// Most bytes of an encoded image: four times what the largest 8-bit colour image takes raw is not
/// an image any more.
pub const IMAGE_BYTES_MAX: u64 = 256 << 20;

/// Format of an encoded image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// Portable network graphics.
    Png = 1,
    /// JPEG, baseline or progressive.
    Jpeg = 2,
    /// WebP, with or without loss; of an animation the first picture.
    Webp = 3,
}

impl Codec {
    /// Returns the codec that a byte of an index means.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Codec::Png, Codec::Jpeg, Codec::Webp].into_iter().find(|&codec| codec as u8 == byte)
    }

    /// Returns the suffix of the codec's shard members.
    pub fn extension(self) -> &'static str {
        match self {
            Codec::Png => "png",
            Codec::Jpeg => "jpg",
            Codec::Webp => "webp",
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
    /// Neither PNG nor JPEG nor WebP.
    #[error("not a png, jpeg or webp image: it starts with {0:02x?}")]
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
        source: Box<dyn Error + Send + Sync>,
    },
    /// There was no memory to decode it here; another machine, or a later try, may have some.
    #[error("there is no memory to decode the {codec:?} data: {said}")]
    Memory {
        /// Format, by the first bytes.
        codec: Codec,
        /// What the decoder said.
        said: String,
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
        let Jpeg { size, .. } = walk_jpeg(bytes)?;
        let codec = Codec::Jpeg;
        ImageInfo { codec, size }
    } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        ImageInfo { codec: Codec::Webp, size: webp_size(bytes)? }
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

/// Reads a WebP's size from its first chunk: RFC 9649, sections 2.5 to 2.7.
fn webp_size(bytes: &[u8]) -> Result<Size, DecodeError> {
    let damaged = |at: usize| DecodeError::Header { codec: Codec::Webp, at };
    let le = |at: usize, n: usize| -> Result<u32, DecodeError> {
        let field = bytes.get(at..at + n).ok_or(damaged(at))?;
        Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    };
    match bytes.get(12..16).ok_or(damaged(12))? {
        b"VP8X" => Ok(Size { width: le(24, 3)? + 1, height: le(27, 3)? + 1 }),
        b"VP8L" if le(20, 1)? == 0x2F => {
            let packed = le(21, 4)?;
            Ok(Size { width: (packed & 0x3FFF) + 1, height: (packed >> 14 & 0x3FFF) + 1 })
        }
        b"VP8 " if bytes.get(23..26) == Some(&[0x9D, 0x01, 0x2A]) => {
            Ok(Size { width: le(26, 2)? & 0x3FFF, height: le(28, 2)? & 0x3FFF })
        }
        _ => Err(damaged(12)),
    }
}

/// What a JPEG's segments say.
struct Jpeg {
    size: Size,
    /// Whether its scans are coded by Huffman's method.
    is_huffman: bool,
    /// Where the first scan starts.
    scan: usize,
}

/// Walks a JPEG's segments up to the first scan.
fn walk_jpeg(bytes: &[u8]) -> Result<Jpeg, DecodeError> {
    let damaged = |at: usize| DecodeError::Header { codec: Codec::Jpeg, at };
    let two = |at: usize| -> Result<u32, DecodeError> {
        let pair = bytes.get(at..at + 2).ok_or(damaged(at))?;
        Ok(u32::from(pair[0]) << 8 | u32::from(pair[1]))
    };
    let mut frame: Option<(Size, u8)> = None;
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
                frame = Some((Size { height, width }, marker));
            }
            _ => {}
        }
        let length = two(at)? as usize;
        if length < 2 {
            return Err(damaged(at));
        }
        at += length;
    }
    let (size, marker) = frame.ok_or(damaged(at))?;
    Ok(Jpeg { size, is_huffman: marker < 0xC8, scan: at })
}

/// Pixels for which a JPEG by Huffman's method has at least one bit: each block of the largest
/// component, 8 by 8 pixels, has a code of its own in the first scan.
const PIXELS_PER_BIT_MAX: u64 = 64;

/// Checks that a JPEG ends, and is not far too short for its size; decoders fill what is missing
/// with grey and say nothing.
pub(crate) fn check_jpeg_end(bytes: &[u8]) -> Result<(), DecodeError> {
    let Jpeg { size, is_huffman, scan } = walk_jpeg(bytes)?;
    let data = &bytes[scan..];
    let pixels = u64::from(size.height) * u64::from(size.width);
    let is_enough = !is_huffman || pixels / PIXELS_PER_BIT_MAX <= 8 * data.len() as u64;
    let ended = data.windows(2).rev().any(|pair| pair == [0xFF, 0xD9]);
    let codec = Codec::Jpeg;
    (ended && is_enough).then_some(()).ok_or(DecodeError::Truncated { codec })
}
