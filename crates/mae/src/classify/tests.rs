mod parts;
mod probes;

use lacuna_recipe::adamw::AdamW;
use lacuna_recipe::state::{Layout, Section};
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::{Optimizer, Precision};
use lacuna_worker::engine::{Backend, Engine, EngineError, EngineSpec, UpdateScalars};
use lacuna_worker::fake::probe_batch;

use super::*;
use crate::engine::{EngineSetup, Place, TaskEngine};
use crate::frozen::FrozenMae;

fn micro() -> ModelConfig {
    ModelConfig::preset("micro").unwrap()
}

fn task(kind: TaskKind, pool: Pool) -> TaskSpec {
    let finetune = kind == TaskKind::Finetune;
    let on = |value: f64| if finetune { value } else { 0.0 };
    TaskSpec {
        kind,
        encoder: None,
        classes: 5,
        pool,
        optimizer: Optimizer::AdamW,
        layer_decay: 1.0,
        drop_path: on(0.2),
        mixup: on(0.8),
        cutmix: on(1.0),
        label_smoothing: on(0.1),
        random_erasing: on(0.25),
        rand_augment: on(9.0),
        ema: None,
    }
}

fn spec(task: TaskSpec) -> EngineSpec {
    EngineSpec {
        model: micro(),
        seed: 5,
        mean: vec![0.5; 3],
        std: vec![0.25; 3],
        slot_batch: 4,
        n_slots: 4,
        precision: Precision::F32,
        device: "cpu0".into(),
        task: Some(task),
    }
}

/// Builds engines of tasks in one way.
struct By(fn(&EngineSpec) -> TaskEngine);

fn engine(spec: &EngineSpec) -> TaskEngine {
    engine_from(spec, Arc::new(EncoderWeights::fresh(&spec.model, spec.seed)))
}

fn setup(spec: &EngineSpec) -> EngineSetup {
    EngineSetup {
        model: spec.model.clone(),
        seed: spec.seed,
        mean: spec.mean.clone(),
        std: spec.std.clone(),
        slot_batch: spec.slot_batch,
        precision: spec.precision,
    }
}

fn engine_from(spec: &EngineSpec, encoder: Arc<EncoderWeights>) -> TaskEngine {
    TaskEngine::new(setup(spec), spec.task.as_ref().unwrap(), encoder).unwrap()
}

impl Backend for By {
    fn library(&self) -> String {
        "libtorch".into()
    }

    fn trainer_env(&self, _device: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn prepare(&self, _device: &str) -> Result<(), EngineError> {
        Ok(())
    }

    fn engine(&self, spec: &EngineSpec) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(self.0(spec)))
    }
}

#[test]
fn engines_of_tasks_keep_the_contract() {
    for (kind, pool) in [
        (TaskKind::Finetune, Pool::Avg),
        (TaskKind::Finetune, Pool::Cls),
        (TaskKind::Linear, Pool::Cls),
        (TaskKind::Linear, Pool::Avg),
        (TaskKind::Linear, Pool::Pixels),
    ] {
        lacuna_worker::conformance::run_from_elsewhere(&spec(task(kind, pool)), &By(engine));
    }
}

/// Slots on copies of the parameters, as on a device.
fn engine_there(spec: &EngineSpec) -> TaskEngine {
    let encoder = Arc::new(EncoderWeights::fresh(&spec.model, spec.seed));
    let place = Place::There(Device::Cpu, None);
    TaskEngine::at(setup(spec), spec.task.as_ref().unwrap(), encoder, place).unwrap()
}

#[test]
fn slots_on_copies_keep_the_contract_and_have_the_same_bits() {
    for (kind, pool) in [(TaskKind::Finetune, Pool::Avg), (TaskKind::Linear, Pool::Cls)] {
        lacuna_worker::conformance::run_from_elsewhere(&spec(task(kind, pool)), &By(engine_there));
        let ema = (kind == TaskKind::Finetune).then_some(0.9);
        for optimizer in [Optimizer::AdamW, Optimizer::Lars] {
            let spec = spec(TaskSpec { ema, optimizer, ..task(kind, pool) });
            let (mut here, mut there) = (engine(&spec), engine_there(&spec));
            for step in 1..4 {
                let (own, copied) = (gradient(&mut here, &batch()), gradient(&mut there, &batch()));
                assert_eq!(own, copied, "{kind} {optimizer:?} step {step}");
                for engine in [&mut here, &mut there] {
                    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.05 };
                    let update = UpdateScalars { lr: 1e-2, t: step, adamw, decay_tokens: false };
                    engine.apply(&own.1, &update).unwrap();
                }
            }
            // A state that comes from elsewhere.
            let changed = [0.5; 3];
            for engine in [&mut here, &mut there] {
                gradient(engine, &batch());
                engine.write(Section::Param, 1, &changed).unwrap();
            }
            assert_eq!(gradient(&mut here, &batch()), gradient(&mut there, &batch()));
            assert_eq!(here.tensor_digests().unwrap(), there.tensor_digests().unwrap());
        }
    }
}

