//! What a run did since the coordinator started: its time, its events, its checkpoints.

use std::collections::BTreeMap;
use std::time::Duration;

use lacuna_control::coordinator::Command;
use lacuna_control::journal::Record;
use lacuna_control::message::StepMark;
use lacuna_track::Figures;
use lacuna_types::{AttemptSeq, Generation, Step, Timestamp};

use crate::times::Times;

/// Upper bounds of the classes that durations fall into, in seconds; the last class has none.
pub(crate) const DURATIONS: [f64; 11] =
    [0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0];

/// How long things took.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Durations {
    /// How many fell into each class.
    pub n: [u64; DURATIONS.len() + 1],
    /// Seconds of all.
    pub sum: f64,
}

impl Durations {
    fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.n[DURATIONS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }
}

/// Everything that is counted of a run; none ever falls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account {
    /// Where the time went.
    pub times: Times,
    /// Events of each kind.
    pub events: BTreeMap<String, u64>,
    /// From the proposal of a checkpoint to its commit.
    pub saves: Durations,
    /// Steps behind the newest state that was marked.
    pub marked: Step,
    /// Steps computed again: their gradient had overflowed, or the group had gone back.
    pub again: u64,
    /// Steps behind the newest state that the run is known to have had.
    reached: Step,
    /// The newest generation, and what was reached before it.
    generation: Generation,
    before: Step,
    /// Images of a step.
    batch: u32,
    /// Until when time was counted.
    timed: Timestamp,
    /// The checkpoint under way, and since when.
    attempt: Option<(Generation, AttemptSeq, Timestamp)>,
}

impl Account {
    /// Begins to count at `now`; `newest` are the figures that are known of the run.
    pub fn open(batch: u32, newest: Option<&Figures>, now: Timestamp) -> Self {
        let marked = Step(newest.map_or(0, |figures| figures.step));
        Account { batch, marked, reached: marked, timed: now, ..Account::default() }
    }

    /// Counts the time since it was last counted as spent in a state.
    pub fn pass(&mut self, state: &str, now: Timestamp) {
        self.times.pass(state, now.since(self.timed).as_secs_f64());
        self.timed = now;
    }

    /// Counts an event.
    pub fn event(&mut self, kind: &str) {
        *self.events.entry(kind.to_string()).or_default() += 1;
    }

    /// Notes a step that a member of a generation is known to have applied.
    pub fn reach(&mut self, generation: Generation, step: Step) {
        if generation > self.generation {
            (self.generation, self.before) = (generation, self.reached);
        }
        self.reached = self.reached.max(step);
    }

    /// Counts the steps up to a mark. `before` are the figures of the one before it, and `started`
    /// is where the mark's generation began.
    pub fn mark(&mut self, before: Option<&Figures>, started: Option<Step>, mark: &StepMark) {
        let same = before.filter(|figures| figures.generation == mark.generation.0);
        // Overflows are counted anew by each generation.
        let overflows = mark.redone.saturating_sub(same.map_or(0, |figures| figures.redone));
        let from = same.map(|figures| Step(figures.step)).or(started).unwrap_or(mark.step);
        self.reach(mark.generation, mark.step);
        let known = self.before;
        let gone_back = mark.step.min(known).0.saturating_sub(from.min(known).0);
        let again = overflows + gone_back;
        self.again += again;
        self.times.repeat((again * u64::from(self.batch)) as f64 / mark.images_per_second);
        self.marked = self.marked.max(mark.step);
    }

    /// Notes the checkpoints that commands of the machine begin.
    pub fn begin(&mut self, generation: Generation, commands: &[Command], now: Timestamp) {
        for command in commands {
            if let Command::Persist(Record::Attempt(seq)) = command {
                self.attempt = Some((generation, *seq, now));
            }
        }
    }

    /// Counts a checkpoint that is committed.
    pub fn committed(&mut self, generation: Generation, seq: AttemptSeq, now: Timestamp) {
        if let Some((.., since)) = self.attempt.take_if(|(g, s, _)| (*g, *s) == (generation, seq)) {
            self.saves.add(now.since(since));
        }
    }
}

/// Returns what is kept of a mark.
pub(crate) fn figures(mark: &StepMark) -> Figures {
    Figures {
        generation: mark.generation.0,
        step: mark.step.0,
        loss: mark.loss,
        lr: mark.lr,
        grad_norm: mark.grad_norm,
        images_per_second: mark.images_per_second,
        data_wait: mark.data_wait,
        digest: mark.digest,
        skipped: mark.skipped,
        redone: mark.redone,
        memory_bytes: mark.memory_bytes,
        mfu: mark.mfu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(generation: u64, step: u64, redone: u64) -> StepMark {
        StepMark {
            generation: Generation(generation),
            step: Step(step),
            loss: 0.5,
            lr: 0.1,
            grad_norm: 1.0,
            images_per_second: 10.0,
            data_wait: 0.0,
            digest: None,
            skipped: 0,
            redone,
            memory_bytes: 0,
            mfu: None,
        }
    }

    #[test]
    fn steps_are_counted_once_and_those_computed_again_apart() {
        let mut account = Account::open(8, None, Timestamp::default());
        let steps = |account: &Account| (account.marked.0, account.again);
        let mut before: Option<Figures> = None;
        let mut mark = |account: &mut Account, started: u64, mark: StepMark| {
            account.mark(before.as_ref(), Some(Step(started)), &mark);
            before = Some(figures(&mark));
        };
        mark(&mut account, 0, marked(1, 10, 1));
        // Beats are ahead of marks.
        account.reach(Generation(1), Step(19));
        mark(&mut account, 0, marked(1, 20, 3));
        assert_eq!(steps(&account), (20, 3), "three overflows");
        // Step 23 was applied and never marked; the next group goes back to step 12.
        account.reach(Generation(1), Step(23));
        account.reach(Generation(2), Step(12));
        mark(&mut account, 12, marked(2, 18, 0));
        assert_eq!(steps(&account), (20, 3 + 6));
        mark(&mut account, 12, marked(2, 30, 1));
        assert_eq!(steps(&account), (30, 3 + 6 + 5 + 1));
        mark(&mut account, 30, marked(3, 40, 0));
        assert_eq!(steps(&account), (40, 15), "a group that goes on where the last one stood");
    }

    #[test]
    fn a_checkpoint_takes_from_its_proposal_to_its_commit() {
        let at = |seconds: u64| Timestamp::default() + Duration::from_secs(seconds);
        let mut account = Account::open(8, None, at(0));
        let begin = [Command::Persist(Record::Attempt(AttemptSeq(3)))];
        account.begin(Generation(2), &begin, at(1));
        account.committed(Generation(1), AttemptSeq(3), at(2));
        account.committed(Generation(2), AttemptSeq(3), at(5));
        account.committed(Generation(2), AttemptSeq(3), at(9));
        assert_eq!(account.saves.sum, 4.0);
        assert_eq!(account.saves.n[DURATIONS.partition_point(|bound| *bound < 4.0)], 1);
        assert_eq!(account.saves.n.iter().sum::<u64>(), 1);
    }
}
