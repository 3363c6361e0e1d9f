//! `lacuna-worker reconstruct`: what a model makes of masked images.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use lacuna_checkpoint::chain;
use lacuna_data::{ImageShape, SampleReader};
use lacuna_mae::frozen::FrozenMae;
use lacuna_mae::reconstruct::{Statistics, draw_rows, write_png};
use lacuna_pixels::{Decoder, IMAGE_BYTES_MAX};
use lacuna_recipe::augment::{CropBox, Size};
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_types::{SampleId, exit};

use super::source::{Hints, Loaded, Need, SourceArgs, shape_of};
use super::{batches, io, random_params, usage};

/// `lacuna-worker reconstruct`.
#[derive(Args, Debug)]
pub struct ReconstructArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Attention heads of the decoder, where a weights file does not say.
    #[arg(long, value_name = "N")]
    decoder_heads: Option<u32>,
    /// Whether the decoder predicts normalised patches, where a weights file does not say.
    #[arg(long, value_name = "BOOL")]
    norm_pix_loss: Option<bool>,
    /// An image file to show; may be given several times.
    #[arg(long = "image", value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Packed images to show; without --image, by default those the run trains on.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// How many of the packed images.
    #[arg(long, default_value_t = 8)]
    images: u32,
    /// Whose brightness and contrast removed patches are shown with, if the model predicts
    /// normalised patches.
    #[arg(long, value_enum, default_value = "visible")]
    statistics: StatisticsArg,
    /// Share of the patches that is removed [default: the model's].
    #[arg(long, value_name = "SHARE")]
    mask_ratio: Option<f64>,
    /// Chooses masks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the PNG goes.
    #[arg(long, default_value = "reconstruction.png")]
    out: PathBuf,
}

/// Whose brightness and contrast removed patches are shown with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StatisticsArg {
    /// Those of visible patches near by: nothing of the answer is in the picture.
    Visible,
    /// The removed patch's own, as the reference's demo does: the picture looks better than the
    /// model knows.
    Truth,
}

/// Most images of one picture: a taller one is no use.
const IMAGES_MAX: u32 = 256;

/// Images to draw: pixels `[b, h, w, c]`, and each one's order of patches.
#[derive(Default)]
struct Shown {
    pixels: Vec<u8>,
    ids_shuffle: Vec<u32>,
}

/// Draws `original | masked | reconstruction | reconstruction by random weights`.
pub fn reconstruct(args: &ReconstructArgs) -> anyhow::Result<u8> {
    if !(1..=IMAGES_MAX).contains(&args.images) {
        return Err(usage(format!("`--images` must be between 1 and {IMAGES_MAX}")));
    }
    if args.image.len() > IMAGES_MAX as usize {
        return Err(usage(format!("`--image` can be given {IMAGES_MAX} times")));
    }
    let hints = Hints {
        decoder_heads: args.decoder_heads,
        norm_pix_loss: args.norm_pix_loss,
        img_size: None,
    };
    let mut loaded = args.source.load(Need::Decoder, hints)?;
    if let Some(mask_ratio) = args.mask_ratio {
        loaded.model.mask_ratio = mask_ratio;
        if let Some(problem) = loaded.model.problems().first() {
            return Err(usage(format!("--mask-ratio does not fit: {problem}")));
        }
    }
    let shown = choose_images(args, &loaded)?;
    let model = loaded.build_as_stored();
    let random = random_params(&loaded.model, args.seed);
    let random = FrozenMae::new(&loaded.model, &loaded.mean, &loaded.std, &random);
    let statistics = match args.statistics {
        StatisticsArg::Visible => Statistics::Visible,
        StatisticsArg::Truth => Statistics::Truth,
    };
    let picture = draw_rows(&model, &random, &shown.pixels, &shown.ids_shuffle, statistics);
    let n = shown.ids_shuffle.len() / loaded.model.n_patches();
    let rows = if n == 1 { "row" } else { "rows" };
    let text = format!(
        "{n} {rows} of original | masked | reconstruction by {} | reconstruction by random \
         weights; {} of {} patches are removed; {}",
        loaded.origin,
        loaded.model.n_patches() - loaded.model.len_keep(),
        loaded.model.n_patches(),
        said_of(statistics, &loaded.model)
    );
    write_png(&picture, &text, &args.out)?;
    println!("{}: {text}", args.out.display());
    Ok(exit::OK)
}

