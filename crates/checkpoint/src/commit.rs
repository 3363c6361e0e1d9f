//! The commit: all receipts become one manifest, created last and only once; and the claims that
//! fence off a coordinator whose time is over.

use std::collections::BTreeMap;

use lacuna_recipe::digest::Crc64;
use lacuna_types::{CoordEpoch, Step};

use crate::aside;
use crate::json::{Hex64, canonical};
use crate::layout::{Attempt, RunDir};
use crate::manifest::{
    InvalidManifest, MANIFEST_BYTES_MAX, Manifest, Parent, RunFacts, SCHEMA, SliceEntry, State,
    TensorEntry, peek_seal,
};
use crate::partition::PARTITION;
use crate::storage::{FsError, Published, chain};
use crate::write::Receipt;

/// What a coordinator knows of the checkpoint that it commits.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    /// Steps behind the state.
    pub step: Step,
    /// The try that all receipts are of.
    pub attempt: Attempt,
    /// The coordinator's start, which it has claimed.
    pub coord_epoch: CoordEpoch,
    /// Number of parts.
    pub world_size: u32,
    /// Time of the commit, RFC 3339.
    pub created: String,
    /// The checkpoint that this state grew from.
    pub parent: Option<Parent>,
    /// What identifies the run's arithmetic.
    pub facts: RunFacts,
    /// The effective run specification, TOML.
    pub spec: String,
}

/// A checkpoint that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its step.
    pub step: Step,
    /// Its manifest's `self`.
    pub manifest: String,
    /// Digest of its state.
    pub state_digest: u64,
}

/// A claim that was not made.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody has this epoch or a later one.
    #[error("coordinator epoch {ours} cannot be claimed: epoch {theirs} is")]
    Taken {
        /// The epoch asked for.
        ours: CoordEpoch,
        /// The highest that is claimed.
        theirs: CoordEpoch,
    },
    /// The file system refused.
    #[error("coordinator epoch {ours} was not claimed")]
    Fs {
        /// The epoch asked for.
        ours: CoordEpoch,
        /// The call that failed.
        #[source]
        source: FsError,
    },
}

/// A commit that was not made, or not seen to be made.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Some writers have not reported.
    #[error("checkpoint step {step}: no receipt of ranks {ranks:?}")]
    MissingReceipts {
        /// Which checkpoint.
        step: Step,
        /// Who is missing.
        ranks: Vec<u32>,
    },
    /// A receipt is of another checkpoint.
    #[error("checkpoint step {step}: receipt of rank {rank} has {field} {found}, not {want}")]
    Foreign {
        /// Which checkpoint.
        step: Step,
        /// Whose receipt.
        rank: u32,
        /// What differs.
        field: &'static str,
        /// What the receipt says.
        found: String,
        /// What the commit is of.
        want: String,
    },
    /// Replicas of the state differ: training has gone wrong somewhere.
    #[error("checkpoint step {step}: replicas differ: {}", list_digests(digests))]
    Divergence {
        /// Which checkpoint.
        step: Step,
        /// State digest of each rank.
        digests: Vec<(u32, Hex64)>,
    },
    /// The receipts do not add up to a state.
    #[error("checkpoint step {step}: receipts do not make a checkpoint")]
    Invalid {
        /// Which checkpoint.
        step: Step,
        /// Why not.
        #[source]
        source: InvalidManifest,
    },
    /// A part is not where its receipt says.
    #[error("checkpoint step {step}: {file} {problem}")]
    Part {
        /// Which checkpoint.
        step: Step,
        /// Which file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Another coordinator has taken over.
    #[error("checkpoint step {step}: coordinator epoch {ours} is fenced off by epoch {theirs}")]
    Fenced {
        /// Which checkpoint.
        step: Step,
        /// Our epoch.
        ours: CoordEpoch,
        /// The highest that is claimed.
        theirs: CoordEpoch,
    },
    /// The coordinator never claimed its epoch.
    #[error("checkpoint step {step}: coordinator epoch {ours} is not claimed")]
    Unclaimed {
        /// Which checkpoint.
        step: Step,
        /// Our epoch.
        ours: CoordEpoch,
    },
    /// There is a checkpoint at this step that is not ours.
    #[error("checkpoint step {step} exists already: {theirs}")]
    Taken {
        /// Which checkpoint.
        step: Step,
        /// What is known of it.
        theirs: String,
        /// Whether its state has the same digest, so that nothing is lost.
        same_state: bool,
    },
    /// The file system refused; committing again with the same receipts is safe.
    #[error("checkpoint step {step} was not committed")]
    Fs {
        /// Which checkpoint.
        step: Step,
        /// The call that failed.
        #[source]
        source: FsError,
    },
}

fn list_digests(digests: &[(u32, Hex64)]) -> String {
    let one = |(rank, digest): &(u32, Hex64)| format!("rank {rank} has {digest}");
    digests.iter().map(one).collect::<Vec<String>>().join(", ")
}

