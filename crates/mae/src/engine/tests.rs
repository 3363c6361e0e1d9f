use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ParamSpec;
use lacuna_recipe::reduce::{ControlWord, Reducer, Verdict};
use lacuna_types::{SampleId, Slot, Step};
use lacuna_worker::engine::DeviceEngine as _;

use crate::objective::{self, SlotLoss};

fn setup(preset: &str, slot_batch: u32) -> EngineSetup {
    let model = ModelConfig::preset(preset).unwrap();
    let channels = model.channels as usize;
    EngineSetup {
        model,
        seed: 7,
        mean: vec![0.45; channels],
        std: vec![0.25; channels],
        slot_batch,
        precision: Precision::F32,
    }
}

fn batch(setup: &EngineSetup, index: u32) -> SlotBatch {
    let b = u64::from(setup.slot_batch);
    let samples: Vec<SampleId> = (0..b).map(|i| SampleId(u64::from(index) * b + i)).collect();
    let model = &setup.model;
    let n_bytes = (b as u32 * model.channels * model.img_size[0] * model.img_size[1]) as usize;
    let order = |s: &SampleId| MaskOrder::draw(3, 0, s.0, model.n_patches()).ids_shuffle;
    SlotBatch {
        slot: Slot { step: Step(4), index },
        labels: (0..setup.slot_batch).map(|i| Some(i % 2)).collect(),
        weights: vec![1.0; samples.len()],
        pixels: (0..n_bytes).map(|i| ((i * 31 + index as usize * 17) % 253) as u8).collect(),
        ids_shuffle: samples.iter().flat_map(order).collect(),
        samples,
    }
}

/// Returns the loss and the flat gradient.
fn compute(engine: &mut dyn Engine, batch: &SlotBatch) -> (u32, Vec<u32>) {
    let layout = engine.layout().clone();
    let mut flat = vec![f32::NAN; layout.numel()];
    let mut seen = vec![0; layout.n_blocks()];
    let loss = engine
        .slot(batch, &mut |grad| {
            seen[grad.block] += 1;
            flat[layout.range(grad.block)].copy_from_slice(grad.values);
        })
        .unwrap();
    assert!(seen.iter().all(|&n| n == 1), "each tensor once");
    assert!(loss.is_finite() && flat.iter().all(|x| x.is_finite()));
    (loss.to_bits(), flat.iter().map(|x| x.to_bits()).collect())
}

#[test]
fn a_slot_is_a_function_of_parameters_and_batch() {
    for (preset, slot_batch) in [("micro", 4), ("demo", 8)] {
        let setup = setup(preset, slot_batch);
        let batches: Vec<SlotBatch> = (0..4).map(|i| batch(&setup, i)).collect();
        let mut engine = TorchEngine::new(setup.clone()).unwrap();
        let first: Vec<_> = batches.iter().map(|b| compute(&mut engine, b)).collect();
        for i in [2, 0, 3, 1, 1, 2] {
            assert!(compute(&mut engine, &batches[i]) == first[i], "{preset}: slot {i} again");
        }
        // Another engine, another thread, another order, another heap.
        let other = std::thread::spawn(move || {
            let ballast: Vec<Vec<u8>> = (1..40).map(|i| vec![1; i * 777]).collect();
            let mut engine = TorchEngine::new(setup).unwrap();
            let results: Vec<_> = batches.iter().rev().map(|b| compute(&mut engine, b)).collect();
            drop(ballast);
            results
        });
        let other = other.join().unwrap();
        assert!(other.into_iter().rev().eq(first), "{preset}: in another engine");
    }
}

