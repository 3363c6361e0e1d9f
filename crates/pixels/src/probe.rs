//! Whether two machines make the same pixels.

use lacuna_recipe::augment::CropBox;
use lacuna_recipe::digest::Crc64;

use crate::{DECODER_ID, Decoder, ImageShape};

/// A made-up picture as JPEG, 4:2:0.
const PICTURE: &[u8] = include_bytes!("probe.jpg");

/// Returns a digest of what this build makes of a picture on this machine, and of its name.
///
/// Workers whose digests differ may not share a run: libraries choose their code by the processor.
pub fn probe_pixels() -> Crc64 {
    let shape = ImageShape { height: 40, width: 48, channels: 3 };
    let crop = CropBox { top: 9, left: 11, height: 78, width: 117 };
    let mut out = vec![0; shape.bytes()];
    let choose = |_| (crop, true);
    let done = Decoder::new().decode_and_render(PICTURE, choose, shape, &mut out);
    done.expect("the picture of this crate decodes");
    Crc64::of(DECODER_ID.as_bytes()).then(Crc64::of(&out))
}
