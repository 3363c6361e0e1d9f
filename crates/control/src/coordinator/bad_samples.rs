//! Bad samples: each is told once an epoch, and an epoch with too many of them fails the run.

use std::collections::BTreeMap;

use lacuna_types::{SampleId, exit};

use super::{Coordinator, Ending};
use crate::journal::Record;
use crate::message::{BadSample, BadSamples};

/// Bad samples that are told one by one in an epoch; of others there is only their number. A person
/// sees the pattern in a hundred, and the state file keeps events for ever.
pub(super) const LISTED_MAX: usize = 100;

impl Coordinator {
    pub(super) fn on_bad_samples(&mut self, report: BadSamples) {
        let BadSamples { epoch, samples, dropped } = report;
        let (epoch_steps, total) = (self.config.epoch_steps.max(1), self.config.total_steps);
        // What names no step of the epoch means nothing.
        if u64::from(epoch) > total / epoch_steps {
            return;
        }
        let of_epoch =
            |bad: &BadSample| bad.step.0 < total && bad.step.0 / epoch_steps == u64::from(epoch);
        let samples: Vec<BadSample> =
            samples.into_iter().filter(of_epoch).map(BadSample::bounded).collect();
        let known = self.saved.bad_samples.get(&epoch).map(|bad| &bad.samples);
        let mut fresh: BTreeMap<SampleId, &BadSample> = BTreeMap::new();
        for bad in &samples {
            if known.is_none_or(|known| !known.contains(&bad.sample)) {
                fresh.entry(bad.sample).or_insert(bad);
            }
        }
        let before = known.map_or(0, |known| known.len());
        if !fresh.is_empty() || dropped > 0 {
            let samples = fresh.keys().copied().collect();
            self.record(Record::BadSamples { epoch, samples, dropped });
        }
        for (n, bad) in (before + 1..=LISTED_MAX).zip(fresh.values()) {
            let BadSample { step, error, stand_in, .. } = bad;
            let more = if n == LISTED_MAX { "; more of this epoch are only counted" } else { "" };
            let text = format!(
                "epoch {epoch}, step {step}: {bad} replaced by sample {stand_in}: {error}{more}"
            );
            self.note("bad_sample", true, text);
        }
        if let Some(last) = samples.last() {
            self.judge_bad_samples(epoch, last);
        }
        self.tell_unlisted(false);
    }

    /// Fails a run that has lost too much of its data.
    fn judge_bad_samples(&mut self, epoch: u32, last: &BadSample) {
        let n = self.saved.bad_samples.get(&epoch).map_or(0, |bad| bad.samples.len() as u64);
        let (most, of) = (self.config.bad_samples_max, self.config.epoch_samples);
        if n <= most {
            return;
        }
        let percent = 100.0 * n as f64 / of.max(1) as f64;
        let why = format!(
            "{n} bad samples in epoch {epoch}, {percent:.3} % of its {of} samples, and at most \
             {most} are allowed (`data.bad_samples_max`); the last is {last}: {}",
            last.error
        );
        self.end(Ending::Failed { why, code: exit::IO });
    }

    /// Says how many bad samples were not listed: of epochs that are over, or of all.
    pub(super) fn tell_unlisted(&mut self, all: bool) {
        if self.saved.bad_samples.is_empty() {
            return;
        }
        let done = self.progress.0 / self.config.epoch_steps.max(1);
        let mut untold: Vec<(u32, u64, usize, u64)> = Vec::new();
        for (epoch, bad) in &self.saved.bad_samples {
            let n = bad.samples.len();
            let unlisted = (n.saturating_sub(LISTED_MAX) as u64).saturating_add(bad.dropped);
            if (all || u64::from(*epoch) < done) && unlisted > bad.told {
                untold.push((*epoch, unlisted, n, bad.dropped));
            }
        }
        for (epoch, unlisted, n, dropped) in untold {
            self.record(Record::BadSamplesTold { epoch, unlisted });
            let mut text = format!("epoch {epoch} had {n} bad samples");
            if n > LISTED_MAX {
                text += &format!(", {} more than are listed", n - LISTED_MAX);
            }
            if dropped > 0 {
                text += &format!("; workers met {dropped} more than they could keep to report");
            }
            self.note("bad_samples", true, text);
        }
    }
}
