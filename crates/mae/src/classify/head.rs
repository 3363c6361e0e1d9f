//! The encoder that a classifier starts from, and a classifier that is only read.

use std::path::Path;
use std::sync::Arc;

use lacuna_checkpoint::import::{self, Described, Given};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::load::{find_step, load_params};
use lacuna_checkpoint::{catalog, chain};
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::keymap;
use lacuna_recipe::keymap::import::Form;
use lacuna_recipe::model::{ModelConfig, ParamSpec};
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::Normalize;
use lacuna_spec::{EncoderPin, Pool, RunSpec, TaskKind, TaskSpec, encoder_at, parse_text};
use lacuna_types::Step;
use tch::{Device, Tensor};
use tracing::{info, warn};

use super::{Encoder, batch_normed, classifier_params, feature_width, finetuned_logits};
use crate::pos_resize::{Resample, resize_table};
use crate::runtime;
use crate::weights::{Weights, values};

/// An encoder that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("encoder `{place}`: {why}")]
pub struct EncoderError {
    place: String,
    why: String,
}

/// Why weights whose norm comes behind the mean of the patches are no encoder for every task.
const POOLED_NORM: &str = "its last norm is `fc_norm`, which was trained behind the mean of the \
    patches and means nothing for single tokens: fine-tune it with `task.pool = \"avg\"`, or use \
    `lacuna-worker features` and `eval knn`, which put it there";

/// The tensors of a trained encoder, under timm's names, and its position table.
#[derive(Clone, Debug)]
pub struct EncoderWeights {
    layout: Arc<Layout>,
    params: Vec<f32>,
    /// `[1 + l, d]`, row-major.
    table: Vec<f32>,
}

impl EncoderWeights {
    /// Reads the encoder of `model` from a checkpoint of a run, `RUN@STEP` or its newest one, or
    /// from weights of another library, `PATH@blake3:HEX` or whatever is there. `scale` is that of
    /// the images that it will be shown, and `reads_tokens` whether single tokens are read behind
    /// its last norm.
    pub fn read(
        place: &str,
        model: &ModelConfig,
        scale: Scale<'_>,
        reads_tokens: bool,
    ) -> Result<Self, EncoderError> {
        let failed = |why: String| EncoderError { place: place.to_string(), why };
        let table = || sincos_2d(model.width as usize, model.grid());
        let (run, pin) = encoder_at(place, |place| Path::new(place).exists());
        let found = RunDir::find(run).map_err(|err| failed(chain(&err)))?;
        let (source, params, table) = match found {
            Some(dir) => {
                let (spec, params) = of_run(&dir, pin).map_err(failed)?;
                check_scale(&spec, scale).map_err(failed)?;
                (spec.model, params, table())
            }
            None => {
                let weights = import::Weights::open(Path::new(run));
                let weights = weights.map_err(|err| failed(chain(&err)))?;
                check_content(&weights, pin).map_err(failed)?;
                if reads_tokens && weights.has_pooled_norm() {
                    return Err(failed(POOLED_NORM.to_string()));
                }
                let of_weights = of_weights(&weights, model, scale, table);
                of_weights.map_err(failed)?
            }
        };
        check_sizes(&source, model).map_err(failed)?;
        if source.img_size != model.img_size {
            let (from, to) = (source.img_size, model.img_size);
            info!(?from, ?to, "the encoder's position table is made for images of another size");
        }
        Ok(EncoderWeights::of(&source, &params, table))
    }

    /// Reads or draws the encoder that a task starts from.
    pub fn of_task(
        task: &TaskSpec,
        model: &ModelConfig,
        seed: u64,
        scale: Scale<'_>,
    ) -> Result<Self, EncoderError> {
        match &task.encoder {
            Some(place) => {
                let begins_anew = task.kind == TaskKind::Finetune && task.pool == Pool::Avg;
                EncoderWeights::read(place, model, scale, !begins_anew)
            }
            None => Ok(EncoderWeights::fresh(model, seed)),
        }
    }

    /// Draws an encoder that has learned nothing.
    pub fn fresh(model: &ModelConfig, seed: u64) -> Self {
        let layout = Layout::new(model.params());
        let mut params: Vec<f32> = vec![0.0; layout.numel()];
        for (block, spec) in layout.params().iter().enumerate() {
            init::fill(spec, seed, &mut params[layout.range(block)]);
        }
        EncoderWeights::of(model, &params, sincos_2d(model.width as usize, model.grid()))
    }

