//! Quantities with units: lengths of training, cadences, times and sizes.
//!
//! A bare number is none of them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Longest length in steps: a schedule counts steps in f64, which is exact up to here.
pub const STEPS_MAX: u64 = 1 << 53;
/// Longest length in epochs: random draws are keyed by a 32-bit epoch.
pub const EPOCHS_MAX: u64 = u32::MAX as u64;
/// Longest time, ten years: anything above is a slip of the unit.
pub const SECONDS_MAX: u64 = 10 * 365 * 86_400;

/// A quantity that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// The text does not start with a whole number.
    #[error("is not a whole number with a unit, such as {expected}")]
    Number {
        /// An example of what is accepted.
        expected: &'static str,
    },
    /// The number is not followed by a unit.
    #[error("needs a unit, such as {expected}")]
    NoUnit {
        /// An example of what is accepted.
        expected: &'static str,
    },
    /// The unit is not one that fits here.
    #[error("has the unit `{unit}`, which is none of {units}")]
    Unit {
        /// What was written.
        unit: String,
        /// What is accepted.
        units: &'static str,
    },
    /// The quantity is zero or too large.
    #[error("must be from 1 to {max}")]
    Range {
        /// Largest accepted value, with its unit.
        max: String,
    },
}

impl UnitError {
    /// Returns what to write instead, where the unit looks like a slip.
    pub fn suggestion(&self) -> Option<&'static str> {
        let UnitError::Unit { unit, units } = self else {
            return None;
        };
        let aliases = [
            ("step", "steps iter iters iterations"),
            ("ep", "e epoch epochs"),
            ("s", "sec secs second seconds"),
            ("min", "m mins minute minutes"),
            ("h", "hr hrs hour hours"),
            ("MiB", "M m mib Mib"),
            ("GiB", "G g gib Gib"),
            ("KiB", "K k kib Kib"),
            ("TiB", "T t tib Tib"),
        ];
        let accepted = |name: &str| units.split(", ").any(|known| known == name);
        let known = |(name, names): &&(&'static str, &str)| {
            accepted(name) && names.split(' ').any(|alias| alias == unit)
        };
        let other_case = || units.split(", ").find(|known| known.eq_ignore_ascii_case(unit));
        aliases.iter().find(known).map(|(name, _)| *name).or_else(other_case)
    }
}

/// Tells whether a unit, or what people write for one, counts time.
pub(crate) fn is_time(unit: &str) -> bool {
    let names =
        "s sec secs second seconds m min mins minute minutes h hr hrs hour hours d day days";
    names.split(' ').any(|name| name.eq_ignore_ascii_case(unit))
}

/// Removes what people put between digits to read them; a comma may also be a point.
pub(crate) fn without_grouping(text: &str) -> String {
    let is_group = |part: &str| part.bytes().take_while(u8::is_ascii_digit).count() == 3;
    let groups = text.split(',').skip(1).all(is_group);
    { text.chars() }.filter(|c| !matches!(c, ' ' | '_') && (!groups || *c != ',')).collect()
}

/// Guesses what a quantity that cannot be read means; the answer can be read.
pub(crate) fn guess<T: FromStr<Err = UnitError>>(text: &str) -> Option<String> {
    let squeezed = without_grouping(text).replace(',', ".");
    let end = squeezed.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, unit) = squeezed.split_at(end);
    let whole: Option<u64> = number.parse().ok();
    let guess = match (whole, unit.to_ascii_lowercase().as_str()) {
        (Some(n), "d" | "day" | "days") => format!("{}h", n.checked_mul(24)?),
        (None, _) => from_fraction(number.parse().ok()?, unit)?,
        (Some(_), lower) => {
            let unit_of = |text: &str| text.parse::<T>().err().and_then(|e| e.suggestion());
            let unit = unit_of(&squeezed).or_else(|| unit_of(&format!("{number}{lower}")));
            format!("{number}{}", unit.unwrap_or(&squeezed[end..]))
        }
    };
    let guess = if guess == text { return None } else { guess };
    guess.parse::<T>().is_ok().then_some(guess)
}

/// Returns a fraction of a time or a size in a smaller unit, where it is whole there.
fn from_fraction(x: f64, unit: &str) -> Option<String> {
    let (factor, smaller) = match unit {
        "h" => (60.0, "min"),
        "min" => (60.0, "s"),
        "TB" => (1000.0, "GB"),
        "GB" => (1000.0, "MB"),
        "TiB" => (1024.0, "GiB"),
        "GiB" => (1024.0, "MiB"),
        _ => return None,
    };
    let n = x * factor;
    (n.fract() == 0.0 && (1.0..1e12).contains(&n)).then(|| format!("{n:.0}{smaller}"))
}