/// Says where brightness and contrast of removed patches come from.
fn said_of(statistics: Statistics, model: &ModelConfig) -> &'static str {
    match (model.norm_pix_loss, statistics) {
        (false, _) => "removed patches are shown as the model predicts them",
        (true, Statistics::Visible) => {
            "removed patches are shown with the brightness and contrast of visible patches near \
             them, never with their own"
        }
        (true, Statistics::Truth) => {
            "removed patches are shown with the ground truth's own brightness and contrast, which \
             the model does not know"
        }
    }
}

/// Reads image files, and packed images spread over their data set, and draws their masks.
fn choose_images(args: &ReconstructArgs, loaded: &Loaded) -> anyhow::Result<Shown> {
    let shape = shape_of(&loaded.model);
    if !shape.is_supported() {
        let channels = shape.channels;
        return Err(usage(format!("images with {channels} channels cannot be read from files")));
    }
    let mut shown = Shown::default();
    let mut decoder = Decoder::new();
    for (i, path) in (0u64..).zip(&args.image) {
        shown.add(args.seed, i, &loaded.model, |out| read_image(&mut decoder, path, shape, out))?;
    }
    let of_run = || loaded.origin.data.clone().map(PathBuf::from);
    let data = match (&args.data, args.image.is_empty()) {
        (Some(data), _) => Some(data.clone()),
        (None, true) => Some(of_run().ok_or_else(|| {
            usage(format!("{} names no images: give --image or --data", loaded.origin))
        })?),
        (None, false) => None,
    };
    if let Some(data) = data {
        add_packed(args, &data, &loaded.model, &mut shown)?;
    }
    Ok(shown)
}

fn add_packed(
    args: &ReconstructArgs,
    data: &Path,
    model: &ModelConfig,
    shown: &mut Shown,
) -> anyhow::Result<()> {
    let dataset = batches::open(data)?;
    let mut reader = SampleReader::default();
    let n = u64::from(args.images).min(dataset.n_samples());
    for i in 0..n {
        let id = dataset.n_samples() / n * i;
        shown.add(args.seed, id, model, |out| {
            let read = reader.plain(&dataset, SampleId(id), shape_of(model), out);
            read.map_err(|error| io(chain(&error)))
        })?;
    }
    Ok(())
}

impl Shown {
    /// Adds an image that `read` gives; its mask is that of `sample` in epoch 0.
    fn add(
        &mut self,
        seed: u64,
        sample: u64,
        model: &ModelConfig,
        read: impl FnOnce(&mut [u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let at = self.pixels.len();
        self.pixels.resize(at + shape_of(model).bytes(), 0);
        read(&mut self.pixels[at..])?;
        self.ids_shuffle.extend(MaskOrder::draw(seed, 0, sample, model.n_patches()).ids_shuffle);
        Ok(())
    }
}

/// Reads an image file as evaluation sees it: the largest centred box, resized.
fn read_image(
    decoder: &mut Decoder,
    path: &Path,
    shape: ImageShape,
    out: &mut [u8],
) -> anyhow::Result<()> {
    let failed =
        |error: std::io::Error| io(format!("failed to read --image `{}`: {error}", path.display()));
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > IMAGE_BYTES_MAX {
        let shown = path.display();
        return Err(usage(format!("--image `{shown}` has {size} bytes, which no image has")));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let choose = |size: Size| (CropBox::largest_centered(size, shape.size()), false);
    let decoded = decoder.decode_and_render(&bytes, choose, shape, out);
    decoded.map(|_| ()).map_err(|error| {
        usage(format!("--image `{}` is not a usable image: {}", path.display(), chain(&error)))
    })
}
