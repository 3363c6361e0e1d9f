//! A Slurm job that goes back into the queue.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tracing::{info, warn};

/// What asks Slurm's controller.
const SCONTROL: &str = "scontrol";
/// How long it may take to answer: the job's time is nearly over.
const DEADLINE: Duration = Duration::from_secs(30);

/// Asks Slurm to queue a job again. It ends what is left of the job then.
pub(super) async fn requeue(job: &str) {
    let asked = Command::new(SCONTROL)
        .args(["requeue", job])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(answer)) if answer.status.success() => info!(job, "the job is queued again"),
        Ok(Ok(answer)) => {
            let said = String::from_utf8_lossy(&answer.stderr).trim().to_string();
            warn!(job, status = %answer.status, said, "`{SCONTROL} requeue` failed");
        }
        Ok(Err(error)) => warn!(job, %error, "`{SCONTROL}` could not be started"),
        Err(_) => warn!(job, "`{SCONTROL} requeue` gave no answer within {DEADLINE:?}"),
    }
}
