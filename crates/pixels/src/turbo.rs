//! JPEG by libjpeg-turbo: the accurate DCT and smooth chroma, which are its defaults and Pillow's.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::ptr::NonNull;

use lacuna_recipe::augment::{CropBox, Size};
use turbojpeg_sys as tj;

use crate::convert::{Layout, cmyk_to_rgb, make_room};
use crate::format::{Codec, DecodeError, PIXELS_MAX};
use crate::planes::{Chroma, PlaneBuffers, PlaneLayout, Smooth};

/// A progressive image with more scans is an attack: a real one has about ten.
const SCANS_MAX: c_int = 500;
/// Most megabytes of coefficients: the largest image in 16-bit coefficients of three channels.
const MEMORY_MAX: c_int = 512;
/// Columns and rows that are decoded around a box: smooth chroma looks one chroma sample to each
/// side, and the first rows after a skip have no row above.
const MARGIN: u32 = 4;
/// Blocks that are decoded to the left of a box in a progressive image: where a scan lacks, blocks
/// are smoothed over two neighbours, and the first that is decoded counts as the image's edge.
const SMOOTHED: u32 = 2;

/// What libjpeg-turbo says of an image that it cannot decode.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TurboError(String);

const YCBCR: c_int = tj::TJCS_TJCS_YCbCr as c_int;
const GREY: c_int = tj::TJCS_TJCS_GRAY as c_int;
const CMYK: c_int = tj::TJCS_TJCS_CMYK as c_int;
const YCCK: c_int = tj::TJCS_TJCS_YCCK as c_int;

/// How the texts of libjpeg-turbo's warnings begin: the `JWRN_` messages of its `jerror.h`.
const WARNINGS: [&str; 7] = [
    "Application transferred too many scanlines",
    "Corrupt JPEG data: ",
    "Inconsistent progression sequence",
    "Invalid SOS parameters for sequential JPEG",
    "Premature end of JPEG file",
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
];

/// What texts of refused allocations hold: libjpeg's `JERR_OUT_OF_MEMORY`, and libjpeg-turbo's
/// own. An image that needs more than `MEMORY_MAX` ends with another text, everywhere.
const NO_MEMORY: [&str; 2] = ["Insufficient memory", "Memory allocation failure"];

impl From<TurboError> for DecodeError {
    fn from(error: TurboError) -> Self {
        let codec = Codec::Jpeg;
        if NO_MEMORY.iter().any(|text| error.0.contains(text)) {
            return DecodeError::Memory { codec, said: error.0 };
        }
        DecodeError::Data { codec, source: Box::new(error) }
    }
}

/// A decompressor; one a thread.
pub(crate) struct Turbo {
    handle: NonNull<std::ffi::c_void>,
}

// SAFETY: the handle owns its memory, and libjpeg-turbo keeps nothing of it in thread-local or
// global state that a call reads back; `&mut self` keeps calls apart.
unsafe impl Send for Turbo {}

impl fmt::Debug for Turbo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turbo")
    }
}

/// What a JPEG's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Height and width.
    pub size: Size,
    /// TurboJPEG's number of the subsampling, -1 where it has none.
    subsampling: c_int,
    /// TurboJPEG's number of the colour space.
    space: c_int,
    /// Whether parts of it can be decoded.
    cuts: bool,
    /// Whether its blocks come in many scans.
    progressive: bool,
}

impl Header {
    fn format(&self) -> (c_int, usize) {
        match self.space {
            GREY => (tj::TJPF_TJPF_GRAY, 1),
            CMYK | YCCK => (tj::TJPF_TJPF_CMYK, 4),
            _ => (tj::TJPF_TJPF_RGB, 3),
        }
    }

