//! Creating runs, and letting those go on that are there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use lacuna_api::error::{Reason, invalid_spec, status};
use lacuna_api::v1;
use lacuna_control::coordinator::Ending;
use lacuna_control::journal::{Record, Saved};
use lacuna_spec::RunSpec;
use lacuna_types::RunId;
use tokio::sync::{OwnedMutexGuard, mpsc};
use tonic::Status;
use tracing::warn;

use super::{Grpc, HELLO_DEADLINE, OPEN_PATIENCE, encoder, facts, going_down, not_found, specs};
use crate::catalogue::Catalogue;
use crate::opening::Unopened;
use crate::registry::lock;
use crate::run::Input;
use crate::store::{StoreError, StoredRun};

/// Refuses places that start from whatever folder a process is in: the caller's is not this one's.
fn whole_places(spec: &RunSpec) -> Result<(), Status> {
    let relative = spec.relative_places();
    let Some((key, place)) = relative.first() else { return Ok(()) };
    let text = format!("`{key}` = `{place}` must be an absolute path or a URL here");
    Err(invalid_spec(text.clone(), vec![(key.to_string(), text)]))
}

/// Keeps two callers from creating a run of one name at a time.
#[derive(Default)]
pub(crate) struct Naming(Mutex<BTreeMap<RunId, Arc<tokio::sync::Mutex<()>>>>);

impl Naming {
    /// Waits until nobody else creates a run of this name.
    async fn turn(&self, id: &RunId) -> OwnedMutexGuard<()> {
        let place = {
            let mut all = lock(&self.0);
            // Whoever holds or awaits one has a share of it.
            all.retain(|_, place| Arc::strong_count(place) > 1);
            all.entry(id.clone()).or_default().clone()
        };
        place.lock_owned().await
    }
}

impl Grpc {
    /// Does what a request asks for; returns the run, and whether it is new.
    pub(super) async fn create_or_resume(
        &self,
        request: v1::CreateRunRequest,
    ) -> Result<(RunId, bool), Status> {
        let v1::CreateRunRequest { spec, resume, n_samples, fingerprint, .. } = request;
        let invalid = |text: String| status(Reason::InvalidSpec, text);
        let mut spec = specs::read(&spec)?;
        whole_places(&spec)?;
        let id = spec.run_id();
        let _turn = self.0.naming.turn(&id).await;
        let elsewhere = |run: Unopened| run.spec.checkpoint.to != spec.checkpoint.to;
        // Whoever moves a run away from a place that does not answer does not wait for that.
        if !self.0.opening.get(&id).is_some_and(elsewhere) {
            self.0.wait_open(&id, OPEN_PATIENCE).await?;
        }
        // What a run was created with counts from its second day on, so it must be open by now.
        let known = self.0.runs().get(&id).map(|handle| handle.spec.clone());
        encoder::pin(&mut spec, known).await?;
        let (n_samples, fingerprint) = if n_samples == 0 && fingerprint.is_empty() {
            let found = facts::look(&mut spec, &self.0.looking).await?;
            (found.n_samples, found.fingerprint)
        } else {
            (n_samples, fingerprint)
        };
        if spec.data.order == lacuna_spec::Order::Auto {
            let text = "`data.order` must be pinned by the client that knows the data";
            return Err(invalid(text.to_string()));
        }
        crate::run::run_config(&spec, n_samples).map_err(invalid)?;
        let created = match self.existing(&id, &spec, n_samples, &fingerprint)? {
            Some(input) => {
                if resume {
                    self.resume(&id, input, spec).await?;
                }
                false
            }
            None => {
                self.create(&id, spec, n_samples, fingerprint).await?;
                true
            }
        };
        Ok((id, created))
    }

