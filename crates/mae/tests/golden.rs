//! The model against values of an independent float64 implementation (tests/golden).
//!
//! Tolerances: f64 differs from the reference by the order of sums only (1e-10, gradients 1e-12);
//! f32 by its own rounding (loss 1e-6 relative, tensors 1e-5).

use std::path::PathBuf;
use std::sync::Arc;

use lacuna_mae::mae::{Mae, Masks, PosTables, unshuffle};
use lacuna_mae::patches::{normalize_patches, patchify, unpatchify};
use lacuna_mae::pos_resize::{Resample, resize_table};
use lacuna_mae::weights::Weights;
use lacuna_recipe::adamw::{self, AdamW};
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::schedule::Schedule;
use lacuna_recipe::state::Layout;
use serde_json::Value;
use tch::{IndexOp, Kind, Tensor};

/// One set of golden inputs: weights, images and masks.
struct Case {
    model: ModelConfig,
    kind: Kind,
    layout: Arc<Layout>,
    flat: Vec<f64>,
    io: Named,
}

type Named = Vec<(String, Tensor)>;

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(file)
}

fn json(file: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path(file)).unwrap()).unwrap()
}

fn tensors(file: &str) -> Named {
    Tensor::read_safetensors(path(file)).unwrap()
}

fn find<'a>(named: &'a Named, name: &str) -> &'a Tensor {
    let (_, tensor) = named.iter().find(|(known, _)| known == name).unwrap();
    tensor
}

/// Lays named tensors out flat.
fn flatten(layout: &Layout, named: &Named) -> Vec<f64> {
    let values = |name: &str| {
        let tensor = find(named, name).to_kind(Kind::Double).contiguous().view(-1);
        Vec::<f64>::try_from(tensor).unwrap()
    };
    layout.params().iter().flat_map(|param| values(&param.name)).collect()
}

impl Case {
    fn load(tag: &str, kind: Kind) -> Self {
        let config = &json("golden.json")[tag]["config"];
        let size = |key: &str| config[key].as_u64().unwrap() as u32;
        let model = ModelConfig {
            img_size: [size("h"), size("w")],
            patch_size: size("p"),
            channels: size("C"),
            width: size("D"),
            depth: size("L"),
            heads: size("heads"),
            decoder_width: size("Dd"),
            decoder_depth: size("Ld"),
            decoder_heads: size("dheads"),
            mlp_ratio: size("r"),
            mask_ratio: config["ratio"].as_f64().unwrap(),
            norm_pix_loss: true,
        };
        assert!(model.problems().is_empty());
        let layout = Layout::new(model.params());
        let flat = flatten(&layout, &tensors(&format!("{tag}.weights.f32.safetensors")));
        Case { model, kind, layout, flat, io: tensors(&format!("{tag}.io.safetensors")) }
    }

    fn weights(&self, flat: &[f64]) -> Weights {
        let f32s = || flat.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let weights = match self.kind {
            Kind::Float => Weights::copy_of(&self.layout, &f32s()),
            _ => Weights::copy_of(&self.layout, flat),
        };
        weights.trainable()
    }

    fn mae(&self, weights: &Weights) -> Mae {
        Mae::new(&self.model, &PosTables::new(&self.model, self.kind), weights)
    }

    fn images(&self) -> Tensor {
        find(&self.io, "img").to_kind(self.kind)
    }

    fn n_images(&self) -> usize {
        self.images().size()[0] as usize
    }

    fn ids_shuffle(&self) -> Vec<u32> {
        let ids = find(&self.io, "ids_shuffle").contiguous().view(-1);
        Vec::<i64>::try_from(ids).unwrap().into_iter().map(|id| id as u32).collect()
    }

    fn masks_of(&self, ids_shuffle: &[u32]) -> Masks {
        Masks::from_shuffle(ids_shuffle, self.model.n_patches(), self.model.len_keep())
    }

