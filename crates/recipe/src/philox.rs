//! Philox4x32-10: the only random source. Every draw is addressed, none is taken from a stream.
//!
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11). Known answers are
//! those of the authors' Random123 distribution.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// What a draw is for. The tag separates the streams; numbers are part of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// Order of samples.
    Order = 0,
    /// Random resized crop.
    Crop = 1,
    /// Horizontal flip.
    Flip = 2,
    /// Mask noise.
    Mask = 3,
    /// Mixup and cutmix.
    Mix = 4,
    /// Stochastic depth.
    DropPath = 5,
    /// Initial weights.
    Init = 6,
    /// Free for extensions.
    User = 7,
    /// Boxes of images that are filled with noise.
    Erase = 8,
    /// The noise that fills them.
    Noise = 9,
    /// Changes of colours and geometry.
    Augment = 10,
}

/// Computes the ten-round Philox4x32 bijection.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let p0: u64 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let p1: u64 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
    }
    c
}

/// Number of draws one address has: the counter has 24 bits for them, four words each.
pub const DRAW_BLOCKS_MAX: u32 = 1 << 24;

/// An address in the space of draws: seed, purpose, epoch and sample.
///
/// Counter words: `sample` low 32 | `sample` high 16, occurrence 16 | epoch 32 | tag 8, draw 24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    key: [u32; 2],
    words: [u32; 3],
    tag: Tag,
}

impl Draws {
    /// Addresses the draws of one `sample` (below 2^48) in one `epoch`.
    pub fn new(seed: u64, tag: Tag, epoch: u32, sample: u64) -> Self {
        assert!(sample < 1 << 48, "sample id {sample} does not fit the counter's 48 bits");
        let key = [seed as u32, (seed >> 32) as u32];
        Draws { key, words: [sample as u32, ((sample >> 32) as u32) << 16, epoch], tag }
    }

    /// Returns the same address for another purpose.
    pub fn tagged(self, tag: Tag) -> Self {
        Draws { tag, ..self }
    }

    /// Returns the same address for the sample's `occurrence`-th use in the epoch.
    pub fn occurrence(mut self, occurrence: u16) -> Self {
        self.words[1] = (self.words[1] & 0xFFFF_0000) | u32::from(occurrence);
        self
    }

    /// Returns the four words of draw block `block` (below [`DRAW_BLOCKS_MAX`]).
    pub fn block(&self, block: u32) -> [u32; 4] {
        assert!(block < DRAW_BLOCKS_MAX, "draw block {block} does not fit the counter's 24 bits");
        let last: u32 = (self.tag as u32) << 24 | block;
        philox4x32([self.words[0], self.words[1], self.words[2], last], self.key)
    }

    /// Returns 32-bit word number `index`: word `index % 4` of block `index / 4`.
    pub fn word(&self, index: u32) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Returns a uniform number in `[0, 1)` with 24 bits, exact in f32.
    pub fn unit_f32(&self, index: u32) -> f32 {
        unit24(self.word(index))
    }

    /// Returns a uniform number in `[0, 1)` with 53 bits from words `2·index` and `2·index + 1`.
    pub fn unit_f64(&self, index: u32) -> f64 {
        let pair = self.block(index / 2);
        let at = ((index % 2) * 2) as usize;
        unit53(pair[at], pair[at + 1])
    }

    /// Returns a uniform integer in `0..n` (n > 0) from word `index`, by multiplication: the bias
    /// is below `n / 2^32`.
    pub fn below(&self, index: u32, n: u32) -> u32 {
        assert!(n > 0, "an empty range has no draw");
        ((u64::from(self.word(index)) * u64::from(n)) >> 32) as u32
    }
}

/// Maps a word to `[0, 1)` by its top 24 bits.
pub fn unit24(word: u32) -> f32 {
    (word >> 8) as f32 / (1u32 << 24) as f32
}

/// Maps two words to `[0, 1)` by 53 bits, `high` first.
pub fn unit53(high: u32, low: u32) -> f64 {
    let bits: u64 = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn counter_layout() {
        let draws = Draws::new(0x1122_3344_5566_7788, Tag::Mask, 9, 0xABCD_0123_4567).occurrence(3);
        let direct =
            philox4x32([0x0123_4567, 0xABCD_0003, 9, 3 << 24 | 5], [0x5566_7788, 0x1122_3344]);
        assert_eq!(draws.block(5), direct);
        assert_eq!(draws.word(22), direct[2]);
    }

    #[test]
    fn ranges() {
        let draws = Draws::new(1, Tag::Crop, 0, 0);
        for i in 0..1000 {
            assert!((0.0..1.0).contains(&draws.unit_f32(i)));
            assert!((0.0..1.0).contains(&draws.unit_f64(i)));
            assert!(draws.below(i, 7) < 7);
        }
        assert_eq!(unit24(u32::MAX), 1.0 - 1.0 / 16_777_216.0);
        assert!(unit53(u32::MAX, u32::MAX) < 1.0);
    }
}
