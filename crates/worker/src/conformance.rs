//! What every [`Engine`](crate::engine::Engine) must do; each implementation runs it in its tests.

use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::state::{Counters, Section, state_digest};
use lacuna_recipe::step::SlotBatch;
use lacuna_types::{SampleId, Slot, Step};

use crate::cpu_state::CpuState;
use crate::engine::{Backend, Engine, EngineSpec, UpdateScalars};
use crate::fake::probe_batch;

const UPDATE: UpdateScalars = UpdateScalars {
    lr: 1e-2,
    t: 1,
    adamw: AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 },
    decay_tokens: true,
};

/// Runs the whole suite on engines of `backend` for `spec`. Panics where the contract is broken.
pub fn run(spec: &EngineSpec, backend: &dyn Backend) {
    starts_from_the_seed(spec, backend);
    weights_of_zero_add_nothing(spec, backend);
    run_from_elsewhere(spec, backend);
}

/// Runs the suite on engines that do not start from the seed alone, and whose slots may join their
/// samples: those parts of the contract that are theirs.
pub fn run_from_elsewhere(spec: &EngineSpec, backend: &dyn Backend) {
    runs_start_as_it_does(spec, backend);
    slots_are_pure(spec, backend);
    every_tensor_gets_one_gradient(spec, backend);
    what_was_written_is_read(spec, backend);
    updates_are_those_of_the_recipe(spec, backend);
    probes_agree(spec, backend);
    wrong_batches_are_refused(spec, backend);
    drawing_changes_nothing(spec, backend);
}

/// The trainer writes `initial` into an engine that may have trained already.
fn runs_start_as_it_does(spec: &EngineSpec, backend: &dyn Backend) {
    let first = engine(spec, backend);
    let layout = first.layout().clone();
    for (block, param) in layout.params().iter().enumerate() {
        let range = layout.range(block);
        let (mut own, mut initial) = (vec![0f32; range.len()], vec![0f32; range.len()]);
        first.read(Section::Param, range, &mut own).expect("reading works");
        first.initial(block, spec.seed, &mut initial);
        assert_eq!(Crc64::of_f32(&own), Crc64::of_f32(&initial), "initial `{}`", param.name);
    }
}

fn engine(spec: &EngineSpec, backend: &dyn Backend) -> Box<dyn Engine> {
    backend.engine(spec).expect("the engine builds")
}

/// A slot of other samples than the probe's.
fn other_batch(spec: &EngineSpec, salt: u8) -> SlotBatch {
    let mut batch = probe_batch(&spec.model, spec.slot_batch);
    batch.slot = Slot { step: Step(3), index: 1 };
    for (i, pixel) in batch.pixels.iter_mut().enumerate() {
        *pixel = pixel.wrapping_mul(31).wrapping_add(salt).wrapping_add(i as u8);
    }
    let n = spec.model.n_patches();
    for (i, ids) in batch.ids_shuffle.chunks_mut(n).enumerate() {
        ids.copy_from_slice(&MaskOrder::draw(u64::from(salt), 1, i as u64, n).ids_shuffle);
        batch.samples[i] = SampleId(1000 + i as u64);
    }
    batch
}

/// Loss and gradients of a slot as one digest.
fn slot_digest(engine: &mut dyn Engine, batch: &SlotBatch) -> Crc64 {
    let mut blocks = vec![Crc64::default(); engine.layout().n_blocks()];
    let loss = engine
        .slot(batch, &mut |grad| blocks[grad.block] = Crc64::of_f32(grad.values))
        .expect("the slot computes");
    blocks.into_iter().fold(Crc64::of_f32(&[loss]), Crc64::then)
}

fn digest(engine: &dyn Engine) -> u64 {
    let counters = Counters::fresh(engine.layout().n_blocks(), 8);
    state_digest(&engine.tensor_digests().expect("digests compute"), &counters)
}

fn starts_from_the_seed(spec: &EngineSpec, backend: &dyn Backend) {
    let first = engine(spec, backend);
    let reference = CpuState::fresh(first.layout().clone(), spec.seed);
    assert_eq!(first.tensor_digests().unwrap(), reference.tensor_digests(), "initial state");
    let other = engine(&EngineSpec { seed: spec.seed + 1, ..spec.clone() }, backend);
    assert_ne!(digest(first.as_ref()), digest(other.as_ref()), "another seed, another state");
}

fn slots_are_pure(spec: &EngineSpec, backend: &dyn Backend) {
    let batches: Vec<SlotBatch> = (0..4).map(|salt| other_batch(spec, salt)).collect();
    let mut first = engine(spec, backend);
    let before = digest(first.as_ref());
    let in_order: Vec<Crc64> =
        batches.iter().map(|batch| slot_digest(first.as_mut(), batch)).collect();
    let again: Vec<Crc64> =
        batches.iter().rev().map(|batch| slot_digest(first.as_mut(), batch)).collect();
    assert!(in_order.iter().eq(again.iter().rev()), "the order of slots does not matter");
    let alone = slot_digest(engine(spec, backend).as_mut(), &batches[2]);
    assert_eq!(alone, in_order[2], "another engine gives the same bits");
    assert_ne!(in_order[0], in_order[1], "other samples give other gradients");
    assert_eq!(digest(first.as_ref()), before, "a slot changes no state");
}

