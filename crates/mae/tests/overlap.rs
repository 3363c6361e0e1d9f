//! Sums that go on while the last slot is differentiated: real backward passes, several buckets,
//! between members over TCP. Whatever overlaps, the bits are the same.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lacuna_collective::conformance::{Members, on_each};
use lacuna_collective::{AbortHandle, Collective, Exposure, Group, TcpCollective, TrainerListener};
use lacuna_mae::engine::{EngineSetup, TorchEngine};
use lacuna_mae::objective::{MaeObjective, Objective};
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::reduce::{Reduction, Verdict};
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::Precision;
use lacuna_types::{Generation, Slot, Step};
use lacuna_worker::engine::Engine;
use lacuna_worker::fake::probe_batch;
use lacuna_worker::host_math::HostMath;

#[path = "../examples/blockwise.rs"]
#[allow(dead_code, reason = "only the objective is of interest here")]
mod blockwise;
#[path = "../examples/simmim.rs"]
#[allow(dead_code, reason = "only the objective is of interest here")]
mod simmim;

const PATIENT: Duration = Duration::from_secs(120);
const SLOTS: u32 = 4;
const SLOT_BATCH: u32 = 2;

fn setup() -> EngineSetup {
    let model = ModelConfig::preset("demo").unwrap();
    let channels = model.channels as usize;
    EngineSetup {
        model,
        seed: 3,
        mean: vec![0.5; channels],
        std: vec![0.25; channels],
        slot_batch: SLOT_BATCH,
        precision: Precision::F32,
    }
}

fn engine(objective: &Arc<dyn Objective>) -> TorchEngine {
    TorchEngine::with_objective(setup(), objective).unwrap()
}

fn mae() -> Arc<dyn Objective> {
    Arc::new(MaeObjective)
}

fn batch(index: u32) -> SlotBatch {
    let mut batch = probe_batch(&setup().model, SLOT_BATCH);
    batch.slot = Slot { step: Step(0), index };
    for (i, pixel) in batch.pixels.iter_mut().enumerate() {
        *pixel = pixel.wrapping_mul(29).wrapping_add((i as u32 * (index + 3)) as u8);
    }
    batch
}

fn group(world: usize) -> Members {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let bind = |_| TrainerListener::bind(any_port, None, Exposure::Loopback).unwrap();
    let listeners: Vec<TrainerListener> = (0..world).map(bind).collect();
    let members: Vec<SocketAddr> = listeners.iter().map(TrainerListener::advertised).collect();
    let connect = |(rank, listener): (usize, &TrainerListener)| {
        let members = members.clone();
        let run = "overlap".parse().unwrap();
        let group = Group { run, generation: Generation(1), rank, members, key: [7; 32] };
        TcpCollective::connect(listener, &group, AbortHandle::new(), PATIENT).unwrap()
    };
    std::thread::scope(|scope| {
        let start = |member| scope.spawn(move || connect(member));
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.map(|member| Box::new(member) as Box<dyn Collective>).collect()
    })
}

/// One rank's step; returns the bits of the mean gradient.
fn step(
    comm: &mut dyn Collective,
    reduction: Reduction,
    bucket: usize,
    overlaps: bool,
) -> Vec<u32> {
    let mut engine = engine(&mae());
    let mut math = HostMath::with_buckets(&engine, reduction, SLOTS, bucket);
    let mut counters = reduction.fresh(engine.layout(), 20);
    let mine = (comm.rank() as u32..SLOTS).step_by(comm.world());
    let batches: Vec<SlotBatch> = mine.map(batch).collect();
    loop {
        math.begin(&counters.exponents);
        for (idx, batch) in batches.iter().enumerate() {
            if overlaps && idx + 1 == batches.len() {
                math.last_slot(&mut engine, batch, comm, PATIENT).unwrap();
            } else {
                math.slot(&mut engine, batch).unwrap();
            }
        }
        math.reduce(comm, PATIENT).unwrap();
        match math.finish(comm.world()).unwrap() {
            Verdict::Apply(summary) if reduction.measures_first(&counters) => {
                reduction.advance(&mut counters, &summary.max_abs, SLOTS);
            }
            Verdict::Apply(_) => return math.mean().iter().map(|g| g.to_bits()).collect(),
            Verdict::Redo => reduction.back_off(&mut counters, &math.overflows()),
            Verdict::Skip(_) => panic!("every gradient is finite"),
        }
    }
}

#[test]
fn sums_beside_a_backward_pass_give_the_bits_of_sums_after_it() {
    for reduction in [Reduction::Exact, Reduction::Exact32] {
        let want = step(group(1)[0].as_mut(), reduction, usize::MAX, false);
        assert!(want.iter().any(|bits| *bits != 0));
        for (world, bucket) in [(1, 1), (2, 1), (2, 1 << 16), (3, 1 << 16), (3, usize::MAX)] {
            let mut members = group(world);
            let got = on_each(&mut members, |comm| step(comm, reduction, bucket, true));
            for (rank, got) in got.iter().enumerate() {
                assert!(*got == want, "{reduction:?}, buckets of {bucket}, rank {rank} of {world}");
            }
        }
    }
}

/// A bucket leaves when its tensors are there, in one order on all ranks: gradients must come in
/// the order that an engine promises, or everything waits for the end of the pass.
#[test]
fn gradients_come_in_the_order_that_is_promised_whatever_the_objective() {
    let objectives: [(&str, Arc<dyn Objective>); 3] = [
        ("mae", mae()),
        ("block-wise", Arc::new(blockwise::Blockwise)),
        ("simmim", Arc::new(simmim::SimMim)),
    ];
    for (name, objective) in objectives {
        let mut engine = engine(&objective);
        let mut order: Vec<usize> = Vec::new();
        engine.slot(&batch(0), &mut |grad| order.push(grad.block)).unwrap();
        assert_eq!(order, engine.completion(), "{name}");
        let embed = engine.layout().find("patch_embed.proj.weight").unwrap();
        let last = order.iter().position(|block| *block == embed).unwrap();
        assert!(last + 4 > order.len(), "{name}: patches are embedded first, so they come last");
        assert!(engine.completion() != (0..order.len()).rev().collect::<Vec<_>>(), "{name}");
    }
}
