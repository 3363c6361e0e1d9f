//! Typed reading of single keys; what they may hold stands in the table of fields.

use std::str::FromStr;

use super::suggest::{closest, quantity_example, quoted};
use super::{Reader, UNAVAILABLE};
use crate::fields::{Interval, Kind, field};
use crate::node::{Node, Value};
use crate::problem::echo;
use crate::run_spec::AutoOr;
use crate::units::{self, UnitError};

/// Words of planned values, refused like planned keys.
const NOT_YET_WORDS: &[&str] = &["zero-weight"];

impl<'a> Reader<'a> {
    pub(super) fn wrong<T>(&mut self, node: &Node, path: &str, wanted: &str) -> Option<T> {
        let message = format!("`{path}` must be {wanted}, not {}", node.value.describe());
        let fix = retyped(&node.value, field(path).kind);
        self.problem(node.at, path, message, fix);
        None
    }

    fn integer_in(&mut self, node: &Node, path: &str, min: u64, max: u64) -> Option<u64> {
        let wanted = match &node.value {
            Value::Integer(n) => match u64::try_from(*n) {
                Ok(n) if (min..=max).contains(&n) => return Some(n),
                _ if *n < i128::from(min) => format!("at least {min}"),
                _ => format!("at most {max}"),
            },
            Value::Huge(_) => format!("at most {max}"),
            _ => "a whole number".to_string(),
        };
        self.wrong(node, path, &wanted)
    }

    /// Reads a whole number in the range of its field.
    pub(super) fn integer(&mut self, path: &str) -> Option<u64> {
        let node = self.required(path)?;
        let Kind::Integer { min, max } = field(path).kind else {
            panic!("`{path}` is not a whole number in the table of fields");
        };
        self.integer_in(node, path, min, max)
    }

    pub(super) fn count(&mut self, path: &str) -> Option<u32> {
        let n = self.integer(path)?;
        Some(u32::try_from(n).expect("the range is one of u32"))
    }

    /// Reads the sides of an image: two numbers, or one for both.
    pub(super) fn sides(&mut self, path: &str) -> Option<[u32; 2]> {
        let node = self.required(path)?;
        let Kind::Sides { max } = field(path).kind else {
            panic!("`{path}` is not a size of images in the table of fields");
        };
        let mut side = |node: &_| {
            let side = self.integer_in(node, path, 1, max)?;
            u32::try_from(side).ok()
        };
        match &node.value {
            Value::Array(list) => match list.as_slice() {
                [height, width] => {
                    let (height, width) = (side(height), side(width));
                    Some([height?, width?])
                }
                _ => self.wrong(node, path, "one number or [height, width]"),
            },
            Value::Integer(_) | Value::Huge(_) => side(node).map(|side| [side, side]),
            _ => self.wrong(node, path, "one number or [height, width]"),
        }
    }

    pub(super) fn auto_or(&mut self, path: &str) -> Option<AutoOr<u64>> {
        let node = self.required(path)?;
        let Kind::AutoOr { min, max } = field(path).kind else {
            panic!("`{path}` takes no \"auto\" in the table of fields");
        };
        match &node.value {
            Value::Text(text) if text == "auto" => Some(AutoOr::Auto),
            Value::Integer(_) | Value::Huge(_) => {
                self.integer_in(node, path, min, max).map(AutoOr::Is)
            }
            _ => self.wrong(node, path, "a whole number or \"auto\""),
        }
    }

    fn float_in(&mut self, node: &Node, path: &str, interval: Interval) -> Option<f64> {
        let x = match &node.value {
            // Beyond 2^53 an integer is no exact float; no key takes such a number.
            Value::Integer(n) => *n as f64,
            Value::Float(x) => *x,
            _ => f64::NAN,
        };
        if x.is_finite() && interval.contains(x) {
            // Adding zero turns -0.0 into 0.0: the two are one value with two texts.
            return Some(x + 0.0);
        }
        self.wrong(node, path, &format!("a number {interval}"))
    }

    pub(super) fn float(&mut self, path: &str) -> Option<f64> {
        let node = self.required(path)?;
        self.float_in(node, path, interval(path))
    }

    /// Reads a list of numbers.
    pub(super) fn floats(&mut self, path: &str) -> Option<Vec<f64>> {
        let node = self.required(path)?;
        let interval = interval(path);
        let Value::Array(list) = &node.value else {
            let message = format!(
                "`{path}` must be an array of numbers {interval}, not {}",
                node.value.describe()
            );
            let fix = match node.value {
                Value::Integer(n) => format!("write [{n}]"),
                Value::Float(x) => format!("write [{x:?}]"),
                _ => format!("for example {}", field(path).example),
            };
            self.problem(node.at, path, message, Some(fix));
            return None;
        };
        let read = list.iter().map(|item| self.float_in(item, path, interval));
        let read: Vec<Option<f64>> = read.collect();
        read.into_iter().collect()
    }

    /// Reads two numbers, a lower and an upper end.
    pub(super) fn range(&mut self, path: &str) -> Option<[f64; 2]> {
        let pair = self.pair(path)?;
        if pair[0] <= pair[1] {
            return Some(pair);
        }
        let message = format!("`{path}` = [{:?}, {:?}] is empty", pair[0], pair[1]);
        let fix = "write the smaller number first".to_string();
        self.problem_among(&[path], message, Some(fix));
        None
    }

