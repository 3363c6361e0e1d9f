//! A history as text: a setup, and lines that are carried out one after the other.

use std::fmt;

use lacuna_control::coordinator::Ending;
use lacuna_control::invariants::{Invariant, Observation, Violation};
use lacuna_types::Timestamp;

use crate::action::{Action, millis};
use crate::setup::{MS, Setup};
use crate::world::World;

/// Longest wait for a condition, in milliseconds of simulated time.
const PATIENCE_MS: u64 = 600_000;
/// Longest time between two steps once faults stopped: an operator's attention, a few generations
/// that time out, and the wait for peers that will not come.
const CALM_MS: u64 = 150_000;

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// Let time pass up to this millisecond of the history, then act.
    At(u64, Action),
    /// Act as soon as something is so, if that comes within so many milliseconds.
    When(Condition, u64, Action),
    /// Act now.
    Now(Action),
    /// Let so many milliseconds pass.
    Wait(u64),
    /// Let time pass until this is so.
    Until(Condition, Option<u64>),
    /// This is so now.
    Expect(Condition),
    /// Nothing, for people.
    Remark(String),
}

/// What a history may wait for, or claim.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// The coordinator knows of at least so many steps.
    Step(u64),
    /// The coordinator's word is this one.
    Stage(String),
    /// The newest generation has so many members.
    World(usize),
    /// So many generations began.
    Generations(u64),
    /// The worker's state and place in the group is this word.
    Worker(String, String),
    /// The worker's step loop is in this phase.
    Phase(String, String),
    /// At least so many parts were begun.
    Parts(u64),
    /// The worker's process has, or has not, a life.
    Alive(String, bool),
    /// At most so many steps were applied again.
    Redone(u64),
    /// At least so many checkpoints were committed.
    Commits(u64),
    /// A commit was refused because of a newer claim.
    Fenced,
    /// At least so many messages were answered with Stale.
    Stale(u64),
    /// The run ended as this word.
    Ended(String),
    /// A line of the transcript contains this.
    Said(String),
    /// No line of the transcript contains this.
    NotSaid(String),
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Condition as C;
        match self {
            C::Step(n) => write!(f, "step {n}"),
            C::Stage(word) => write!(f, "stage {word}"),
            C::World(n) => write!(f, "world {n}"),
            C::Generations(n) => write!(f, "generations {n}"),
            C::Worker(w, word) => write!(f, "worker {w} {word}"),
            C::Phase(w, word) => write!(f, "phase {w} {word}"),
            C::Parts(n) => write!(f, "parts {n}"),
            C::Alive(w, true) => write!(f, "alive {w}"),
            C::Alive(w, false) => write!(f, "dead {w}"),
            C::Redone(n) => write!(f, "redone {n}"),
            C::Commits(n) => write!(f, "commits {n}"),
            C::Fenced => write!(f, "fenced"),
            C::Stale(n) => write!(f, "stale {n}"),
            C::Ended(word) => write!(f, "ended {word}"),
            C::Said(text) => write!(f, "said {text}"),
            C::NotSaid(text) => write!(f, "not said {text}"),
        }
    }
}

