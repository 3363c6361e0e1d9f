//! Decoding by the `image` crate.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(not(feature = "turbo"))]
use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder, ImageError, Limits};
use lacuna_recipe::augment::Size;

use crate::convert::{Layout, make_room};
use crate::format::{Codec, DecodeError};

/// Most bytes that the PNG decoder may allocate for its own use (colour profiles, rows).
const PNG_ALLOC_MAX: u64 = 256 << 20;

/// Decodes the whole image into `raw`, grown as needed; returns what lies there.
pub(crate) fn decode(
    codec: Codec,
    bytes: &[u8],
    raw: &mut Vec<u8>,
) -> Result<(Size, Layout), DecodeError> {
    // Decoders are other people's code that reads other people's bytes: a panic is a bad image.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_into(codec, bytes, raw)));
    let decoded = decoded.map_err(|_| DecodeError::Panicked { codec })?;
    decoded.map_err(|source| DecodeError::Data { codec, source: Box::new(source) })
}

fn decode_into(
    codec: Codec,
    bytes: &[u8],
    raw: &mut Vec<u8>,
) -> Result<(Size, Layout), ImageError> {
    match codec {
        Codec::Png => {
            let mut limits = Limits::no_limits();
            limits.max_alloc = Some(PNG_ALLOC_MAX);
            read_pixels(PngDecoder::with_limits(Cursor::new(bytes), limits)?, raw)
        }
        #[cfg(not(feature = "turbo"))]
        Codec::Jpeg => read_pixels(JpegDecoder::new(Cursor::new(bytes))?, raw),
        #[cfg(feature = "turbo")]
        Codec::Jpeg => unreachable!("JPEG is decoded by libjpeg-turbo"),
        Codec::Webp => read_pixels(WebPDecoder::new(Cursor::new(bytes))?, raw),
    }
}

fn read_pixels(
    decoder: impl ImageDecoder,
    raw: &mut Vec<u8>,
) -> Result<(Size, Layout), ImageError> {
    let (width, height) = decoder.dimensions();
    let color: ColorType = decoder.color_type();
    let channels = usize::from(color.channel_count());
    let depth = usize::from(color.bytes_per_pixel()) / channels;
    // The header was checked against `PIXELS_MAX`, so this is at most 512 MiB.
    make_room(raw, decoder.total_bytes() as usize);
    decoder.read_image(raw)?;
    let size = Size { height, width };
    Ok((size, Layout { channels, depth }))
}
