//! `lacuna ckpt export`: parameters for other libraries, and how they load them.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use lacuna_checkpoint::export::{
    ExportDtype, ExportError, ExportLayout, ExportOptions, Exported, MAX_SHARD_BYTES, export,
};
use lacuna_data::pack::class_names;
use lacuna_recipe::model::ModelConfig;
use lacuna_spec::{Pool, RunSpec, TaskKind, TaskSpec};
use lacuna_types::exit;

use super::{pick, run_dir, stored_spec};
use crate::data::talk::{count, io, put, usage};

/// `lacuna ckpt export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The run: its spec file, or its folder or URL (checkpoint.to/NAME).
    run: PathBuf,
    /// For which library.
    #[arg(long, value_enum)]
    layout: Layout,
    /// Step of the checkpoint [default: the newest usable one].
    #[arg(long)]
    step: Option<u64>,
    /// Of a fine-tuned model the average of its weights (`task.ema`).
    #[arg(long)]
    ema: bool,
    /// Of a fine-tuned model the data that it learned from, where they lie elsewhere than then
    /// (`data.shards`): the file gets the names of their classes.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Leave the decoder out; with `timm` it always is, with `hf` the folder is for `ViTMAEModel`.
    #[arg(long)]
    encoder_only: bool,
    /// Element type of the tensors.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Most bytes of a weights file in the layout `hf`; beyond, there are several and an index.
    #[arg(long, value_name = "BYTES", default_value_t = MAX_SHARD_BYTES)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    max_shard_bytes: u64,
    /// Folder that gets the files; for `mae` and `timm` also a name that ends in .safetensors.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Write over an earlier export.
    #[arg(long)]
    force: bool,
}

/// Layouts of exported files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// One file under the reference's names, decoder and position tables included.
    Mae,
    /// One file with the encoder, for timm's vision transformers.
    Timm,
    /// A folder for transformers' ViTMAE classes.
    Hf,
}

/// Element types of exported tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// As trained.
    F32,
    /// Rounded.
    Bf16,
}

/// Files of which a folder with an export for Hugging Face has at least one.
const HF_FILES: [&str; 3] = ["config.json", "model.safetensors", "model.safetensors.index.json"];

/// Exports a checkpoint.
pub(super) fn run(args: &ExportArgs) -> anyhow::Result<u8> {
    let (layout, file) = match (args.layout, args.encoder_only) {
        (Layout::Mae, false) => (ExportLayout::Mae, Some("mae.safetensors")),
        // The encoder's tensors have the same names for both libraries.
        (Layout::Mae, true) => (ExportLayout::Timm, Some("mae-encoder.safetensors")),
        (Layout::Timm, _) => (ExportLayout::Timm, Some("timm.safetensors")),
        (Layout::Hf, false) => (ExportLayout::Hf, None),
        (Layout::Hf, true) => (ExportLayout::HfEncoder, None),
    };
    let out = target(&args.to, file)?;
    let holds_export = match file {
        Some(_) => out.exists(),
        None => HF_FILES.iter().any(|name| out.join(name).exists()),
    };
    if !args.force && holds_export {
        let shown = out.display();
        return Err(usage(format!("`{shown}` holds an export: write over it with --force")));
    }
    let dir = run_dir(&args.run)?;
    let manifest = pick(&dir, args.step)?;
    let spec = stored_spec(&manifest)?;
    let layout = match &spec.task {
        Some(task) => layout_of_task(task, args)?,
        None if args.ema => return Err(usage("--ema: only runs that fine-tune keep an average")),
        None => layout,
    };
    let options = ExportOptions {
        layout,
        dtype: match args.dtype {
            Dtype::F32 => ExportDtype::F32,
            Dtype::Bf16 => ExportDtype::Bf16,
        },
        max_shard_bytes: args.max_shard_bytes,
        image_mean: spec.data.mean.clone(),
        image_std: spec.data.std.clone(),
        classes: spec.task.as_ref().map_or(Vec::new(), |task| names_of(args, &spec, task)),
    };
    let exported = export(&dir, &manifest, &spec.model, &options, &out);
    let exported = exported.map_err(|error| match error {
        ExportError::NotSquare { .. } => usage(error.to_string()),
        _ => io(&error),
    })?;
    let hint = match &spec.task {
        Some(task) => classifier_hint(task, &spec.model, &out),
        None => load_hint(layout, &spec.model, &out),
    };
    put(&report(&exported, manifest.step, &hint))?;
    Ok(exit::OK)
}

/// Returns the names of a classifier's classes, as they stand beside the data that it learned from.
fn names_of(args: &ExportArgs, spec: &RunSpec, task: &TaskSpec) -> Vec<String> {
    let data = args.data.as_deref().unwrap_or(Path::new(&spec.data.shards));
    let names = class_names(data);
    if names.len() == task.classes as usize {
        return names;
    }
    eprintln!(
        "note: `{}` does not name {} classes: the file will not either (--data says where the data \
         are that the run learned from)",
        data.display(),
        task.classes
    );
    Vec::new()
}

/// Finds out how a run of a task is exported.
fn layout_of_task(task: &TaskSpec, args: &ExportArgs) -> anyhow::Result<ExportLayout> {
    if task.kind == TaskKind::Linear {
        return Err(usage(
            "the run is a linear probe: a head behind an encoder that is exported by itself",
        ));
    }
    if args.layout != Layout::Timm {
        return Err(usage("the run fine-tuned a classifier, which has the layout `timm` only"));
    }
    match (args.ema, task.ema) {
        (false, _) => Ok(ExportLayout::Classifier),
        (true, Some(_)) => Ok(ExportLayout::ClassifierAverage),
        (true, None) => Err(usage("--ema: the run keeps no average of its weights (`task.ema`)")),
    }
}

