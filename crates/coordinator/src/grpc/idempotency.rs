//! Requests that come twice, because the answer to the first got lost, are carried out once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use lacuna_api::error::{Reason, status};
use lacuna_api::v1;
use lacuna_types::RunId;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::OwnedMutexGuard;
use tonic::Status;

use crate::registry::lock;

/// So many requests are remembered.
const KEPT: usize = 1000;
/// Longest id of a request.
const ID_MAX: usize = 64;

/// A run, and whether it is new.
pub(super) type Answer = (RunId, bool);

/// The newest requests that have an id, and what came of them.
#[derive(Default)]
pub(crate) struct Once(Mutex<VecDeque<Known>>);

struct Known {
    id: String,
    request: [u8; 32],
    /// Held while the request is carried out; empty where that failed.
    answer: Arc<tokio::sync::Mutex<Option<Answer>>>,
}

/// The right to carry a request out, which others with the same id wait for.
pub(super) struct Turn(Option<OwnedMutexGuard<Option<Answer>>>);

impl Turn {
    /// Returns what came of the request, if it was carried out.
    pub(super) fn answer(&self) -> Option<Answer> {
        self.0.as_deref().cloned().flatten()
    }

    /// Remembers what came of the request, and returns it.
    pub(super) fn keep(&mut self, answer: Answer) -> Answer {
        if let Some(kept) = self.0.as_deref_mut() {
            *kept = Some(answer.clone());
        }
        answer
    }
}

impl Once {
    /// Waits for the turn of a request; one without an id has it at once.
    ///
    /// # Errors
    /// `MALFORMED` for an id that is none, or that another request had.
    pub(super) async fn turn(&self, request: &v1::CreateRunRequest) -> Result<Turn, Status> {
        let id = &request.request_id;
        if id.is_empty() {
            return Ok(Turn(None));
        }
        if id.len() > ID_MAX || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
            let text = format!("`request_id` has {ID_MAX} printable characters at most");
            return Err(status(Reason::Malformed, text));
        }
        let digest: [u8; 32] = Sha256::digest(request.encode_to_vec()).into();
        let answer = self.place_of(id, digest)?;
        Ok(Turn(Some(answer.lock_owned().await)))
    }

    fn place_of(
        &self,
        id: &str,
        request: [u8; 32],
    ) -> Result<Arc<tokio::sync::Mutex<Option<Answer>>>, Status> {
        let mut all = lock(&self.0);
        if let Some(known) = all.iter().find(|known| known.id == id) {
            if known.request != request {
                let text = format!("another request had the `request_id` {id} before");
                return Err(status(Reason::Malformed, text));
            }
            return Ok(known.answer.clone());
        }
        if all.len() == KEPT {
            all.pop_front();
        }
        let answer: Arc<tokio::sync::Mutex<Option<Answer>>> = Arc::default();
        all.push_back(Known { id: id.to_string(), request, answer: answer.clone() });
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str, spec: &str) -> v1::CreateRunRequest {
        let (request_id, spec) = (id.to_string(), spec.to_string());
        v1::CreateRunRequest { spec, request_id, ..Default::default() }
    }

    #[tokio::test]
    async fn a_request_that_comes_again_is_answered_as_it_was() {
        let once = Once::default();
        let answer: Answer = ("x".parse().unwrap(), true);
        {
            let mut first = once.turn(&request("a", "s")).await.unwrap();
            assert_eq!(first.answer(), None);
            let again = request("a", "s");
            let mut second = std::pin::pin!(once.turn(&again));
            let waker = std::task::Waker::noop();
            let mut context = std::task::Context::from_waker(waker);
            assert!(second.as_mut().poll(&mut context).is_pending(), "it waits for the first");
            first.keep(answer.clone());
            drop(first);
            assert_eq!(second.await.unwrap().answer(), Some(answer.clone()));
        }
        // One that failed is tried again.
        drop(once.turn(&request("b", "s")).await.unwrap());
        assert_eq!(once.turn(&request("b", "s")).await.unwrap().answer(), None);
        // Without an id each one counts.
        let mut turn = once.turn(&request("", "s")).await.unwrap();
        turn.keep(answer);
        assert_eq!(once.turn(&request("", "s")).await.unwrap().answer(), None);
    }

    #[tokio::test]
    async fn ids_that_cannot_be() {
        let once = Once::default();
        drop(once.turn(&request("a", "s")).await.unwrap());
        for (id, spec) in [("a", "t"), ("a b", "s"), (&"x".repeat(65), "s")] {
            let refused = once.turn(&request(id, spec)).await.err().unwrap();
            assert!(refused.message().contains("`request_id`"), "{refused}");
        }
    }

    #[tokio::test]
    async fn old_ones_are_forgotten() {
        let once = Once::default();
        for n in 0..=KEPT {
            drop(once.turn(&request(&n.to_string(), "s")).await.unwrap());
        }
        assert_eq!(lock(&once.0).len(), KEPT);
        once.turn(&request("0", "another")).await.map(drop).unwrap();
    }
}
