//! Decodes, cuts, resizes and mirrors.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeError, ResizeOptions, Resizer};
use lacuna_recipe::augment::{CropBox, Size};

use crate::convert::{Layout, cut, mirror};
use crate::format::{Codec, DecodeError, ImageInfo, ImageShape, check_jpeg_end, probe};
use crate::library;
#[cfg(feature = "turbo")]
use crate::planes::{Chroma, PlaneBuffers, PlaneLayout, Planes, Smooth};
#[cfg(feature = "turbo")]
use crate::turbo::{Colours, Header, Turbo};

/// Decodes images one after another, reusing its buffers.
#[derive(Debug)]
pub struct Decoder {
    /// Decoded pixels of `region`.
    raw: Vec<u8>,
    /// Size of the whole image.
    size: Size,
    /// The part of the image that `raw` holds.
    region: CropBox,
    layout: Layout,
    cut: Vec<u8>,
    /// The cut image after the rows were resized.
    half: Vec<u8>,
    resizer: Resizer,
    options: ResizeOptions,
    #[cfg(feature = "turbo")]
    turbo: Option<Turbo>,
    #[cfg(feature = "turbo")]
    colours: Option<Colours>,
    #[cfg(feature = "turbo")]
    smooth: Smooth,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new()
    }
}

fn whole(size: Size) -> CropBox {
    CropBox { top: 0, left: 0, height: size.height, width: size.width }
}

impl Decoder {
    /// Builds a decoder with empty buffers.
    pub fn new() -> Self {
        // Catmull–Rom is the bicubic filter with a = −0.5; as a convolution it is antialiased.
        let algorithm = ResizeAlg::Convolution(FilterType::CatmullRom);
        let empty = Size { height: 0, width: 0 };
        Decoder {
            raw: Vec::new(),
            size: empty,
            region: whole(empty),
            layout: Layout { channels: 1, depth: 1 },
            cut: Vec::new(),
            half: Vec::new(),
            resizer: Resizer::new(),
            options: ResizeOptions::new().resize_alg(algorithm).use_alpha(false),
            #[cfg(feature = "turbo")]
            turbo: None,
            #[cfg(feature = "turbo")]
            colours: None,
            #[cfg(feature = "turbo")]
            smooth: Smooth::default(),
        }
    }