    /// Returns the queue of the run of this name, if there is one and `spec` means the same run.
    fn existing(
        &self,
        id: &RunId,
        spec: &RunSpec,
        n_samples: u64,
        fingerprint: &str,
    ) -> Result<Option<mpsc::Sender<Input>>, Status> {
        let Some(input) = self.0.input_of(id) else { return Ok(None) };
        let mut differences = self.0.differences(id, spec);
        if let Some(handle) = self.0.runs().get(id)
            && (handle.n_samples != n_samples || handle.fingerprint != fingerprint)
        {
            differences.push(format!(
                "data: {} samples ({}) -> {n_samples} samples ({fingerprint}) [maths]",
                handle.n_samples, handle.fingerprint
            ));
        }
        if let Some(handle) = self.0.runs().get(id)
            && handle.spec.checkpoint.to != spec.checkpoint.to
        {
            let (old, new) = (&handle.spec.checkpoint.to, &spec.checkpoint.to);
            differences.push(format!("checkpoint.to: {old} -> {new} [fixed while the run exists]"));
        }
        if differences.is_empty() {
            return Ok(Some(input));
        }
        let text = format!(
            "run `{id}` exists and differs:\n  {}\n\
             give the changed run another name",
            differences.join("\n  ")
        );
        Err(status(Reason::RunExists, text))
    }

    async fn resume(
        &self,
        id: &RunId,
        input: mpsc::Sender<Input>,
        spec: RunSpec,
    ) -> Result<(), Status> {
        // A run that is on keeps its spec: what may change of it has calls of its own.
        let view = self.0.runs().get(id).map(|handle| handle.ends.view.clone());
        let view = view.ok_or_else(|| not_found(id))?;
        let ending = view.borrow().ending.clone();
        match ending {
            Some(Ending::Finished { .. }) => Ok(()),
            _ => {
                input.send(Input::Resume(Box::new(spec))).await.map_err(|_| going_down())?;
                let mut view = view;
                let awake = view.wait_for(|view| view.ending.is_none());
                match tokio::time::timeout(HELLO_DEADLINE, awake).await {
                    Ok(Ok(_)) => Ok(()),
                    _ => Err(status(Reason::TimedOut, "the run did not wake up in time")),
                }
            }
        }
    }

    async fn create(
        &self,
        id: &RunId,
        spec: RunSpec,
        n_samples: u64,
        fingerprint: String,
    ) -> Result<(), Status> {
        let (wanted, print, epoch) = (spec.clone(), fingerprint.clone(), self.0.epoch);
        let open = move || Catalogue::open(wanted, n_samples, print, epoch, None);
        let (catalogue, found) = tokio::task::spawn_blocking(open)
            .await
            .map_err(|err| status(Reason::Internal, err.to_string()))?
            .map_err(|err| {
                let to = &spec.checkpoint.to;
                status(Reason::Storage, format!("checkpoints at `{to}` cannot be used: {err}"))
            })?;
        for damaged in &found.damaged {
            warn!(run_id = %id, "{damaged}");
        }
        if spec.checkpoint.resume == lacuna_spec::Resume::Never && found.newest.is_some() {
            let text = format!(
                "run `{id}` has checkpoints at `{}` and `checkpoint.resume` is \"never\"",
                spec.checkpoint.to
            );
            return Err(status(Reason::RunExists, text));
        }
        // Only now: had the new place not been usable, it would be gone from both.
        if !self.0.opening.give_up(id) {
            let text = format!("run `{id}` was opened meanwhile where it was: submit it again");
            return Err(status(Reason::Starting, text));
        }
        // A run that was left alone at the start has a journal: its numbers are not used again.
        let internal = |err: StoreError| status(Reason::Internal, err.to_string());
        let journal = self.0.store().journal(id).map_err(internal)?;
        let mut saved = Saved::replay(journal.iter().map(|line| &line.record));
        let mut news = found.news(&saved);
        if saved.ending.is_some() {
            news.push(Record::Resumed);
        }
        news.iter().for_each(|record| saved.apply(record));
        let stored = StoredRun {
            run_id: id.clone(),
            spec: spec.to_json().to_string(),
            n_samples,
            fingerprint,
            saved,
        };
        let written = {
            let mut store = self.0.store();
            store.put_run(&stored).and_then(|()| store.record(id, &news))
        };
        written.map_err(|err| self.0.fail(err))?;
        let order = self.0.next_order();
        let started = self.0.start_run(stored, spec, catalogue, order);
        started.map_err(|err| status(Reason::InvalidSpec, err))
    }
}
