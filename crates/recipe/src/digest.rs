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
        let value = crc_fast::checksum_combine(Crc64Nvme, self.value, next.value, next.bytes);
        Crc64 { value, bytes }
    }
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
}
