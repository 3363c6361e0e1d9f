//! A trainer process: one device, one run at a time.

pub mod job;
pub mod saver;
pub mod session;
pub mod shared;
pub mod step_loop;
mod sync;
pub mod uplink;

use std::sync::Arc;

use anyhow::Context as _;
use lacuna_collective::{Exposure, TrainerListener};
use lacuna_types::{Incarnation, WorkerId};

use crate::args::TrainerArgs;
use crate::engine::Backend;

/// Runs a trainer until its run, its agent or its coordinator ends it; returns the exit code.
pub fn run(args: TrainerArgs, backend: Arc<dyn Backend>) -> anyhow::Result<u8> {
    let worker: WorkerId = args.worker_id.parse().context("read --worker-id")?;
    let incarnation = Incarnation(args.incarnation);
    let listener = TrainerListener::bind(args.bind_addr, args.advertise_addr, Exposure::Loopback)
        .context("listen for peers")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the control thread")?;
    let session = session::Driver::new(args, worker, incarnation, listener, backend);
    Ok(runtime.block_on(session.run()))
}