fn parse_condition(text: &str) -> Result<Condition, String> {
    use Condition as C;
    if let Some(rest) = text.strip_prefix("said ") {
        return Ok(C::Said(rest.to_string()));
    }
    if let Some(rest) = text.strip_prefix("not said ") {
        return Ok(C::NotSaid(rest.to_string()));
    }
    let number = |t: &str| t.parse::<u64>().map_err(|_| format!("`{t}` is not a number"));
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(match words[..] {
        ["step", n] => C::Step(number(n)?),
        ["stage", word] => C::Stage(word.to_string()),
        ["world", n] => C::World(number(n)? as usize),
        ["generations", n] => C::Generations(number(n)?),
        ["worker", w, word] => C::Worker(w.to_string(), word.to_string()),
        ["phase", w, word] => C::Phase(w.to_string(), word.to_string()),
        ["parts", n] => C::Parts(number(n)?),
        ["alive", w] => C::Alive(w.to_string(), true),
        ["dead", w] => C::Alive(w.to_string(), false),
        ["redone", n] => C::Redone(number(n)?),
        ["commits", n] => C::Commits(number(n)?),
        ["fenced"] => C::Fenced,
        ["stale", n] => C::Stale(number(n)?),
        ["ended", word] => C::Ended(word.to_string()),
        _ => return Err(format!("`{text}` is not a condition")),
    })
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::At(ms, action) => write!(f, "at {ms}ms {action}"),
            Line::When(condition, ms, action) => {
                write!(f, "when {condition} within {ms}ms {action}")
            }
            Line::Now(action) => write!(f, "{action}"),
            Line::Wait(ms) => write!(f, "wait {ms}ms"),
            Line::Until(condition, None) => write!(f, "until {condition}"),
            Line::Until(condition, Some(ms)) => write!(f, "until {condition} within {ms}ms"),
            Line::Expect(condition) => write!(f, "expect {condition}"),
            Line::Remark(text) => write!(f, "{text}"),
        }
    }
}

/// A setup with its lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Script {
    /// What it starts from.
    pub setup: Setup,
    /// What happens.
    pub lines: Vec<Line>,
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.setup)?;
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Script {
    type Err = String;

    /// Reads a script; the error names the line.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut script = Script { setup: Setup::default(), lines: Vec::new() };
        for (at, line) in text.lines().enumerate() {
            let read = read_line(&mut script.setup, line.trim());
            let read = read.map_err(|why| format!("line {}: {why}", at + 1))?;
            script.lines.extend(read);
        }
        Ok(script)
    }
}

fn read_line(setup: &mut Setup, line: &str) -> Result<Option<Line>, String> {
    if line.is_empty() || line.starts_with('#') {
        return Ok(Some(Line::Remark(line.to_string())));
    }
    if let Some(rest) = line.strip_prefix("set ") {
        let (key, value) = rest.split_once(' ').ok_or("`set` takes a key and a value")?;
        setup.set(key, value.trim())?;
        return Ok(None);
    }
    if let Some(rest) = line.strip_prefix("wait ") {
        return Ok(Some(Line::Wait(millis(rest.trim())?)));
    }
    if let Some(rest) = line.strip_prefix("until ") {
        return Ok(Some(match rest.rsplit_once(" within ") {
            Some((rest, time)) => Line::Until(parse_condition(rest)?, Some(millis(time)?)),
            None => Line::Until(parse_condition(rest)?, None),
        }));
    }
    if let Some(rest) = line.strip_prefix("expect ") {
        return Ok(Some(Line::Expect(parse_condition(rest)?)));
    }
    if let Some(rest) = line.strip_prefix("when ") {
        let (condition, rest) = rest.split_once(" within ").ok_or("`when` takes `within`")?;
        let (time, action) = rest.split_once(' ').ok_or("`when` takes a command")?;
        let condition = parse_condition(condition)?;
        return Ok(Some(Line::When(condition, millis(time)?, action.parse()?)));
    }
    let timed = line.strip_prefix("at ").and_then(|rest| rest.split_once(' '));
    if let Some((time, action)) = timed
        && let Ok(ms) = millis(time)
    {
        return Ok(Some(Line::At(ms, action.parse()?)));
    }
    Ok(Some(Line::Now(line.parse()?)))
}

