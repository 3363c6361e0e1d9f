use std::net::SocketAddr;

use lacuna_collective::conformance::Members;
use lacuna_collective::{AbortHandle, Exposure, Group, TcpCollective, TrainerListener};
use lacuna_recipe::model::ModelConfig;
use lacuna_types::{Generation, Slot, Step};

use super::*;
use crate::engine::EngineSpec;
use crate::fake::{FakeEngine, Faults, probe_batch};

const PATIENT: Duration = Duration::from_secs(60);
const SLOTS: u32 = 6;

/// Patches so large that a tensor has two exponents of 32-bit sums.
fn spec() -> EngineSpec {
    let micro = ModelConfig::preset("micro").expect("a preset");
    EngineSpec {
        model: ModelConfig { patch_size: 4, ..micro },
        seed: 5,
        mean: vec![0.5; 3],
        std: vec![0.25; 3],
        slot_batch: 2,
        n_slots: SLOTS,
        precision: lacuna_spec::Precision::F32,
        device: "cpu0".into(),
        task: None,
    }
}

fn group(world: usize) -> Members {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let bind = |_| TrainerListener::bind(any_port, None, Exposure::Loopback).unwrap();
    let listeners: Vec<TrainerListener> = (0..world).map(bind).collect();
    let members: Vec<SocketAddr> = listeners.iter().map(TrainerListener::advertised).collect();
    let connect = |(rank, listener): (usize, &TrainerListener)| {
        let members = members.clone();
        let run = "buckets".parse().unwrap();
        let group = Group { run, generation: Generation(1), rank, members, key: [3; 32] };
        TcpCollective::connect(listener, &group, AbortHandle::new(), PATIENT).unwrap()
    };
    std::thread::scope(|scope| {
        let start = |member| scope.spawn(move || connect(member));
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.map(|member| Box::new(member) as Box<dyn Collective>).collect()
    })
}

fn batch(index: u32) -> SlotBatch {
    let mut batch = probe_batch(&spec().model, spec().slot_batch);
    batch.slot = Slot { step: Step(0), index };
    for (i, pixel) in batch.pixels.iter_mut().enumerate() {
        *pixel = pixel.wrapping_mul(29).wrapping_add((i as u32 * (index + 3)) as u8);
    }
    batch
}

/// The slots of a rank: every `world`-th.
fn slots(rank: usize, world: usize) -> Vec<SlotBatch> {
    (rank as u32..SLOTS).step_by(world).map(batch).collect()
}

/// One rank's step; returns the bits of the mean gradient.
fn step(
    comm: &mut dyn Collective,
    reduction: Reduction,
    bucket: usize,
    overlapped: bool,
) -> (Verdict, Vec<u32>) {
    let mut engine = FakeEngine::new(spec(), Duration::ZERO);
    let mut math = HostMath::with_buckets(&engine, reduction, SLOTS, bucket);
    let mut counters = reduction.fresh(engine.layout(), 12);
    let batches = slots(comm.rank(), comm.world());
    loop {
        math.begin(&counters.exponents);
        for (idx, batch) in batches.iter().enumerate() {
            if overlapped && idx + 1 == batches.len() {
                math.last_slot(&mut engine, batch, comm, PATIENT).unwrap();
            } else {
                math.slot(&mut engine, batch).unwrap();
            }
        }
        math.reduce(comm, PATIENT).unwrap();
        let verdict = math.finish(comm.world()).unwrap();
        match &verdict {
            Verdict::Apply(summary) if reduction.measures_first(&counters) => {
                reduction.advance(&mut counters, &summary.max_abs, SLOTS);
            }
            _ => return (verdict, math.mean().iter().map(|g| g.to_bits()).collect()),
        }
    }
}

/// The bits do not depend on the world, the size of buckets, or on what is summed while slots
/// compute.
#[test]
fn every_combination_gives_the_same_bits() {
    let layout = FakeEngine::new(spec(), Duration::ZERO).layout().clone();
    assert!(Reduction::Exact32.n_exponents(&layout) > layout.n_blocks());
    for reduction in [Reduction::Exact, Reduction::Exact32] {
        let reference = step(group(1)[0].as_mut(), reduction, usize::MAX, false);
        assert!(matches!(reference.0, Verdict::Apply(_)), "{:?}", reference.0);
        // More workers than slots: some have none.
        for world in [2, 3, SLOTS as usize + 1] {
            for (bucket, overlapped) in
                [(usize::MAX, false), (usize::MAX, true), (1, true), (64, true), (64, false)]
            {
                let mut members = group(world);
                let done = lacuna_collective::conformance::on_each(&mut members, |comm| {
                    step(comm, reduction, bucket, overlapped)
                });
                for (rank, done) in done.iter().enumerate() {
                    let place = format!("{reduction:?}, {bucket}, {overlapped}, {rank} of {world}");
                    assert!(*done == reference, "{place}");
                }
            }
        }
    }
}

/// Floats promise one thing: all ranks have the same.
#[test]
fn floats_are_equal_on_all_ranks() {
    let mut members = group(3);
    let done = lacuna_collective::conformance::on_each(&mut members, |comm| {
        step(comm, Reduction::Fast, 64, true)
    });
    assert!(done.iter().all(|other| *other == done[0]));
    let Verdict::Apply(summary) = &done[0].0 else { panic!("{:?}", done[0].0) };
    let alone = step(group(1)[0].as_mut(), Reduction::Exact, usize::MAX, false);
    let Verdict::Apply(exact) = alone.0 else { panic!("{:?}", alone.0) };
    assert!((summary.grad_norm / exact.grad_norm - 1.0).abs() < 1e-5);
}

#[test]
fn a_peer_that_dies_while_slots_compute_is_an_error_of_the_sum() {
    let mut members = group(2);
    let gone = members.pop();
    let mut engine = FakeEngine::new(spec(), Duration::ZERO);
    let mut math = HostMath::with_buckets(&engine, Reduction::Exact, SLOTS, 1);
    math.begin(&vec![30; engine.layout().n_blocks()]);
    drop(gone);
    let comm = members[0].as_mut();
    let (loss, _) = math.last_slot(&mut engine, &batch(0), comm, PATIENT).expect("it computes");
    assert!(loss.is_finite());
    let failed = math.reduce(comm, PATIENT).expect_err("the peer is gone");
    assert!(matches!(failed, CollectiveError::PeerLost { rank: 1, .. }), "{failed}");
}

#[test]
fn an_engine_that_fails_in_the_last_slot_is_the_engines_error() {
    let mut members = group(2);
    let results = lacuna_collective::conformance::on_each(&mut members, |comm| {
        let fail_at = (comm.rank() == 0).then_some(0);
        let faults = Faults { fail_at, ..Faults::default() };
        let mut engine = FakeEngine::new(spec(), Duration::ZERO).with_faults(faults);
        let mut math = HostMath::with_buckets(&engine, Reduction::Exact, SLOTS, 1);
        math.begin(&vec![30; engine.layout().n_blocks()]);
        let brief = Duration::from_millis(300);
        let done = math.last_slot(&mut engine, &batch(0), comm, brief);
        done.map_err(|err| err.to_string()).map(|_| math.reduce(comm, brief))
    });
    let [Err(failed), Ok(waited)] = &results[..] else { panic!("{results:?}") };
    assert!(failed.contains("on a broken device"), "{failed}");
    let Err(CollectiveError::Timeout { waiting_for, .. }) = waited else { panic!("{waited:?}") };
    assert_eq!(*waiting_for, [0]);
}
