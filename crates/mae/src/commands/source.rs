//! Where a model comes from: checkpoints of a run, or a weights file of any library.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use lacuna_checkpoint::import::{
    DescribeError, Described, Given, ImportError, Weights, describe, read_model,
};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::load::{find_step, load_params};
use lacuna_checkpoint::manifest::Manifest;
use lacuna_checkpoint::{catalog, chain};
use lacuna_data::ImageShape;
use lacuna_mae::frozen::{FrozenMae, OwnTables, Pool};
use lacuna_mae::pos_resize::{Resample, resize_table};
use lacuna_recipe::keymap::import::Form;
use lacuna_recipe::keymap::timm;
use lacuna_recipe::model::{ModelConfig, ParamSpec};
use lacuna_recipe::pos_embed::sincos_2d;
use lacuna_recipe::state::Layout;
use lacuna_spec::classifier::{averaged, classifier_params, own_name};
use lacuna_spec::{RunSpec, TaskKind, TaskSpec, parse_text};
use lacuna_types::Step;

use super::{io, usage};

/// Mean and deviation of ImageNet's channels, which MAE and timm's `.mae` models are trained with.
const IMAGENET: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// Which model is used.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// Folder or URL of a run's checkpoints, `<checkpoint.to>/<name>`; or weights: a .safetensors
    /// file (of `lacuna ckpt export`, the reference, timm), or a folder of transformers.
    source: PathBuf,
    /// Step of the run's checkpoint [default: the newest].
    #[arg(long)]
    step: Option<u64>,
    /// Of a fine-tuned run the average of its weights (`task.ema`).
    #[arg(long)]
    ema: bool,
    /// Attention heads of the encoder, where a weights file does not say.
    #[arg(long, value_name = "N")]
    heads: Option<u32>,
    /// Mean of each channel (0 to 1), where a weights file does not say: `0.5,0.5,0.5`.
    #[arg(long, value_delimiter = ',', value_name = "M,…")]
    mean: Vec<f64>,
    /// Deviation of each channel, likewise.
    #[arg(long, value_delimiter = ',', value_name = "S,…")]
    std: Vec<f64>,
}

/// At which size images are encoded.
#[derive(Args, Debug)]
pub struct SizeArgs {
    /// Height and width of images, `224` or `192x256` [default: the model's].
    #[arg(long, value_name = "N|HxW", value_parser = parse_size)]
    img_size: Option<[u32; 2]>,
    /// How the position table becomes one for another size.
    #[arg(long, value_enum, default_value = "auto")]
    pos_resize: PosResize,
}

/// Ways to make a position table for another grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PosResize {
    /// A sine-cosine table is computed; any other is resampled as its library does.
    Auto,
    /// Bicubic, not antialiased: the reference and transformers.
    Mae,
    /// Bicubic, antialiased: timm.
    Timm,
}

/// What a weights file may not say and not every command asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// Attention heads of the decoder.
    pub decoder_heads: Option<u32>,
    /// Whether it predicts normalised patches.
    pub norm_pix_loss: Option<bool>,
    /// Height and width of images, for a position table that is for no square.
    pub img_size: Option<[u32; 2]>,
}

/// How much of a model is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The encoder; the decoder's parameters may be anything.
    Encoder,
    /// The decoder too.
    Decoder,
}

/// A model in memory.
#[derive(Debug)]
pub struct Loaded {
    /// Its sizes, at the image size that it was trained or stored with.
    pub model: ModelConfig,
    /// Mean of each channel, in units of full brightness.
    pub mean: Vec<f64>,
    /// Deviation of each channel.
    pub std: Vec<f64>,
    /// Its parameters, laid out as [`Layout`] does.
    pub params: Vec<f32>,
    /// Where it comes from.
    pub origin: Origin,
    /// Whether its last norm is timm's `fc_norm`, behind the mean of the patches.
    pub norm_after_mean: bool,
    own: OwnTables,
    /// How its library resamples tables.
    resample: Resample,
}

/// Where a model comes from, for messages and reports.
#[derive(Clone, Debug)]
pub struct Origin {
    /// As the person named it.
    pub source: String,
    /// The checkpoint's step; nothing for weights files.
    pub step: Option<u64>,
    /// Whose names the weights file has.
    pub form: Option<Form>,
    /// The data set that the run trains on.
    pub data: Option<String>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.source)?;
        self.step.map_or(Ok(()), |step| write!(f, " at step {step}"))
    }
}

impl SizeArgs {
    /// Returns what the size tells about a weights file.
    pub fn hints(&self) -> Hints {
        Hints { img_size: self.img_size, ..Hints::default() }
    }
}

