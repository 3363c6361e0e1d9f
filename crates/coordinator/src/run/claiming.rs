//! Taking a run's checkpoints back, when it goes on.

use std::time::Duration;

use lacuna_spec::RunSpec;

use super::RunTask;
use crate::catalogue::{Catalogue, Found};
use crate::store::StoredRun;

/// How long claiming may take: the run stands still anyway.
const CLAIMING: Duration = Duration::from_secs(120);

impl RunTask {
    /// Claims the run's checkpoints where this coordinator has not, or another one has since, and
    /// tells what is there by now; nothing where the claim still holds.
    pub(super) async fn claim_again(&mut self, spec: &RunSpec) -> Result<Option<Found>, String> {
        let (catalogue, spec) = (self.catalogue.clone(), spec.clone());
        let StoredRun { n_samples, fingerprint, .. } = &self.stored;
        let (n_samples, print, epoch) = (*n_samples, fingerprint.clone(), self.shared.epoch);
        let open = move || match catalogue.has_claim()? {
            true => Ok(None),
            false => Catalogue::open(spec, n_samples, print, epoch, None).map(Some),
        };
        let opened = tokio::time::timeout(CLAIMING, tokio::task::spawn_blocking(open)).await;
        let opened = opened.map_err(|_| format!("its checkpoints gave no answer for {CLAIMING:?}"));
        let opened = opened?.map_err(|err| err.to_string())?.map_err(|err| err.to_string())?;
        Ok(opened.map(|(catalogue, found)| {
            self.catalogue = catalogue;
            found
        }))
    }
}
