//! The messages that open a connection, and the proofs in them. Pure.
//!
//! ```text
//! dialer   -> acceptor  Hello    who I think we are, my nonce
//! acceptor -> dialer    Reply    Challenge: its nonce and its proof | Refuse: why
//! dialer   -> acceptor  proof
//! acceptor -> dialer    Reply    Welcome | Refuse: why
//! ```
//!
//! A proof is BLAKE3 keyed with the generation's key over both nonces, the run, the generation, the
//! world, both ranks and the direction: it fits one connection in one direction only. All numbers
//! are little-endian.

use crate::Refusal;

/// Opens every Hello; the last byte is the version of this exchange.
const MAGIC: [u8; 8] = *b"lacunaC\x02";
pub(crate) const NONCE_BYTES: usize = 32;
pub(crate) const PROOF_BYTES: usize = 32;
pub(crate) const HELLO_BYTES: usize = 8 + 32 + 8 + 2 + 2 + 2 + NONCE_BYTES;
pub(crate) const REPLY_BYTES: usize = 2 + NONCE_BYTES + PROOF_BYTES;
/// The longest message of the exchange.
pub(crate) const MESSAGE_BYTES_MAX: usize = HELLO_BYTES;

pub(crate) type Nonce = [u8; NONCE_BYTES];
pub(crate) type Key = [u8; 32];

/// First message of a dialer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// BLAKE3 of the run's id: fixed size, and the id is not shown to strangers.
    pub run_hash: [u8; 32],
    pub generation: u64,
    pub world: u16,
    pub dialer: u16,
    pub acceptor: u16,
    pub nonce: Nonce,
}

impl Hello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..40].copy_from_slice(&self.run_hash);
        out[40..48].copy_from_slice(&self.generation.to_le_bytes());
        out[48..50].copy_from_slice(&self.world.to_le_bytes());
        out[50..52].copy_from_slice(&self.dialer.to_le_bytes());
        out[52..54].copy_from_slice(&self.acceptor.to_le_bytes());
        out[54..].copy_from_slice(&self.nonce);
        out
    }

    /// Reads a Hello; `None` for bytes of another protocol or version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        if bytes[..8] != MAGIC {
            return None;
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut generation = [0; 8];
        generation.copy_from_slice(&bytes[40..48]);
        let mut hello = Self {
            run_hash: [0; 32],
            generation: u64::from_le_bytes(generation),
            world: u16_at(48),
            dialer: u16_at(50),
            acceptor: u16_at(52),
            nonce: [0; NONCE_BYTES],
        };
        hello.run_hash.copy_from_slice(&bytes[8..40]);
        hello.nonce.copy_from_slice(&bytes[54..]);
        Some(hello)
    }

    /// Says whether an acceptor with the plan `expected` lets this dialer go on.
    ///
    /// `expected.dialer` is ignored: any higher rank of the world may dial.
    pub fn check(&self, expected: &Self) -> Result<(), Refusal> {
        if self.run_hash != expected.run_hash {
            Err(Refusal::OtherRun)
        } else if self.generation != expected.generation {
            Err(Refusal::OtherGeneration)
        } else if self.world != expected.world
            || self.acceptor != expected.acceptor
            || self.dialer <= self.acceptor
            || self.dialer >= self.world
        {
            Err(Refusal::OtherGroup)
        } else {
            Ok(())
        }
    }
}

/// Which end of a connection proves itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prover {
    Dialer,
    Acceptor,
}

/// Computes the proof of one end. Comparing two `blake3::Hash` takes constant time.
pub(crate) fn prove(key: &Key, prover: Prover, hello: &Hello, acceptor: &Nonce) -> blake3::Hash {
    let direction: &[u8] = match prover {
        Prover::Dialer => b"dialer..",
        Prover::Acceptor => b"acceptor",
    };
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(direction).update(&hello.encode()).update(acceptor);
    hasher.finalize()
}

/// An acceptor's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Challenge { nonce: Nonce, proof: [u8; PROOF_BYTES] },
    Welcome,
    Refuse(Refusal),
}

impl Reply {
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let mut out = [0; REPLY_BYTES];
        match self {
            Self::Challenge { nonce, proof } => {
                out[0] = 1;
                out[2..2 + NONCE_BYTES].copy_from_slice(nonce);
                out[2 + NONCE_BYTES..].copy_from_slice(proof);
            }
            Self::Welcome => out[0] = 2,
            Self::Refuse(refusal) => {
                out[0] = 3;
                out[1] = match refusal {
                    Refusal::OtherRun => 1,
                    Refusal::OtherGeneration => 2,
                    Refusal::OtherGroup => 3,
                    Refusal::WrongKey => 4,
                };
            }
        }
        out
    }

    /// Reads a reply; `None` for bytes of another protocol or version.
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Option<Self> {
        match (bytes[0], bytes[1]) {
            (1, 0) => {
                let (mut nonce, mut proof) = ([0; NONCE_BYTES], [0; PROOF_BYTES]);
                nonce.copy_from_slice(&bytes[2..2 + NONCE_BYTES]);
                proof.copy_from_slice(&bytes[2 + NONCE_BYTES..]);
                Some(Self::Challenge { nonce, proof })
            }
            (2, 0) => Some(Self::Welcome),
            (3, 1) => Some(Self::Refuse(Refusal::OtherRun)),
            (3, 2) => Some(Self::Refuse(Refusal::OtherGeneration)),
            (3, 3) => Some(Self::Refuse(Refusal::OtherGroup)),
            (3, 4) => Some(Self::Refuse(Refusal::WrongKey)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
