//! Encoded images to pixels: PNG, JPEG and WebP, cut, resized and mirrored.
//!
//! The format is told by the first bytes, never by a file name. Orientation tags are not applied
//! and alpha is dropped, as in the reference recipe. 16-bit images keep their high byte, in grey
//! images too (Pillow clips those at 255, which turns nearly all of them white). One channel from
//! colour is Pillow's `L`: `(19595 R + 38470 G + 7471 B + 2^15) >> 16`; colour from CMYK is
//! Pillow's too, for inks as Adobe stores them.
//!
//! With the feature `turbo`, JPEG is decoded by libjpeg-turbo, and only where the wanted box lies:
//! the pixels are those that decoding the whole image gives. Without it a decoder in Rust does the
//! same more slowly and with other pixels, which [`DECODER_ID`] says.
//!
//! Start reading at [`Decoder`].

mod convert;
mod decoder;
mod format;
mod library;
#[cfg(feature = "turbo")]
mod planes;
mod probe;
#[cfg(feature = "turbo")]
mod turbo;

pub use decoder::Decoder;
#[cfg(feature = "turbo")]
pub use planes::{BAND_ROWS, Chroma, PlaneBuffers, PlaneLayout, Planes};

pub use probe::probe_pixels;

pub use format::{
    Codec, DecodeError, IMAGE_BYTES_MAX, ImageInfo, ImageShape, PIXELS_MAX, SHAPE_SIDE_MAX, probe,
};

/// Names the code that turns bytes into pixels: another one gives other pixels. The last part is
/// raised when the code of this crate changes a pixel.
pub const DECODER_ID: &str =
    if cfg!(feature = "turbo") { "libjpeg-turbo-3.1+fir-6.1/1" } else { "image-0.25+fir-6.1/1" };

#[cfg(test)]
mod tests;