/// A backward pass in pieces gives the bits of a whole one, and gradients in completion order.
#[test]
fn pieces_of_a_backward_pass_change_no_bits() {
    for (preset, slot_batch, precision, blocks) in [
        ("micro", 4, Precision::F32, 3),
        ("demo", 8, Precision::F32, 8),
        ("micro", 4, Precision::Bf16, 3),
    ] {
        let setup = EngineSetup { precision, ..setup(preset, slot_batch) };
        let batch = batch(&setup, 1);
        let mae: Arc<dyn Objective> = Arc::new(MaeObjective);
        let program = || {
            let n = slot_batch as usize;
            SlotProgram::new(&mae, &setup.model, n, Device::Cpu, precision)
        };
        let fresh = CpuState::fresh(program().layout.clone(), 7);
        let images: Vec<f32> = batch.pixels.iter().map(|&b| f32::from(b) / 64.0 - 2.0).collect();
        let gradients = |program: &SlotProgram| {
            // SAFETY: the buffers outlive the graph, which is gone at the end of this closure.
            let (weights, images_bchw) = unsafe {
                let weights = Weights::view_of(&program.layout, fresh.section(Section::Param));
                (program.leaves(weights), view(&images, &program.image_shape()))
            };
            let (ids_shuffle, weights) = (&batch.ids_shuffle[..], (weights, &batch.weights[..]));
            let input = SlotInput {
                images_bchw,
                ids_shuffle,
                weights: weights.1,
                draws: Vec::new(),
                labels: &[],
            };
            let mut grads: Vec<(usize, Crc64)> = Vec::new();
            let loss = program.differentiate(&weights.0, &input, &mut |block, grad| {
                grads.push((block, Crc64::of_f32(values(&grad))));
            });
            (loss.double_value(&[]), grads)
        };
        let (pieces, whole) = (program(), program().uncut());
        let want = gradients(&whole);
        assert!(gradients(&pieces) == want, "{preset}, {precision}: the first slot");
        assert!(gradients(&pieces) == want, "{preset}, {precision}: the second");
        assert_eq!((pieces.n_pieces(), whole.n_pieces()), (blocks + 1, 1), "{preset}");
        let order: Vec<usize> = want.1.iter().map(|(block, _)| *block).collect();
        assert_eq!(order, pieces.completion());
    }
}

/// The flat buffer's address decides where every tensor lies relative to a cache line; kernels that
/// looked at alignment would make a slot depend on the heap.
#[test]
fn alignment_of_the_parameters_does_not_change_bits() {
    for (preset, slot_batch) in [("micro", 4), ("demo", 8)] {
        let setup = setup(preset, slot_batch);
        let batch = batch(&setup, 0);
        let (n, mae) = (slot_batch as usize, Arc::new(MaeObjective) as Arc<dyn Objective>);
        let program = SlotProgram::new(&mae, &setup.model, n, Device::Cpu, Precision::F32);
        let images: Vec<f32> = batch.pixels.iter().map(|&b| f32::from(b) / 64.0 - 2.0).collect();
        let fresh = CpuState::fresh(program.layout.clone(), 7);
        let param = fresh.section(Section::Param);
        let digest_at = |offset: usize| {
            let mut buffer: Vec<f32> = vec![0.0; param.len() + offset];
            buffer[offset..].copy_from_slice(param);
            // SAFETY: both buffers outlive the graph, which is gone at the end of this closure.
            let (weights, images_bchw) = unsafe {
                let weights = Weights::view_of(&program.layout, &buffer[offset..]).trainable();
                (weights, view(&images, &program.image_shape()))
            };
            let (ids_shuffle, weights_b) = (&batch.ids_shuffle[..], &batch.weights[..]);
            let input = SlotInput {
                images_bchw,
                ids_shuffle,
                weights: weights_b,
                draws: Vec::new(),
                labels: &[],
            };
            let mut sum = Crc64::default();
            let loss = program.differentiate(&weights, &input, &mut |_, grad| {
                sum = sum.then(Crc64::of_f32(values(&grad)));
            });
            sum.then(Crc64::of_f32(&[loss.double_value(&[]) as f32]))
        };
        let want = digest_at(0);
        for offset in [1, 2, 4, 8, 12, 13] {
            assert_eq!(digest_at(offset), want, "{preset}: {offset} elements further");
        }
    }
}