fn every_tensor_gets_one_gradient(spec: &EngineSpec, backend: &dyn Backend) {
    let mut engine = engine(spec, backend);
    let layout = engine.layout().clone();
    let mut seen = vec![0; layout.n_blocks()];
    let batch = other_batch(spec, 1);
    let loss = engine
        .slot(&batch, &mut |grad| {
            seen[grad.block] += 1;
            assert_eq!(grad.values.len(), layout.range(grad.block).len());
            assert!(grad.values.iter().all(|g| g.is_finite()));
        })
        .unwrap();
    assert!(loss.is_finite() && loss > 0.0);
    assert!(seen.iter().all(|&n| n == 1), "each tensor once: {seen:?}");
}

/// Checks that the loss of a slot is made of those of its samples. Panics where it is not.
pub fn weights_of_zero_add_nothing(spec: &EngineSpec, backend: &dyn Backend) {
    let mut engine = engine(spec, backend);
    let mut batch = other_batch(spec, 2);
    let (mut parts, mut whole) = (0.0, 0.0);
    let n = batch.weights.len();
    for only in 0..=n {
        batch.weights = (0..n).map(|i| f32::from(only == n || i == only)).collect();
        let loss = f64::from(engine.slot(&batch, &mut |_| {}).unwrap());
        if only == n { whole = loss } else { parts += loss }
    }
    assert!((parts - whole).abs() < 1e-5 * whole, "parts {parts}, whole {whole}");
    batch.weights = vec![0.0; n];
    let nothing = |g: lacuna_recipe::reduce::SlotGrad<'_>| {
        assert!(g.values.iter().all(|&x| x == 0.0), "tensor {}", g.block);
    };
    assert_eq!(engine.slot(&batch, &mut { nothing }).unwrap(), 0.0);
}

fn what_was_written_is_read(spec: &EngineSpec, backend: &dyn Backend) {
    let mut engine = engine(spec, backend);
    let n = engine.layout().numel();
    for (salt, section) in Section::ALL.into_iter().enumerate() {
        let values: Vec<f32> = (0..n).map(|i| (i as f32 + 0.3) * (salt + 1) as f32).collect();
        engine.write(section, 0, &values[..n / 2]).unwrap();
        engine.write(section, n / 2, &values[n / 2..]).unwrap();
        let mut back = vec![0.0; n];
        engine.read(section, 0..n, &mut back).unwrap();
        assert_eq!(back, values);
        let digests = engine.tensor_digests().unwrap();
        let range = engine.layout().range(0);
        assert_eq!(digests[0][salt], Crc64::of_f32(&values[range]));
    }
}

fn updates_are_those_of_the_recipe(spec: &EngineSpec, backend: &dyn Backend) {
    let mut engine = engine(spec, backend);
    let mut reference = CpuState::fresh(engine.layout().clone(), spec.seed);
    let n = engine.layout().numel();
    engine.read(Section::Param, 0..n, reference.section_mut(Section::Param)).unwrap();
    let batch = other_batch(spec, 3);
    let before = slot_digest(engine.as_mut(), &batch);
    for t in 1..=3 {
        let mean: Vec<f32> = (0..n).map(|i| ((i % 17) as f32 - 8.0) * 1e-3 / t as f32).collect();
        let update = UpdateScalars { t, ..UPDATE };
        engine.apply(&mean, &update).unwrap();
        reference.apply(&mean, &update);
        assert_eq!(engine.tensor_digests().unwrap(), reference.tensor_digests(), "update {t}");
    }
    assert_ne!(slot_digest(engine.as_mut(), &batch), before, "slots see the new parameters");
}

fn probes_agree(spec: &EngineSpec, backend: &dyn Backend) {
    let mut first = engine(spec, backend);
    let probe = first.probe().unwrap();
    let state = digest(first.as_ref());
    let n = first.layout().numel();
    first.apply(&vec![1e-3; n], &UPDATE).unwrap();
    assert_eq!(first.probe().unwrap(), probe, "a probe does not depend on the state");
    assert_ne!(digest(first.as_ref()), state);
    assert_eq!(engine(spec, backend).probe().unwrap(), probe);
}

fn wrong_batches_are_refused(spec: &EngineSpec, backend: &dyn Backend) {
    let mut engine = engine(spec, backend);
    let mut batch = other_batch(spec, 4);
    batch.pixels.pop();
    let err = engine.slot(&batch, &mut |_| {}).unwrap_err().to_string();
    assert!(err.contains("slot 1 of step 3"), "{err}");
}

fn drawing_changes_nothing(spec: &EngineSpec, backend: &dyn Backend) {
    let batch = other_batch(spec, 7);
    let mut engine = engine(spec, backend);
    let before = (digest(engine.as_ref()), slot_digest(engine.as_mut(), &batch));
    let draw = |engine: &mut dyn Engine| {
        let n = 1.max(batch.samples.len() / 2);
        let pixels = &batch.pixels[..batch.pixels.len() / batch.samples.len() * n];
        engine.draw(pixels, &batch.ids_shuffle[..spec.model.n_patches() * n]).expect("it draws")
    };
    let pictures = draw(engine.as_mut());
    assert_eq!(pictures, draw(engine.as_mut()), "one state, one picture");
    for picture in pictures.iter().flatten() {
        let bytes = picture.width as usize * picture.height as usize * 3;
        assert_eq!(picture.rgb.len(), bytes, "three bytes for each pixel");
    }
    let after = (digest(engine.as_ref()), slot_digest(engine.as_mut(), &batch));
    assert_eq!(before, after, "a drawing changes no state");
}