    /// Returns whether `model` has tensors of these shapes.
    pub fn fits(&self, model: &ModelConfig) -> bool {
        let positions = (1 + model.n_patches()) * model.width as usize;
        self.layout.params() == encoder_params(model) && self.table.len() == positions
    }

    /// Takes the encoder's part of a model's parameters.
    pub fn of(model: &ModelConfig, params: &[f32], table: Vec<f32>) -> Self {
        let whole = Layout::new(model.params());
        let layout = Layout::new(encoder_params(model));
        let mut out: Vec<f32> = Vec::with_capacity(layout.numel());
        for spec in layout.params() {
            let block = whole.find(&spec.name).expect("it is one of the model's");
            out.extend_from_slice(&params[whole.range(block)]);
        }
        EncoderWeights { layout, params: out, table }
    }

    /// Returns the tensors.
    pub fn weights(&self) -> Weights {
        Weights::copy_of(&self.layout, &self.params)
    }

    /// Returns the position table, `[1, 1 + l, d]`.
    pub fn table(&self, model: &ModelConfig) -> Tensor {
        Tensor::from_slice(&self.table).view([1, -1, i64::from(model.width)])
    }

    /// Computes a digest of everything.
    pub fn digest(&self) -> Crc64 {
        Crc64::of_f32(&self.params).then(Crc64::of_f32(&self.table))
    }

    /// Returns what a classifier's tensor begins with, where it is not drawn. The norm behind the
    /// patches' mean, `fc_norm`, begins anew, as the reference's does: it takes the place of one
    /// that saw single tokens.
    pub fn initial(&self, name: &str) -> Option<&[f32]> {
        if name == "pos_embed" {
            return Some(&self.table);
        }
        let named = |spec: &ParamSpec| spec.name == name;
        let block = self.layout.params().iter().position(named)?;
        Some(&self.params[self.layout.range(block)])
    }
}

/// Lists the encoder's tensors, sorted by name.
fn encoder_params(model: &ModelConfig) -> Vec<ParamSpec> {
    model.params().into_iter().filter(|p| keymap::timm(&p.name).is_some()).collect()
}

/// Reads an encoder from weights of another library, with a position table for `model`'s grid:
/// that of the file, resampled as its library does where the grid is another one, or `sincos`.
fn of_weights(
    weights: &import::Weights,
    model: &ModelConfig,
    scale: Scale<'_>,
    sincos: impl Fn() -> Vec<f32>,
) -> Result<(ModelConfig, Vec<f32>, Vec<f32>), String> {
    let given =
        |heads, img_size| Given { heads, img_size, encoder_alone: true, ..Given::default() };
    // The size of images is asked for where the table is for no square.
    let describe = |heads| {
        let described = import::describe(weights, &given(heads, None));
        described.or_else(|_| import::describe(weights, &given(heads, Some(model.img_size))))
    };
    // Tensors do not show heads: those of the spec hold where the file does not say, or only its
    // sizes suggest others.
    let is_guess = |found: &Described| found.notices.iter().any(|text| text.contains("heads"));
    let described = match describe(None) {
        Ok(found) if !is_guess(&found) => Ok(found),
        Ok(found) => {
            let (said, guessed) = (model.heads, found.config.heads);
            if said != guessed {
                let text = "models of these sizes have other attention heads; the spec is believed";
                warn!(model.heads = said, usual = guessed, "{text}");
            }
            describe(Some(said))
        }
        Err(_) => describe(Some(model.heads)),
    };
    let described = described.map_err(|err| chain(&err))?;
    match &described.normalization {
        Some((mean, std)) => compare_scales((mean, std), scale)?,
        None => info!("how pixels are normalised is not in the file: the spec is believed"),
    }
    described.notices.iter().for_each(|notice| info!("{notice}"));
    let (form, source) = (described.form, described.config);
    let read = import::read_model(weights, &source).map_err(|err| chain(&err))?;
    let table = match read.encoder_table {
        None => sincos(),
        Some(stored) => {
            let (from, to) = (source.grid(), model.grid());
            let resample = if form == Form::Timm { Resample::Antialias } else { Resample::Plain };
            resize_table(&stored, source.width as usize, from, to, resample)
        }
    };
    Ok((source, read.params, table))
}

/// Mean and deviation of each channel, in units of full brightness.
pub type Scale<'a> = (&'a [f64], &'a [f64]);