    fn masks(&self) -> Masks {
        self.masks_of(&self.ids_shuffle())
    }

    fn ones(&self) -> Tensor {
        Tensor::ones([self.n_images() as i64], (self.kind, tch::Device::Cpu))
    }

    /// Loss and flat gradient at `flat`, over the images `range` with their `weights`.
    fn gradient(&self, flat: &[f64], range: &[usize], weights: &[f64]) -> (f64, Vec<f64>) {
        let params = self.weights(flat);
        let n_patches = self.model.n_patches();
        let ids = self.ids_shuffle();
        let of = |&i: &usize| ids[i * n_patches..(i + 1) * n_patches].to_vec();
        let ids: Vec<u32> = range.iter().flat_map(of).collect();
        let rows: Vec<i64> = range.iter().map(|&i| i as i64).collect();
        let images = self.images().index_select(0, &Tensor::from_slice(&rows));
        let weights = Tensor::from_slice(weights).to_kind(self.kind);
        let loss = self.mae(&params).loss(&images, &self.masks_of(&ids), &weights);
        let grads = Tensor::run_backward(&[&loss], params.tensors(), false, false);
        let values = |grad: &Tensor| {
            let grad = grad.to_kind(Kind::Double).contiguous().view(-1);
            Vec::<f64>::try_from(grad).unwrap()
        };
        (loss.double_value(&[]), grads.iter().flat_map(values).collect())
    }

    fn all(&self) -> (Vec<usize>, Vec<f64>) {
        ((0..self.n_images()).collect(), vec![1.0; self.n_images()])
    }
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// T2: the order inside a patch is row, column, channel.
#[test]
fn patches_are_flattened_channel_last() {
    let pixel = |c: i64, y: i64, x: i64| (100 * c + 10 * y + x) as f64;
    let all = (0..32).map(|i| pixel(i / 16, i / 4 % 4, i % 4)).collect::<Vec<f64>>();
    let images = Tensor::from_slice(&all).view([1, 2, 4, 4]);
    let patches = patchify(&images, 2);
    let golden = json("extra.json");
    for (l, want) in golden["patchify_p2_c2"].as_array().unwrap().iter().enumerate() {
        assert_eq!(Vec::<f64>::try_from(patches.i((0, l as i64))).unwrap(), floats(want));
    }
    assert_eq!(max_difference(&unpatchify(&patches, 2, [2, 2]), &images), 0.0);
    let rect = Case::load("rect", Kind::Double);
    let again = unpatchify(&patchify(&rect.images(), 4), 4, [2, 3]);
    assert_eq!(max_difference(&again, &rect.images()), 0.0);
}

/// T4: a token that carries its patch's number comes back at that patch; all others are mask
/// tokens.
#[test]
fn tokens_return_to_their_places() {
    let (n_patches, len_keep) = (8, 3);
    let shuffle: [u32; 16] = [1, 5, 3, 7, 2, 4, 6, 0, 6, 0, 7, 1, 2, 3, 4, 5];
    let masks = Masks::from_shuffle(&shuffle, n_patches, len_keep);
    let cls = Tensor::full([2, 1], -1, (Kind::Int64, tch::Device::Cpu));
    let tokens = Tensor::cat(&[cls, masks.ids_keep_bk.shallow_clone()], 1).unsqueeze(-1);
    let mask_token = Tensor::from_slice(&[-7i64]).view([1, 1, 1]);
    let placed = unshuffle(&tokens, &mask_token, &masks.ids_restore_bl).squeeze_dim(-1);
    assert_eq!(placed.size(), [2, 9]);
    for (b, shuffle) in shuffle.chunks(n_patches).enumerate() {
        let row = Vec::<i64>::try_from(placed.i(b as i64)).unwrap();
        assert_eq!(row[0], -1);
        for patch in 0..n_patches {
            let kept = shuffle[..len_keep].contains(&(patch as u32));
            assert_eq!(row[1 + patch], if kept { patch as i64 } else { -7 });
        }
    }
}

/// T5: the loss does not depend on the order in which visible patches are listed; T7's values show
/// that mixing two orders would be seen.
#[test]
fn order_of_the_visible_patches_does_not_matter() {
    for tag in ["micro", "rect", "mid"] {
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
            let case = Case::load(tag, kind);
            let (n_patches, len_keep) = (case.model.n_patches(), case.model.len_keep());
            let mut raster = case.ids_shuffle();
            for ids in raster.chunks_mut(n_patches) {
                ids[..len_keep].sort_unstable();
                ids[len_keep..].sort_unstable();
            }
            let mae = case.mae(&case.weights(&case.flat));
            let loss =
                |masks: &Masks| mae.loss(&case.images(), masks, &case.ones()).double_value(&[]);
            let (shuffled, sorted) = (loss(&case.masks()), loss(&case.masks_of(&raster)));
            assert!((shuffled - sorted).abs() < tolerance, "{tag}: {shuffled} and {sorted}");

            // Visible tokens in one order, places of another: the known mistake.
            let mixed = Masks { ids_keep_bk: case.masks_of(&raster).ids_keep_bk, ..case.masks() };
            let want = json("golden.json")[tag]["loss_seed_bug"].as_f64().unwrap();
            assert!((loss(&mixed) - want).abs() < 1e-5, "{tag}");
            assert!((loss(&mixed) - shuffled).abs() > 7e-5, "{tag}: the mistake is visible");
        }
    }
}

