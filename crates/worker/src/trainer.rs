//! A trainer process: one device, one run at a time.

pub mod bad_samples;
pub mod fault;
pub mod job;
mod meter;
pub mod metrics;
mod reconstructions;
pub mod save_meter;
pub mod saver;
pub mod session;
pub mod shared;
mod snapshot;
pub mod step_loop;
mod sync;
pub mod uplink;

use std::sync::Arc;

use anyhow::Context as _;
use lacuna_collective::{Exposure, TrainerListener};
use lacuna_types::{Incarnation, WorkerId, exit};

use crate::args::TrainerArgs;
use crate::engine::Backend;
use crate::entry::CodedError;
use crate::transport::{Peers, Transport};

/// Runs a trainer until its run, its agent or its coordinator ends it; returns the exit code.
pub fn run(args: TrainerArgs, backend: Arc<dyn Backend>) -> anyhow::Result<u8> {
    let worker: WorkerId = args.worker_id.parse().context("read --worker-id")?;
    let incarnation = Incarnation(args.incarnation);
    backend.prepare(&args.device).map_err(|err| unfit(&err)).context("prepare the device")?;
    let transport = Transport::open(&args.transport, &args.device)
        .map_err(|err| unfit(&err))
        .context("prepare the collective")?;
    let usage = |err: &dyn std::error::Error| CodedError {
        code: exit::USAGE,
        message: lacuna_checkpoint::chain(err),
    };
    let credentials = args.credentials.read().map_err(|err| usage(&err))?;
    let exposure = if credentials.is_empty() { Exposure::Loopback } else { Exposure::Trusted };
    let listener = TrainerListener::bind(args.bind_addr, args.advertise_addr, exposure)
        .context("listen for peers")?;
    let peers = Peers { listener, transport };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the control thread")?;
    let session = session::Driver::new(args, worker, incarnation, peers, backend);
    Ok(runtime.block_on(session.run()))
}

/// This device cannot take part, whoever starts the trainer again.
fn unfit(err: &dyn std::error::Error) -> CodedError {
    CodedError { code: exit::UNFIT, message: lacuna_checkpoint::chain(err) }
}
