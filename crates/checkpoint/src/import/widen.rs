//! Elements of foreign files as f32; nothing is lost.

/// Widens little-endian elements of `dtype`, one of [`lacuna_recipe::keymap::import::DTYPES`].
pub(super) fn widen(dtype: &str, bytes: &[u8], out: &mut [f32]) {
    let halves = |widen: fn(u16) -> f32, out: &mut [f32]| {
        for (b, x) in bytes.chunks_exact(2).zip(out) {
            *x = widen(u16::from_le_bytes([b[0], b[1]]));
        }
    };
    match dtype {
        "F32" => bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes),
        "BF16" => halves(from_bf16, out),
        "F16" => halves(from_f16, out),
        other => panic!("the plan takes no tensor of {other}"),
    }
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn from_f16(bits: u16) -> f32 {
    /// The smallest half, 2^-24.
    const SMALLEST: f32 = 1.0 / 16_777_216.0;
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(bits >> 10) & 0x1f, u32::from(bits) & 0x3ff);
    match exponent {
        0 => f32::from_bits(sign | (fraction as f32 * SMALLEST).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        // The exponents of the two types count from -15 and from -127.
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_widened() {
        for (bits, want) in [
            (0x0000, 0.0f32),
            (0x8000, -0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_95),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x03ff, 6.097_555e-5),
            (0x8001, -5.960_464_5e-8),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(from_f16(bits).to_bits(), want.to_bits(), "{bits:04x}");
        }
        assert!(from_f16(0x7e00).is_nan());
        assert_eq!(from_bf16(0xbf80), -1.0);
        let mut out = [0.0; 2];
        widen("BF16", &[0x80, 0x3f, 0, 0x40], &mut out);
        assert_eq!(out, [1.0, 2.0]);
    }

    /// Every half is a number that a float has too, in the same order.
    #[test]
    fn halves_keep_their_order() {
        let finite: Vec<f32> = (0..0x7c00).map(from_f16).collect();
        assert!(finite.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