#[test]
fn without_mixing_a_slot_is_made_of_its_samples() {
    let plain = TaskSpec { mixup: 0.0, cutmix: 0.0, ..task(TaskKind::Finetune, Pool::Avg) };
    lacuna_worker::conformance::weights_of_zero_add_nothing(&spec(plain), &By(engine));
}

/// What RandAugment does depends on the sample's draws alone, and it does something.
#[test]
fn augmented_images_are_others_and_the_same_each_time() {
    let finetune = task(TaskKind::Finetune, Pool::Avg);
    let of = |rand_augment: f64| {
        let mut engine = engine(&spec(TaskSpec { rand_augment, ..finetune.clone() }));
        [gradient(&mut engine, &batch()), gradient(&mut engine, &batch())]
    };
    let (with, without) = (of(9.0), of(0.0));
    assert_eq!(with[0], with[1]);
    assert_ne!(with[0], without[0]);
    let program = Classification::new(
        finetune.clone(),
        Arc::new(EncoderWeights::fresh(&spec(finetune).model, 0)),
    );
    assert!(program.augments());
}

/// A bad sample that is shown all the same changes neither its partner's image nor its target.
#[test]
fn a_partner_of_weight_0_is_not_mixed_in() {
    let mut engine = engine(&spec(task(TaskKind::Finetune, Pool::Avg)));
    let mut batch = batch();
    batch.weights = vec![1.0, 1.0, 0.0, 0.0];
    let want = gradient(&mut engine, &batch);
    let half = batch.pixels.len() / 2;
    batch.pixels[half..].iter_mut().for_each(|pixel| *pixel = !*pixel);
    batch.labels[2..].fill(Some(4));
    assert_eq!(gradient(&mut engine, &batch), want);
}

fn batch() -> SlotBatch {
    probe_batch(&micro(), 4)
}

fn gradient(engine: &mut TaskEngine, batch: &SlotBatch) -> (f32, Vec<f32>) {
    let layout = engine.layout().clone();
    let mut flat = vec![0f32; layout.numel()];
    let loss = engine
        .slot(batch, &mut |grad| flat[layout.range(grad.block)].copy_from_slice(grad.values))
        .unwrap();
    (loss, flat)
}

#[test]
fn a_fine_tuned_model_starts_as_its_encoder() {
    let (model, plain) = (micro(), task(TaskKind::Finetune, Pool::Cls));
    let engine = engine(&spec(plain.clone()));
    let layout = Layout::new(model.params());
    let mut params = vec![0f32; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        lacuna_recipe::init::fill(spec, 5, &mut params[layout.range(block)]);
    }
    let frozen = FrozenMae::new(&model, &[0.5; 3], &[0.25; 3], &params);
    let cls = frozen.features(&batch().pixels).cls;
    let mut own = vec![0f32; engine.layout().numel()];
    engine.read(Section::Param, 0..own.len(), &mut own).unwrap();
    let head = Head::new(&plain, &model, (&[0.5; 3], &[0.25; 3]), None, &own);
    let logits = head.logits(&batch().pixels);
    let weight = &own[engine.layout().range(engine.layout().find("head.weight").unwrap())];
    for (i, logits) in logits.chunks_exact(5).enumerate() {
        for (class, logit) in logits.iter().enumerate() {
            let want: f32 = (0..8).map(|d| cls[i * 8 + d] * weight[class * 8 + d]).sum();
            assert!((logit - want).abs() < 1e-6, "{logit} {want}");
        }
    }
}