    /// Returns the box that has to be decoded so that the pixels in `crop` come out right.
    pub fn around(&self, crop: CropBox) -> CropBox {
        let Size { height, width } = self.size;
        let whole = CropBox { top: 0, left: 0, height, width };
        let Some(mcu) = usize::try_from(self.subsampling).ok().and_then(|n| MCU.get(n)) else {
            return whole;
        };
        if !self.cuts {
            return whole;
        }
        let before = |at: u32, unit: u32| at.saturating_sub(MARGIN) / unit * unit;
        let after = |at: u32, end: u32| at.saturating_add(MARGIN).min(end);
        let smoothed = if self.progressive { SMOOTHED * mcu.0 } else { 0 };
        let (left, top) = (before(crop.left, mcu.0), before(crop.top, mcu.1));
        let left = left.saturating_sub(smoothed);
        let right = after(crop.left + crop.width, width);
        let bottom = after(crop.top + crop.height, height);
        CropBox { top, left, height: bottom - top, width: right - left }
    }
}

/// Width and height of a block of each subsampling, by TurboJPEG's numbers.
const MCU: [(u32, u32); 7] = [(8, 8), (16, 8), (16, 16), (8, 8), (8, 16), (32, 8), (8, 32)];

impl Turbo {
    /// Creates a decompressor.
    ///
    /// # Panics
    /// If there is no memory for it.
    pub fn new() -> Self {
        // SAFETY: the call takes a constant and returns a new handle or null.
        let handle = unsafe { tj::tj3Init(tj::TJINIT_TJINIT_DECOMPRESS as c_int) };
        let mut turbo = Turbo { handle: NonNull::new(handle).expect("memory for a decompressor") };
        turbo.set(tj::TJPARAM_TJPARAM_MAXPIXELS, PIXELS_MAX as c_int);
        turbo.set(tj::TJPARAM_TJPARAM_SCANLIMIT, SCANS_MAX);
        turbo.set(tj::TJPARAM_TJPARAM_MAXMEMORY, MEMORY_MAX);
        turbo
    }

    fn set(&mut self, parameter: tj::TJPARAM, value: c_int) {
        // SAFETY: the handle is live.
        let set = unsafe { tj::tj3Set(self.handle.as_ptr(), parameter as c_int, value) };
        assert_eq!(set, 0, "parameter {parameter} takes {value}");
    }

    fn get(&self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: the handle is live.
        unsafe { tj::tj3Get(self.handle.as_ptr(), parameter as c_int) }
    }

