//! Checkpoints of the runs that this coordinator has. Reading them takes threads of their own.

use std::time::{Duration, SystemTime};

use lacuna_api::error::{Reason, status};
use lacuna_api::v1;
use lacuna_api::v1::checkpoint_service_server::CheckpointService;
use lacuna_checkpoint::catalog::{self, Entry, Status as Found};
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::manifest::{MANIFEST_BYTES_MAX, Manifest};
use lacuna_checkpoint::retain::{self, Hold};
use lacuna_checkpoint::storage::Published;
use lacuna_types::Step;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{BoxStream, Grpc, bounded, parse_run};
use crate::clock::rfc3339;

/// Bytes of a manifest in one message.
const PIECE_BYTES: usize = 256 << 10;
/// How often a caller hears that a checkpoint is still being read.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
/// How long a caller waits for its turn to read.
const TURN_DEADLINE: Duration = Duration::from_secs(3);
/// Who holds what is pinned through this service.
const HOLDER: &str = "pinned";

fn storage(error: impl std::error::Error + 'static) -> Status {
    status(Reason::Storage, lacuna_checkpoint::chain(&error))
}

fn no_checkpoint(dir: &RunDir, step: u64) -> Status {
    let text = format!("run `{}` has no checkpoint at step {step}", dir.run());
    status(Reason::CheckpointNotFound, text)
}

impl Grpc {
    /// Works on a thread that may wait: a few callers at a time, since commits need threads, too.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let turn = self.0.reading.clone().acquire_owned();
        let Ok(Ok(turn)) = tokio::time::timeout(TURN_DEADLINE, turn).await else {
            let text = "too many callers read at a time; try again";
            return Err(status(Reason::RateLimited, text));
        };
        let work = move || {
            let _turn = turn;
            work()
        };
        run_blocking(work).await
    }
}

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|err| Err(status(Reason::Internal, err.to_string())))
}

fn describe(dir: &RunDir, entry: &Entry, holds: &[Hold]) -> Result<v1::Checkpoint, Status> {
    let step = entry.step.0;
    let now = rfc3339(SystemTime::now());
    let pinned = holds.iter().any(|hold| hold.step == entry.step && !hold.is_over(&now));
    Ok(match &entry.status {
        Found::Damaged { reason } => {
            v1::Checkpoint { step, damage: reason.clone(), pinned, ..Default::default() }
        }
        Found::Good(manifest) => v1::Checkpoint {
            step,
            damage: String::new(),
            created: manifest.created.clone(),
            parts: manifest.world_size,
            bytes: manifest.files.iter().map(|file| file.bytes).sum(),
            loss: manifest.state.facts.loss.last,
            digest: manifest.state_digest.0,
            verified: catalog::is_verified(dir, manifest).map_err(storage)?,
            pinned,
        },
    })
}

impl Grpc {
    /// Finds a run's checkpoints; what it returns opens their place, which may take its time.
    fn run_dir(
        &self,
        run_id: &str,
    ) -> Result<impl FnOnce() -> Result<RunDir, Status> + Send + 'static, Status> {
        let id = parse_run(run_id)?;
        let to = self.spec_of(&id)?.checkpoint.to;
        Ok(move || RunDir::open(&to, id).map_err(storage))
    }
}

/// Finds the usable checkpoint of a step.
fn manifest_of(dir: &RunDir, step: u64) -> Result<Manifest, Status> {
    let entry = catalog::look(dir, Step(step)).map_err(storage)?;
    match entry.ok_or_else(|| no_checkpoint(dir, step))?.status {
        Found::Good(manifest) => Ok(*manifest),
        Found::Damaged { reason } => Err(status(Reason::CheckpointCorrupt, reason)),
    }
}

