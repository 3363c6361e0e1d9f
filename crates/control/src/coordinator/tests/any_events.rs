//! Whatever workers say in whatever order: the machine never fails, never says what is not durable,
//! and is what its journal adds up to.

use lacuna_types::SampleId;
use proptest::prelude::*;

use super::*;
use crate::message::{BadSample, BadSamples, Beat, FaultKind, Phase};
use crate::plan::CheckpointRef;

fn worker() -> impl Strategy<Value = (WorkerId, Incarnation)> {
    let names = prop_oneof!["a:0", "b:0", "c:0"];
    (names, 1..3u64).prop_map(|(name, life)| (name.parse().unwrap(), Incarnation(life)))
}

fn kind() -> impl Strategy<Value = FaultKind> {
    use FaultKind::{Checkpoint, Communicator, Local, Storage};
    let kinds = [Communicator, Storage, Local, Checkpoint];
    prop::sample::select(kinds.to_vec())
}

fn message() -> impl Strategy<Value = ToCoordinator> {
    let small = 0..6u64;
    let numbers = (small.clone(), small.clone(), small.clone());
    prop_oneof![
        4 => Just(ToCoordinator::Warm { probe: 7 }),
        1 => Just(ToCoordinator::Warm { probe: 8 }),
        4 => (numbers.clone(), any::<bool>()).prop_map(|((g, step, _), kept)| {
            ToCoordinator::Prepared {
                generation: Generation(g),
                state: Some(Step(step)),
                trained: Generation(g / 2),
                kept,
            }
        }),
        4 => numbers.clone().prop_map(|(g, step, digest)| ToCoordinator::Synced {
            generation: Generation(g),
            step: Step(step),
            digest: digest / 4,
        }),
        2 => numbers.clone().prop_map(|(g, step, digest)| ToCoordinator::Held {
            generation: Generation(g),
            step: Step(step),
            digest: digest / 4,
        }),
        4 => (numbers.clone(), any::<bool>()).prop_map(|((g, step, op_seq), in_op)| {
            let (generation, step) = (Generation(g), Step(step));
            let (phase, phase_ms, slot_us) = (Phase::Reduce, 9000, op_seq * 100);
            ToCoordinator::Beat(Beat {
                generation, step, phase, phase_ms, op_seq, in_op, slot_us, data_us: 0,
                memory_bytes: 0,
            })
        }),
        1 => (numbers.clone(), kind()).prop_map(|((g, rank, _), kind)| ToCoordinator::Fault {
            generation: Generation(g),
            kind,
            suspects: vec![rank as usize],
            detail: "broken".into(),
        }),
        1 => numbers.clone().prop_map(|(g, seq, step)| ToCoordinator::Snapshotted {
            generation: Generation(g),
            attempt: AttemptSeq(seq),
            step: Step(step),
            digest: 1,
        }),
        1 => numbers.clone().prop_map(|(g, seq, _)| ToCoordinator::PartDone {
            generation: Generation(g),
            attempt: AttemptSeq(seq),
            receipt: "r".into(),
        }),
        1 => (small, 7..9u64).prop_map(|(g, probe)| ToCoordinator::Audited {
            generation: Generation(g),
            probe,
        }),
        1 => Just(ToCoordinator::Leaving { why: "x".into() }),
        1 => (0..4u32, 0..12u64, 0..20u64).prop_map(|(epoch, step, sample)| {
            let bad = BadSample {
                step: Step(step),
                sample: SampleId(sample),
                key: None,
                shard: "s".into(),
                offset: 0,
                error: "e".into(),
                stand_in: SampleId(0),
            };
            let (samples, dropped) = (vec![bad], sample / 19);
            ToCoordinator::BadSamples(BadSamples { epoch, samples, dropped })
        }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (worker(), 0..5u64, any::<bool>()).prop_map(|((worker, incarnation), g, up)| {
            let (endpoint, state, generation) = ("h:1".into(), None, Generation(g));
            Event::Hello(Hello { worker, incarnation, endpoint, state, generation, up })
        }),
        12 => (worker(), message()).prop_map(|((worker, incarnation), message)| {
            Event::Message { worker, incarnation, message }
        }),
        1 => worker().prop_map(|(worker, incarnation)| Event::StreamLost { worker, incarnation }),
        1 => worker().prop_map(|(worker, incarnation)| Event::TrainerExited {
            worker,
            incarnation: Some(incarnation),
            how: "exit code 1".into(),
        }),
        3 => (1..6u64).prop_map(|g| Event::CommId {
            generation: Generation(g),
            comm_id: vec![0; 32],
        }),
        1 => (1..6u64, 1..4u64, 0..6u64).prop_map(|(g, seq, step)| Event::CheckpointDone {
            generation: Generation(g),
            attempt: AttemptSeq(seq),
            checkpoint: CheckpointRef { step: Step(step), manifest: "m".into() },
        }),
        1 => (0..6u64, 0..4u8, 0..6u64).prop_map(|(step, found, next)| Event::Examined {
            checkpoint: CheckpointRef { step: Step(step), manifest: "m".into() },
            found: match found {
                0 => Examination::Sound,
                1 => Examination::Unknown { why: "x".into() },
                2 => Examination::Gone { next: None },
                _ => Examination::Damaged {
                    why: "x".into(),
                    next: (next < step)
                        .then(|| CheckpointRef { step: Step(next), manifest: "m".into() }),
                },
            },
        }),
        2 => Just(Event::Tick),
        1 => worker().prop_map(|(worker, _)| Event::Drain { worker, why: "x".into() }),
        1 => worker().prop_map(|(worker, _)| Event::Release { worker }),
        1 => Just(Event::Force),
        1 => Just(Event::Checkpoint),
    ]
}

/// The generation that a message to a worker names, if it asks for something.
fn named(message: &ToWorker) -> Option<Generation> {
    match message {
        ToWorker::Prepare(plan) => Some(plan.generation),
        ToWorker::Connect { generation, .. } | ToWorker::Start { generation, .. } => {
            Some(*generation)
        }
        _ => None,
    }
}

proptest! {
    #[test]
    fn no_order_of_events_breaks_the_machine(
        events in prop::collection::vec((event(), 0..2000u64), 1..120),
    ) {
        let config = RunConfig { n_slots: 4, workers_max: 3, bad_samples_max: 4, ..CONFIG };
        let mut machine =
            Coordinator::new(config, Timing::one_machine(), Saved::default(), Timestamp(0));
        let (mut now, mut durable) = (Timestamp(0), Saved::default());
        for (event, ms) in events {
            now = now + Duration::from_millis(ms);
            for command in machine.handle(now, event) {
                match command {
                    Command::Persist(record) => {
                        if let Record::Planned(plan) = &record {
                            prop_assert!(plan.generation > durable.generation, "I1");
                            let mut slots: Vec<u32> =
                                plan.members.iter().flat_map(|m| m.slots.clone()).collect();
                            slots.sort();
                            prop_assert_eq!(slots, vec![0, 1, 2, 3], "I4");
                        }
                        durable.apply(&record);
                    }
                    Command::Send { message, .. } => {
                        let known = named(&message).is_none_or(|g| g <= durable.generation);
                        prop_assert!(known, "{:?} was said before it was durable", message);
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(machine.saved(), &durable, "I8");
            if let Some((at, what)) = machine.next_deadline() {
                // A deadline in the past that nothing moves would be asked for without end.
                machine.handle(now, Event::Tick);
                let again = machine.next_deadline().map(|(at, _)| at);
                prop_assert!(at > now || again != Some(at), "{} is due for ever", what);
                durable = machine.saved().clone();
            }
        }
    }
}
