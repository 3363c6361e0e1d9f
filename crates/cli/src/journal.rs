//! `lacuna journal`: what a coordinator has written down, straight from its state file.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use lacuna_coordinator::clock::rfc3339;
use lacuna_coordinator::store::{JournalLine, SqliteStore, Store as _, StoreError};
use lacuna_types::{RunId, exit};

use crate::Coded;
use crate::serve::default_state;

/// Settings of `lacuna journal`.
#[derive(Args, Debug)]
pub struct JournalArgs {
    /// Name of the run; without one, all runs are listed.
    run: Option<String>,

    /// Folder of the coordinator's state file.
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
}

/// Prints a run's journal, one record a line, or the runs that there are.
pub fn journal(args: JournalArgs) -> anyhow::Result<u8> {
    let failed = |err: StoreError| Coded::error(exit::IO, lacuna_checkpoint::chain(&err));
    let state = args.state.unwrap_or_else(default_state);
    let store = SqliteStore::open_to_read(&state.join("coordinator.sqlite"));
    let store = store.map_err(failed)?;
    let runs = store.runs().map_err(failed)?;
    let Some(run) = &args.run else {
        for run in runs {
            println!("{}\tgeneration {}", run.run_id, run.saved.generation);
        }
        return Ok(exit::OK);
    };
    let id: RunId = run
        .parse()
        .map_err(|err: lacuna_types::NameError| Coded::error(exit::USAGE, err.to_string()))?;
    if !runs.iter().any(|run| run.run_id == id) {
        let text = format!("`{}` holds no run `{id}`", state.display());
        return Err(Coded::error(exit::USAGE, text));
    }
    for JournalLine { seq, at_ms, epoch, record } in store.journal(&id).map_err(failed)? {
        let at = rfc3339(UNIX_EPOCH + Duration::from_millis(at_ms));
        println!("{seq}\t{at}\tstart {epoch}\t{record}");
    }
    Ok(exit::OK)
}
