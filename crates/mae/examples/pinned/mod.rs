//! How a program comes to have the environment of a trainer process.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use lacuna_mae::runtime::{CPU_ENV, missing_pins};

/// Runs this program again with the environment of a trainer, which libraries read as they load;
/// does nothing where it has that already.
pub fn start_again_pinned() -> anyhow::Result<()> {
    if missing_pins().is_empty() {
        return Ok(());
    }
    let mut command = Command::new(std::env::current_exe()?);
    let error = command.args(std::env::args_os().skip(1)).envs(CPU_ENV.iter().copied()).exec();
    Err(error).context("start the pinned process")
}