impl SourceArgs {
    /// Loads the model.
    pub fn load(&self, need: Need, hints: Hints) -> anyhow::Result<Loaded> {
        match run_dir(&self.source)? {
            Some(dir) => self.load_run(&dir, need, hints),
            None => self.load_weights(need, hints),
        }
    }

    /// Loads parameters of a checkpoint.
    fn load_run(&self, dir: &RunDir, need: Need, hints: Hints) -> anyhow::Result<Loaded> {
        let shown = self.source.display();
        let flags = [
            ("--heads", self.heads.is_some()),
            ("--mean", !self.mean.is_empty()),
            ("--std", !self.std.is_empty()),
            ("--decoder-heads", hints.decoder_heads.is_some()),
            ("--norm-pix-loss", hints.norm_pix_loss.is_some()),
        ];
        if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
            return Err(usage(format!("{flag} is for weights files: the run `{shown}` says it")));
        }
        let manifest = match self.step {
            Some(step) => find_step(dir, Step(step)).map_err(|e| io(chain(&e)))?,
            None => {
                let entries = catalog::list(dir).map_err(|e| io(chain(&e)))?;
                let newest = catalog::newest_good(&entries).cloned();
                newest.ok_or_else(|| io(format!("the run `{shown}` has no usable checkpoint")))?
            }
        };
        let spec = parse_text("the checkpoint's spec", &manifest.spec, &[])
            .context("read the spec stored in the checkpoint")?
            .spec;
        if self.ema && spec.task.as_ref().is_none_or(|task| task.ema.is_none()) {
            return Err(usage(format!(
                "--ema: the run `{shown}` keeps no average of its weights (`task.ema`)"
            )));
        }
        if let Some(task) = &spec.task {
            if task.kind == TaskKind::Finetune && need == Need::Encoder {
                return self.load_tuned(dir, &manifest, &spec, task);
            }
            let what = match need {
                Need::Decoder => "no decoder, which pictures need",
                Need::Encoder => "the encoder of another one, `task.encoder`: name that",
            };
            return Err(usage(format!("the run `{shown}` learns classes and has {what}")));
        }
        let wanted = |param: &ParamSpec| need == Need::Decoder || timm(&param.name).is_some();
        let layout = Layout::new(spec.model.params());
        let params = load_params(dir, &manifest, &layout, wanted).map_err(|e| io(chain(&e)))?;
        Ok(Loaded {
            params,
            mean: spec.data.mean.clone(),
            std: spec.data.std.clone(),
            origin: Origin {
                source: shown.to_string(),
                step: Some(manifest.step),
                form: None,
                data: Some(spec.data.shards.clone()),
            },
            norm_after_mean: false,
            own: OwnTables::default(),
            resample: Resample::Plain,
            model: spec.model,
        })
    }

    /// Loads the encoder of a fine-tuned model; its head is left out.
    fn load_tuned(
        &self,
        dir: &RunDir,
        manifest: &Manifest,
        spec: &RunSpec,
        task: &TaskSpec,
    ) -> anyhow::Result<Loaded> {
        let stored = |name: &str| if self.ema { averaged(name) } else { name.to_string() };
        let mut tuned = classifier_params(task, &spec.model);
        tuned.retain(|param| !param.name.starts_with("head."));
        tuned.iter_mut().for_each(|param| param.name = stored(&param.name));
        let tuned = Layout::new(tuned);
        let values = load_params(dir, manifest, &tuned, |_| true).map_err(|e| io(chain(&e)))?;
        let block = |name: &str| tuned.find(&stored(name)).expect("it is one of them");
        let of = |name: &str| &values[tuned.range(block(name))];
        let layout = Layout::new(spec.model.params());
        let mut params = vec![0.0; layout.numel()];
        for (block, param) in layout.params().iter().enumerate() {
            if timm(&param.name).is_some() {
                let name = own_name(task.pool, &param.name);
                params[layout.range(block)].copy_from_slice(of(&name));
            }
        }
        Ok(Loaded {
            params,
            mean: spec.data.mean.clone(),
            std: spec.data.std.clone(),
            origin: Origin {
                source: self.source.display().to_string(),
                step: Some(manifest.step),
                form: None,
                data: Some(spec.data.shards.clone()),
            },
            norm_after_mean: task.pool == lacuna_spec::Pool::Avg,
            own: OwnTables { encoder: Some(of("pos_embed").to_vec()), decoder: None },
            // As its export for timm is read.
            resample: Resample::Antialias,
            model: spec.model.clone(),
        })
    }

    /// Loads a weights file.
    fn load_weights(&self, need: Need, hints: Hints) -> anyhow::Result<Loaded> {
        let shown = self.source.display().to_string();
        for (flag, given) in [("--step", self.step.is_some()), ("--ema", self.ema)] {
            if given {
                return Err(usage(format!("{flag} is for runs, and `{shown}` is none")));
            }
        }
        let weights = Weights::open(&self.source).map_err(|e| unreadable(&self.source, e))?;
        let given = Given {
            heads: self.heads,
            decoder_heads: hints.decoder_heads,
            norm_pix_loss: hints.norm_pix_loss,
            img_size: hints.img_size,
            encoder_alone: need == Need::Encoder,
        };
        let described =
            describe(&weights, &given).map_err(|e| undescribed(&self.source, need, e))?;
        let Described { form, config: model, has_decoder, normalization, notices } = described;
        if need == Need::Decoder && !has_decoder {
            return Err(usage(format!(
                "`{shown}` holds an encoder alone, and pictures need the decoder: give a run's \
                 checkpoints, an export with `--layout mae` or `hf`, or a file with decoder \
                 (mae_*_full or mae_visualize_*)"
            )));
        }
        notices.iter().for_each(|notice| eprintln!("note: {notice}"));
        let (mean, std) = self.normalization(&model, normalization)?;
        let read = read_model(&weights, &model).map_err(|e| unreadable(&self.source, e))?;
        if !read.ignored.is_empty() {
            eprintln!("note: left out, no part of this model: {}", read.ignored.join(", "));
        }
        Ok(Loaded {
            model,
            mean,
            std,
            params: read.params,
            origin: Origin { source: shown, step: None, form: Some(form), data: None },
            norm_after_mean: weights.has_pooled_norm(),
            own: OwnTables { encoder: read.encoder_table, decoder: read.decoder_table },
            resample: if form == Form::Timm { Resample::Antialias } else { Resample::Plain },
        })
    }

    /// Finds how pixels are normalised: as the flags say, the file, or ImageNet.
    fn normalization(
        &self,
        model: &ModelConfig,
        said: Option<(Vec<f64>, Vec<f64>)>,
    ) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        let (said_mean, said_std) = match (said, model.channels) {
            (Some((mean, std)), _) => (mean, std),
            (None, 3) => {
                if self.mean.is_empty() || self.std.is_empty() {
                    eprintln!(
                        "note: how pixels are normalised is not in the file: ImageNet's mean and \
                         deviation are taken (--mean and --std change it)"
                    );
                }
                (IMAGENET.0.to_vec(), IMAGENET.1.to_vec())
            }
            (None, _) => (Vec::new(), Vec::new()),
        };
        let choose = |given: &Vec<f64>, said| if given.is_empty() { said } else { given.clone() };
        let (mean, std) = (choose(&self.mean, said_mean), choose(&self.std, said_std));
        let n = model.channels as usize;
        for (flag, values) in [("--mean", &mean), ("--std", &std)] {
            if values.is_empty() {
                return Err(usage(format!("how pixels are normalised is not in the file: {flag}")));
            }
            if values.len() != n {
                let found = values.len();
                return Err(usage(format!("{flag} has {found} values for {n} channels")));
            }
        }
        if let Some(bad) = std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(usage(format!("--std must be positive, not {bad}")));
        }
        if let Some(bad) = mean.iter().find(|m| !m.is_finite()) {
            return Err(usage(format!("--mean must be finite, not {bad}")));
        }
        Ok((mean, std))
    }
}

