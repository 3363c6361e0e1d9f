//! The entries of the table.

use lacuna_recipe::augment::SIDE_MAX;
use lacuna_recipe::order::LANES_MAX;
use lacuna_types::{LOADER_THREADS_MAX, WORLD_MAX};

use super::{Field, Interval, Kind, Mark};
use crate::run_spec::{
    BadSamples, CHECKPOINT_SCHEMES, CacheMode, DATA_SCHEMES, Optimizer, Order, Pool, Precision,
    RECONSTRUCTIONS_MAX, Reduce, Resume, TaskKind, WhenBusy,
};

/// Version of the layout that this build reads.
pub(crate) const SCHEMA: u64 = 1;
/// Largest batch: counts of samples stay exact in f32 up to here.
const BATCH_MAX: u32 = 1 << 24;
/// Most workers of a run, and most spares.
pub(crate) const WORKERS_MAX: u32 = WORLD_MAX;
/// Largest block of the order: more samples than any data set has.
const BLOCK_MAX: u64 = 1 << 48;
/// Longest deadline of a read in seconds: a step waits two minutes for its data.
const DEADLINE_MAX: u32 = 100;
/// Highest limit of a rate: a terabyte a second.
const MBPS_MAX: u32 = 1_000_000;
/// Most attempts that may fail in a row.
const FAILURES_MAX: u32 = 1_000_000;
/// Most checkpoints kept by number.
const KEEP_LAST_MAX: u32 = 10_000;
/// Longest gap between digests, and most non-finite steps in a row.
const INTERVAL_MAX: u32 = 1_000_000;
/// Largest seed: TOML's integers end here.
const SEED_MAX: u64 = i64::MAX as u64;
/// Most classes: labels have 24 bits, and a head has a row for each.
const CLASSES_MAX: u32 = 1 << 20;
/// What `task.drop_path` does.
const DROP_PATH: &str =
    "fine-tuning: share of the last block's branches that are dropped, fewer before";
/// Part of a whole.
const SHARE: Interval = Interval::from(0.0, 1.0);