/// Refuses weights that are not those that the run was created with.
fn check_content(weights: &import::Weights, pin: Option<EncoderPin<'_>>) -> Result<(), String> {
    match pin {
        None => Ok(()),
        Some(EncoderPin::Step(_)) => Err("it is weights, which have no steps".to_string()),
        Some(EncoderPin::Content(wanted)) => {
            let found = weights.digest().map_err(|err| chain(&err))?.to_hex();
            if wanted.eq_ignore_ascii_case(&found) {
                return Ok(());
            }
            Err(format!("its content is blake3:{found}: other weights lie in its place"))
        }
    }
}

fn of_run(dir: &RunDir, pin: Option<EncoderPin<'_>>) -> Result<(RunSpec, Vec<f32>), String> {
    let manifest = match pin {
        Some(EncoderPin::Step(step)) => find_step(dir, Step(step)).map_err(|err| chain(&err))?,
        Some(EncoderPin::Content(_)) => {
            return Err("it is a run, whose checkpoints are named by their steps".to_string());
        }
        None => {
            let entries = catalog::list(dir).map_err(|err| chain(&err))?;
            let newest = catalog::newest_good(&entries).cloned();
            newest.ok_or("the run has no usable checkpoint")?
        }
    };
    let spec = parse_text("the checkpoint's spec", &manifest.spec, &[]);
    let spec = spec.map_err(|err| chain(&err))?.spec;
    if spec.task.is_some() {
        let why = "it is a run of a task: `lacuna ckpt export RUN --layout timm --to DIR` makes \
                   weights of a fine-tuned one, and those can be given";
        return Err(why.to_string());
    }
    let layout = Layout::new(spec.model.params());
    let wanted = |param: &ParamSpec| keymap::timm(&param.name).is_some();
    let params = load_params(dir, &manifest, &layout, wanted).map_err(|err| chain(&err))?;
    Ok((spec, params))
}

/// Refuses images that are shown in other units than the encoder has seen.
fn check_scale(spec: &RunSpec, (mean, std): Scale<'_>) -> Result<(), String> {
    compare_scales((&spec.data.mean, &spec.data.std), (mean, std))
}

fn compare_scales(theirs: Scale<'_>, (mean, std): Scale<'_>) -> Result<(), String> {
    // Files may have them in f32.
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6;
    let alike = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(near);
    if alike(theirs.0, mean) && alike(theirs.1, std) {
        return Ok(());
    }
    Err(format!(
        "it has seen images with `data.mean` {:?} and `data.std` {:?}, and here they are {mean:?} \
         and {std:?}",
        theirs.0, theirs.1
    ))
}

/// Refuses an encoder of other sizes. Images may have another one: the position table follows.
fn check_sizes(source: &ModelConfig, model: &ModelConfig) -> Result<(), String> {
    let sizes = |m: &ModelConfig| {
        [
            ("model.patch_size", m.patch_size),
            ("model.channels", m.channels),
            ("model.width", m.width),
            ("model.depth", m.depth),
            ("model.heads", m.heads),
            ("model.mlp_ratio", m.mlp_ratio),
        ]
    };
    let differ: Vec<String> = sizes(source)
        .into_iter()
        .zip(sizes(model))
        .filter(|(theirs, ours)| theirs != ours)
        .map(|((key, theirs), (_, ours))| format!("`{key}` is {theirs} there and {ours} here"))
        .collect();
    if differ.is_empty() { Ok(()) } else { Err(differ.join("; ")) }
}

/// A classifier that is only read.
#[derive(Debug)]
pub struct Head {
    task: TaskSpec,
    model: ModelConfig,
    weights: Weights,
    /// What a probe reads features with.
    frozen: Option<Encoder>,
    normalize: Normalize,
    /// Mean and variance of a probe's features, `[d]`.
    statistics: Option<[Tensor; 2]>,
    device: Device,
}

impl Head {
    /// Takes the parameters of a classifier, flat in the layout of [`classifier_params`].
    ///
    /// `mean` and `std` have one value per channel, in units of full brightness.
    pub fn new(
        task: &TaskSpec,
        model: &ModelConfig,
        (mean, std): (&[f64], &[f64]),
        encoder: Option<&EncoderWeights>,
        params: &[f32],
    ) -> Self {
        let layout = Layout::new(classifier_params(task, model));
        let frozen = encoder
            .filter(|_| task.kind == TaskKind::Linear)
            .map(|encoder| Encoder::new(model, &encoder.weights(), encoder.table(model)));
        Head {
            task: task.clone(),
            model: model.clone(),
            weights: Weights::copy_of(&layout, params),
            frozen,
            normalize: Normalize::new(mean, std),
            statistics: None,
            device: Device::Cpu,
        }
    }

