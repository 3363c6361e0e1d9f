//! CRC-64/NVME: the digest of states, tensors and files.
//!
//! Its values combine: the digest of a concatenation follows from the digests of its pieces, so a
//! tensor has one digest however many files hold its slices.

use crc_fast::CrcAlgorithm::Crc64Nvme;

/// A CRC-64/NVME value together with the number of bytes it covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Crc64 {
    /// The checksum; 0 for no bytes.
    pub value: u64,
    /// Bytes covered.
    pub bytes: u64,
}

impl Crc64 {
    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Crc64 { value: crc_fast::checksum(Crc64Nvme, bytes), bytes: bytes.len() as u64 }
    }

    /// Computes the digest of the little-endian bytes of `values`.
    pub fn of_f32(values: &[f32]) -> Self {
        const { assert!(cfg!(target_endian = "little"), "digests are over little-endian bytes") };
        Crc64::of(bytemuck::cast_slice(values))
    }

    /// Returns the digest of this piece followed by `next`.
    pub fn then(self, next: Crc64) -> Self {
        let bytes = self.bytes + next.bytes;
        if next.bytes == 0 {
            return self;
        }
        if self.bytes == 0 {
            return next;
        }
        Crc64 { value: multiply(shift(next.bytes), self.value) ^ next.value, bytes }
    }
}

// Combining is arithmetic on polynomials over GF(2) modulo the CRC's own, bit 63 being x^0: the
// digest of a piece is multiplied by x^8 for every byte that follows. Manifests combine a digest
// for each slice of each tensor, so it has to be cheap: by the library it was most of the work.

/// The CRC's polynomial without x^64, reflected.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^(2^k) for each k.
const POWERS: [u64; 64] = {
    let mut powers = [1 << 62; 64];
    let mut k = 1;
    while k < 64 {
        powers[k] = multiply(powers[k - 1], powers[k - 1]);
        k += 1;
    }
    powers
};

const fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    let mut left = a;
    while left != 0 {
        // All ones where the highest bit is set.
        product ^= b & (left as i64 >> 63) as u64;
        left <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
    }
    product
}

/// Returns x^(8 · bytes).
fn shift(bytes: u64) -> u64 {
    let mut product = 1 << 63;
    // Bit k of the number stands for x^(8 · 2^k).
    let mut left = bytes;
    while left != 0 {
        let k = left.trailing_zeros() as usize;
        product = multiply(POWERS[(k + 3) % 64], product);
        left &= left - 1;
    }
    product
}

/// Formats a CRC-64 as 16 hexadecimal digits, the form used in manifests.
pub fn hex(value: u64) -> String {
    format!("{value:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        // The catalogue's check value of CRC-64/NVME.
        assert_eq!(Crc64::of(b"123456789").value, 0xae8b14860a799888);
        assert_eq!(hex(Crc64::default().value), "0000000000000000");
    }

    #[test]
    fn pieces_combine() {
        let text: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        let whole = Crc64::of(&text);
        for cut in [0, 1, 8, 511, 999, 1000] {
            assert_eq!(Crc64::of(&text[..cut]).then(Crc64::of(&text[cut..])), whole, "cut {cut}");
        }
    }

    proptest::proptest! {
        /// As the library does it, for lengths up to exabytes.
        #[test]
        fn combining_agrees_with_the_library(
            a: u64,
            b: u64,
            before in 1..1u64 << 58,
            k in 0..59u32,
        ) {
            let after = 1u64 << k | b >> (64 - k).min(63);
            let combined = Crc64 { value: a, bytes: before }.then(Crc64 { value: b, bytes: after });
            let want = crc_fast::checksum_combine(Crc64Nvme, a, b, after);
            proptest::prop_assert_eq!(combined, Crc64 { value: want, bytes: before + after });
        }
    }
}
