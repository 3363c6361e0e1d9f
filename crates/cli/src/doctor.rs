//! `lacuna doctor`: whether this machine can train, and what is wrong if not.

use std::fmt;

use clap::Args;
use lacuna_types::exit;

use crate::client::Output;
use crate::connect::Connect;
use crate::runtime;
use crate::train::find_worker;

/// `lacuna doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Folder for checkpoints, which is tried; or the URL of a store.
    #[arg(long, value_name = "FOLDER")]
    checkpoints: Option<String>,
    /// Look at this machine only, and at no coordinator.
    #[arg(long)]
    offline: bool,
    /// How the result is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    connect: Connect,
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    Note,
    Bad,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Fine => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "BAD",
        })
    }
}

struct Finding {
    what: &'static str,
    verdict: Verdict,
    text: String,
}

/// Open files that a coordinator of some hundred workers, or a loader of many shards, needs.
const FILES_MIN: u64 = 4096;
/// Shared memory through which two workers of one machine sum, bytes.
const SHARED_MIN: u64 = 64 << 20;

/// Looks at everything, and says which finding stands in the way of training.
pub fn doctor(args: DoctorArgs) -> anyhow::Result<u8> {
    let mut findings = vec![worker(), files(), shared_memory(), processor()];
    findings.extend(args.checkpoints.as_deref().map(checkpoints));
    if !args.offline {
        findings.push(runtime()?.block_on(coordinator(&args.connect)));
    }
    match args.output {
        Output::Json => {
            let of = |f: &Finding| {
                serde_json::json!({
                    "what": f.what, "verdict": f.verdict.to_string().to_lowercase(), "text": f.text,
                })
            };
            println!("{}", serde_json::Value::from(findings.iter().map(of).collect::<Vec<_>>()));
        }
        Output::Table => {
            for Finding { what, verdict, text } in &findings {
                println!("{verdict:<5} {what:<14} {text}");
            }
        }
    }
    let is_bad = findings.iter().any(|finding| finding.verdict == Verdict::Bad);
    Ok(if is_bad { exit::UNFIT } else { exit::OK })
}

fn finding(what: &'static str, verdict: Verdict, text: impl Into<String>) -> Finding {
    Finding { what, verdict, text: text.into() }
}

fn worker() -> Finding {
    match find_worker() {
        Ok((path, said)) => {
            finding("lacuna-worker", Verdict::Fine, format!("{}: {said}", path.display()))
        }
        Err(err) => finding("lacuna-worker", Verdict::Bad, format!("{err:#}")),
    }
}

fn files() -> Finding {
    use rustix::process::{Resource, getrlimit};
    match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < FILES_MIN => {
            let text = format!("{most} may be open; raise the limit to {FILES_MIN} (ulimit -Hn)");
            finding("open files", Verdict::Note, text)
        }
        most => {
            let most = most.map_or("any number".to_string(), |n| n.to_string());
            finding("open files", Verdict::Fine, format!("{most} may be open"))
        }
    }
}

fn shared_memory() -> Finding {
    let place = "/dev/shm";
    match rustix::fs::statvfs(place) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let text = format!("{} MiB free in {place}", free >> 20);
            let verdict = if free < SHARED_MIN { Verdict::Note } else { Verdict::Fine };
            let advice = if free < SHARED_MIN { "; a container needs --shm-size=1g" } else { "" };
            finding("shared memory", verdict, text + advice)
        }
        Err(err) => {
            let text = format!("{place}: {err}; workers of one machine will sum through sockets");
            finding("shared memory", Verdict::Note, text)
        }
    }
}

fn processor() -> Finding {
    let n = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores = format!("{n} of this machine's cores may be used");
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("avx2") {
        let text = format!("{cores}; without AVX2, which the exact sums are built for");
        return finding("processor", Verdict::Bad, text);
    }
    finding("processor", Verdict::Fine, cores)
}

fn checkpoints(place: &str) -> Finding {
    let tried = crate::ckpt::try_place(place);
    match tried {
        Ok(()) => {
            finding("checkpoints", Verdict::Fine, format!("`{place}` keeps what it is given"))
        }
        Err(err) => finding("checkpoints", Verdict::Bad, format!("`{place}`: {err:#}")),
    }
}

async fn coordinator(connect: &Connect) -> Finding {
    let url = connect.target().map(|target| target.url().to_string()).unwrap_or_default();
    let asked = async {
        let mut client = connect.client().await?;
        client.info().await
    };
    match asked.await {
        Ok(info) => {
            let theirs: lacuna_types::BuildId = info.build.unwrap_or_default().into();
            let ours = lacuna_types::BuildId::this();
            if theirs == ours {
                return finding("coordinator", Verdict::Fine, format!("{url}: {theirs}"));
            }
            let text = format!("{url} is {theirs}, this is {ours}: install the same build");
            finding("coordinator", Verdict::Bad, text)
        }
        // `lacuna train` brings its own.
        Err(err) => {
            let text = format!("{}; `lacuna train` needs none", lacuna_checkpoint::chain(&err));
            finding("coordinator", Verdict::Note, text)
        }
    }
}