#[test]
fn a_sample_of_weight_zero_adds_nothing_and_divides() {
    let setup = setup("micro", 2);
    let mut engine = TorchEngine::new(setup.clone()).unwrap();
    let whole = batch(&setup, 0);
    let mut parts: Vec<f64> = Vec::new();
    for weights in [vec![1.0, 0.0], vec![0.0, 1.0], vec![1.0, 1.0]] {
        let (loss, _) = compute(&mut engine, &SlotBatch { weights, ..whole.clone() });
        parts.push(f64::from(f32::from_bits(loss)));
    }
    assert!((parts[0] + parts[1] - parts[2]).abs() < 1e-6, "{parts:?}");
    let mut noise = whole.clone();
    noise.weights = vec![1.0, 0.0];
    let first = compute(&mut engine, &noise);
    noise.pixels[192..].fill(77);
    assert!(compute(&mut engine, &noise) == first, "a weightless image has no influence");
}

#[test]
fn a_fresh_engine_holds_the_weights_of_its_seed() {
    let setup = setup("micro", 2);
    let engine = TorchEngine::new(setup.clone()).unwrap();
    let same = TorchEngine::new(setup.clone()).unwrap();
    let other = TorchEngine::new(EngineSetup { seed: 8, ..setup }).unwrap();
    assert_eq!(engine.tensor_digests().unwrap(), same.tensor_digests().unwrap());
    assert_ne!(engine.params(), other.params());
    let n = engine.layout().numel();
    let mut moments = vec![f32::NAN; n];
    for section in [Section::ExpAvg, Section::ExpAvgSq] {
        engine.read(section, 0..n, &mut moments).unwrap();
        assert!(moments.iter().all(|&x| x == 0.0));
    }
}

#[test]
fn what_is_written_is_read_and_computed_with() {
    let setup = setup("micro", 2);
    let mut engine = TorchEngine::new(setup.clone()).unwrap();
    let slot = batch(&setup, 0);
    let before = compute(&mut engine, &slot);
    for section in Section::ALL {
        let written: Vec<f32> = (0..100).map(|i| i as f32 * 1e-3 - 0.05).collect();
        engine.write(section, 40, &written).unwrap();
        let mut read = vec![0.0; 50];
        engine.read(section, 60..110, &mut read).unwrap();
        assert_eq!(read, written[20..70]);
    }
    assert!(compute(&mut engine, &slot) != before);
}

#[test]
fn updates_lower_the_loss() {
    let setup = setup("micro", 4);
    let mut engine = TorchEngine::new(setup.clone()).unwrap();
    let slot = batch(&setup, 0);
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
    let mut losses: Vec<f32> = Vec::new();
    for t in 1..=20 {
        let (loss, grad) = compute(&mut engine, &slot);
        losses.push(f32::from_bits(loss));
        let mean: Vec<f32> = grad.into_iter().map(f32::from_bits).collect();
        let update = UpdateScalars { lr: 1e-2, t, adamw: adamw.clone(), decay_tokens: true };
        engine.apply(&mean, &update).unwrap();
    }
    assert!(losses[19] < 0.9 * losses[0], "{losses:?}");
}

#[test]
fn the_probe_depends_on_the_shapes_and_not_on_the_state() {
    let mut engine = TorchEngine::new(setup("micro", 2)).unwrap();
    let digest = engine.probe().unwrap();
    let other_seed = EngineSetup { seed: 99, ..setup("micro", 2) };
    let mut moved = TorchEngine::new(other_seed).unwrap();
    moved.write(Section::Param, 0, &[1.0; 32]).unwrap();
    assert_eq!(moved.probe().unwrap(), digest);
    assert_eq!(moved.probe().unwrap(), digest);
    let mut wider = TorchEngine::new(setup("micro", 3)).unwrap();
    assert_ne!(wider.probe().unwrap(), digest);
    assert!(engine.describe().starts_with("cpu (libtorch 2.11"), "{}", engine.describe());
}

/// The masked autoencoder on a machine that computes something else from some moment on.
#[derive(Debug)]
struct GoesBad(Arc<AtomicBool>);