/// What a run starts from is what the engine starts from, its encoder above all.
#[test]
fn runs_start_from_the_encoder() {
    for (kind, pool) in [(TaskKind::Finetune, Pool::Avg), (TaskKind::Linear, Pool::Cls)] {
        let spec = spec(task(kind, pool));
        let setup = |seed| Arc::new(EncoderWeights::fresh(&spec.model, seed));
        let made = |seed| {
            let own = EngineSpec { seed: 5, ..spec.clone() };
            engine_from(&own, setup(seed))
        };
        for (engine, other) in [(made(5), made(6)), (made(6), made(5))] {
            let layout = engine.layout().clone();
            let mut differ = 0;
            for block in 0..layout.n_blocks() {
                let range = layout.range(block);
                let [mut want, mut found, mut others] = [(); 3].map(|()| vec![0f32; range.len()]);
                engine.read(Section::Param, range, &mut want).unwrap();
                engine.initial(block, 5, &mut found);
                other.initial(block, 5, &mut others);
                assert_eq!(found, want, "{}", layout.params()[block].name);
                differ += usize::from(found != others);
            }
            assert_eq!(differ > 0, kind == TaskKind::Finetune, "{kind:?}: {differ}");
        }
    }
}

/// The norm behind the mean begins anew, the encoder's own last norm as it was.
#[test]
fn a_norm_of_another_place_begins_anew() {
    let model = micro();
    let params: Vec<f32> = (0..Layout::new(model.params()).numel()).map(|i| i as f32).collect();
    let table = vec![0.0; (1 + model.n_patches()) * model.width as usize];
    let encoder = Arc::new(EncoderWeights::of(&model, &params, table));
    for (pool, name, is_kept) in [(Pool::Avg, "fc_norm", false), (Pool::Cls, "norm", true)] {
        let engine = engine_from(&spec(task(TaskKind::Finetune, pool)), encoder.clone());
        let of = |leaf: &str| {
            let block = engine.layout().find(&format!("{name}.{leaf}")).unwrap();
            let mut values = vec![0f32; engine.layout().range(block).len()];
            engine.initial(block, 5, &mut values);
            values
        };
        let fresh = (of("weight"), of("bias")) == (vec![1.0; 8], vec![0.0; 8]);
        assert_eq!(fresh, !is_kept, "{name}: {:?}", of("weight"));
    }
}

#[test]
fn layers_learn_at_their_own_rates() {
    let decays = TaskSpec { layer_decay: 0.5, ..task(TaskKind::Finetune, Pool::Avg) };
    let mut engine = engine(&spec(decays));
    let layout = engine.layout().clone();
    let mut before = vec![0f32; layout.numel()];
    engine.read(Section::Param, 0..before.len(), &mut before).unwrap();
    let mean = vec![1f32; layout.numel()];
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    engine.apply(&mean, &UpdateScalars { lr: 1e-2, t: 1, adamw, decay_tokens: false }).unwrap();
    let mut after = vec![0f32; layout.numel()];
    engine.read(Section::Param, 0..after.len(), &mut after).unwrap();
    let moved = |name: &str| {
        let at = layout.range(layout.find(name).unwrap()).start;
        f64::from(before[at] - after[at])
    };
    // Two blocks: tokens are three layers below the head.
    for (name, scale) in [
        ("head.bias", 1.0),
        ("fc_norm.bias", 1.0),
        ("blocks.1.mlp.fc1.bias", 0.5),
        ("blocks.0.mlp.fc1.bias", 0.25),
        ("cls_token", 0.125),
        ("pos_embed", 0.125),
    ] {
        assert!((moved(name) - 1e-2 * scale).abs() < 1e-6, "{name}: {}", moved(name));
    }
}

#[test]
fn a_probe_learns_what_a_line_can_tell() {
    let probe = TaskSpec { optimizer: Optimizer::Sgd, ..task(TaskKind::Linear, Pool::Pixels) };
    let mut engine = engine(&spec(TaskSpec { classes: 4, ..probe }));
    let batch = batch();
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let first = gradient(&mut engine, &batch).0;
    for t in 1..=30 {
        let (_, mean) = gradient(&mut engine, &batch);
        let update = UpdateScalars { lr: 1e-2, t, adamw: adamw.clone(), decay_tokens: false };
        engine.apply(&mean, &update).unwrap();
    }
    let last = gradient(&mut engine, &batch).0;
    assert!(first > 1.2 && last < 0.1, "from {first} to {last}");
}

