//! The service itself and its workers.

use std::collections::BTreeMap;
use std::time::Duration;

use lacuna_api::error::{Reason, status};
use lacuna_api::v1;
use lacuna_api::v1::admin_service_server::AdminService;
use lacuna_control::coordinator::Event;
use lacuna_types::{BuildId, RunId, WorkerId};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::messages::workers_of;
use super::{Grpc, ask, bounded, node_of, page};
use crate::bans::Bans;
use crate::clock::now_ms;
use crate::registry::RunHandle;
use crate::run::Input;
use crate::store::Ban;

/// Longest ban: who wants more takes the machine away.
const BAN_SECONDS_MAX: u64 = 10 * 365 * 86_400;

/// Describes a worker that waits for a run.
fn free(id: WorkerId, device: String) -> (String, v1::Worker) {
    let worker_id = id.to_string();
    let state = "free".to_string();
    (worker_id.clone(), v1::Worker { worker_id, state, device, ..Default::default() })
}

/// Describes a worker of a run.
fn of_run(run: &RunId, worker: v1::RunWorker) -> (String, v1::Worker) {
    let v1::RunWorker { worker_id, rank, state, step, phase, device, .. } = worker;
    let run_id = run.to_string();
    let worker = v1::Worker { worker_id, run_id, rank, state, phase, step, device };
    (worker.worker_id.clone(), worker)
}

#[tonic::async_trait]
impl AdminService for Grpc {
    async fn get_info(
        &self,
        _request: Request<v1::GetInfoRequest>,
    ) -> Result<Response<v1::GetInfoResponse>, Status> {
        let build = Some(BuildId::this().into());
        let (coord_epoch, now_ms) = (self.0.epoch.0, now_ms());
        Ok(Response::new(v1::GetInfoResponse { build, coord_epoch, now_ms }))
    }

    async fn list_bans(
        &self,
        _request: Request<v1::ListBansRequest>,
    ) -> Result<Response<v1::ListBansResponse>, Status> {
        let message = |ban: Ban| v1::Ban { node: ban.node, until_ms: ban.until_ms, why: ban.why };
        let bans = self.0.bans.list().into_iter().map(message).collect();
        Ok(Response::new(v1::ListBansResponse { bans }))
    }

    async fn list_workers(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        let v1::ListWorkersRequest { page_size, page_token } = request.into_inner();
        // Those of runs take the place of what is known of them as connected.
        let free = self.0.devices().into_iter().map(|(id, device)| free(id, device));
        let mut all: BTreeMap<String, v1::Worker> = free.collect();
        for (id, handle) in self.0.runs().iter() {
            all.extend(workers_of(handle).into_iter().map(|w| of_run(id, w)));
        }
        let after = all.iter().skip_while(|(id, _)| **id <= page_token);
        let (workers, next_page_token) =
            page(after, page_size, |(_, worker)| worker.clone(), |worker| &worker.worker_id);
        Ok(Response::new(v1::ListWorkersResponse { workers, next_page_token }))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let v1::DrainWorkerRequest { worker_id, why } = request.into_inner();
        let malformed = |err: lacuna_types::NameError| status(Reason::Malformed, err.to_string());
        let worker: WorkerId = worker_id.parse().map_err(malformed)?;
        // An ended run still lists the workers that it had.
        let holds = |h: &&RunHandle| {
            let view = h.ends.view.borrow();
            view.ending.is_none() && view.status.workers.iter().any(|w| w.worker == worker)
        };
        let input = self.0.runs().values().find(holds).map(|h| h.ends.input.clone());
        let waits = self.0.devices().iter().any(|(id, _)| *id == worker);
        let none = || match waits {
            true => status(
                Reason::WrongState,
                format!(
                    "worker {worker} waits for a run and has nothing to hand over: end its agent, \
                     or `lacuna ban {}`",
                    node_of(&worker)
                ),
            ),
            false => status(Reason::WorkerNotFound, format!("no run has a worker {worker}")),
        };
        ask(input.ok_or_else(none)?, Event::Drain { worker: worker.clone(), why: bounded(why) })
            .await?;
        Ok(Response::new(v1::DrainWorkerResponse {}))
    }

    async fn release_worker(
        &self,
        request: Request<v1::ReleaseWorkerRequest>,
    ) -> Result<Response<v1::ReleaseWorkerResponse>, Status> {
        let malformed = |err: lacuna_types::NameError| status(Reason::Malformed, err.to_string());
        let worker: WorkerId = request.into_inner().worker_id.parse().map_err(malformed)?;
        let inputs: Vec<mpsc::Sender<Input>> =
            self.0.runs().values().map(|h| h.ends.input.clone()).collect();
        let mut held = false;
        for input in inputs {
            held |= ask(input, Event::Release { worker: worker.clone() }).await?;
        }
        if !held {
            let text = format!("no run keeps a worker {worker} out");
            return Err(status(Reason::WorkerNotFound, text));
        }
        Ok(Response::new(v1::ReleaseWorkerResponse {}))
    }

    async fn ban_node(
        &self,
        request: Request<v1::BanNodeRequest>,
    ) -> Result<Response<v1::BanNodeResponse>, Status> {
        let v1::BanNodeRequest { node, seconds, why } = request.into_inner();
        let malformed = |err: lacuna_types::NameError| status(Reason::Malformed, err.to_string());
        format!("{node}:cpu0").parse::<WorkerId>().map_err(malformed)?;
        if seconds > BAN_SECONDS_MAX {
            let text = format!("a ban lasts {BAN_SECONDS_MAX} seconds at most, ten years");
            return Err(status(Reason::Malformed, text));
        }
        let why = bounded(why);
        let ban = Bans::ban(&node, Duration::from_secs(seconds), why.clone());
        let written = self.0.store().put_ban(&ban);
        written.map_err(|err| self.0.fail(err))?;
        self.0.bans.set(ban);
        // Those of the machine that wait for a run notice.
        self.0.runs_changed();
        let worker_ids = if seconds > 0 { self.drain_node(&node, &why).await? } else { Vec::new() };
        Ok(Response::new(v1::BanNodeResponse { worker_ids }))
    }
}

impl Grpc {
    /// Takes the workers of a machine out at the next boundary.
    async fn drain_node(&self, node: &str, why: &str) -> Result<Vec<String>, Status> {
        let mut leaving: Vec<(WorkerId, mpsc::Sender<Input>)> = Vec::new();
        for handle in self.0.runs().values() {
            let view = handle.ends.view.borrow();
            if view.ending.is_some() {
                continue;
            }
            let of_node = view.status.workers.iter().filter(|w| node_of(&w.worker) == node);
            leaving.extend(of_node.map(|w| (w.worker.clone(), handle.ends.input.clone())));
        }
        let mut failed: Option<Status> = None;
        for (worker, input) in &leaving {
            let why = format!("its node is kept out: {why}");
            let asked = ask(input.clone(), Event::Drain { worker: worker.clone(), why }).await;
            failed = failed.or(asked.err());
        }
        if let Some(err) = failed {
            return Err(err);
        }
        Ok(leaving.into_iter().map(|(worker, _)| worker.to_string()).collect())
    }
}
