//! What values a key takes: the reader, the schema for editors and the reference page follow this.

use std::fmt;

/// The values of a key, before it is compared with others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A run's name.
    Name,
    /// A path, or a URL of one of these schemes.
    Place(&'static [&'static str]),
    /// One of these words.
    Word(&'static [&'static str]),
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A whole number, or `"auto"`.
    AutoOr {
        /// Smallest number.
        min: u64,
        /// Largest number.
        max: u64,
    },
    /// A number.
    Number(Interval),
    /// Two numbers.
    Pair(Interval),
    /// Two numbers, the smaller one first.
    Range(Interval),
    /// One number for each channel of an image.
    PerChannel(Interval),
    /// Sides of an image in pixels: height and width, or one number for both.
    Sides {
        /// Longest side.
        max: u64,
    },
    /// A length in steps or epochs.
    Length,
    /// A length in steps or epochs, or `"none"`.
    LengthOrNone,
    /// Steps, epochs or a time.
    Cadence,
    /// A list of cadences, or one.
    Cadences,
    /// A size in bytes.
    Bytes,
    /// Fewest and most workers.
    Workers,
}

/// Most rules of when to save: one for each unit and some to spare.
pub const CADENCES_MAX: usize = 8;

impl fmt::Display for Kind {
    /// Says what to write, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Name => {
                let max = lacuna_types::NAME_BYTES_MAX;
                write!(f, "string: 1 to {max} of a-z A-Z 0-9 . _ : -, not a dot first")
            }
            Kind::Place([]) => write!(f, "string: a path"),
            Kind::Place(schemes) => {
                let schemes: Vec<String> = schemes.iter().map(|s| format!("{s}://")).collect();
                write!(f, "string: a path, or a URL of {}", schemes.join(", "))
            }
            Kind::Word(words) => {
                let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
                write!(f, "{}", words.join(", "))
            }
            Kind::Bool => write!(f, "true, false"),
            Kind::Integer { min, max } if min == max => write!(f, "{min}"),
            Kind::Integer { min, max } => write!(f, "whole number from {min} to {max}"),
            Kind::AutoOr { min, max } => write!(f, "whole number from {min} to {max}, or \"auto\""),
            Kind::Number(interval) => write!(f, "number {interval}"),
            Kind::Pair(interval) => write!(f, "two numbers, each {interval}"),
            Kind::Range(interval) => write!(f, "two numbers, the smaller first, each {interval}"),
            Kind::PerChannel(interval) => write!(f, "a number for each channel, {interval}"),
            Kind::Sides { max } => {
                write!(f, "whole number from 1 to {max}, or [height, width] of such")
            }
            Kind::Length => write!(f, "string: whole number with unit ep or step"),
            Kind::LengthOrNone => write!(f, "string: whole number with unit ep or step; \"none\""),
            Kind::Cadence => write!(f, "string: whole number with unit ep, step, s, min or h"),
            Kind::Cadences => write!(
                f,
                "string: whole number with unit ep, step, s, min or h; or a list of 1 to \
                 {CADENCES_MAX}"
            ),
            Kind::Bytes => {
                write!(f, "string: whole number with unit B, KiB, MiB, GiB, TiB, kB, MB, GB or TB")
            }
            Kind::Workers => write!(f, "string: \"min:max\", 1 to {}", super::table::WORKERS_MAX),
        }
    }
}

/// Numbers between two ends, each of which may be left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub min: f64,
    /// Upper end.
    pub max: f64,
    /// Whether the lower end itself is refused.
    pub min_excluded: bool,
    /// Whether the upper end itself is refused.
    pub max_excluded: bool,
}

impl Interval {
    pub(crate) const fn from(min: f64, max: f64) -> Self {
        Interval { min, max, min_excluded: false, max_excluded: false }
    }

    pub(crate) const fn above(min: f64, max: f64) -> Self {
        Interval { min, max, min_excluded: true, max_excluded: false }
    }

    pub(crate) const fn below(min: f64, max: f64) -> Self {
        Interval { min, max, min_excluded: false, max_excluded: true }
    }

    pub(crate) const fn between(min: f64, max: f64) -> Self {
        Interval { min, max, min_excluded: true, max_excluded: true }
    }

    /// Tells whether `x` lies inside, also after it was rounded to f32, as the arithmetic of a run
    /// does: what is as good as an excluded end is refused too.
    pub fn contains(&self, x: f64) -> bool {
        let above = match self.min_excluded {
            true => x >= self.min + f64::from(f32::MIN_POSITIVE),
            false => x >= self.min,
        };
        let below = match self.max_excluded {
            true => f64::from(x as f32) < self.max,
            false => x <= self.max,
        };
        above && below
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interval { min, max, .. } = self;
        match (self.min_excluded, self.max_excluded) {
            (false, false) => write!(f, "from {min} to {max}"),
            (true, false) => write!(f, "above {min} and up to {max}"),
            (false, true) => write!(f, "from {min} to below {max}"),
            (true, true) => write!(f, "between {min} and {max}, both excluded"),
        }
    }
}