    pub(super) fn pair(&mut self, path: &str) -> Option<[f64; 2]> {
        let node = self.required(path)?;
        if !matches!(node.value, Value::Array(_)) {
            let message = format!("`{path}` must be 2 numbers, not {}", node.value.describe());
            let fix = format!("for example {}", field(path).example);
            self.problem(node.at, path, message, Some(fix));
            return None;
        }
        let list = self.floats(path)?;
        match <[f64; 2]>::try_from(list) {
            Ok(pair) => Some(pair),
            Err(list) => {
                let message = format!("`{path}` must have 2 numbers, not {}", list.len());
                let fix = format!("for example {}", field(path).example);
                self.problem_among(&[path], message, Some(fix));
                None
            }
        }
    }

    pub(super) fn boolean(&mut self, path: &str) -> Option<bool> {
        let node = self.required(path)?;
        match node.value {
            Value::Bool(b) => Some(b),
            _ => self.wrong(node, path, "true or false"),
        }
    }

    pub(super) fn text(&mut self, path: &str) -> Option<&'a str> {
        let node = self.required(path)?;
        match &node.value {
            Value::Text(text) => Some(text),
            _ => self.wrong(node, path, "a string"),
        }
    }

    /// Reads one of a closed set of words.
    pub(super) fn word<T: Copy>(&mut self, path: &str, all: &[(&'static str, T)]) -> Option<T> {
        let text = self.text(path)?;
        if let Some((_, value)) = all.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<&str> = all.iter().map(|(word, _)| *word).collect();
        let (message, fix) = if NOT_YET_WORDS.contains(&text) {
            let message = format!("`{path}` = \"{text}\" {UNAVAILABLE}");
            (message, format!("use {}", quoted(&words)))
        } else {
            let message = format!("`{path}` = \"{}\" is unknown", echo(text));
            match closest(text, words.iter().copied()) {
                Some(word) => (message, format!("did you mean \"{word}\"?")),
                None => (message, format!("use {}", quoted(&words))),
            }
        };
        self.problem_among(&[path], message, Some(fix));
        None
    }

    pub(super) fn quantity<T: FromStr<Err = UnitError>>(&mut self, path: &str) -> Option<T> {
        let node = self.required(path)?;
        self.quantity_in(node, path)
    }

    pub(super) fn quantity_in<T: FromStr<Err = UnitError>>(
        &mut self,
        node: &Node,
        path: &str,
    ) -> Option<T> {
        let field = field(path);
        let Value::Text(text) = &node.value else {
            let wanted = format!("a string with a unit such as {}", quantity_example(field));
            return self.wrong(node, path, &wanted);
        };
        match text.parse() {
            Ok(quantity) => Some(quantity),
            Err(error) => {
                let error: UnitError = error;
                let message = format!("`{path}` = \"{}\" {error}", echo(text));
                let fix = match units::guess::<T>(text) {
                    Some(guess) => Some(format!("did you mean \"{guess}\"?")),
                    None if path == "checkpoint.keep.every"
                        && matches!(error, UnitError::Number { .. }) =>
                    {
                        Some("or remove it to keep none for good".to_string())
                    }
                    None => without_guess(&error, field.kind),
                };
                self.problem(node.at, path, message, fix);
                None
            }
        }
    }
}

/// Says what to do about a quantity whose meaning is not clear.
fn without_guess(error: &UnitError, kind: Kind) -> Option<String> {
    match (error, kind) {
        (UnitError::Range { .. }, Kind::LengthOrNone) => {
            Some("or \"none\" for no warm-up".to_string())
        }
        (UnitError::Unit { unit, .. }, Kind::Length | Kind::LengthOrNone)
            if units::is_time(unit) =>
        {
            Some("give it in ep or step: times differ between machines".to_string())
        }
        _ => None,
    }
}

fn interval(path: &str) -> Interval {
    match field(path).kind {
        Kind::Number(interval)
        | Kind::Pair(interval)
        | Kind::Range(interval)
        | Kind::PerChannel(interval) => interval,
        _ => panic!("`{path}` is not a number in the table of fields"),
    }
}

/// Returns how to write a value so that it is what its key takes, where that is plain.
fn retyped(value: &Value, kind: Kind) -> Option<String> {
    let is_whole = matches!(kind, Kind::Integer { .. } | Kind::AutoOr { .. } | Kind::Sides { .. });
    let is_list = matches!(kind, Kind::Pair(_) | Kind::Range(_) | Kind::PerChannel(_));
    let is_number = is_whole || is_list || matches!(kind, Kind::Number(_));
    let number = match value {
        Value::Integer(n) => Some(*n as f64),
        Value::Float(x) => Some(*x),
        _ => None,
    };
    let unquoted = "remove the quotes".to_string();
    match (value, kind) {
        (Value::Text(text), _) if is_number && text.trim().parse::<f64>().is_ok() => Some(unquoted),
        (Value::Text(text), Kind::Bool) if matches!(text.as_str(), "true" | "false") => {
            Some(unquoted)
        }
        (Value::Float(x), _) if is_whole && x.fract() == 0.0 && x.abs() < 1e15 => {
            Some(format!("write {x:.0}"))
        }
        (Value::Integer(n @ (0 | 1)), Kind::Bool) => Some(format!("write {}", *n == 1)),
        (Value::Integer(n), Kind::Name) => Some(format!("write \"{n}\"")),
        (Value::Integer(n), Kind::Workers) if *n > 0 => Some(format!("write \"{n}:{n}\"")),
        (Value::Integer(n @ 2..=99), Kind::Number(Interval { max: 1.0, .. })) => {
            Some(format!("{n} percent are {}", *n as f64 / 100.0))
        }
        // Means and deviations of bytes are a common slip.
        (_, Kind::PerChannel(_)) if number.is_some_and(|x| x > 16.0 && x <= 255.0) => {
            Some("divide it by 255: full brightness is 1".to_string())
        }
        (_, Kind::Word(words)) => Some(format!("use {}", quoted(words))),
        _ => None,
    }
}