/// Returns the run whose folder or URL `path` is; nothing if it is something else.
pub fn run_dir(path: &Path) -> anyhow::Result<Option<RunDir>> {
    let place = path.to_str().ok_or_else(|| usage(format!("{path:?} is not UTF-8")))?;
    RunDir::find(place).map_err(|e| io(chain(&e)))
}

/// Tells files that are something else from disks that do not read.
fn unreadable(path: &Path, error: ImportError) -> anyhow::Error {
    match error {
        ImportError::Fs(_) | ImportError::Unsound { .. } => io(chain(&error)),
        ImportError::Nothing { path } => usage(format!(
            "`{}` is neither the folder of a run's checkpoints nor one with a .safetensors file",
            path.display()
        )),
        ImportError::Map(_) | ImportError::Mismatch { .. } | ImportError::NotFinite { .. } => {
            usage(format!("`{}`: {}", path.display(), chain(&error)))
        }
        _ => usage(chain(&error)),
    }
}

/// Names the flag that says what the file does not.
fn undescribed(path: &Path, need: Need, error: DescribeError) -> anyhow::Error {
    let hint = match &error {
        DescribeError::Heads { stack: "encoder", .. } => ": give --heads",
        DescribeError::Heads { .. } => ": give --decoder-heads",
        DescribeError::ImgSize { .. } if need == Need::Encoder => ": give --img-size",
        _ => "",
    };
    match error {
        DescribeError::Import(error) => unreadable(path, error),
        error => usage(format!("`{}`: {error}{hint}", path.display())),
    }
}

