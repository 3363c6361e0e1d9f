//! The model against values of an independent float64 implementation, on a device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lacuna_mae::context::{EXACT, Kernels};
use lacuna_mae::mae::{Mae, Masks, PosTables};
use lacuna_mae::weights::Weights;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_spec::Precision;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Sets of golden values: square, oblong with four channels, and one of a real depth.
pub const TAGS: [&str; 3] = ["micro", "rect", "mid"];

/// The one set whose gradients are known.
const WITH_GRADIENTS: &str = "micro";

/// A quantity and how far it is from its golden value.
#[derive(Debug)]
pub struct Comparison {
    /// Name of the quantity.
    pub what: &'static str,
    /// Largest difference; of a loss, relative to it.
    pub off: f64,
    /// The difference must be below it.
    pub tolerance: f64,
}

/// Golden values in a folder, to be compared on a device.
#[derive(Debug)]
pub struct Golden {
    folder: PathBuf,
    device: Device,
    values: Value,
}

/// A set of golden values that was read.
struct Case {
    model: ModelConfig,
    layout: Arc<Layout>,
    flat: Vec<f64>,
    io: Named,
}

type Named = Vec<(String, Tensor)>;

/// Allowed differences: f64 differs from the reference by the order of sums only, f32 by its
/// rounding. A device whose f32 products are in truth TF32 is off by a hundred times as much.
struct Tolerances {
    loss: f64,
    tensor: f64,
    gradient: f64,
}

const F64: Tolerances = Tolerances { loss: 1e-10, tensor: 1e-10, gradient: 1e-12 };
/// Of bf16 and tf32: the loss relative to f64, and 1 less the cosine of the two gradients. Without
/// its f32 residual stream the loss would be off by twice as much.
const LOWER: Tolerances = Tolerances { loss: 2e-3, tensor: f64::NAN, gradient: 1e-4 };
const F32: Tolerances = Tolerances { loss: 1e-6, tensor: 1e-5, gradient: 1e-5 };

/// Names a kind of tensors, `f32` or `f64`.
pub fn kind_name(kind: Kind) -> &'static str {
    if kind == Kind::Float { "f32" } else { "f64" }
}