    /// Turns a call's result into ours: warnings are for damaged data that has pixels all the same.
    fn done(&self, code: c_int) -> Result<(), TurboError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the handle is live, and the text is a C string that stays until the next call.
        let text = unsafe { CStr::from_ptr(tj::tj3GetErrorStr(self.handle.as_ptr())) };
        let text = text.to_string_lossy();
        // The library's own code of severity is no help: an error that ends decoding counts as a
        // warning once there was one. But only the first warning of a call leaves its text, and an
        // error writes over it.
        if WARNINGS.iter().any(|start| text.starts_with(start)) {
            return Ok(());
        }
        Err(TurboError(text.into_owned()))
    }

    /// Reads the header.
    pub fn header(&mut self, bytes: &[u8]) -> Result<Header, TurboError> {
        // SAFETY: the handle is live, and the bytes are read during the call only.
        let code = unsafe {
            tj::tj3DecompressHeader(self.handle.as_ptr(), bytes.as_ptr(), bytes.len() as _)
        };
        self.done(code)?;
        let side = |parameter| u32::try_from(self.get(parameter)).unwrap_or(0);
        let size = Size {
            height: side(tj::TJPARAM_TJPARAM_JPEGHEIGHT),
            width: side(tj::TJPARAM_TJPARAM_JPEGWIDTH),
        };
        let precision = self.get(tj::TJPARAM_TJPARAM_PRECISION);
        if precision != 8 {
            return Err(TurboError(format!("{precision} bits a sample, 8 are supported")));
        }
        Ok(Header {
            size,
            subsampling: self.get(tj::TJPARAM_TJPARAM_SUBSAMP),
            space: self.get(tj::TJPARAM_TJPARAM_COLORSPACE),
            cuts: self.get(tj::TJPARAM_TJPARAM_LOSSLESS) == 0,
            progressive: self.get(tj::TJPARAM_TJPARAM_PROGRESSIVE) != 0,
        })
    }

    /// Decodes the planes into `out`; `None` for images whose planes are not kept.
    pub fn planes(
        &mut self,
        bytes: &[u8],
        out: &mut PlaneBuffers,
    ) -> Result<Option<PlaneLayout>, TurboError> {
        let header = self.header(bytes)?;
        let chroma = match (header.space, header.subsampling) {
            (GREY, tj::TJSAMP_TJSAMP_GRAY) => Chroma::Grey,
            (YCBCR, tj::TJSAMP_TJSAMP_444) => Chroma::Full,
            (YCBCR, tj::TJSAMP_TJSAMP_422) => Chroma::HalfWidth,
            (YCBCR, tj::TJSAMP_TJSAMP_420) => Chroma::Quarter,
            (YCBCR, tj::TJSAMP_TJSAMP_440) => Chroma::HalfHeight,
            _ => return Ok(None),
        };
        let size = header.size;
        if !header.cuts || !PlaneLayout::is_worth(size) {
            return Ok(None);
        }
        let (width, height) = (size.width as c_int, size.height as c_int);
        let n_planes = if chroma == Chroma::Grey { 1 } else { 3 };
        let mut planes: [Vec<u8>; 3] = [const { Vec::new() }; 3];
        let mut strides = [0; 3];
        for (plane, id) in planes.iter_mut().zip(0..n_planes) {
            // SAFETY: these two compute sizes from their arguments alone.
            let (bytes, stride) = unsafe {
                let samp = header.subsampling;
                let stride = tj::tj3YUVPlaneWidth(id, width, samp);
                (tj::tj3YUVPlaneSize(id, width, 0, height, samp), stride)
            };
            make_room(plane, bytes as usize);
            strides[id as usize] = stride;
        }
        let mut pointers = planes.each_mut().map(|plane| plane.as_mut_ptr());
        // SAFETY: the handle is live and decodes the bytes whose header gave the sizes; each plane
        // has the room that the library asks for at its strides.
        let code = unsafe {
            tj::tj3DecompressToYUVPlanes8(
                self.handle.as_ptr(),
                bytes.as_ptr(),
                bytes.len() as _,
                pointers.as_mut_ptr(),
                strides.as_mut_ptr(),
            )
        };
        self.done(code)?;
        let layout = PlaneLayout { size, chroma };
        let planes = planes.each_ref().map(Vec::as_slice);
        out.copy(&layout, planes, strides.map(|n| n as usize));
        Ok(Some(layout))
    }

    /// Decodes a box that [`Header::around`] gave into `raw`.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        header: &Header,
        region: CropBox,
        raw: &mut Vec<u8>,
    ) -> Result<Layout, TurboError> {
        let Size { height, width } = header.size;
        let whole = (region.height, region.width) == (height, width);
        let [x, y, w, h] = match whole {
            true => [0; 4],
            false => [region.left, region.top, region.width, region.height].map(|n| n as c_int),
        };
        // SAFETY: the handle is live, and has read the header that the region was made from.
        let code =
            unsafe { tj::tj3SetCroppingRegion(self.handle.as_ptr(), tj::tjregion { x, y, w, h }) };
        self.done(code)?;
        let (format, channels) = header.format();
        let pitch = region.width as usize * channels;
        make_room(raw, pitch * region.height as usize);
        // SAFETY: the handle is live; the call reads the header of the same bytes again, whose size
        // is that of `header`, and writes `region.height` rows of `pitch` bytes, which `raw` holds.
        let code = unsafe {
            tj::tj3Decompress8(
                self.handle.as_ptr(),
                bytes.as_ptr(),
                bytes.len() as _,
                raw.as_mut_ptr(),
                pitch as c_int,
                format,
            )
        };
        self.done(code)?;
        if channels == 4 {
            cmyk_to_rgb(raw);
        }
        Ok(Layout { channels: channels.min(3), depth: 1 })
    }
}

/// Turns planes of equal size into colour; one a thread.
pub(crate) struct Colours(Turbo);