    /// Returns the same classifier on `device`; what goes in and comes out stays on the host.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        let move_encoder = |encoder: Encoder| {
            let table = encoder.pos_embed_1nd.to_device(device);
            Encoder::new(&encoder.model, &encoder.weights.share().to_device(device), table)
        };
        let moved = |[mean_d, var_d]: [Tensor; 2]| [mean_d, var_d].map(|x| x.to_device(device));
        Head {
            weights: self.weights.to_device(device),
            frozen: self.frozen.map(move_encoder),
            statistics: self.statistics.map(moved),
            device,
            ..self
        }
    }

    /// Returns the same again for another thread; the parameters are shared.
    pub fn share(&self) -> Self {
        let share = |[mean_d, var_d]: &[Tensor; 2]| [mean_d.shallow_clone(), var_d.shallow_clone()];
        Head {
            task: self.task.clone(),
            model: self.model.clone(),
            weights: self.weights.share(),
            frozen: self.frozen.as_ref().map(Encoder::share),
            normalize: self.normalize.clone(),
            statistics: self.statistics.as_ref().map(share),
            device: self.device,
        }
    }

    /// Returns the number of classes.
    pub fn n_classes(&self) -> usize {
        self.task.classes as usize
    }

    /// Returns the number of values that the head reads.
    pub fn feature_width(&self) -> usize {
        feature_width(&self.task, &self.model)
    }

    /// Returns whether it needs statistics of its training set's features first.
    pub fn wants_statistics(&self) -> bool {
        self.task.kind == TaskKind::Linear && self.statistics.is_none()
    }

    /// Computes what a probe's head reads of images `pixels` `[b, h, w, c]`, before the batch norm:
    /// `[b, d]`.
    pub fn features(&self, pixels: &[u8]) -> Vec<f32> {
        runtime::pin_threads();
        tch::no_grad(|| {
            let pooled_bd = self.pooled(pixels).to_device(Device::Cpu).contiguous();
            values::<f32>(&pooled_bd).to_vec()
        })
    }

    /// Takes sums of features and of their squares over `n` images, `[d]` each.
    pub fn set_statistics(&mut self, n: u64, sums: &[f64], squares: &[f64]) {
        let mean: Vec<f32> = sums.iter().map(|sum| (sum / n as f64) as f32).collect();
        let var = sums.iter().zip(squares).map(|(sum, square)| {
            let mean = sum / n as f64;
            (square / n as f64 - mean * mean).max(0.0) as f32
        });
        let var: Vec<f32> = var.collect();
        let there = |values: &[f32]| Tensor::from_slice(values).to_device(self.device);
        self.statistics = Some([there(&mean), there(&var)]);
    }

    /// Computes logits `[b, k]` of images `pixels` `[b, h, w, c]`.
    ///
    /// # Panics
    /// If a probe has no statistics yet.
    pub fn logits(&self, pixels: &[u8]) -> Vec<f32> {
        runtime::pin_threads();
        let logits_bk = tch::no_grad(|| match self.task.kind {
            TaskKind::Finetune => {
                let images_bchw = self.images(pixels);
                finetuned_logits(&self.task, &self.model, &self.weights, &images_bchw, None)
            }
            TaskKind::Linear => {
                let statistics = self.statistics.as_ref().expect("a probe has statistics");
                let normed_bd = batch_normed(&self.pooled(pixels), statistics);
                crate::vit::Linear::new(&self.weights, "head").forward(&normed_bd)
            }
        });
        values::<f32>(&logits_bk.to_device(Device::Cpu).contiguous()).to_vec()
    }

    fn pooled(&self, pixels: &[u8]) -> Tensor {
        if self.task.pool == Pool::Pixels {
            return self.images(pixels).flatten(1, -1);
        }
        let encoder = self.frozen.as_ref().expect("a probe has an encoder");
        let tokens_bnd = encoder.tokens(&self.images(pixels), None);
        encoder.pooled(&tokens_bnd, self.task.pool)
    }

    fn images(&self, pixels: &[u8]) -> Tensor {
        let [height, width] = self.model.img_size;
        let mut normal: Vec<f32> = vec![0.0; pixels.len()];
        self.normalize.apply(pixels, (height * width) as usize, &mut normal);
        let shape = [-1, i64::from(self.model.channels), i64::from(height), i64::from(width)];
        Tensor::from_slice(&normal).view(shape).to_device(self.device)
    }
}