    /// Decodes an image, keeps its pixels for [`render`](Decoder::render) and returns its size.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Size, DecodeError> {
        self.decode_part(bytes, None)?;
        Ok(self.size)
    }

    /// Decodes an image as far as the box needs it that `choose` names for its size, and renders
    /// that into `out` as [`render`](Decoder::render) does. Returns the image's size.
    ///
    /// The pixels are those of [`decode`](Decoder::decode) and [`render`](Decoder::render). Damage
    /// outside the box may go unnoticed.
    ///
    /// # Panics
    /// If the box leaves the image, or `out` is not one image of `shape`.
    pub fn decode_and_render(
        &mut self,
        bytes: &[u8],
        choose: impl FnOnce(Size) -> (CropBox, bool),
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<Size, DecodeError> {
        let ImageInfo { size, .. } = probe(bytes)?;
        let (crop, flip) = choose(size);
        assert_inside(crop, size);
        self.decode_part(bytes, Some(crop))?;
        self.render(crop, flip, shape, out)?;
        Ok(size)
    }

    /// Decodes an image as far as a box needs it, keeps that for [`render`](Decoder::render) of
    /// this box, and returns the image's size; the two make what
    /// [`decode_and_render`](Decoder::decode_and_render) does.
    ///
    /// # Panics
    /// If the box leaves the image.
    pub fn decode_box(&mut self, bytes: &[u8], crop: CropBox) -> Result<Size, DecodeError> {
        assert_inside(crop, probe(bytes)?.size);
        self.decode_part(bytes, Some(crop))?;
        Ok(self.size)
    }

    /// Decodes at least the box that is wanted, or everything.
    fn decode_part(&mut self, bytes: &[u8], wanted: Option<CropBox>) -> Result<(), DecodeError> {
        let ImageInfo { codec, size } = probe(bytes)?;
        if codec == Codec::Jpeg {
            check_jpeg_end(bytes)?;
        }
        self.size = Size { height: 0, width: 0 };
        self.region = whole(self.size);
        let (got, region, layout) = match codec {
            #[cfg(feature = "turbo")]
            Codec::Jpeg => self.decode_jpeg(bytes, wanted)?,
            _ => {
                let _ = wanted;
                let (got, layout) = library::decode(codec, bytes, &mut self.raw)?;
                (got, whole(got), layout)
            }
        };
        if got != size {
            return Err(DecodeError::Header { codec, at: 0 });
        }
        (self.size, self.region, self.layout) = (size, region, layout);
        Ok(())
    }

    #[cfg(feature = "turbo")]
    fn decode_jpeg(
        &mut self,
        bytes: &[u8],
        wanted: Option<CropBox>,
    ) -> Result<(Size, CropBox, Layout), crate::turbo::TurboError> {
        let turbo = self.turbo.get_or_insert_with(Turbo::new);
        let header: Header = turbo.header(bytes)?;
        // A header that says another size than ours read is refused by the caller.
        let inside = |crop: &CropBox| {
            crop.top.saturating_add(crop.height) <= header.size.height
                && crop.left.saturating_add(crop.width) <= header.size.width
        };
        let wanted = wanted.filter(inside);
        let region = wanted.map_or(whole(header.size), |crop| header.around(crop));
        let layout = turbo.decode(bytes, &header, region, &mut self.raw)?;
        Ok((header.size, region, layout))
    }

    /// Decodes a JPEG as far as what is the same for every crop; `None` for other images.
    #[cfg(feature = "turbo")]
    pub fn planes(
        &mut self,
        bytes: &[u8],
        out: &mut PlaneBuffers,
    ) -> Result<Option<PlaneLayout>, DecodeError> {
        let ImageInfo { codec, .. } = probe(bytes)?;
        if codec != Codec::Jpeg {
            return Ok(None);
        }
        check_jpeg_end(bytes)?;
        Ok(self.turbo.get_or_insert_with(Turbo::new).planes(bytes, out)?)
    }

    /// Renders a box out of planes: the bytes that the JPEG gives.
    ///
    /// # Panics
    /// If the planes do not hold the box, or `out` is not one image of `shape`.
    #[cfg(feature = "turbo")]
    pub fn render_planes(
        &mut self,
        planes: Planes<'_>,
        crop: CropBox,
        flip: bool,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let held = planes.layout.size;
        assert_inside(crop, held);
        let size = Size { height: crop.height, width: crop.width };
        let (luma, stride) = (planes.luma(crop), held.width as usize);
        if planes.layout.chroma == Chroma::Grey {
            self.layout = Layout { channels: 1, depth: 1 };
            self.raw.resize(size.height as usize * size.width as usize, 0);
            let rows = self.raw.chunks_exact_mut(size.width as usize).zip(luma.chunks(stride));
            rows.for_each(|(to, from)| to.copy_from_slice(&from[..to.len()]));
        } else {
            self.layout = Layout { channels: 3, depth: 1 };
            self.raw.resize(3 * size.height as usize * size.width as usize, 0);
            planes.smooth(crop, &mut self.smooth);
            let colours = self.colours.get_or_insert_with(Colours::new);
            colours.convert((luma, stride), &self.smooth, size, &mut self.raw)?;
        }
        (self.size, self.region) = (held, crop);
        self.render(crop, flip, shape, out)
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
        assert_inside(crop, self.size);
        let crop =
            CropBox { top: crop.top - self.region.top, left: crop.left - self.region.left, ..crop };
        let held = Size { height: self.region.height, width: self.region.width };
        let channels = shape.channels as usize;
        if (crop.height, crop.width) == (shape.height, shape.width) {
            cut(&self.raw, held, self.layout, crop, channels, out);
        } else if self.layout == (Layout { channels, depth: 1 }) {
            self.resize(held, crop, shape, out).map_err(DecodeError::Resize)?;
        } else {
            let bytes = crop.height as usize * crop.width as usize * channels;
            self.cut.resize(bytes, 0);
            cut(&self.raw, held, self.layout, crop, channels, &mut self.cut);
            std::mem::swap(&mut self.raw, &mut self.cut);
            let size = Size { height: crop.height, width: crop.width };
            let resized = self.resize(size, whole(size), shape, out);
            std::mem::swap(&mut self.raw, &mut self.cut);
            resized.map_err(DecodeError::Resize)?;
        }
        if flip {
            mirror(out, shape);
        }
        Ok(())
    }

    /// Resizes a box of `raw`, an image of `held` with the channels of `shape`.
    fn resize(
        &mut self,
        held: Size,
        crop: CropBox,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), ResizeError> {
        // By type: a pixel type that is told at run time has the compiler make all ten.
        match shape.channels {
            1 => self.resize_as::<U8>(held, crop, shape.size(), out),
            _ => self.resize_as::<U8x3>(held, crop, shape.size(), out),
        }
    }

    fn resize_as<P: PixelTrait>(
        &mut self,
        held: Size,
        crop: CropBox,
        target: Size,
        out: &mut [u8],
    ) -> Result<(), ResizeError> {
        let Size { height, width } = target;
        let between = Size { height: crop.height, width };
        let (resizer, options) = (&mut self.resizer, &self.options);
        if crop.width == width || crop.height == height {
            return resize_box::<P>(resizer, options, (&self.raw, held, crop), (out, target));
        }
        // Rows first, as Pillow does when it shrinks; left to itself the crate starts with columns.
        self.half.resize(width as usize * crop.height as usize * P::size(), 0);
        let from = (self.raw.as_slice(), held, crop);
        resize_box::<P>(resizer, options, from, (&mut self.half, between))?;
        resize_box::<P>(resizer, options, (&self.half, between, whole(between)), (out, target))
    }

    /// Has images resized with these instructions, which the processor has.
    #[cfg(all(test, feature = "turbo"))]
    pub(crate) fn set_cpu_extensions(&mut self, extensions: fast_image_resize::CpuExtensions) {
        assert!(extensions.is_supported(), "{extensions:?} on this processor");
        // SAFETY: the processor has them.
        unsafe { self.resizer.set_cpu_extensions(extensions) }
    }

    /// Returns the whole decoded image with `channels` (1 or 3) channels, not resized.
    ///
    /// # Panics
    /// If the image was not decoded whole.
    pub fn whole(&mut self, channels: u32) -> &[u8] {
        assert!(matches!(channels, 1 | 3), "grey or colour");
        assert_eq!(self.region, whole(self.size), "a whole image");
        let Size { height, width } = self.size;
        let bytes = height as usize * width as usize * channels as usize;
        self.cut.resize(bytes, 0);
        let (raw, layout) = (&self.raw, self.layout);
        cut(raw, self.size, layout, self.region, channels as usize, &mut self.cut);
        &self.cut
    }
}

/// Resizes a box of an image into another image.
fn resize_box<P: PixelTrait>(
    resizer: &mut Resizer,
    options: &ResizeOptions,
    (from, size, crop): (&[u8], Size, CropBox),
    (to, target): (&mut [u8], Size),
) -> Result<(), ResizeError> {
    let sized = "the buffers were sized for these images";
    let image = TypedImageRef::<P>::from_buffer(size.width, size.height, from).expect(sized);
    let part = TypedCroppedImage::from_ref(&image, crop.left, crop.top, crop.width, crop.height);
    let mut out = TypedImage::<P>::from_buffer(target.width, target.height, to).expect(sized);
    resizer.resize_typed(&part.expect("the box lies inside"), &mut out, options)
}

fn assert_inside(crop: CropBox, size: Size) {
    let Size { height, width } = size;
    assert!(
        crop.height > 0
            && crop.width > 0
            && u64::from(crop.top) + u64::from(crop.height) <= u64::from(height)
            && u64::from(crop.left) + u64::from(crop.width) <= u64::from(width),
        "{crop:?} lies inside {height}x{width}"
    );
}
