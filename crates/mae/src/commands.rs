//! Commands of `lacuna-worker` that use a trained model.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::load::{Expected, load_newest, load_step};
use lacuna_data::{Dataset, ImageShape, SampleReader};
use lacuna_mae::frozen::FrozenMae;
use lacuna_mae::reconstruct::{draw_rows, write_png};
use lacuna_mae::worker::TorchBackend;
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use lacuna_spec::{RunSpec, parse_text};
use lacuna_types::{SampleId, Step, exit};
use lacuna_worker::engine::EngineSpec;

/// `lacuna-worker reconstruct`.
#[derive(Args, Debug)]
pub struct ReconstructArgs {
    /// Folder or URL of the run's checkpoints, `<checkpoint.to>/<name>`.
    run: PathBuf,
    /// Step of the checkpoint; by default the newest.
    #[arg(long)]
    step: Option<u64>,
    /// Packed images to show; by default those the run trains on.
    #[arg(long)]
    data: Option<PathBuf>,
    /// How many images.
    #[arg(long, default_value_t = 8)]
    images: u32,
    /// Chooses images and masks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the PNG goes.
    #[arg(long, default_value = "reconstruction.png")]
    out: PathBuf,
}

/// Most images of one picture: a taller one is no use.
const IMAGES_MAX: u32 = 256;

/// Draws `original | masked | reconstruction | reconstruction by random weights`.
pub fn reconstruct(args: &ReconstructArgs) -> anyhow::Result<u8> {
    if !(1..=IMAGES_MAX).contains(&args.images) {
        bail!("`--images` must be between 1 and {IMAGES_MAX}");
    }
    let dir = run_dir(&args.run)?;
    let (spec, step, params) = load(&dir, args.step)?;
    let (mean, std) = (&spec.data.mean, &spec.data.std);
    let model = FrozenMae::new(&spec.model, mean, std, &params);
    let random = FrozenMae::new(&spec.model, mean, std, &random_params(&spec.model, args.seed));
    let data = args.data.clone().unwrap_or_else(|| PathBuf::from(&spec.data.shards));
    let (pixels, ids_shuffle) = choose_images(args, &spec.model, &data)?;
    let picture = draw_rows(&model, &random, &pixels, &ids_shuffle);
    write_png(&picture, &args.out)?;
    println!(
        "{}: {} rows of original | masked | reconstruction at step {step} | reconstruction by \
         random weights; removed patches are shown with the brightness and contrast of visible \
         patches near them, never with their own",
        args.out.display(),
        args.images
    );
    Ok(exit::OK)
}

/// Runs the engine's conformance suite; panics where the contract is broken.
pub fn conformance() -> u8 {
    for (name, slot_batch) in [("micro", 3), ("demo", 2)] {
        let model = ModelConfig::preset(name).expect("a preset");
        let channels = model.channels as usize;
        let spec = EngineSpec {
            model,
            seed: 5,
            mean: vec![0.5; channels],
            std: vec![0.25; channels],
            slot_batch,
            n_slots: 4,
            precision: lacuna_spec::Precision::F32,
            device: "cpu0".to_string(),
            task: None,
        };
        lacuna_worker::conformance::run(&spec, &TorchBackend::default());
        println!("engine conformance: {name} with slots of {slot_batch}");
    }
    println!("engine conformance: passed");
    exit::OK
}

fn run_dir(path: &Path) -> anyhow::Result<RunDir> {
    if let Some(dir) = path.to_str().and_then(RunDir::open_url) {
        return dir.context("open the run's checkpoints");
    }
    let full = std::fs::canonicalize(path).with_context(|| format!("open `{}`", path.display()))?;
    let name = full.file_name().and_then(|name| name.to_str()).context("the folder has no name")?;
    let root = full.parent().context("the folder has no parent")?;
    Ok(RunDir::new(root, name.parse().context("read the run's name from its folder")?))
}

/// Loads spec and parameters of a checkpoint.
fn load(dir: &RunDir, step: Option<u64>) -> anyhow::Result<(RunSpec, Step, Vec<f32>)> {
    let entries = lacuna_checkpoint::catalog::list(dir).context("list checkpoints")?;
    let newest = lacuna_checkpoint::catalog::newest_good(&entries);
    let manifest =
        newest.with_context(|| format!("no checkpoint in `{}`", dir.path().display()))?;
    let loaded = parse_text("the checkpoint's spec", &manifest.spec, &[])
        .context("read the spec stored in the checkpoint")?;
    let spec = loaded.spec;
    let layout = Layout::new(spec.model.params());
    let expected = Expected::tensors(&layout);
    let state = match step {
        Some(step) => load_step(dir, Step(step), &expected)?,
        None => load_newest(dir, &expected)?.context("no checkpoint can be loaded")?.state,
    };
    let step = state.manifest.step();
    let [params, _, _] = state.sections;
    Ok((spec, step, params))
}

fn random_params(model: &ModelConfig, seed: u64) -> Vec<f32> {
    let layout = Layout::new(model.params());
    let mut params = vec![0f32; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        init::fill(spec, seed, &mut params[layout.range(block)]);
    }
    params
}

/// Reads images spread over the data set, whole, and draws their masks.
fn choose_images(
    args: &ReconstructArgs,
    model: &ModelConfig,
    data: &Path,
) -> anyhow::Result<(Vec<u8>, Vec<u32>)> {
    let dataset = Dataset::open(data).with_context(|| format!("open data `{}`", data.display()))?;
    let [height, width] = model.img_size;
    let shape = ImageShape { height, width, channels: model.channels };
    let mut reader = SampleReader::default();
    let n = u64::from(args.images).min(dataset.n_samples());
    let mut pixels = vec![0u8; n as usize * shape.bytes()];
    let mut ids_shuffle: Vec<u32> = Vec::new();
    for (i, out) in (0..n).zip(pixels.chunks_mut(shape.bytes())) {
        let id = dataset.n_samples() / n * i;
        reader.plain(&dataset, SampleId(id), shape, out).context("read an image")?;
        ids_shuffle.extend(MaskOrder::draw(args.seed, 0, id, model.n_patches()).ids_shuffle);
    }
    Ok((pixels, ids_shuffle))
}