/// Pins a checkpoint, or lets it go; either may have been done before.
fn pin(dir: &RunDir, step: u64, pinned: bool, why: &str) -> Result<(), Status> {
    let name = format!("{HOLDER}-{step}");
    if !pinned {
        return match retain::release(dir, &name) {
            Err(error) if !error.is_not_found() => Err(storage(error)),
            _ => Ok(()),
        };
    }
    let is_there = || catalog::find(dir, Step(step)).map_err(storage).map(|found| found.is_some());
    if !is_there()? {
        return Err(no_checkpoint(dir, step));
    }
    let hold = Hold { name, step: Step(step), why: why.to_string(), until: None };
    let published = retain::hold(dir, &hold).map_err(storage)?;
    // Retention may have been removing it before the pin was there.
    if published == Published::Created && !is_there()? {
        retain::release(dir, &hold.name).map_err(storage)?;
        return Err(no_checkpoint(dir, step));
    }
    Ok(())
}

#[tonic::async_trait]
impl CheckpointService for Grpc {
    type GetManifestStream = BoxStream<v1::GetManifestResponse>;
    type VerifyCheckpointStream = BoxStream<v1::VerifyCheckpointResponse>;

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        let dir = self.run_dir(&request.into_inner().run_id)?;
        let list = move || {
            let dir = dir()?;
            let entries = catalog::list(&dir).map_err(storage)?;
            let holds = retain::holds(&dir).map_err(storage)?;
            entries.iter().map(|entry| describe(&dir, entry, &holds)).collect()
        };
        let checkpoints = self.blocking(list).await?;
        Ok(Response::new(v1::ListCheckpointsResponse { checkpoints }))
    }

    async fn get_manifest(
        &self,
        request: Request<v1::GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        let v1::GetManifestRequest { run_id, step } = request.into_inner();
        let dir = self.run_dir(&run_id)?;
        let read = move || {
            let dir = dir()?;
            let path = dir.manifest(Step(step));
            dir.storage().read_small(&path, MANIFEST_BYTES_MAX).map_err(|error| {
                if error.is_not_found() { no_checkpoint(&dir, step) } else { storage(error) }
            })
        };
        let text = self.blocking(read).await?;
        let pieces: Vec<Result<v1::GetManifestResponse, Status>> = text
            .chunks(PIECE_BYTES)
            .map(|piece| Ok(v1::GetManifestResponse { piece: piece.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn pin_checkpoint(
        &self,
        request: Request<v1::PinCheckpointRequest>,
    ) -> Result<Response<v1::PinCheckpointResponse>, Status> {
        let v1::PinCheckpointRequest { run_id, step, pinned, why } = request.into_inner();
        let dir = self.run_dir(&run_id)?;
        self.blocking(move || pin(&dir()?, step, pinned, &bounded(why))).await?;
        Ok(Response::new(v1::PinCheckpointResponse {}))
    }

    async fn verify_checkpoint(
        &self,
        request: Request<v1::VerifyCheckpointRequest>,
    ) -> Result<Response<Self::VerifyCheckpointStream>, Status> {
        let v1::VerifyCheckpointRequest { run_id, step } = request.into_inner();
        let dir = self.run_dir(&run_id)?;
        let Ok(turn) = self.0.verifying.clone().try_acquire_owned() else {
            let text = "other checkpoints are being read; ask again when they are";
            return Err(status(Reason::RateLimited, text));
        };
        let find = move || {
            let dir = dir()?;
            let manifest = manifest_of(&dir, step)?;
            Ok((dir, manifest))
        };
        let (dir, manifest) = self.blocking(find).await?;
        let (out, answers) = mpsc::channel(4);
        let read = move || {
            let _turn = turn;
            let verified = catalog::verify_and_mark(&dir, &manifest).map_err(storage)?;
            let (bytes, problems) = (verified.bytes, verified.problems);
            Ok(v1::VerifyCheckpointResponse { done: true, bytes, problems })
        };
        tokio::spawn(async move {
            let mut reading = std::pin::pin!(run_blocking(read));
            let last = loop {
                tokio::select! {
                    done = &mut reading => break done,
                    () = tokio::time::sleep(SIGN_OF_LIFE) => {
                        if out.send(Ok(v1::VerifyCheckpointResponse::default())).await.is_err() {
                            // Reading goes on: its result stands beside the checkpoint.
                            return;
                        }
                    }
                }
            };
            // Nobody waits any more where it fails.
            let _ = out.send(last).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}
