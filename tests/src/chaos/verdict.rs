//! What must hold of a run's history, whatever happened to it.

use std::collections::BTreeMap;

use crate::history::{Formed, Heard, parse_formed};

/// How strictly figures are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// The coordinator heard of every step.
    Complete,
    /// It was away or cut off for a while, and figures of that time are missing.
    Sparse,
}

/// Counts of a history, for tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Generations that trained.
    pub generations: usize,
    /// Steps that were applied again from an older state in a later generation.
    pub redone: u64,
    /// Steps that no figures were heard of.
    pub unheard: u64,
}

/// Lists what is wrong with a history, and counts.
///
/// - Generations strictly increase, in events and in figures.
/// - Inside a generation each step comes once and in order, from the state it started with on.
/// - A generation that goes on from memory starts where the one before was heard of last, or one
///   step later (that step's figures died with rank 0).
pub fn judge(heard: &Heard, marks: Marks) -> (Vec<String>, Tally) {
    let mut problems: Vec<String> = Vec::new();
    let formed = generations(heard, &mut problems);
    let steps = steps_by_generation(heard, &mut problems);
    let mut tally = Tally { generations: formed.len(), ..Tally::default() };
    let mut last: Option<u64> = None;
    for (number, (start, from_memory)) in &formed {
        if let Some(last) = last {
            tally.redone += last.saturating_sub(start.step);
            let continues = start.step == last || start.step == last + 1;
            if *from_memory && !(continues || (marks == Marks::Sparse && start.step > last)) {
                problems.push(format!(
                    "generation {number} goes on from memory at step {}, step {last} was applied",
                    start.step
                ));
            }
        }
        let mut next = start.step + 1;
        for &step in steps.get(number).into_iter().flatten() {
            if step < next || (step > next && marks == Marks::Complete) {
                problems.push(format!("generation {number}: step {step} came, {next} was due"));
            }
            tally.unheard += step.saturating_sub(next);
            next = step + 1;
        }
        last = Some(next - 1);
    }
    for number in steps.keys().filter(|number| !formed.contains_key(number)) {
        problems.push(format!("figures of generation {number}, which never formed"));
    }
    problems.truncate(20);
    (problems, tally)
}

fn generations(heard: &Heard, problems: &mut Vec<String>) -> BTreeMap<u64, (Formed, bool)> {
    let mut formed: BTreeMap<u64, (Formed, bool)> = BTreeMap::new();
    for told in heard.kind("formed") {
        let text = &told.event.text;
        let Some(it) = parse_formed(text) else {
            problems.push(format!("event `{text}` cannot be read"));
            continue;
        };
        if formed.last_key_value().is_some_and(|(last, _)| it.generation <= *last) {
            problems.push(format!("generation {} formed after a later one", it.generation));
        }
        let from_memory = text.contains("state in memory") || text.contains("healed from");
        formed.insert(it.generation, (it, from_memory));
    }
    formed
}

fn steps_by_generation(heard: &Heard, problems: &mut Vec<String>) -> BTreeMap<u64, Vec<u64>> {
    let mut steps: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for applied in &heard.applied {
        let (generation, step) = (applied.figures.generation, applied.figures.step);
        if steps.last_key_value().is_some_and(|(last, _)| generation < *last) {
            problems.push(format!("figures of generation {generation} after a later one"));
        }
        steps.entry(generation).or_default().push(step);
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lacuna_api::v1;

    use super::*;
    use crate::history::{Applied, Told};

    fn heard(formed: &[&str], steps: &[(u64, u64)]) -> Heard {
        let at = Instant::now();
        let event = |text: &&str| v1::RunEvent {
            kind: "formed".into(),
            text: (*text).to_string(),
            ..Default::default()
        };
        let figures = |&(generation, step)| v1::Figures { generation, step, ..Default::default() };
        Heard {
            told: formed.iter().map(|text| Told { at, event: event(text) }).collect(),
            applied: steps.iter().map(|it| Applied { at, figures: figures(it) }).collect(),
            ..Heard::default()
        }
    }

    const FIRST: &str = "generation 1: 2 workers at step 0, from the seed; slots: …";
    const SECOND: &str = "generation 2: 1 workers at step 2, state in memory; slots: …";

    #[test]
    fn a_good_history_passes() {
        let it = heard(&[FIRST, SECOND], &[(1, 1), (1, 2), (2, 3), (2, 4)]);
        let tally = Tally { generations: 2, redone: 0, unheard: 0 };
        assert_eq!(judge(&it, Marks::Complete), (vec![], tally));
        let died_with_rank_0 = heard(&[FIRST, SECOND], &[(1, 1), (2, 3)]);
        assert_eq!(judge(&died_with_rank_0, Marks::Complete).0, Vec::<String>::new());
    }

    #[test]
    fn gaps_repeats_and_lost_steps_are_found() {
        let gap = heard(&[FIRST], &[(1, 1), (1, 3)]);
        assert_eq!(judge(&gap, Marks::Complete).0, ["generation 1: step 3 came, 2 was due"]);
        assert_eq!(
            judge(&gap, Marks::Sparse),
            (vec![], Tally { unheard: 1, generations: 1, redone: 0 })
        );
        let twice = heard(&[FIRST], &[(1, 1), (1, 1)]);
        assert_eq!(judge(&twice, Marks::Sparse).0.len(), 1);
        let lost = heard(&[FIRST, SECOND], &[(1, 1), (1, 2), (1, 3), (2, 3)]);
        let (problems, tally) = judge(&lost, Marks::Complete);
        assert!(problems[0].contains("goes on from memory at step 2, step 3"), "{problems:?}");
        assert_eq!(tally.redone, 1);
        let back = heard(&[SECOND, FIRST], &[]);
        assert!(judge(&back, Marks::Complete).0[0].contains("after a later one"));
        let unknown = heard(&[FIRST], &[(5, 1)]);
        assert!(judge(&unknown, Marks::Complete).0[0].contains("never formed"));
    }
}