/// Claims a coordinator's start on a run, once and before it commits anything.
pub fn claim(dir: &RunDir, ours: CoordEpoch) -> Result<(), ClaimError> {
    let failed = |source: FsError| ClaimError::Fs { ours, source };
    dir.storage().prepare(dir.root(), &dir.claims()).map_err(failed)?;
    if let Some(theirs) = highest_claim(dir).map_err(failed)?.filter(|theirs| *theirs >= ours) {
        return Err(ClaimError::Taken { ours, theirs });
    }
    let text = canonical(&serde_json::json!({ "coord_epoch": ours.0 })) + "\n";
    let path = dir.claim(ours);
    match dir.storage().create_small(&path, &path, &text).map_err(failed)? {
        Published::Created => Ok(()),
        Published::Exists => Err(ClaimError::Taken { ours, theirs: ours }),
    }
}

/// Returns the highest coordinator start that is claimed.
pub fn highest_claim(dir: &RunDir) -> Result<Option<CoordEpoch>, FsError> {
    let names = dir.storage().names(&dir.claims())?;
    Ok(names.iter().filter_map(|name| RunDir::parse_claim(name)).max())
}

/// Commits a checkpoint from the receipts of all its writers.
///
/// Committing again with the same receipts and context finds the first commit and succeeds, so a
/// lost answer can be asked for again. Readers see the whole checkpoint or none of it. A damaged
/// one that has the place gives way.
pub fn commit(dir: &RunDir, receipts: &[Receipt], ctx: &Context) -> Result<Committed, CommitError> {
    let step = ctx.step;
    let manifest = assemble(dir, receipts, ctx)?;
    check_parts(dir, &manifest)?;
    check_fence(dir, ctx)?;
    let failed = |source: FsError| CommitError::Fs { step, source };
    let path = dir.manifest(step);
    // The name of the temporary file is per attempt, and commits of one attempt are one after
    // another.
    let via = dir.attempt(step, ctx.attempt).join("manifest.json");
    let text = manifest.render();
    let create = || dir.storage().create_small(&via, &path, &text);
    let mut published = create().map_err(failed)?;
    if published == Published::Exists && aside::make_room(dir, step).map_err(failed)? {
        published = create().map_err(failed)?;
    }
    let seal = match published {
        Published::Created => manifest.seal.clone(),
        Published::Exists => check_ours(dir, &manifest)?,
    };
    if let Err(error) = point_latest(dir, &manifest, &seal) {
        // A hint only: readers list the manifests.
        tracing::warn!(step = step.0, error = %chain(&error), "latest.json was not updated");
    }
    Ok(Committed { step, manifest: seal, state_digest: manifest.state_digest.0 })
}

/// Puts receipts together and checks that they are one state.
pub fn assemble(
    dir: &RunDir,
    receipts: &[Receipt],
    ctx: &Context,
) -> Result<Manifest, CommitError> {
    let step = ctx.step;
    let by_rank = sort_receipts(dir, receipts, ctx)?;
    let first = by_rank[0];
    let same = |r: &&Receipt| r.state_digest == first.state_digest && r.counters == first.counters;
    if !by_rank.iter().all(same) {
        let digests = by_rank.iter().map(|r| (r.rank, r.state_digest)).collect();
        return Err(CommitError::Divergence { step, digests });
    }
    let invalid = |source: InvalidManifest| CommitError::Invalid { step, source };
    let mut manifest = Manifest {
        schema: SCHEMA.to_string(),
        run: dir.run().to_string(),
        step: step.0,
        coord_epoch: ctx.coord_epoch.0,
        attempt: ctx.attempt,
        generation: ctx.attempt.generation.0,
        parent: ctx.parent.clone(),
        world_size: ctx.world_size,
        partition: PARTITION.to_string(),
        created: ctx.created.clone(),
        state_digest: first.state_digest,
        state: State {
            counters: first.counters.clone(),
            finite: by_rank.iter().all(|r| r.finite),
            facts: ctx.facts.clone(),
        },
        spec: ctx.spec.clone(),
        files: by_rank.iter().map(|r| r.file.clone()).collect(),
        tensors: gather_tensors(&by_rank).map_err(invalid)?,
        seal: String::new(),
    };
    manifest.check().map_err(invalid)?;
    manifest.seal();
    Ok(manifest)
}

/// Orders receipts by rank; each must be of this attempt, and every rank must have one.
fn sort_receipts<'a>(
    dir: &RunDir,
    receipts: &'a [Receipt],
    ctx: &Context,
) -> Result<Vec<&'a Receipt>, CommitError> {
    let step = ctx.step;
    let mut by_rank: Vec<Option<&Receipt>> = vec![None; ctx.world_size as usize];
    for receipt in receipts {
        let rank = receipt.rank;
        let foreign = |field, found: String, want: String| {
            let error = CommitError::Foreign { step, rank, field, found, want };
            Err(error)
        };
        let pairs = [
            ("run", receipt.run.clone(), dir.run().to_string()),
            ("step", receipt.step.to_string(), step.to_string()),
            ("attempt", receipt.attempt.to_string(), ctx.attempt.to_string()),
            ("world size", receipt.world_size.to_string(), ctx.world_size.to_string()),
            ("partition", receipt.partition.clone(), PARTITION.to_string()),
        ];
        for (field, found, want) in pairs {
            if found != want {
                return foreign(field, found, want);
            }
        }
        let Some(place) = by_rank.get_mut(rank as usize) else {
            return foreign("rank", rank.to_string(), format!("below {}", ctx.world_size));
        };
        // A report may come twice; two different ones may not.
        if let Some(earlier) = place.filter(|earlier| *earlier != receipt) {
            return foreign("digest", receipt.seal.clone(), earlier.seal.clone());
        }
        *place = Some(receipt);
    }
    let missing = (0u32..).zip(&by_rank).filter(|(_, r)| r.is_none()).map(|(rank, _)| rank);
    let ranks: Vec<u32> = missing.collect();
    if !ranks.is_empty() || by_rank.is_empty() {
        return Err(CommitError::MissingReceipts { step, ranks });
    }
    Ok(by_rank.into_iter().flatten().collect())
}