/// T7.
#[test]
fn losses() {
    for tag in ["micro", "rect", "mid"] {
        let golden = &json("golden.json")[tag];
        for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-6)] {
            for (norm_pix_loss, key) in [(true, "loss"), (false, "loss_raw_pixels")] {
                let mut case = Case::load(tag, kind);
                case.model.norm_pix_loss = norm_pix_loss;
                let mae = case.mae(&case.weights(&case.flat));
                let got = mae.loss(&case.images(), &case.masks(), &case.ones()).double_value(&[]);
                let want = golden[key].as_f64().unwrap();
                assert!((got / want - 1.0).abs() < tolerance, "{tag} {kind:?} {key}: {got}");
            }
        }
    }
}

/// T8: latent, prediction, target, mask and indices.
#[test]
fn tensors_of_the_forward_pass() {
    for tag in ["micro", "rect", "mid"] {
        for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
            let case = Case::load(tag, kind);
            let masks = case.masks();
            let got = case.mae(&case.weights(&case.flat)).predict(&case.images(), &masks);
            let target = normalize_patches(&patchify(&case.images(), case.model.patch_size.into()));
            for (name, got) in
                [("latent", &got.latent_bnd), ("pred", &got.pred_blp), ("target", &target)]
            {
                let off = max_difference(got, find(&case.io, name));
                assert!(off < tolerance, "{tag} {kind:?} {name}: {off}");
            }
            assert_eq!(max_difference(&masks.mask_bl(), find(&case.io, "mask")), 0.0);
            for (name, got) in
                [("ids_keep", &masks.ids_keep_bk), ("ids_restore", &masks.ids_restore_bl)]
            {
                assert_eq!(max_difference(got, find(&case.io, name)), 0.0, "{tag} {name}");
            }
        }
    }
}

/// T9: the gradients of all tensors, which the reference took by complex steps.
#[test]
fn gradients() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
        let case = Case::load("micro", kind);
        assert_eq!(case.layout.n_blocks(), 48);
        let (range, weights) = case.all();
        let (_, got) = case.gradient(&case.flat, &range, &weights);
        let want = flatten(&case.layout, &tensors("micro.grads.f64.safetensors"));
        let off = furthest(&got, &want);
        assert!(off < tolerance, "{kind:?}: {off}");
    }
}

