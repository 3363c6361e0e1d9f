//! Bad samples on their way from the loader's threads to the coordinator.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use lacuna_control::bad_samples::REPORT_SAMPLES_MAX;
use lacuna_control::message::{BadSample, BadSamples};
use lacuna_data::loader;

/// Bad samples kept until they can be sent: several messages, and less than a megabyte.
const WAITING_MAX: usize = 1024;
/// Bad samples kept after they were sent, to say them again on the next stream: those that may have
/// been under way when the last one broke.
const SAID_MAX: usize = REPORT_SAMPLES_MAX;
/// Epochs whose overflow is counted: loaders reach from one into the next.
const EPOCHS_MAX: usize = 4;

/// A bounded queue that nobody waits for: what does not fit is counted.
#[derive(Debug, Default)]
pub struct BadSampleQueue {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<(u32, BadSample)>,
    said: VecDeque<(u32, BadSample)>,
    dropped: BTreeMap<u32, u64>,
}

impl BadSampleQueue {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a bad sample of an epoch.
    pub fn push(&self, epoch: u32, bad: BadSample) {
        let bad = bad.bounded();
        let mut inner = self.inner();
        if inner.waiting.len() < WAITING_MAX {
            inner.waiting.push_back((epoch, bad));
            return;
        }
        *inner.dropped.entry(epoch).or_default() += 1;
        if inner.dropped.len() > EPOCHS_MAX {
            inner.dropped.pop_first();
        }
    }

    /// Takes what one message says: the oldest bad samples of one epoch, or what was dropped.
    pub fn take(&self) -> Option<BadSamples> {
        let mut inner = self.inner();
        let waiting = inner.waiting.front().map(|(epoch, _)| *epoch);
        let epoch = waiting.or_else(|| inner.dropped.keys().next().copied())?;
        let of_epoch = inner.waiting.iter().take_while(|(e, _)| *e == epoch).count();
        let taken = inner.waiting.drain(..of_epoch.min(REPORT_SAMPLES_MAX));
        let taken: Vec<(u32, BadSample)> = taken.collect();
        let samples = taken.iter().map(|(_, bad)| bad.clone()).collect();
        inner.said.extend(taken);
        let old = inner.said.len().saturating_sub(SAID_MAX);
        inner.said.drain(..old);
        let dropped = inner.dropped.remove(&epoch).unwrap_or_default();
        Some(BadSamples { epoch, samples, dropped })
    }

    /// Says again what may not have arrived: the stream is a new one. The coordinator knows a
    /// sample that it has heard of.
    pub fn say_again(&self) {
        let mut inner = self.inner();
        let said = std::mem::take(&mut inner.said);
        said.into_iter().rev().for_each(|bad| inner.waiting.push_front(bad));
    }
}

/// Describes a loader's bad sample for the coordinator.
pub fn describe(bad: &loader::BadSample) -> BadSample {
    let place = &bad.place;
    BadSample {
        step: bad.slot.step,
        sample: place.sample,
        key: place.member.clone(),
        shard: place.shard.to_string_lossy().into_owned(),
        offset: place.offset,
        // The place is said by its own fields.
        error: bad.error.replacen(&place.to_string(), "it", 1),
        stand_in: bad.stand_in,
    }
}

#[cfg(test)]
mod tests {
    use lacuna_types::{SampleId, Step};

    use super::*;

    fn bad(sample: u64) -> BadSample {
        BadSample {
            step: Step(1),
            sample: SampleId(sample),
            key: None,
            shard: "s.tar".into(),
            offset: 512,
            error: "e".repeat(10_000),
            stand_in: SampleId(0),
        }
    }

    fn ids(report: &BadSamples) -> Vec<u64> {
        report.samples.iter().map(|bad| bad.sample.0).collect()
    }

    #[test]
    fn what_does_not_fit_is_counted_and_the_count_is_said() {
        let queue = BadSampleQueue::default();
        let n = WAITING_MAX as u64 + 3;
        (0..n).for_each(|sample| queue.push(5, bad(sample)));
        let first = queue.take().unwrap();
        assert_eq!((first.epoch, first.dropped), (5, 3));
        assert_eq!(ids(&first), (0..REPORT_SAMPLES_MAX as u64).collect::<Vec<u64>>());
        assert!(first.samples[0].error.len() < 1000, "texts are bounded");
        let mut said = first.samples.len();
        while let Some(report) = queue.take() {
            assert_eq!(report.dropped, 0, "counted once");
            said += report.samples.len();
        }
        assert_eq!(said, WAITING_MAX);
    }

    #[test]
    fn a_message_is_of_one_epoch() {
        let queue = BadSampleQueue::default();
        [(0, 7), (0, 8), (1, 7)].into_iter().for_each(|(epoch, id)| queue.push(epoch, bad(id)));
        let said: Vec<(u32, Vec<u64>)> = std::iter::from_fn(|| queue.take())
            .map(|report| (report.epoch, ids(&report)))
            .collect();
        assert_eq!(said, [(0, vec![7, 8]), (1, vec![7])]);
    }

    #[test]
    fn a_new_stream_hears_again_what_may_be_lost() {
        let queue = BadSampleQueue::default();
        queue.push(0, bad(1));
        queue.push(0, bad(2));
        queue.take().unwrap();
        queue.push(0, bad(3));
        queue.say_again();
        assert_eq!(ids(&queue.take().unwrap()), [1, 2, 3]);
        assert_eq!(queue.take(), None);
    }
}
