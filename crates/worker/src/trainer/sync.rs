//! Getting every member to one state: from the seed, a checkpoint, or a peer's memory.

use std::time::Duration;

use lacuna_checkpoint::load::{Expected, LoadError, find_step, load_into};
use lacuna_collective::{Collective, CollectiveError};
use lacuna_control::plan::{Origin, Sync};
use lacuna_recipe::state::{Counters, Section};

use super::job::Job;
use crate::engine::{Engine, EngineError};

/// Elements of one broadcast: bounds the buffer, and is large enough for any network.
const CHUNK: usize = 1 << 22;
/// Longest a single chunk may take.
const CHUNK_DEADLINE: Duration = Duration::from_secs(60);
/// Largest encoding of the counters: at most four bytes for 2048 elements of the parameters.
const COUNTERS_BYTES_MAX: usize = 64 << 20;

/// A synchronisation that failed.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The communicator failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(Box<lacuna_checkpoint::load::LoadError>),
    /// Another checkpoint stands where the named one should.
    #[error("the checkpoint of step {step} is {found}, not {want}")]
    OtherCheckpoint {
        /// The step.
        step: u64,
        /// Manifest found.
        found: String,
        /// Manifest named by the coordinator.
        want: String,
    },
    /// A peer sent something that is no state.
    #[error("the peer's state cannot be read: {0}")]
    Peer(String),
}

/// Brings engine and counters to the plan's state. `counters` is what this worker has, if anything.
pub(super) fn synchronise(
    job: &Job,
    engine: &mut dyn Engine,
    counters: Option<Counters>,
    comm: &mut dyn Collective,
    sync: &Sync,
) -> Result<Counters, SyncError> {
    match &sync.origin {
        Origin::Seed => from_seed(job, engine),
        Origin::Checkpoint { manifest } => {
            from_checkpoint(job, engine, sync.resume_step.0, manifest)
        }
        Origin::Memory { source, healed } => {
            let mine = healed.contains(&comm.rank());
            if healed.is_empty() {
                return Ok(counters.expect("a member that is not healed has a state"));
            }
            from_peer(engine, counters, comm, *source, mine)
        }
    }
}

fn from_seed(job: &Job, engine: &mut dyn Engine) -> Result<Counters, SyncError> {
    let layout = engine.layout().clone();
    for block in 0..layout.n_blocks() {
        let range = layout.range(block);
        let mut values = vec![0f32; range.len()];
        engine.write(Section::ExpAvg, range.start, &values)?;
        engine.write(Section::ExpAvgSq, range.start, &values)?;
        engine.initial(block, job.spec.train.seed, &mut values);
        engine.write(Section::Param, range.start, &values)?;
    }
    Ok(job.reduction().fresh(&layout, job.spec.train.batch))
}

fn from_checkpoint(
    job: &Job,
    engine: &mut dyn Engine,
    step: u64,
    manifest: &str,
) -> Result<Counters, SyncError> {
    let layout = engine.layout().clone();
    let spec_digest = job.spec_digest();
    let expected = Expected {
        layout: &layout,
        spec_digest: Some(&spec_digest),
        data_fingerprint: Some(&job.fingerprint),
        seed: Some(job.spec.train.seed),
    };
    let failed = |err: LoadError| SyncError::Checkpoint(Box::new(err));
    let found = find_step(&job.dir, lacuna_types::Step(step)).map_err(failed)?;
    if found.seal != manifest {
        let (found, want) = (found.seal, manifest.to_string());
        return Err(SyncError::OtherCheckpoint { step, found, want });
    }
    let mut written: Result<(), EngineError> = Ok(());
    let counters = load_into(&job.dir, &found, &expected, &mut |section, at, values| {
        if written.is_ok() {
            written = engine.write(section, at, values);
        }
    });
    written?;
    let mut counters = counters.map_err(failed)?;
    job.reduction().fit(&layout, &mut counters);
    Ok(counters)
}

/// Broadcasts the source's counters and sections; only those who are healed (`mine`) take them.
fn from_peer(
    engine: &mut dyn Engine,
    counters: Option<Counters>,
    comm: &mut dyn Collective,
    source: usize,
    mine: bool,
) -> Result<Counters, SyncError> {
    let sends = comm.rank() == source;
    let mut text: Vec<u8> = match &counters {
        Some(counters) if sends => serde_json::to_vec(counters).expect("plain structs are JSON"),
        _ => Vec::new(),
    };
    let mut length = (text.len() as u64).to_le_bytes();
    comm.broadcast(source, &mut length, CHUNK_DEADLINE)?;
    let length = u64::from_le_bytes(length) as usize;
    if length > COUNTERS_BYTES_MAX {
        return Err(SyncError::Peer(format!("counters of {length} bytes")));
    }
    text.resize(length, 0);
    comm.broadcast(source, &mut text, CHUNK_DEADLINE)?;
    let received: Counters =
        serde_json::from_slice(&text).map_err(|err| SyncError::Peer(err.to_string()))?;

    let n = engine.layout().numel();
    let mut buffer = vec![0f32; CHUNK.min(n)];
    for section in Section::ALL {
        for at in (0..n).step_by(CHUNK) {
            let values = &mut buffer[..CHUNK.min(n - at)];
            let range = at..at + values.len();
            if sends {
                engine.read(section, range, values)?;
            }
            comm.broadcast(source, bytemuck::cast_slice_mut(values), CHUNK_DEADLINE)?;
            if mine {
                engine.write(section, at, values)?;
            }
        }
    }
    Ok(match counters {
        Some(own) if !mine => own,
        _ => received,
    })
}