/// T10: four updates with our AdamW.
#[test]
fn four_updates() {
    let case = Case::load("micro", Kind::Double);
    let golden = &json("golden.json")["micro_adamw"];
    let recipe = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
    let schedule = Schedule { peak: 0.02, min_lr: 0.0, warmup_steps: 2.0, total_steps: 6.0 };
    let n = case.layout.numel();
    let (mut param, mut exp_avg, mut exp_avg_sq) = (case.flat.clone(), vec![0.0; n], vec![0.0; n]);
    let (range, weights) = case.all();
    for (step, want) in golden["steps"].as_array().unwrap().iter().enumerate() {
        let (loss, grad) = case.gradient(&param, &range, &weights);
        let norm = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        let lr = schedule.lr(step as u64);
        for (got, key) in [(loss, "loss"), (norm, "grad_norm"), (lr, "lr")] {
            assert!((got - want[key].as_f64().unwrap()).abs() < 1e-9, "step {step} {key}: {got}");
        }
        for (block, spec) in case.layout.params().iter().enumerate() {
            let update = recipe.update_f64(lr, step as u64 + 1, spec.decays(true));
            let range = case.layout.range(block);
            adamw::apply_f64(
                &update,
                &mut param[range.clone()],
                &mut exp_avg[range.clone()],
                &mut exp_avg_sq[range.clone()],
                &grad[range],
            );
        }
    }
    let (loss, _) = case.gradient(&param, &range, &weights);
    assert!((loss - golden["final_loss"].as_f64().unwrap()).abs() < 1e-9, "{loss}");
    let want = flatten(&case.layout, &tensors("micro.after4.f64.safetensors"));
    let off = furthest(&param, &want);
    assert!(off < 1e-9, "parameters: {off}");
}

/// T13: the mean over equal slots is the gradient of the whole; a ragged end is filled with
/// samples of weight zero.
#[test]
fn slots_add_up() {
    let check = |tag: &str, slots: &[(&[usize], &[f64])], n: f64, tolerance: f64| {
        let case = Case::load(tag, Kind::Double);
        let (range, weights) = case.all();
        let (whole_loss, whole) = case.gradient(&case.flat, &range, &weights);
        let (mut loss, mut sum) = (0.0, vec![0.0; whole.len()]);
        for (range, weights) in slots {
            let share = range.len() as f64 / n;
            let (slot_loss, grad) = case.gradient(&case.flat, range, weights);
            loss += slot_loss * share;
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g * share);
        }
        assert!((loss - whole_loss).abs() < tolerance, "{tag}: {loss} and {whole_loss}");
        let off = furthest(&sum, &whole);
        assert!(off < tolerance, "{tag}: {off}");
    };
    check("micro", &[(&[0], &[1.0]), (&[1], &[1.0])], 2.0, 1e-12);
    check("mid", &[(&[1], &[1.0]), (&[0], &[1.0])], 2.0, 1e-12);
    // Three samples in slots of two: the filling must not change the sum over the three.
    check("rect", &[(&[0, 1], &[1.0, 1.0]), (&[2, 0], &[1.0, 0.0])], 3.0, 1e-12);
}

/// T14: constant patches become zero, and a nearly constant one follows the epsilon inside the
/// root.
#[test]
fn nearly_constant_patches() {
    let golden = &json("extra.json")["norm_pix_edge"];
    let want = floats(&golden["ramp"]);
    let ramp: Vec<f64> = (0..16).map(|i| 0.5 + 1e-3 * f64::from(i)).collect();
    let patches: Vec<f64> = [vec![0.25; 16], ramp].concat();
    let patches = Tensor::from_slice(&patches).view([1, 2, 16]);
    let variance = patches.var_dim(-1, true, false).double_value(&[0, 1]);
    assert!((variance - golden["ramp_var_unbiased"].as_f64().unwrap()).abs() < 1e-15);
    let got = normalize_patches(&patches);
    assert_eq!(got.i((0, 0)).abs().max().double_value(&[]), 0.0);
    let got = Vec::<f64>::try_from(got.i((0, 1))).unwrap();
    let off = furthest(&got, &want);
    assert!(off < 1e-12, "{off}");
    let gray = Tensor::full([1, 1, 768], 0.3, (Kind::Float, tch::Device::Cpu));
    assert!(normalize_patches(&gray).abs().max().double_value(&[]) < 1e-3);
}