impl fmt::Debug for Colours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Colours")
    }
}

impl Colours {
    /// Creates a converter.
    pub fn new() -> Self {
        let mut turbo = Turbo::new();
        turbo.set(tj::TJPARAM_TJPARAM_SUBSAMP, tj::TJSAMP_TJSAMP_444);
        Colours(turbo)
    }

    /// Writes `size` pixels of three channels to `out`: luma's rows are `stride` bytes apart, and
    /// chroma begins `skip` bytes into its rows.
    pub fn convert(
        &mut self,
        (luma, stride): (&[u8], usize),
        from: &Smooth,
        size: Size,
        out: &mut [u8],
    ) -> Result<(), TurboError> {
        let (width, height) = (size.width as usize, size.height as usize);
        assert!(height > 0 && luma.len() >= (height - 1) * stride + width && stride >= width);
        assert_eq!(out.len(), 3 * width * height);
        let chroma = from.stride * height;
        assert!(from.skip + width <= from.stride && from.chroma.iter().all(|c| c.len() >= chroma));
        let planes = [luma, &from.chroma[0][from.skip..], &from.chroma[1][from.skip..]];
        let planes = planes.map(<[u8]>::as_ptr);
        let strides = [stride, from.stride, from.stride].map(|n| n as c_int);
        // SAFETY: the handle is live; each plane has `height` rows of `width` bytes at its stride,
        // and `out` has room for as many pixels, as asserted above.
        let code = unsafe {
            tj::tj3DecodeYUVPlanes8(
                self.0.handle.as_ptr(),
                planes.as_ptr(),
                strides.as_ptr(),
                out.as_mut_ptr(),
                width as c_int,
                0,
                height as c_int,
                tj::TJPF_TJPF_RGB,
            )
        };
        self.0.done(code)
    }
}

impl Drop for Turbo {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { tj::tj3Destroy(self.handle.as_ptr()) }
    }
}

/// How a test's JPEG is made.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoding {
    /// TurboJPEG's number of the subsampling: 0 4:4:4, 1 4:2:2, 2 4:2:0, 3 grey, 4 4:4:0, 5 4:1:1,
    /// 6 4:4:1.
    pub subsampling: c_int,
    /// 1 to 100.
    pub quality: c_int,
    /// Many scans.
    pub progressive: bool,
    /// 3, or 4 for CMYK, which is stored as YCCK.
    pub channels: usize,
}

/// Encodes rows of interleaved channels.
#[cfg(test)]
pub(crate) fn encode(pixels: &[u8], size: Size, how: Encoding) -> Vec<u8> {
    assert_eq!(pixels.len(), size.width as usize * size.height as usize * how.channels);
    let format = if how.channels == 4 { tj::TJPF_TJPF_CMYK } else { tj::TJPF_TJPF_RGB };
    let (mut out, mut n) = (std::ptr::null_mut(), 0);
    // SAFETY: the handle lives until `tj3Destroy`, the pixels hold what the sizes say, and the
    // library allocates the result, which is copied and freed.
    unsafe {
        let handle = tj::tj3Init(tj::TJINIT_TJINIT_COMPRESS as c_int);
        let set = |parameter: tj::TJPARAM, value: c_int| {
            assert_eq!(tj::tj3Set(handle, parameter as c_int, value), 0);
        };
        set(tj::TJPARAM_TJPARAM_SUBSAMP, how.subsampling);
        set(tj::TJPARAM_TJPARAM_QUALITY, how.quality);
        set(tj::TJPARAM_TJPARAM_PROGRESSIVE, how.progressive.into());
        let (width, height) = (size.width as c_int, size.height as c_int);
        let code =
            tj::tj3Compress8(handle, pixels.as_ptr(), width, 0, height, format, &mut out, &mut n);
        assert_eq!(code, 0, "{:?}", CStr::from_ptr(tj::tj3GetErrorStr(handle)));
        let bytes = std::slice::from_raw_parts(out, n as usize).to_vec();
        tj::tj3Free(out.cast());
        tj::tj3Destroy(handle);
        bytes
    }
}