/// Splits `"15min"` into 15 and `min`.
fn split<'a>(text: &'a str, expected: &'static str) -> Result<(u64, &'a str), UnitError> {
    let end = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, unit) = text.split_at(end);
    let fraction = unit.starts_with(['.', ' ', '_', ',']);
    if digits.is_empty() || fraction {
        return Err(UnitError::Number { expected });
    }
    if unit.is_empty() {
        return Err(UnitError::NoUnit { expected });
    }
    // More digits than a u64 holds are above every limit, whatever the unit.
    Ok((digits.parse().unwrap_or(u64::MAX), unit))
}

fn within(n: u64, max: u64, unit: &str) -> Result<u64, UnitError> {
    if (1..=max).contains(&n) {
        return Ok(n);
    }
    let max = format!("{max}{unit}");
    Err(UnitError::Range { max })
}

fn unknown(unit: &str, units: &'static str) -> UnitError {
    UnitError::Unit { unit: crate::problem::echo(unit), units }
}

/// How long to train: part of the mathematics, so never a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the data.
    Epochs(u32),
    /// Steps.
    Steps(u64),
}

impl Length {
    /// Returns the length in steps; `None` where it is above [`STEPS_MAX`].
    pub fn steps(self, steps_per_epoch: u64) -> Option<u64> {
        let steps = match self {
            Length::Steps(n) => n,
            Length::Epochs(n) => u64::from(n).checked_mul(steps_per_epoch)?,
        };
        (steps <= STEPS_MAX).then_some(steps)
    }
}

impl FromStr for Length {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (n, unit) = split(text, "\"800ep\" or \"500step\"")?;
        match unit {
            "step" => Ok(Length::Steps(within(n, STEPS_MAX, "step")?)),
            "ep" => Ok(Length::Epochs(within(n, EPOCHS_MAX, "ep")? as u32)),
            _ => Err(unknown(unit, "ep, step")),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Length::Epochs(n) => write!(f, "{n}ep"),
            Length::Steps(n) => write!(f, "{n}step"),
        }
    }
}

/// How often something is done: it changes no result, so times are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cadence {
    /// After that many steps or epochs.
    Length(Length),
    /// After that many seconds.
    Seconds(u64),
}

impl FromStr for Cadence {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (n, unit) = split(text, "\"100step\", \"1ep\" or \"15min\"")?;
        match unit {
            "step" | "ep" => text.parse().map(Cadence::Length),
            _ => seconds(n, unit, "ep, step, s, min, h").map(Cadence::Seconds),
        }
    }
}

impl fmt::Display for Cadence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cadence::Length(length) => write!(f, "{length}"),
            Cadence::Seconds(n) if n % 3600 == 0 => write!(f, "{}h", n / 3600),
            Cadence::Seconds(n) if n % 60 == 0 => write!(f, "{}min", n / 60),
            Cadence::Seconds(n) => write!(f, "{n}s"),
        }
    }
}

impl Serialize for Length {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Cadence {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn seconds(n: u64, unit: &str, units: &'static str) -> Result<u64, UnitError> {
    let factor = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        _ => return Err(unknown(unit, units)),
    };
    within(n, SECONDS_MAX / factor, unit).map(|n| n * factor)
}

/// Reads a time: `"30s"`, `"15min"`, `"2h"`.
///
/// # Errors
/// [`UnitError`] if the text is anything else, zero, or above ten years.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (n, unit) = split(text, "\"30s\", \"15min\" or \"2h\"")?;
    seconds(n, unit, "s, min, h").map(Duration::from_secs)
}

/// Reads a size in bytes: `"256MiB"`, `"500GB"`.
///
/// # Errors
/// [`UnitError`] if the text is anything else, zero, or above 2^63 bytes.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let (n, unit) = split(text, "\"256MiB\" or \"500GB\"")?;
    let factor: u64 = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => {
            return Err(unknown(unit, "B, KiB, MiB, GiB, TiB, kB, MB, GB, TB"));
        }
    };
    within(n, (1 << 63) / factor, unit).map(|n| n * factor)
}

/// A size in bytes, as [`parse_bytes`] reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_bytes(text).map(Bytes)
    }
}

impl fmt::Display for Bytes {
    /// Writes the largest unit of a thousand that divides it, so that it reads as it was written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000)];
        let binary = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("B", 1)];
        let all = units.into_iter().chain(binary);
        let (unit, factor) = { all }
            .find(|(_, factor): &(&str, u64)| self.0.is_multiple_of(*factor))
            .expect("one divides all");
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Writes 1234567 as `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Writes a size for people, with a binary unit: `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut i = 0;
    while value >= 1024.0 && i + 1 < units.len() {
        value /= 1024.0;
        i += 1;
    }
    if bytes < 1024 { format!("{bytes} B") } else { format!("{value:.1} {}", units[i]) }
}

#[cfg(test)]
mod tests;