/// T16: features of whole images are those of timm's model of the same weights.
#[test]
fn features_of_whole_images() {
    let want = tensors("mid.features.safetensors");
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        let case = Case::load("mid", kind);
        let tokens = case.mae(&case.weights(&case.flat)).encode(&case.images());
        let l = case.model.n_patches() as i64;
        let mean = tokens.narrow(1, 1, l).mean_dim(1, false, None::<Kind>);
        for (name, got) in
            [("features", &tokens), ("cls", &tokens.select(1, 0)), ("mean_patch", &mean)]
        {
            let off = max_difference(got, find(&want, name));
            assert!(off < tolerance, "{kind:?} {name}: {off}");
        }
    }
}

/// T17: tables for other grids, as the reference and transformers resample them and as timm does.
#[test]
fn position_tables_are_resampled() {
    let golden = tensors("pos_resize.safetensors");
    let flat =
        |name: &str| Vec::<f32>::try_from(find(&golden, name).contiguous().view(-1)).unwrap();
    let source = flat("src");
    let (mut rows, mut furthest_apart) = (0, 0.0f32);
    for (size, to) in [("6x6", [6, 6]), ("3x3", [3, 3]), ("4x6", [4, 6])] {
        let both =
            [("fb", Resample::Plain), ("timm", Resample::Antialias)].map(|(by, resample)| {
                let got = resize_table(&source, 16, [4, 4], to, resample);
                let want = flat(&format!("{by}_{size}"));
                assert_eq!(got.len(), want.len());
                assert_eq!(got[..16], source[..16], "the class token's row");
                let off = got.iter().zip(&want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(off < 1e-6, "{by} {size}: {off}");
                rows += 1;
                got
            });
        let apart = both[0].iter().zip(&both[1]).map(|(a, b)| (a - b).abs());
        furthest_apart = apart.fold(furthest_apart, f32::max);
    }
    assert_eq!(rows, 6);
    let known = json("extra.json")["pos_resize_max_fb_vs_timm"]["3x3"].as_f64().unwrap();
    assert!((f64::from(furthest_apart) - known).abs() < 1e-5, "{furthest_apart}");
    assert_eq!(resize_table(&source, 16, [4, 4], [4, 4], Resample::Plain), source);
}

/// Half precision in products, as automatic mixed precision has it: T18.
#[test]
fn bfloat16_products_stay_near() {
    let case = Case::load("mid", Kind::Float);
    let (range, ones) = case.all();
    let (exact, want) = case.gradient(&case.flat, &range, &ones);
    let params =
        Weights::copy_of(&case.layout, &case.flat.iter().map(|&x| x as f32).collect::<Vec<f32>>());
    let params = params.half_products().trainable();
    let loss = case.mae(&params).loss(&case.images(), &case.masks(), &case.ones());
    assert_eq!(loss.kind(), Kind::Float, "the loss is computed in f32");
    let off = (loss.double_value(&[]) / exact - 1.0).abs();
    assert!(off < 2e-3, "the loss is off by {off}");
    // Without the f32 residual stream it would be off by 4e-3; without half precision not at all.
    assert!(off > 1e-6, "nothing was computed in half precision");
    let grads = Tensor::run_backward(&[&loss], params.tensors(), false, false);
    let values = |grad: &Tensor| {
        Vec::<f64>::try_from(grad.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
    };
    let got: Vec<f64> = grads.iter().flat_map(values).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let cosine = dot(&got, &want) / (dot(&got, &got) * dot(&want, &want)).sqrt();
    assert!(cosine > 0.9999, "the gradient's direction: {cosine}");
}
