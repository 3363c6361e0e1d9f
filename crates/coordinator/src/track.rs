//! Writing what people's tools read of a run: TensorBoard's files, metrics and events.
//!
//! A follower reads from the state file what is written down already: it is never in a run's way,
//! loses nothing when it was away, and writes nothing twice, since the files say how far they go.

mod mirror;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lacuna_track::{Body, Record, TrackError, Tracker};
use lacuna_types::RunId;
use tokio::sync::{mpsc, watch};

use self::mirror::{Mirror, MirrorError};
use crate::grpc::pictures::size_of;
use crate::registry::Shared;
use crate::run::{Input, View};
use crate::store::{PicturePlace, SqliteStore, Store as _, StoreError, Update};

/// Shortest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long to leave files alone that could not be written.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// Updates read at once.
const PAGE: u64 = 512;

/// Why files are not written.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Track(#[from] TrackError),
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    #[error(
        "`{}` has records up to {files}, the state file up to {state}: another run wrote there, or \
         the state file lost its newest updates with the machine; give `track.tensorboard` another \
         folder",
        folder.display()
    )]
    Ahead { folder: PathBuf, files: u64, state: u64 },
}

/// Follows one run into one folder.
pub(crate) struct Follower {
    pub shared: Arc<Shared>,
    pub run: RunId,
    pub folder: PathBuf,
    /// URL of a folder that gets copies of the files.
    pub copies: Option<String>,
    /// The spec, for people.
    pub spec: String,
    /// Where what goes wrong is told.
    pub remarks: mpsc::Sender<Input>,
}

impl Follower {
    /// Writes until the service closes, and then what is left.
    pub async fn run(self, mut view: watch::Receiver<View>, mut closing: watch::Receiver<bool>) {
        let follower = Arc::new(self);
        let mut open: Option<Open> = None;
        let mut mirror: Option<Mirror> = None;
        let mut told = false;
        loop {
            let last = *closing.borrow_and_update();
            let ended = view.borrow_and_update().ending.is_some();
            let (worker, before) = (follower.clone(), open.take());
            let Ok(turn) = follower.shared.tracking.clone().acquire_owned().await else { return };
            let work = move || {
                let _turn = turn;
                worker.follow(before)
            };
            let written = tokio::task::spawn_blocking(work).await;
            let done = match written {
                Ok(Ok(now)) => {
                    open = Some(now);
                    // Not in that turn: a store that does not answer holds nobody else up.
                    let (worker, before) = (follower.clone(), mirror.take());
                    let Ok(turn) = follower.shared.copying.clone().acquire_owned().await else {
                        return;
                    };
                    let copy = move || {
                        let _turn = turn;
                        worker.copy(before, last || ended)
                    };
                    tokio::task::spawn_blocking(copy).await
                }
                Ok(Err(err)) => Ok(Err(err)),
                Err(panic) => Err(panic),
            };
            let pause = match done {
                Ok(Ok(now)) => {
                    (mirror, told) = (now, false);
                    LOOK_EVERY
                }
                Ok(Err(err)) => {
                    if !told {
                        follower.tell(&err).await;
                    }
                    told = true;
                    TRY_AGAIN
                }
                // A bug, which the panic has told.
                Err(_) => return,
            };
            if last {
                return;
            }
            let rest = async {
                tokio::time::sleep(pause).await;
                // The run's task is gone where this fails, and the service closes.
                let _ = view.changed().await;
            };
            tokio::select! {
                () = rest => {}
                changed = closing.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn tell(&self, err: &FollowError) {
        let text = format!("files of `track.tensorboard`: {}", lacuna_checkpoint::chain(err));
        // Nobody is left to tell where the run's task is gone.
        let _ = self.remarks.send(Input::Remark { warning: true, text }).await;
    }

    /// Writes what the files lack.
    fn follow(&self, open: Option<Open>) -> Result<Open, FollowError> {
        let mut open = match open {
            Some(open) => open,
            None => self.open()?,
        };
        loop {
            let page = open.store.updates(&self.run, open.tracker.last_seq(), PAGE)?;
            if page.is_empty() {
                open.tracker.flush()?;
                return Ok(open);
            }
            for (seq, update) in page {
                let record = self.record(&open.store, seq, update)?;
                open.tracker.take(&[record])?;
            }
        }
    }

    /// Copies files that have grown to where the run wants them, if that is due or `now`.
    fn copy(&self, mirror: Option<Mirror>, now: bool) -> Result<Option<Mirror>, FollowError> {
        let Some(url) = &self.copies else { return Ok(None) };
        let mut mirror = match mirror {
            Some(mirror) => mirror,
            None => Mirror::open(url, &self.folder)?,
        };
        mirror.copy(now)?;
        Ok(Some(mirror))
    }

    fn record(&self, store: &SqliteStore, seq: u64, update: Update) -> Result<Record, StoreError> {
        let (at_ms, body) = match update {
            Update::Event { kind, warning, text, at_ms } => {
                (at_ms, Body::Event { kind, warning, text })
            }
            Update::Figures { figures, at_ms } => (at_ms, Body::Figures(figures)),
            Update::Picture { place, at_ms } => (at_ms, self.picture(store, place)?),
        };
        Ok(Record { seq, at_ms, body })
    }

    fn picture(&self, store: &SqliteStore, place: PicturePlace) -> Result<Body, StoreError> {
        let PicturePlace { step, index, sample } = place;
        let png = store.picture(&self.run, step, index)?;
        Ok(match png.and_then(|png| Some((size_of(&png)?, png))) {
            Some(((width, height), png)) => {
                let tag = format!("reconstruction/{index:02}_sample_{sample}");
                Body::Image { tag, step, png, width, height, channels: 3 }
            }
            // These files were away for so long that newer pictures took its place.
            None => Body::Event {
                kind: "picture".to_string(),
                warning: false,
                text: format!("picture {index} of step {step} is no longer kept"),
            },
        })
    }

    fn open(&self) -> Result<Open, FollowError> {
        let store = SqliteStore::open_to_read(&self.shared.state_file())?;
        if let Some(url) = &self.copies {
            Mirror::restore(url, &self.folder)?;
        }
        let tracker = Tracker::open(&self.folder, now_ms())?.with_spec(&self.spec);
        let (files, state) = (tracker.last_seq(), store.last_seq(&self.run)?);
        if files > state {
            return Err(FollowError::Ahead { folder: self.folder.clone(), files, state });
        }
        Ok(Open { store, tracker })
    }
}

/// What is open while files are written.
struct Open {
    store: SqliteStore,
    tracker: Tracker,
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}