impl Golden {
    /// Opens the folder.
    pub fn open(folder: &Path, device: Device) -> anyhow::Result<Self> {
        let path = folder.join("golden.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("read golden values `{}`", path.display()))?;
        let values = serde_json::from_str(&text)
            .with_context(|| format!("read golden values `{}` as JSON", path.display()))?;
        Ok(Golden { folder: folder.to_path_buf(), device, values })
    }

    /// Reads one set.
    fn case(&self, tag: &str) -> anyhow::Result<Case> {
        let model = self.model(tag)?;
        let layout = Layout::new(model.params());
        let flat = flatten(&layout, &self.tensors(&format!("{tag}.weights.f32.safetensors"))?)?;
        let io = self.tensors(&format!("{tag}.io.safetensors"))?;
        Ok(Case { model, layout, flat, io })
    }

    fn masks(&self, Case { model, io, .. }: &Case) -> anyhow::Result<Masks> {
        let ids = find(io, "ids_shuffle")?.contiguous().view(-1);
        let ids: Vec<u32> = Vec::<i64>::try_from(ids)?.into_iter().map(|id| id as u32).collect();
        let masks = Masks::from_shuffle(&ids, model.n_patches(), model.len_keep());
        Ok(masks.to_device(self.device))
    }

    /// Computes one set and compares it.
    pub fn compare(&self, tag: &str, kind: Kind) -> anyhow::Result<Vec<Comparison>> {
        let case = self.case(tag)?;
        let Case { model, layout, flat, io } = &case;
        let weights = self.weights(layout, flat, kind);
        let tables = PosTables::new(model, kind).to_device(self.device);
        let mae = Mae::new(model, &tables, &weights);
        let images = find(io, "img")?.to_kind(kind).to_device(self.device);
        let masks = self.masks(&case)?;

        let most = if kind == Kind::Float { F32 } else { F64 };
        let ones = Tensor::ones([images.size()[0]], (kind, self.device));
        let loss = mae.loss(&images, &masks, &ones);
        let want = self.values[tag]["loss"].as_f64().context("no golden loss")?;
        let off = (loss.double_value(&[]) / want - 1.0).abs();
        let mut seen = vec![Comparison { what: "loss", off, tolerance: most.loss }];
        let predicted = tch::no_grad(|| mae.predict(&images, &masks));
        for (what, got) in [("latent", &predicted.latent_bnd), ("pred", &predicted.pred_blp)] {
            let off = max_difference(got, find(io, what)?)?;
            seen.push(Comparison { what, off, tolerance: most.tensor });
        }
        if tag == WITH_GRADIENTS {
            let off = self.gradients_off(layout, &loss, &weights)?;
            seen.push(Comparison { what: "gradients", off, tolerance: most.gradient });
        }
        Ok(seen)
    }

    /// Computes `mid` in lower precision and compares it with f64 on the same device, as automatic
    /// mixed precision is compared: the loss, and the direction of the gradient.
    pub fn compare_lower(&self, precision: Precision) -> anyhow::Result<Vec<Comparison>> {
        const TAG: &str = "mid";
        let case = self.case(TAG)?;
        let exact = self.weights(&case.layout, &case.flat, Kind::Double);
        let (want, want_grad) = self.differentiate(&case, &exact, Kind::Double)?;
        let params = self.weights(&case.layout, &case.flat, Kind::Float);
        let params = match precision {
            Precision::Bf16 => params.half_products().trainable(),
            Precision::F32 | Precision::Tf32 => params,
        };
        let kernels = Kernels { tf32: precision == Precision::Tf32, ..EXACT };
        let (loss, grad) =
            super::with_kernels(kernels, || self.differentiate(&case, &params, Kind::Float))?;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let cosine =
            dot(&grad, &want_grad) / (dot(&grad, &grad) * dot(&want_grad, &want_grad)).sqrt();
        // Libraries compute products this small in f32 where that is faster; a large one tells.
        let is_lower = match precision {
            Precision::Bf16 => 1.0 - cosine >= 1e-10,
            Precision::Tf32 => !self.device.is_cuda() || self.shortens_products(kernels)?,
            Precision::F32 => true,
        };
        if !is_lower {
            bail!("nothing was computed in {precision:?}");
        }
        let off = (loss / want - 1.0).abs();
        Ok(vec![
            Comparison { what: "loss", off, tolerance: LOWER.loss },
            Comparison { what: "gradient", off: 1.0 - cosine, tolerance: LOWER.gradient },
        ])
    }

    /// Returns loss and gradient, flat in the layout's order.
    fn differentiate(
        &self,
        case: &Case,
        weights: &Weights,
        kind: Kind,
    ) -> anyhow::Result<(f64, Vec<f64>)> {
        let tables = PosTables::new(&case.model, kind).to_device(self.device);
        let mae = Mae::new(&case.model, &tables, weights);
        let images = find(&case.io, "img")?.to_kind(kind).to_device(self.device);
        let ones = Tensor::ones([images.size()[0]], (kind, self.device));
        let loss = mae.loss(&images, &self.masks(case)?, &ones);
        let grads = Tensor::run_backward(&[&loss], weights.tensors(), false, false);
        let mut flat: Vec<f64> = Vec::with_capacity(case.flat.len());
        for grad in &grads {
            let grad = grad.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view(-1);
            flat.extend(Vec::<f64>::try_from(grad)?);
        }
        Ok((loss.double_value(&[]), flat))
    }

    fn gradients_off(
        &self,
        layout: &Layout,
        loss: &Tensor,
        weights: &Weights,
    ) -> anyhow::Result<f64> {
        let want = self.tensors(&format!("{WITH_GRADIENTS}.grads.f64.safetensors"))?;
        let got = Tensor::run_backward(&[loss], weights.tensors(), false, false);
        let mut worst: f64 = 0.0;
        for (param, got) in layout.params().iter().zip(&got) {
            let want = find(&want, &param.name)?.reshape(got.size().as_slice());
            let off = max_difference(got, &want)?;
            // `max` of f64 would drop a NaN.
            worst = if off.is_nan() || off > worst { off } else { worst };
        }
        Ok(worst)
    }

    /// Tells whether a large product has other bits with `kernels` than with exact ones.
    fn shortens_products(&self, kernels: Kernels) -> anyhow::Result<bool> {
        const SIDE: i64 = 512;
        let places = Tensor::arange(SIDE * SIDE, (Kind::Float, self.device));
        let matrix = (places.remainder(251.0) / 251.0).reshape([SIDE, SIDE]);
        let product = |kernels| super::with_kernels(kernels, || Ok(matrix.matmul(&matrix)));
        Ok(!product(kernels)?.equal(&product(EXACT)?))
    }

    fn model(&self, tag: &str) -> anyhow::Result<ModelConfig> {
        let config = &self.values[tag]["config"];
        let size = |key: &str| {
            let value = config[key].as_u64().and_then(|value| u32::try_from(value).ok());
            value.with_context(|| format!("golden set `{tag}` has no size `{key}`"))
        };
        let ratio = config["ratio"].as_f64();
        let model = ModelConfig {
            img_size: [size("h")?, size("w")?],
            patch_size: size("p")?,
            channels: size("C")?,
            width: size("D")?,
            depth: size("L")?,
            heads: size("heads")?,
            decoder_width: size("Dd")?,
            decoder_depth: size("Ld")?,
            decoder_heads: size("dheads")?,
            mlp_ratio: size("r")?,
            mask_ratio: ratio.with_context(|| format!("golden set `{tag}` has no `ratio`"))?,
            norm_pix_loss: true,
        };
        match model.problems().first() {
            Some(problem) => bail!("golden set `{tag}`: {problem}"),
            None => Ok(model),
        }
    }

    fn weights(&self, layout: &Arc<Layout>, flat: &[f64], kind: Kind) -> Weights {
        let weights = if kind == Kind::Float {
            let flat: Vec<f32> = flat.iter().map(|&x| x as f32).collect();
            Weights::copy_of(layout, &flat)
        } else {
            Weights::copy_of(layout, flat)
        };
        weights.to_device(self.device).trainable()
    }

    fn tensors(&self, file: &str) -> anyhow::Result<Named> {
        let path = self.folder.join(file);
        Tensor::read_safetensors(&path).with_context(|| format!("read `{}`", path.display()))
    }
}

/// Lays named tensors out flat.
fn flatten(layout: &Layout, named: &Named) -> anyhow::Result<Vec<f64>> {
    let mut flat: Vec<f64> = Vec::with_capacity(layout.numel());
    for param in layout.params() {
        let tensor = find(named, &param.name)?.to_kind(Kind::Double).contiguous().view(-1);
        flat.extend(Vec::<f64>::try_from(tensor)?);
    }
    Ok(flat)
}

fn find<'a>(named: &'a Named, name: &str) -> anyhow::Result<&'a Tensor> {
    let found = named.iter().find(|(known, _)| known == name);
    found.map(|(_, tensor)| tensor).with_context(|| format!("no golden tensor `{name}`"))
}

fn max_difference(got: &Tensor, want: &Tensor) -> anyhow::Result<f64> {
    if got.size() != want.size() {
        bail!("shape {:?}, the golden one is {:?}", got.size(), want.size());
    }
    let got = got.to_device(Device::Cpu).to_kind(Kind::Double);
    Ok((got - want.to_kind(Kind::Double)).abs().max().double_value(&[]))
}