const fn maths(path: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Field {
    let mark = Mark::Maths;
    Field { path, mark, kind, doc, example }
}

const fn placement(
    path: &'static str,
    kind: Kind,
    example: &'static str,
    doc: &'static str,
) -> Field {
    let mark = Mark::Placement;
    Field { path, mark, kind, doc, example }
}

const fn display(
    path: &'static str,
    kind: Kind,
    example: &'static str,
    doc: &'static str,
) -> Field {
    let mark = Mark::Display;
    Field { path, mark, kind, doc, example }
}

/// A count that fits 32 bits.
const fn whole(min: u32, max: u32) -> Kind {
    Kind::Integer { min: min as u64, max: max as u64 }
}

/// A size of the model; the limits are those of `ModelConfig::problems`.
const fn size(max: u32) -> Kind {
    whole(1, max)
}

pub(super) const FIELDS: &[Field] = &[
    display("schema", Kind::Integer { min: SCHEMA, max: SCHEMA }, "1", "version of this layout"),
    display("name", Kind::Name, "\"my-run\"", "the run's name, unique on its coordinator"),
    maths(
        "model.img_size",
        Kind::Sides { max: SIDE_MAX as u64 },
        "[224, 224]",
        "height and width of an image in pixels; one number means both",
    ),
    maths(
        "model.patch_size",
        size(1024),
        "16",
        "side of a square patch in pixels; divides both sides",
    ),
    maths("model.channels", size(1024), "3", "channels of an image"),
    maths(
        "model.width",
        size(65_536),
        "768",
        "width of the encoder; a multiple of 4 and of `heads`",
    ),
    maths("model.depth", size(1024), "12", "blocks of the encoder"),
    maths("model.heads", size(1024), "12", "attention heads of the encoder"),
    maths(
        "model.decoder_width",
        size(65_536),
        "512",
        "width of the decoder; a multiple of 4 and of `decoder_heads`",
    ),
    maths("model.decoder_depth", size(1024), "8", "blocks of the decoder"),
    maths("model.decoder_heads", size(1024), "16", "attention heads of the decoder"),
    maths(
        "model.mlp_ratio",
        size(64),
        "4",
        "hidden width of an MLP as a multiple of the block's width",
    ),
    maths(
        "model.mask_ratio",
        Kind::Number(Interval::between(0.0, 1.0)),
        "0.75",
        "share of patches that the encoder does not see, between 0 and 1",
    ),
    maths("model.norm_pix_loss", Kind::Bool, "true", "whether each target patch is normalised"),
    // The place of the data is free; its content is checked by the fingerprint of its index.
    placement(
        "data.shards",
        Kind::Place(&DATA_SCHEMES),
        "\"data/train\"",
        "folder or URL of the packed data, or its index file",
    ),
    maths(
        "data.order",
        Kind::Word(Order::WORDS),
        "\"global\"",
        "order of samples in an epoch: auto, global, block, sequential",
    ),
    maths(
        "data.lanes",
        whole(1, LANES_MAX),
        "256",
        "parts of order = \"block\" that a step reads side by side; divides `batch`",
    ),
    maths(
        "data.block",
        Kind::AutoOr { min: 1, max: BLOCK_MAX },
        "1024",
        "samples of a block of order = \"block\", or \"auto\": four chunks, 2^18 / lanes or more",
    ),
    maths(
        "data.mean",
        Kind::PerChannel(Interval::from(-16.0, 16.0)),
        "[0.485, 0.456, 0.406]",
        "mean of each channel, in units of full brightness",
    ),
    maths(
        "data.std",
        Kind::PerChannel(Interval::from(1e-3, 16.0)),
        "[0.229, 0.224, 0.225]",
        "standard deviation of each channel, same units",
    ),
    maths(
        "data.crop_scale",
        Kind::Range(Interval::above(0.0, 1.0)),
        "[0.2, 1.0]",
        "smallest and largest area of a crop, as a share of the image",
    ),
    maths(
        "data.crop_ratio",
        Kind::Range(Interval::from(0.01, 100.0)),
        "[0.75, 1.3333333333333333]",
        "smallest and largest width / height of a crop",
    ),
    maths("data.flip", Kind::Number(SHARE), "0.5", "probability of a horizontal flip"),
    maths(
        "data.bad_samples",
        Kind::Word(BadSamples::WORDS),
        "\"substitute\"",
        "what an undecodable sample does: fail, substitute",
    ),
    placement(
        "data.bad_samples_max",
        Kind::Number(SHARE),
        "0.001",
        "share of bad samples in an epoch above which the run fails; fewer than 10 never fail it",
    ),
    placement(
        "data.threads",
        Kind::AutoOr { min: 1, max: LOADER_THREADS_MAX as u64 },
        "4",
        "threads of a worker that decode, or \"auto\"",
    ),
    placement(
        "data.deadline_seconds",
        whole(1, DEADLINE_MAX),
        "50",
        "seconds that a read from a store is tried before the group forms again, up to 100",
    ),
    placement(
        "data.cache.dir",
        Kind::Place(&[]),
        "\"/nvme/lacuna\"",
        "folder on a local disk for what was downloaded, and for decoded planes of JPEG",
    ),
    placement(
        "data.cache.size",
        Kind::Bytes,
        "\"500GB\"",
        "most that the cache of this data may take",
    ),
    placement(
        "data.cache.mode",
        Kind::Word(CacheMode::WORDS),
        "\"auto\"",
        "what it keeps: jpeg (downloads), planes (those and decoded images), auto",
    ),
    maths("train.duration", Kind::Length, "\"800ep\"", "length of the run in ep or step"),
    maths("train.batch", whole(1, BATCH_MAX), "4096", "samples of a step over all workers"),
    maths(
        "train.slot_batch",
        whole(1, BATCH_MAX),
        "128",
        "samples of a slot, the unit of work; divides `batch`",
    ),
    maths(
        "train.precision",
        Kind::Word(Precision::WORDS),
        "\"f32\"",
        "arithmetic of the model: f32, bf16, tf32 (GPU)",
    ),
    maths(
        "train.reduce",
        Kind::Word(Reduce::WORDS),
        "\"exact\"",
        "sum of gradients: exact (same bits for any workers), exact32 (half the bytes), fast",
    ),
    maths("train.seed", Kind::Integer { min: 0, max: SEED_MAX }, "0", "key of every random draw"),
    placement(
        "train.max_nonfinite_steps",
        whole(1, INTERVAL_MAX),
        "3",
        "steps in a row with a non-finite gradient that fail the run",
    ),
    placement(
        "train.digest_every",
        whole(1, INTERVAL_MAX),
        "100",
        "steps between two comparisons of the workers' state",
    ),
    maths(
        "optim.base_lr",
        Kind::Number(Interval::above(0.0, 100.0)),
        "1.5e-4",
        "learning rate at batch 256; the peak is base_lr * batch / 256",
    ),
    maths(
        "optim.min_lr",
        Kind::Number(Interval::from(0.0, 100.0)),
        "0.0",
        "learning rate at the end",
    ),
    maths(
        "optim.warmup",
        Kind::LengthOrNone,
        "\"40ep\"",
        "linear rise of the learning rate, in ep or step, or \"none\"",
    ),
    maths(
        "optim.weight_decay",
        Kind::Number(Interval::from(0.0, 100.0)),
        "0.05",
        "decoupled weight decay of matrices",
    ),
    maths(
        "optim.betas",
        Kind::Pair(Interval::below(0.0, 1.0)),
        "[0.9, 0.95]",
        "decay of AdamW's two moments",
    ),
    maths(
        "optim.eps",
        Kind::Number(Interval::above(0.0, 1.0)),
        "1e-8",
        "added to the root of AdamW's second moment",
    ),
    maths("optim.decay_tokens", Kind::Bool, "true", "whether cls_token and mask_token are decayed"),
    placement("elastic.workers", Kind::Workers, "\"2:8\"", "fewest and most workers, \"min:max\""),
    placement(
        "elastic.spares",
        whole(0, WORKERS_MAX),
        "0",
        "workers beyond the most that stand by warm, to take a lost one's place at once",
    ),
    placement(
        "checkpoint.to",
        Kind::Place(&CHECKPOINT_SCHEMES),
        "\"runs\"",
        "folder or URL that holds the folder of the run",
    ),
    placement(
        "checkpoint.every",
        Kind::Cadences,
        "[\"15min\", \"1ep\"]",
        "when to save: a list of step, ep, s, min or h",
    ),
    placement(
        "checkpoint.keep.last",
        whole(1, KEEP_LAST_MAX),
        "3",
        "newest checkpoints that are kept",
    ),
    placement(
        "checkpoint.keep.every",
        Kind::Length,
        "\"50ep\"",
        "checkpoints that are kept for good: the first at or after each multiple",
    ),
    placement(
        "checkpoint.resume",
        Kind::Word(Resume::WORDS),
        "\"auto\"",
        "what a run that has checkpoints does: auto (go on), never (refuse)",
    ),
    placement(
        "checkpoint.when_busy",
        Kind::Word(WhenBusy::WORDS),
        "\"skip\"",
        "when the next is due and one is being written: skip, wait (stand still), cancel (the one)",
    ),
    placement(
        "checkpoint.max_write_mbps",
        whole(0, MBPS_MAX),
        "0",
        "megabytes a second at which a worker writes its part, 0 for no limit",
    ),
    placement(
        "checkpoint.max_failures",
        whole(0, FAILURES_MAX),
        "0",
        "attempts in a row that may fail before the run does, 0 for any number",
    ),
    placement(
        "checkpoint.read_back",
        Kind::Bool,
        "false",
        "whether the coordinator reads each checkpoint back and marks it as verified",
    ),
    display(
        "track.every",
        Kind::Cadence,
        "\"20step\"",
        "how often progress is recorded, in step, ep, s, min or h",
    ),
    display(
        "track.tensorboard",
        Kind::Place(&CHECKPOINT_SCHEMES),
        "\"runs/tb\"",
        "folder for files of TensorBoard, metrics.jsonl and events.jsonl, which the coordinator \
         writes; behind a URL, copies of them",
    ),
    display(
        "track.reconstructions.every",
        Kind::Length,
        "\"1ep\"",
        "how often a worker draws what the model fills in, for the page and TensorBoard",
    ),
    display(
        "track.reconstructions.images",
        whole(1, RECONSTRUCTIONS_MAX),
        "8",
        "images that are drawn, the same each time, spread evenly over the data",
    ),
    maths(
        "task.kind",
        Kind::Word(TaskKind::WORDS),
        "\"finetune\"",
        "`finetune` learns classes with the whole encoder, `linear` with a linear map behind it",
    ),
    maths(
        "task.encoder",
        Kind::Place(&CHECKPOINT_SCHEMES),
        "\"runs/mine\"",
        "where the encoder comes from: a run's checkpoints, or weights of mae, timm or \
         transformers; without it from the seed. Pinned when the run is created: `RUN@STEP`, \
         `PATH@blake3:HEX`",
    ),
    maths("task.classes", whole(2, CLASSES_MAX), "10", "classes that labels are from"),
    maths(
        "task.pool",
        Kind::Word(Pool::WORDS),
        "\"avg\"",
        "what the head reads: `avg`, the patches' mean (usual in fine-tuning), `cls`, or `pixels`",
    ),
    maths(
        "task.optimizer",
        Kind::Word(Optimizer::WORDS),
        "\"adamw\"",
        "`adamw` (usual in fine-tuning), `lars` (usual in probes) or `sgd`",
    ),
    maths(
        "task.layer_decay",
        Kind::Number(Interval::above(0.0, 1.0)),
        "0.75",
        "fine-tuning: a layer's learning rate to the next one's",
    ),
    maths("task.drop_path", Kind::Number(Interval::below(0.0, 1.0)), "0.1", DROP_PATH),
    maths(
        "task.mixup",
        Kind::Number(Interval::from(0.0, 2.0)),
        "0.8",
        "fine-tuning: parameter of the Beta distribution by which images are blended, 0 off",
    ),
    maths(
        "task.cutmix",
        Kind::Number(Interval::from(0.0, 2.0)),
        "1.0",
        "fine-tuning: the same for boxes cut from another image; with both, half of the slots each",
    ),
    maths(
        "task.label_smoothing",
        Kind::Number(Interval::below(0.0, 1.0)),
        "0.1",
        "fine-tuning: share of a target that all classes have alike",
    ),
    maths(
        "task.random_erasing",
        Kind::Number(SHARE),
        "0.25",
        "fine-tuning: share of the images in which a box is filled with noise",
    ),
    maths(
        "task.rand_augment",
        Kind::Number(Interval::from(0.0, 10.0)),
        "9.0",
        "fine-tuning: magnitude of two random changes of colours or geometry, 0 off",
    ),
    maths(
        "task.ema",
        Kind::Number(Interval::between(0.0, 1.0)),
        "0.9999",
        "fine-tuning: share that an average of the weights keeps at each update; without it none \
         is kept",
    ),
];