#[derive(Debug)]
struct BadLoss(Box<dyn SlotLoss>, Arc<AtomicBool>);

impl Objective for GoesBad {
    fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        MaeObjective.params(model)
    }

    fn prepare(&self, model: &ModelConfig, device: Device) -> Box<dyn SlotLoss> {
        Box::new(BadLoss(MaeObjective.prepare(model, device), self.0.clone()))
    }
}

impl SlotLoss for BadLoss {
    fn loss(&self, weights: &Weights, slot: &objective::Slot<'_>) -> tch::Tensor {
        let factor = if self.1.load(Ordering::Relaxed) { 1.25 } else { 1.0 };
        self.0.loss(weights, slot) * factor
    }
}

/// It is asked for when states differ: whoever went bad since the start must show.
#[test]
fn a_probe_is_computed_each_time() {
    let bad = Arc::new(AtomicBool::new(false));
    let objective: Arc<dyn Objective> = Arc::new(GoesBad(bad.clone()));
    let host = TorchEngine::with_objective(setup("micro", 2), &objective).unwrap();
    let there = DeviceTorchEngine::with_objective(setup("micro", 2), stand_in(), &objective);
    let engines: [Box<dyn Engine>; 2] = [Box::new(host), Box::new(there.unwrap())];
    for mut engine in engines {
        bad.store(false, Ordering::Relaxed);
        let good = engine.probe().unwrap();
        assert_eq!(engine.probe().unwrap(), good);
        bad.store(true, Ordering::Relaxed);
        assert_ne!(engine.probe().unwrap(), good, "{}", engine.describe());
    }
}

#[test]
fn batches_of_another_shape_are_refused() {
    let setup = setup("micro", 2);
    let mut engine = TorchEngine::new(setup.clone()).unwrap();
    let good = batch(&setup, 3);
    let mut cases: Vec<(&str, SlotBatch)> = Vec::new();
    let mut case = |what, change: fn(&mut SlotBatch)| {
        let mut bad = good.clone();
        change(&mut bad);
        cases.push((what, bad));
    };
    case("1 samples, not 2", |b| b.samples.truncate(1));
    case("3 weights, not 2", |b| b.weights.push(1.0));
    case("383 pixel values, not 384", |b| b.pixels.truncate(383));
    case("31 patch ids, not 32", |b| b.ids_shuffle.truncate(31));
    case("sample 1 does not name each patch once", |b| b.ids_shuffle[20] = b.ids_shuffle[21]);
    case("sample 0 does not name each patch once", |b| b.ids_shuffle[3] = 16);
    for (what, bad) in cases {
        let error = engine.slot(&bad, &mut |_| panic!("no gradient of a bad batch")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("slot 3 of step 4") && text.contains(what), "{text}");
    }
}

#[test]
fn setups_that_fit_nothing_are_refused() {
    let good = setup("micro", 2);
    let mut model = good.model.clone();
    model.heads = 3;
    let text = |setup: EngineSetup| TorchEngine::new(setup).unwrap_err().to_string();
    assert!(text(EngineSetup { model, ..good.clone() }).contains("`width` = 8"));
    assert!(text(EngineSetup { mean: vec![0.5], ..good.clone() }).contains("1 values"));
    assert!(text(EngineSetup { slot_batch: 0, ..good }).contains("slot_batch"));
}

#[test]
fn gradients_complete_from_the_end() {
    let model = ModelConfig::preset("base").unwrap();
    let layout = Layout::new(model.params());
    let order = MaeObjective.completion(&model, &layout).unwrap();
    let place = |name: &str| {
        let block = layout.find(name).unwrap();
        order.iter().position(|&b| b == block).unwrap()
    };
    let want = [
        "decoder_pred.weight",
        "decoder_blocks.7.mlp.fc2.weight",
        "decoder_blocks.0.norm1.bias",
        "mask_token",
        "blocks.11.attn.qkv.weight",
        "blocks.10.attn.qkv.weight",
        "cls_token",
        "patch_embed.proj.weight",
    ];
    assert!(want.map(place).is_sorted());
}