/// Tells how timm loads a fine-tuned model.
fn classifier_hint(task: &TaskSpec, model: &ModelConfig, out: &Path) -> String {
    let pool = if task.pool == Pool::Avg { "avg" } else { "token" };
    let [height, width] = model.img_size;
    format!(
        "  import safetensors.torch, timm\n  \
         model = timm.models.vision_transformer.VisionTransformer(img_size=({height}, {width}), \
         patch_size={}, in_chans={}, embed_dim={}, depth={}, num_heads={}, mlp_ratio={}, \
         num_classes={}, global_pool={pool:?})\n  \
         model.load_state_dict(safetensors.torch.load_file({:?}))\n",
        model.patch_size,
        model.channels,
        model.width,
        model.depth,
        model.heads,
        model.mlp_ratio,
        task.classes,
        out.display().to_string()
    )
}

/// Returns the file or folder that an export makes.
fn target(to: &Path, file: Option<&str>) -> anyhow::Result<PathBuf> {
    let is_weights = to.extension().is_some_and(|suffix| suffix == "safetensors");
    match file {
        None if is_weights => Err(usage(format!("`{}` must be a folder", to.display()))),
        Some(_) if is_weights => Ok(to.to_path_buf()),
        Some(name) => Ok(to.join(name)),
        None => Ok(to.to_path_buf()),
    }
}

fn report(exported: &Exported, step: u64, hint: &str) -> String {
    let Exported { files, n_tensors, weights } = exported;
    let files: String = files.iter().map(|file| format!("{}\n", file.display())).collect();
    let tensors = count(*n_tensors as u64, "tensor");
    let digests = match weights.as_slice() {
        [(_, digest)] => format!(", weights {digest}"),
        several => several.iter().map(|(file, d)| format!("\n  {d} {}", file.display())).collect(),
    };
    format!("{files}step {step}: {tensors}{digests}\n\nto load it in Python:\n{hint}")
}

/// Tells how a library loads the export.
fn load_hint(layout: ExportLayout, model: &ModelConfig, out: &Path) -> String {
    let path = format!("{:?}", out.display().to_string());
    let load = format!("load_state_dict(safetensors.torch.load_file({path}))");
    match layout {
        ExportLayout::Hf => format!(
            "  from transformers import ViTMAEForPreTraining, ViTMAEModel\n  \
             model = ViTMAEForPreTraining.from_pretrained({path})\n"
        ),
        ExportLayout::HfEncoder => format!(
            "  from transformers import ViTMAEModel\n  \
             model = ViTMAEModel.from_pretrained({path})\n"
        ),
        ExportLayout::Classifier | ExportLayout::ClassifierAverage => {
            unreachable!("it has a hint of its own")
        }
        ExportLayout::Timm => {
            format!("  import safetensors.torch, timm\n  model = {}\n  model.{load}\n", timm(model))
        }
        ExportLayout::Mae => {
            let [height, width] = model.img_size;
            let img_size =
                if height == width { height.to_string() } else { format!("({height}, {width})") };
            format!(
                "  import safetensors.torch\n  \
                 # model: MaskedAutoencoderViT(img_size={img_size}, patch_size={}, in_chans={}, \
                 embed_dim={}, depth={}, num_heads={}, decoder_embed_dim={}, decoder_depth={}, \
                 decoder_num_heads={})\n  \
                 model.{load}\n",
                model.patch_size,
                model.channels,
                model.width,
                model.depth,
                model.heads,
                model.decoder_width,
                model.decoder_depth,
                model.decoder_heads,
            )
        }
    }
}

/// Returns the expression that builds the encoder: a named model where timm has one of these sizes.
fn timm(model: &ModelConfig) -> String {
    let known = [
        ("base", "vit_base_patch16_224.mae"),
        ("large", "vit_large_patch16_224.mae"),
        ("huge", "vit_huge_patch14_224.mae"),
    ];
    let encoder = |m: &ModelConfig| {
        (m.img_size, m.patch_size, m.channels, m.width, m.depth, m.heads, m.mlp_ratio)
    };
    let is_same =
        |name: &str| ModelConfig::preset(name).is_some_and(|m| encoder(&m) == encoder(model));
    if let Some((_, name)) = known.iter().find(|(preset, _)| is_same(preset)) {
        return format!("timm.create_model({name:?}, pretrained=False)");
    }
    let [height, width] = model.img_size;
    format!(
        "timm.models.vision_transformer.VisionTransformer(img_size=({height}, {width}), \
         patch_size={}, in_chans={}, embed_dim={}, depth={}, num_heads={}, mlp_ratio={}, \
         num_classes=0)",
        model.patch_size, model.channels, model.width, model.depth, model.heads, model.mlp_ratio
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_encoders_have_their_name() {
        let base = ModelConfig::preset("base").unwrap();
        assert!(timm(&base).contains("vit_base_patch16_224.mae"));
        let other_decoder = ModelConfig { decoder_depth: 2, ..base };
        assert!(timm(&other_decoder).contains("vit_base_patch16_224.mae"));
        let demo = ModelConfig::preset("demo").unwrap();
        assert!(timm(&demo).contains("embed_dim=192, depth=6, num_heads=3"));
    }

    #[test]
    fn names_of_exports() {
        let name = |to: &str, file| target(Path::new(to), file).unwrap();
        assert_eq!(name("out", Some("mae.safetensors")), Path::new("out/mae.safetensors"));
        assert_eq!(name("a.safetensors", Some("mae.safetensors")), Path::new("a.safetensors"));
        assert_eq!(name("out", None), Path::new("out"));
        assert!(target(Path::new("a.safetensors"), None).is_err());
    }
}
