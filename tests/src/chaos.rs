//! The product's claim under seeded faults: whatever happens to its processes and its network, a
//! run ends with the bits of an undisturbed one.
//!
//! A *cell* is one run with one kind of fault and one number of workers. Start reading at
//! [`cell::run`].

pub mod cell;
mod inject;
pub mod matrix;
pub mod verdict;

use std::fmt;
use std::str::FromStr;

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// None.
    Quiet,
    /// SIGKILL of trainers and agents, also while forming, healing and saving.
    Kills,
    /// SIGKILL and restart of the coordinator, SIGSTOP of it.
    Coordinator,
    /// Workers join and are drained.
    JoinDrain,
    /// SIGSTOP of trainers, short of the lease and past it.
    Stops,
    /// Cut, one-way cut, slow and reset connections: to the coordinator, between workers.
    Partitions,
    /// Peers cut for so long that the group must be seen to hang, while all of them beat.
    Hangs,
    /// All of these but hangs.
    Mixed,
}

impl Row {
    /// The rows of the matrix.
    pub const ALL: [Row; 8] = [
        Row::Quiet,
        Row::Kills,
        Row::Coordinator,
        Row::JoinDrain,
        Row::Stops,
        Row::Partitions,
        Row::Hangs,
        Row::Mixed,
    ];

    /// Returns its word on command lines.
    pub fn word(self) -> &'static str {
        match self {
            Row::Quiet => "quiet",
            Row::Kills => "kills",
            Row::Coordinator => "coordinator",
            Row::JoinDrain => "join-drain",
            Row::Stops => "stops",
            Row::Partitions => "partitions",
            Row::Hangs => "hangs",
            Row::Mixed => "mixed",
        }
    }

    /// Returns what it is, for people.
    pub fn title(self) -> &'static str {
        match self {
            Row::Quiet => "no fault",
            Row::Kills => "random kills",
            Row::Coordinator => "coordinator restart, stall",
            Row::JoinDrain => "join and drain",
            Row::Stops => "SIGSTOP",
            Row::Partitions => "partitions",
            Row::Hangs => "peers cut for long",
            Row::Mixed => "all of these but that",
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Row {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = Row::ALL.map(Row::word).join(", ");
        let row = Row::ALL.into_iter().find(|row| row.word() == text);
        row.ok_or_else(|| format!("`{text}`: expected one of {words}"))
    }
}