/// The CPU as the device, behind a stand-in for the driver.
fn stand_in() -> DevicePlace {
    let library = Some(lacuna_nccl_standin::path());
    DevicePlace {
        device: Device::Cpu,
        ordinal: 0,
        driver: library.clone(),
        compiler: library,
        n_slots: 2,
    }
}

/// The engine of devices there.
fn on_device(setup: EngineSetup) -> DeviceTorchEngine {
    DeviceTorchEngine::new(setup, stand_in()).unwrap()
}

#[test]
fn steps_on_a_device_have_the_bits_of_the_host() {
    for precision in [Precision::F32, Precision::Bf16] {
        steps_agree(EngineSetup { precision, ..setup("micro", 2) });
    }
}

#[test]
fn products_of_ten_bits_need_a_device() {
    let setup = EngineSetup { precision: Precision::Tf32, ..setup("micro", 2) };
    let text = TorchEngine::new(setup).unwrap_err().to_string();
    assert_eq!(text, "`train.precision` = \"tf32\" needs a CUDA device; a CPU has f32 and bf16");
}

fn steps_agree(setup: EngineSetup) {
    let mut host = TorchEngine::new(setup.clone()).unwrap();
    let mut there = on_device(setup.clone());
    assert_eq!(host.probe().unwrap(), there.probe().unwrap());
    assert_eq!(host.tensor_digests().unwrap(), there.tensor_digests().unwrap(), "initial state");
    let mut update = UpdateScalars {
        lr: 1e-3,
        t: 0,
        adamw: AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 },
        decay_tokens: true,
    };
    let layout = host.layout().clone();
    let mut reducer = Reducer::new(layout.clone(), 2);
    let mut mean = vec![0f32; layout.numel()];
    let exponents = vec![30; layout.n_blocks()];
    for step in 0..3 {
        let mut word = ControlWord::new(2);
        reducer.begin(&exponents);
        there.state().begin(&exponents).unwrap();
        for index in 0..2 {
            let batch = batch(&setup, 2 * step + index);
            let loss = host.slot(&batch, &mut |grad| reducer.add(grad)).unwrap();
            reducer.end_slot(index, loss);
            assert_eq!(there.slot_there(&batch).unwrap().to_bits(), loss.to_bits());
            word.end_slot(index, loss);
        }
        let Verdict::Apply(expected) = reducer.finish(1, &mut mean).unwrap() else {
            panic!("step {step} is sound")
        };
        there.state().close(&mut word).unwrap();
        assert_eq!(there.state().word().unwrap().read(1).unwrap().loss, expected.loss);
        let (_, max_abs) = there.state().mean().unwrap();
        assert_eq!(max_abs, expected.max_abs);
        update.t += 1;
        host.apply(&mean, &update).unwrap();
        there.apply_there(&update).unwrap();
        assert_eq!(host.tensor_digests().unwrap(), there.tensor_digests().unwrap(), "step {step}");
    }
    // The entries of the host give the same.
    let batch = batch(&setup, 99);
    assert!(compute(&mut host, &batch) == compute(&mut there, &batch));
    host.apply(&mean, &update).unwrap();
    there.apply(&mean, &update).unwrap();
    assert_eq!(host.tensor_digests().unwrap(), there.tensor_digests().unwrap());
    assert!(there.describe().starts_with("stand-in (libtorch 2.11.0"), "{}", there.describe());
}

#[test]
fn an_error_of_libtorch_comes_without_its_stack() {
    let multiplied = || {
        let [one, other] = [[2, 3], [4, 5]]
            .map(|shape| tch::Tensor::zeros(shape, (tch::Kind::Float, Device::Cpu)));
        one.matmul(&other)
    };
    let err = guarded("multiply", multiplied).unwrap_err();
    let text = format!("{err} {:?}", std::error::Error::source(&err).map(ToString::to_string));
    assert!(text.contains("shapes cannot be multiplied (2x3 and 4x5)"), "{text}");
    assert!(!text.contains("frame #") && !text.contains("Exception raised"), "{text}");
}
