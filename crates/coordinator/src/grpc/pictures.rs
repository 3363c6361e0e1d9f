//! Pictures that trainers draw: looked at, and written down beside everything else.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_api::{PICTURE_BYTES_MAX, v1};
use lacuna_types::{RunId, WorkerId};
use tracing::{debug, warn};

use crate::registry::Shared;
use crate::store::{Entry, PicturePlace, Update};

/// Longest side of a picture, pixels.
const SIDE_MAX: u32 = 16_384;

/// Keeps a picture, unless it is there or is none. Nothing waits for it: a worker that sends more
/// than is written loses some.
pub(super) fn keep(shared: &Arc<Shared>, run: &RunId, worker: &WorkerId, picture: v1::Picture) {
    let v1::Picture { step, index, sample, png } = picture;
    let place = PicturePlace { step, index, sample };
    let Some((width, height)) = size_of(&png) else {
        warn!(run_id = %run, worker_id = %worker, "a picture that is none was sent");
        return;
    };
    if !is_asked_for(shared, run, place) {
        warn!(run_id = %run, worker_id = %worker, step, index, "a picture that nobody asked for");
        return;
    }
    let Ok(turn) = shared.drawing.clone().try_acquire_owned() else {
        debug!(run_id = %run, step, index, "more pictures than are written; one is left out");
        return;
    };
    debug!(run_id = %run, step, index, width, height, "picture");
    let (shared, run) = (shared.clone(), run.clone());
    tokio::spawn(async move {
        let _turn = turn;
        shared.keep_picture(&run, place, png).await;
    });
}

/// Tells whether a run's spec asks for a picture, at a step that the run has come to.
fn is_asked_for(shared: &Shared, run: &RunId, place: PicturePlace) -> bool {
    let runs = shared.runs();
    let Some(handle) = runs.get(run) else { return false };
    let (wanted, resolved) =
        (&handle.spec.track.reconstructions, handle.spec.resolve(handle.n_samples));
    let (Some(wanted), Ok(resolved)) = (wanted, resolved) else { return false };
    let every = wanted.every.steps(resolved.geometry.steps_per_epoch()).unwrap_or(u64::MAX).max(1);
    let is_due = place.step.is_multiple_of(every) || place.step == resolved.total_steps;
    // Marks come behind steps, by at most as many as lie between two of them.
    let has_come = place.step <= handle.ends.view.borrow().status.step.0.saturating_add(every);
    is_due && has_come && place.index < wanted.images && place.step <= resolved.total_steps
}

impl Shared {
    async fn keep_picture(&self, run: &RunId, place: PicturePlace, png: Vec<u8>) {
        let updates = self.runs().get(run).map(|handle| handle.ends.updates.clone());
        let known = self.store().has_picture(run, place);
        let Some(updates) = updates.filter(|_| !known.unwrap_or(true)) else { return };
        let at_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let update = Update::Picture { place, at_ms };
        let entry = Entry::Picture(update.clone(), png);
        // A store that failed takes the service down by itself.
        if let Ok(numbers) = self.scribe.write(run, vec![entry]).await {
            for seq in numbers {
                // Without watchers there is nobody to send to.
                let _ = updates.send((seq, update.clone()));
            }
        }
    }
}

/// Reads width and height of a PNG from its first chunk; `None` if it is none or too large.
pub(crate) fn size_of(png: &[u8]) -> Option<(u32, u32)> {
    const BEGIN: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";
    let sides = png.strip_prefix(BEGIN)?.first_chunk::<8>()?;
    let side =
        |at: usize| u32::from_be_bytes([sides[at], sides[at + 1], sides[at + 2], sides[at + 3]]);
    let allowed = |side: u32| (1..=SIDE_MAX).contains(&side);
    let (width, height) = (side(0), side(4));
    (png.len() <= PICTURE_BYTES_MAX && allowed(width) && allowed(height)).then_some((width, height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_picture_is_told() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x54\0\0\0\x1c rest".to_vec();
        assert_eq!(size_of(&png), Some((84, 28)));
        assert_eq!(size_of(&png[..20]), None, "cut off");
        assert_eq!(size_of(b"<svg onload=alert(1)>"), None);
        png[16] = 1;
        assert_eq!(size_of(&png), None, "16 million pixels wide");
    }
}