impl Loaded {
    /// Builds the model for images of the wanted size; returns it and what its position table is.
    pub fn build(&self, args: &SizeArgs) -> anyhow::Result<(FrozenMae, String)> {
        let img_size = args.img_size.unwrap_or(self.model.img_size);
        let model = ModelConfig { img_size, ..self.model.clone() };
        let problems: Vec<String> = model.problems().iter().map(ToString::to_string).collect();
        if !problems.is_empty() {
            return Err(usage(format!("--img-size does not fit: {}", problems.join("; "))));
        }
        let ([h, w], channels) = (img_size, model.channels);
        if !shape_of(&model).is_supported() {
            return Err(usage(format!(
                "images of {h}x{w} with {channels} channels cannot be made"
            )));
        }
        let (from, to) = (self.model.grid(), model.grid());
        let [rows, columns] = to;
        let width = model.width as usize;
        let resample = match args.pos_resize {
            PosResize::Auto => self.own.encoder.is_some().then_some(self.resample),
            PosResize::Mae => Some(Resample::Plain),
            PosResize::Timm => Some(Resample::Antialias),
        };
        let whose = if self.own.encoder.is_some() { "the file's own" } else { "sine-cosine" };
        let (table, note) = match resample.filter(|_| from != to) {
            Some(resample) => {
                let stored = self.own.encoder.clone().unwrap_or_else(|| sincos_2d(width, from));
                let how = match resample {
                    Resample::Plain => "bicubic without antialiasing, as mae and transformers do",
                    Resample::Antialias => "bicubic with antialiasing, as timm does",
                };
                let [from_rows, from_columns] = from;
                let note = format!(
                    "{whose}, resized from {from_rows} x {from_columns} to {rows} x {columns} \
                     patches ({how})"
                );
                (Some(resize_table(&stored, width, from, to, resample)), note)
            }
            None if self.own.encoder.is_some() => {
                (self.own.encoder.clone(), format!("{whose}, for {rows} x {columns} patches"))
            }
            None => (None, format!("{whose}, computed for {rows} x {columns} patches")),
        };
        // The decoder's is for the stored grid, and features do not need it.
        let decoder = self.own.decoder.clone().filter(|_| from == to);
        let tables = OwnTables { encoder: table, decoder };
        let built = FrozenMae::with_tables(&model, &self.mean, &self.std, &self.params, &tables);
        Ok((built.norm_after_mean(self.norm_after_mean), note))
    }

    /// Chooses what of an image is its feature, where `asked` does not say it: what the model's own
    /// head would read.
    pub fn pool(&self, asked: Option<Pool>) -> anyhow::Result<Pool> {
        match asked {
            None if self.norm_after_mean => Ok(Pool::Mean),
            None => Ok(Pool::Cls),
            Some(Pool::Cls) if self.norm_after_mean => Err(usage(format!(
                "`{}` was trained to read the mean of its patches (`fc_norm`), and its class token \
                 means nothing: take --pool mean",
                self.origin.source
            ))),
            Some(pool) => Ok(pool),
        }
    }

    /// Builds the model for images of its own size.
    pub fn build_as_stored(&self) -> FrozenMae {
        FrozenMae::with_tables(&self.model, &self.mean, &self.std, &self.params, &self.own)
    }
}

/// Returns the shape of a model's images.
pub fn shape_of(model: &ModelConfig) -> ImageShape {
    let [height, width] = model.img_size;
    ImageShape { height, width, channels: model.channels }
}

/// Reads `224` or `192x256`.
fn parse_size(text: &str) -> Result<[u32; 2], String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    let side = |text: &str| text.parse::<u32>().ok().filter(|&side| side > 0);
    match (side(height), side(width)) {
        (Some(height), Some(width)) => Ok([height, width]),
        _ => Err("not a size: write `224`, or height and width, `192x256`".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one_number_or_two() {
        assert_eq!(parse_size("224"), Ok([224, 224]));
        assert_eq!(parse_size("192x256"), Ok([192, 256]));
        for bad in ["", "0", "x", "12x", "12x0", "-3", "1x2x3"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
