//! The run as arithmetic: everything that decides a run's bits and is not a tensor operation.
//!
//! Order of samples, random draws, learning rate, decay groups, position tables, initial weights,
//! the exact gradient reduction, AdamW and the digest of the state; and [`eval`], how features are
//! judged. Pure: no clock, no I/O, no threads, no random source of its own; functions of platform C
//! libraries are avoided (`libm` is used), so the same inputs give the same bits everywhere.
//!
//! Start reading at [`step`] (what a step is), [`reduce`] (why the sum does not depend on who
//! computed what) and [`state`] (what a run's state is).
#![forbid(unsafe_code)]

pub mod adamw;
pub mod augment;
pub mod classify;
pub mod digest;
pub mod eval;
pub mod init;
pub mod keymap;
pub mod lars;
pub mod mask;
pub mod model;
pub mod order;
pub mod philox;
pub mod pos_embed;
pub mod prp;
pub mod randaugment;
pub mod reduce;
pub mod schedule;
pub mod state;
pub mod step;