fn gather_tensors(receipts: &[&Receipt]) -> Result<BTreeMap<String, TensorEntry>, InvalidManifest> {
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    for receipt in receipts {
        for slice in &receipt.slices {
            let fresh = || TensorEntry {
                dtype: slice.dtype,
                shape: slice.shape.clone(),
                crc64: Hex64::default(),
                slices: Vec::new(),
            };
            let tensor = tensors.entry(slice.tensor.clone()).or_insert_with(fresh);
            if (tensor.dtype, &tensor.shape) != (slice.dtype, &slice.shape) {
                let problem = format!(
                    "rank {} has {} {:?}, others {} {:?}",
                    receipt.rank,
                    slice.dtype.name(),
                    slice.shape,
                    tensor.dtype.name(),
                    tensor.shape
                );
                return Err(InvalidManifest::Cover { tensor: slice.tensor.clone(), problem });
            }
            let (range, at, crc64) = (slice.range, slice.at, slice.crc64);
            tensor.slices.push(SliceEntry { range, file: receipt.rank, at, crc64 });
        }
    }
    for tensor in tensors.values_mut() {
        tensor.slices.sort_by_key(|slice| (slice.range, slice.file));
        let whole = tensor.slices.iter().fold(Crc64::default(), |sum, slice| {
            let bytes = slice.at[1].saturating_sub(slice.at[0]);
            sum.then(Crc64 { value: slice.crc64.0, bytes })
        });
        tensor.crc64 = Hex64(whole.value);
    }
    Ok(tensors)
}

/// Checks that every part is there with its size.
fn check_parts(dir: &RunDir, manifest: &Manifest) -> Result<(), CommitError> {
    let step = manifest.step();
    let missing = crate::read::first_missing(dir, manifest);
    let missing = missing.map_err(|source| CommitError::Fs { step, source })?;
    let Some((idx, problem)) = missing else { return Ok(()) };
    let file = manifest.files[idx as usize].name.clone();
    Err(CommitError::Part { step, file, problem })
}

fn check_fence(dir: &RunDir, ctx: &Context) -> Result<(), CommitError> {
    let (step, ours) = (ctx.step, ctx.coord_epoch);
    let highest = highest_claim(dir).map_err(|source| CommitError::Fs { step, source })?;
    match highest {
        Some(theirs) if theirs == ours => Ok(()),
        Some(theirs) if theirs > ours => Err(CommitError::Fenced { step, ours, theirs }),
        _ => Err(CommitError::Unclaimed { step, ours }),
    }
}

/// Reads the manifest that took our name: it may be ours, if an earlier answer was lost.
///
/// Returns the seal of the manifest that is there.
fn check_ours(dir: &RunDir, ours: &Manifest) -> Result<String, CommitError> {
    let step = ours.step();
    let path = dir.manifest(step);
    let text = dir.storage().read_small(&path, MANIFEST_BYTES_MAX);
    let text = text.map_err(|source| CommitError::Fs { step, source })?;
    let (theirs, same_state) = match Manifest::parse(&text) {
        // A commit that was repeated at a later time differs in nothing else.
        Ok(theirs) if is_same_commit(&theirs, ours) => return Ok(theirs.seal),
        Ok(theirs) => (
            format!("attempt {} of coordinator epoch {}", theirs.attempt, theirs.coord_epoch),
            theirs.state_digest == ours.state_digest,
        ),
        Err(error) => {
            let seal = peek_seal(&text).unwrap_or_else(|| "no digest".to_string());
            (format!("a damaged manifest ({seal}): {}", chain(&error)), false)
        }
    };
    Err(CommitError::Taken { step, theirs, same_state })
}

fn is_same_commit(theirs: &Manifest, ours: &Manifest) -> bool {
    let mut ours = ours.clone();
    ours.created.clone_from(&theirs.created);
    ours.seal.clone_from(&theirs.seal);
    ours == *theirs
}

fn point_latest(dir: &RunDir, manifest: &Manifest, seal: &str) -> Result<(), FsError> {
    let hint = serde_json::json!({
        "step": manifest.step,
        "attempt": manifest.attempt.to_string(),
        "manifest": seal,
    });
    dir.storage().replace_small(&dir.latest(), &(canonical(&hint) + "\n"))
}

#[cfg(test)]
mod tests;