/// Images are planes for RandAugment and pixels for everybody else: channels stay what they are.
#[test]
fn colours_are_augmented_channel_by_channel() {
    let augmenting = TaskSpec { rand_augment: 9.0, ..task(TaskKind::Finetune, Pool::Avg) };
    let engine = engine(&spec(augmenting));
    // One channel is a picture, the other two are one grey each.
    let mut batch = batch();
    for (i, pixel) in batch.pixels.chunks_exact_mut(3).enumerate() {
        pixel.copy_from_slice(&[(i * 5 % 251) as u8, 90, 90]);
    }
    let draws: Vec<Draws> = (0..4).map(|i| Draws::new(3, Tag::User, 7, i)).collect();
    let shown = engine.augmented(&batch, &draws);
    assert_ne!(shown, batch.pixels);
    let mixed = |pixel: &[u8]| pixel[1] != pixel[2];
    assert!(!shown.chunks_exact(3).any(mixed), "equal channels stay equal");
}

/// The average is that of its definition, and keeping it changes nothing else.
#[test]
fn an_average_follows_the_weights_and_changes_none() {
    let share = 0.75;
    let plain = spec(task(TaskKind::Finetune, Pool::Avg));
    let kept = spec(TaskSpec { ema: Some(share), ..task(TaskKind::Finetune, Pool::Avg) });
    let (mut plain, mut kept) = (engine(&plain), engine(&kept));
    let n = plain.layout().numel();
    assert_eq!(kept.layout().numel(), 2 * n);
    let names = kept.layout().params()[plain.layout().n_blocks()..].iter().map(|p| p.name.clone());
    let of = plain.layout().params().iter().map(|p| averaged(&p.name));
    assert!(names.eq(of), "averages lie behind their tensors, in the same order");
    let all = |engine: &TaskEngine| {
        let mut out = vec![0f32; engine.layout().numel()];
        engine.read(Section::Param, 0..out.len(), &mut out).unwrap();
        out
    };
    let mut want = all(&plain);
    assert_eq!(all(&kept), [&want[..], &want[..]].concat(), "it begins as the weights");
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.05 };
    let batch = batch();
    for t in 1..=3 {
        let (_, mean) = gradient(&mut plain, &batch);
        let (_, mean_kept) = gradient(&mut kept, &batch);
        assert_eq!(mean_kept[..n], mean[..]);
        assert!(mean_kept[n..].iter().all(|value| *value == 0.0));
        let update = UpdateScalars { lr: 1e-2, t, adamw: adamw.clone(), decay_tokens: false };
        plain.apply(&mean, &update).unwrap();
        kept.apply(&mean_kept, &update).unwrap();
        let now = all(&plain);
        for (average, value) in want.iter_mut().zip(&now) {
            *average = share as f32 * *average + (1.0 - share) as f32 * value;
        }
        assert_eq!(all(&kept), [&now[..], &want[..]].concat(), "after {t}");
    }
    let mut order = kept.completion();
    order.sort_unstable();
    assert!(order.into_iter().eq(0..kept.layout().n_blocks()));
    assert_eq!(plain.probe().unwrap(), kept.probe().unwrap());
}

#[test]
fn a_label_beyond_the_classes_is_named() {
    let mut engine = engine(&spec(task(TaskKind::Linear, Pool::Cls)));
    let labels = vec![Some(0), Some(5), None, Some(1)];
    let err = engine.slot(&SlotBatch { labels, ..batch() }, &mut |_| {}).unwrap_err();
    assert!(err.to_string().contains("a label 5, and `task.classes` = 5"), "{err}");
}

#[test]
fn the_probe_covers_the_encoder() {
    let spec_of = |seed| EngineSpec { seed, ..spec(task(TaskKind::Linear, Pool::Cls)) };
    let (one, other) = (engine(&spec_of(5)).probe().unwrap(), engine(&spec_of(6)).probe().unwrap());
    assert_ne!(one, other);
    assert_eq!(one, engine(&spec_of(5)).probe().unwrap());
}

/// Workers compute a slot of a small model, too, whatever the run's own is.
#[test]
fn models_of_any_shape_have_a_probe() {
    let model = ModelConfig {
        img_size: [12, 12],
        patch_size: 4,
        channels: 1,
        width: 16,
        depth: 3,
        ..micro()
    };
    for kind in [TaskKind::Finetune, TaskKind::Linear] {
        for pool in [Pool::Avg, Pool::Cls] {
            let spec = EngineSpec {
                model: model.clone(),
                mean: vec![0.5],
                std: vec![0.25],
                ..spec(task(kind, pool))
            };
            let other = EngineSpec { seed: 6, ..spec.clone() };
            let probe = |spec| engine(spec).probe().unwrap();
            assert_eq!(probe(&spec), probe(&spec));
            assert_ne!(probe(&spec), probe(&other), "{kind:?}: its encoder takes part");
        }
    }
}
