//! Keyed permutations with random access: any image of `0..n` is computed alone, without a table.
//!
//! From [`TABLE_MAX`] on: a Feistel network over the next power of two, whose results outside
//! `0..n` are fed in again until they fall inside (cycle walking: a permutation of a larger set,
//! followed from a member of the subset back into the subset, permutes the subset). Below: a table,
//! because a Feistel network over a handful of bits is visibly not uniform at any affordable number
//! of rounds.

use crate::philox::Draws;

/// Permutations of fewer elements than this are shuffled tables.
///
/// Measured on pairs of images: six rounds are indistinguishable from uniform at 100 elements and
/// three times too uneven at 16.
pub const TABLE_MAX: u64 = 100;

/// Rounds of the network; the smallest even number that passes the pair test from [`TABLE_MAX`] on.
const ROUNDS: usize = 6;

/// Largest permutation: a sample id has 48 bits.
pub const N_MAX: u64 = 1 << 48;

/// A pseudo-random permutation of `0..n`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prp {
    n: u64,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Table(Vec<u32>),
    Feistel {
        /// Width of the right half; the left half, one bit narrower or equal, lies above it.
        right_bits: u32,
        left_mask: u64,
        right_mask: u64,
        keys: [u64; ROUNDS],
    },
}

impl Prp {
    /// Builds the permutation of `0..n` (1 ≤ n ≤ 2^48) that the address `draws` selects.
    pub fn new(draws: &Draws, n: u64) -> Self {
        assert!((1..=N_MAX).contains(&n), "a permutation has 1 to 2^48 elements, not {n}");
        if n < TABLE_MAX {
            let table = shuffle(draws, n as u32);
            return Prp { n, kind: Kind::Table(table) };
        }
        let bits: u32 = 64 - (n - 1).leading_zeros();
        let left_bits: u32 = bits / 2;
        let right_bits: u32 = bits - left_bits;
        let mut keys: [u64; ROUNDS] = [0; ROUNDS];
        for (pair, block) in keys.chunks_exact_mut(2).zip(0u32..) {
            let w = draws.block(block);
            pair[0] = u64::from(w[0]) << 32 | u64::from(w[1]);
            pair[1] = u64::from(w[2]) << 32 | u64::from(w[3]);
        }
        let kind = Kind::Feistel {
            right_bits,
            left_mask: (1 << left_bits) - 1,
            right_mask: (1 << right_bits) - 1,
            keys,
        };
        Prp { n, kind }
    }

    /// Returns the number of elements.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Returns the image of `i` (below n).
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "{i} lies outside a permutation of {}", self.n);
        match &self.kind {
            Kind::Table(table) => u64::from(table[i as usize]),
            Kind::Feistel { right_bits, left_mask, right_mask, keys } => {
                let mut x = i;
                // The network covers less than twice n, so two passes are the mean at worst.
                loop {
                    let mut left = x >> right_bits;
                    let mut right = x & right_mask;
                    for pair in keys.chunks_exact(2) {
                        left ^= mix(right, pair[0]) & left_mask;
                        right ^= mix(left, pair[1]) & right_mask;
                    }
                    x = left << right_bits | right;
                    if x < self.n {
                        return x;
                    }
                }
            }
        }
    }
}

/// Mixes a half with a round key; the upper bits of the last product, folded down, are used.
fn mix(half: u64, key: u64) -> u64 {
    let x = (half ^ key).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ (x >> 32)
}

/// Shuffles `0..n` (Fisher–Yates); word `i` of `draws` decides the swap of place `i`.
pub fn shuffle(draws: &Draws, n: u32) -> Vec<u32> {
    let mut out: Vec<u32> = (0..n).collect();
    // Draws first, then swaps, some at a time: the processor then waits for several places of a
    // large table at once.
    let mut with = [0u32; 64];
    let mut end = n;
    while end > 1 {
        let start = end.saturating_sub(with.len() as u32).max(1);
        for (to, i) in with.iter_mut().zip((start..end).rev()) {
            *to = draws.below(i, i + 1);
        }
        for (other, i) in with.iter().zip((start..end).rev()) {
            out.swap(i as usize, *other as usize);
        }
        end = start;
    }
    out
}

#[cfg(test)]
mod tests;