impl World {
    /// Tells whether something is so.
    pub fn holds(&self, condition: &Condition) -> bool {
        use Condition as C;
        let machine = self.host.machine.as_ref();
        let status = || machine.map(lacuna_control::coordinator::Coordinator::status);
        match condition {
            C::Step(n) => status().is_some_and(|s| s.step.0 >= *n),
            C::Stage(word) => {
                self.host.is_settled() && machine.is_some_and(|m| m.state_word() == word)
            }
            C::World(n) => {
                let members =
                    status().map(|s| s.workers.iter().filter(|w| w.rank.is_some()).count());
                members == Some(*n)
            }
            C::Generations(n) => self.host.generation.0 == *n,
            C::Worker(name, word) => status().is_some_and(|s| {
                let found = s.workers.iter().find(|w| w.worker.as_str() == name);
                found.map_or("absent", |w| w.state) == word
            }),
            C::Phase(name, word) => {
                let lives = self.lives(name);
                lives.iter().any(|pid| self.procs[*pid].step_loop.phase().word() == word)
            }
            C::Parts(n) => self.counts.parts >= *n,
            C::Alive(name, alive) => self.lives(name).is_empty() != *alive,
            C::Redone(n) => self.counts.redone <= *n,
            C::Commits(n) => self.counts.commits >= *n,
            C::Fenced => self.counts.fenced > 0,
            C::Stale(n) => self.counts.stale >= *n,
            C::Ended(word) => self.host.ending().is_some_and(|e| ending_word(e) == word),
            C::Said(text) => self.lines().iter().any(|line| line.contains(text)),
            C::NotSaid(text) => !self.lines().iter().any(|line| line.contains(text)),
        }
    }

    /// Carries a script out, up to its end or a violation.
    pub fn play(&mut self, script: &Script) {
        for line in &script.lines {
            match line {
                Line::At(ms, action) => {
                    self.run_until(ms * MS, |_| true);
                    self.do_next(action);
                }
                Line::When(condition, ms, action) => {
                    let until = self.now + ms * MS;
                    if self.run_until(until, |world| !world.holds(condition)) {
                        self.do_next(action);
                    }
                }
                Line::Now(action) => self.do_next(action),
                Line::Wait(ms) => {
                    let until = self.now + ms * MS;
                    self.run_until(until, |_| true);
                }
                Line::Until(condition, limit) => {
                    self.wait_for(condition, limit.unwrap_or(PATIENCE_MS));
                }
                Line::Expect(condition) => {
                    if self.violation.is_none() && !self.holds(condition) {
                        self.failed_expectation(&format!("expect {condition}"));
                    }
                }
                Line::Remark(_) => {}
            }
            if self.violation.is_some() {
                return;
            }
        }
    }

    fn do_next(&mut self, action: &Action) {
        if self.violation.is_some() {
            return;
        }
        self.perform(action);
        if *action == Action::Repair {
            let bound = std::time::Duration::from_millis(CALM_MS);
            self.observe(&Observation::Calm { bound });
        }
    }

    fn wait_for(&mut self, condition: &Condition, limit_ms: u64) {
        let until = self.now + limit_ms * MS;
        let came = self.run_until(until, |world| !world.holds(condition));
        if came {
            self.rest_if_ended();
        } else if self.violation.is_none() {
            self.failed_expectation(&format!("until {condition}"));
        }
    }

    fn rest_if_ended(&mut self) {
        if self.host.ending().is_some() {
            self.observe(&Observation::Unrest);
        }
    }

    fn failed_expectation(&mut self, what: &str) {
        let at = Timestamp(self.now);
        let state = self.host.machine.as_ref().map(|m| {
            let s = m.status();
            format!("{} at step {} in generation {}", s.state, s.step, s.generation)
        });
        let state = state.unwrap_or_else(|| "the coordinator is down".to_string());
        let what = format!("`{what}` does not hold: {state}");
        self.say(|| format!("FAILED {what}"));
        self.violation = Some(Violation { invariant: Invariant::Liveness, at, what });
    }
}

/// Returns the word of an ending.
pub fn ending_word(ending: &Ending) -> &'static str {
    match ending {
        Ending::Finished { .. } => "finished",
        Ending::Failed { .. } => "failed",
        Ending::Stopped { .. } => "stopped",
        Ending::Cancelled { .. } => "cancelled",
        Ending::Paused { .. } => "paused",
    }
}
