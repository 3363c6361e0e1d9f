//! The run specification: TOML text to located values to a validated [`RunSpec`].
//!
//! A spec is a stack of layers: the built-in defaults, a preset or other files named by `base`,
//! the file itself, and `--set` overrides. The layers are merged key by key, every value remembers
//! where it was written, and one pass turns them into a [`RunSpec`] or into all [`Problems`] at
//! once.
//!
//! Pure: files are read through a closure of the caller; no clock, no threads, no environment. This
//! crate does not open data, talk to a coordinator, or know how a run is executed.
//!
//! Start reading at [`parse_file`] (how text becomes a spec), [`RunSpec`] (what a spec holds) and
//! [`fields`] (what each key means, and whether it changes the result of a run).
#![forbid(unsafe_code)]

pub mod classifier;
pub mod fields;
mod load;
mod node;
pub mod plan;
pub mod presets;
mod problem;
pub mod reference;
mod render;
mod run_spec;
pub mod schema;
mod syntax;
pub mod units;
mod validate;

pub use fields::{DefaultValue, Field, FieldDiff, Interval, Kind, Mark, diff, fields};
pub use load::{
    INHERITANCE_DEPTH_MAX, Loaded, OVERRIDES_MAX, ReadText, SPEC_BYTES_MAX, from_json, parse_file,
    parse_text,
};
pub use plan::{Memory, PlanReport, WorkerRow, plan, task_warnings};
pub use problem::{PROBLEMS_MAX, Place, Problem, Problems, SpecError};
pub use run_spec::{
    AutoOr, BAD_SAMPLES_FREE, BAD_SAMPLES_SHARE, BadSamples, CHECKPOINT_SCHEMES, CacheMode,
    CacheSpec, CheckpointSpec, DATA_SCHEMES, DEADLINE_SECONDS, DataSpec, ElasticSpec, EncoderPin,
    KeepSpec, OptimSpec, Optimizer, Order, Pool, Precision, RECONSTRUCTIONS, RECONSTRUCTIONS_MAX,
    ReconstructionsSpec, Reduce, ResolveError, Resolved, Resume, RunSpec, SLOTS_MAX, TaskKind,
    TaskSpec, TrackSpec, TrainSpec, WhenBusy, Workers, encoder_at,
};
pub use units::{Cadence, Length};
