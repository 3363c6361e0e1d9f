//! The files of a run that people's tools read, derived from its numbered updates.
//!
//! | file | holds |
//! |---|---|
//! | `events.out.tfevents.*` | TensorBoard's events: scalars, pictures, the spec as text |
//! | `metrics.jsonl` | a line for each record of figures |
//! | `events.jsonl` | a line for each event, and one that names each picture |
//!
//! Each of the three knows by itself how far it got: lines carry the number of their record, and
//! so do TensorBoard's events, in a field that other readers skip. Lines that do not follow on
//! the number before say in `after` what they follow on. So a [`Tracker`] that is opened after a
//! crash finds up to where all is there ([`Tracker::last_seq`]) whatever end was torn off, and
//! what it is fed again goes only where it is missing. Event files are never appended to: each
//! life begins its own, under a name that sorts last.
//!
//! What this crate does not do: it reads no clock, starts no thread, draws no picture and keeps
//! nothing from before. It does not wait for the disk either: what was flushed survives the end of
//! the process; what a crash of the machine takes from the ends is fed again.
//!
//! Start reading at [`Tracker`]; `board.rs` is TensorBoard's side, `lines.rs` the other.
#![forbid(unsafe_code)]

mod board;
mod error;
mod frame;
mod lines;
mod message;
mod record;
mod tracker;

pub use board::write_scalars;
pub use error::TrackError;
pub use frame::{EventReader, read_events};
pub use message::{
    Event, Image, PluginData, SESSION_START, SessionLog, Summary, SummaryMetadata, Tensor,
    TensorDim, TensorShape, Value,
};
pub use record::{Body, Figures, Record};
pub use tracker::{EVENTS_FILE, METRICS_FILE, Tracker};

#[cfg(test)]
mod tests;
