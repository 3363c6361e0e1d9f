//! `lacuna doctor`: whether this machine can train, and what is wrong if not.

use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Args;
use lacuna_api::client::ClientError;
use lacuna_types::exit;

use crate::client::Output;
use crate::connect::Connect;
use crate::runtime;
use crate::train::find_worker;

mod disk;
mod machine;

/// `lacuna doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Folder for checkpoints, which is tried; or the URL of a store.
    #[arg(long, value_name = "FOLDER")]
    checkpoints: Option<String>,
    /// Have the worker check its engine, too: that sums, updates and digests are what they must be.
    #[arg(long)]
    selftest: bool,
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

/// A clock that is further off than this makes times in logs hard to compare.
const SKEW_MAX: Duration = Duration::from_secs(2);
/// How long a worker may take to check its engine.
const SELFTEST_DEADLINE: Duration = Duration::from_secs(300);

/// Looks at everything, and says which finding stands in the way of training.
pub fn doctor(args: DoctorArgs) -> anyhow::Result<u8> {
    let mut findings = vec![worker(), machine::processor()];
    findings.extend(machine::devices());
    findings.extend([machine::shared_memory(), machine::files(), machine::network()]);
    findings.extend(args.checkpoints.iter().flat_map(|place| places(place)));
    let runtime = runtime()?;
    if args.selftest {
        findings.push(runtime.block_on(selftest()));
    }
    if !args.offline {
        findings.extend(runtime.block_on(coordinator(&args.connect)));
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

fn checkpoints(place: &str) -> Finding {
    let tried = crate::ckpt::try_place(place);
    match tried {
        Ok(()) => {
            finding("checkpoints", Verdict::Fine, format!("`{place}` keeps what it is given"))
        }
        Err(err) => finding("checkpoints", Verdict::Bad, format!("`{place}`: {err:#}")),
    }
}

/// Tries the place, and how fast it is where it is a folder of this machine.
fn places(place: &str) -> Vec<Finding> {
    let tried = checkpoints(place);
    let folder = Path::new(place);
    let is_folder = tried.verdict != Verdict::Bad && folder.is_dir();
    [tried].into_iter().chain(is_folder.then(|| disk::speed(folder))).collect()
}

/// Has the worker check that its engine keeps the contract that exactness needs.
async fn selftest() -> Finding {
    let run = async {
        let (worker, _) = find_worker()?;
        let ended = tokio::process::Command::new(worker)
            .arg("conformance")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let ended = tokio::time::timeout(SELFTEST_DEADLINE, ended);
        anyhow::Ok(ended.await.context("it takes longer than five minutes")??)
    };
    match run.await {
        Ok(ended) if ended.status.success() => {
            let text = "the engine gives equal bits in every way that it must";
            finding("selftest", Verdict::Fine, text)
        }
        Ok(ended) => {
            let said = String::from_utf8_lossy(&ended.stderr);
            let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            let text = format!("`lacuna-worker conformance` ended with {}: {last}", ended.status);
            finding("selftest", Verdict::Bad, text)
        }
        Err(err) => finding("selftest", Verdict::Bad, format!("{err:#}")),
    }
}

async fn coordinator(connect: &Connect) -> Vec<Finding> {
    let url = connect.target().map(|target| target.url().to_string()).unwrap_or_default();
    let asked = async {
        let mut client = connect.client().await?;
        let (before, sent) = (SystemTime::now(), Instant::now());
        let info = client.info().await?;
        Ok::<_, ClientError>((info, before + sent.elapsed() / 2))
    };
    match asked.await {
        Ok((info, at)) => {
            let clock = clock(info.now_ms, at);
            let theirs: lacuna_types::BuildId = info.build.unwrap_or_default().into();
            let ours = lacuna_types::BuildId::this();
            if theirs == ours {
                let text = format!("{url}: {theirs}");
                return vec![finding("coordinator", Verdict::Fine, text), clock];
            }
            let text = format!("{url} is {theirs}, this is {ours}: install the same build");
            vec![finding("coordinator", Verdict::Bad, text), clock]
        }
        Err(err) if connect.names_one() => {
            vec![finding("coordinator", Verdict::Bad, lacuna_checkpoint::chain(&err))]
        }
        // `lacuna train` brings its own.
        Err(err) => {
            let text = format!("{}; `lacuna train` needs none", lacuna_checkpoint::chain(&err));
            vec![finding("coordinator", Verdict::Note, text)]
        }
    }
}

/// Compares the coordinator's clock with this machine's, `at` the same moment. Nothing that is
/// computed depends on either.
fn clock(theirs_ms: u64, at: SystemTime) -> Finding {
    let ours = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let theirs = Duration::from_millis(theirs_ms);
    let (off, word) = match ours.checked_sub(theirs) {
        Some(off) => (off, "ahead of"),
        None => (theirs - ours, "behind"),
    };
    if theirs_ms == 0 {
        return finding("clock", Verdict::Note, "the coordinator does not say what time it is");
    }
    let text = format!("{:.1} s {word} the coordinator's", off.as_secs_f64());
    if off <= SKEW_MAX {
        return finding("clock", Verdict::Fine, text);
    }
    let advice = "; times in logs do not agree, and certificates may be refused";
    finding("clock", Verdict::Note, text + advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared() {
        let at = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let of = |ms: u64| {
            let Finding { verdict, text, .. } = clock(ms, at);
            (verdict, text)
        };
        let fine = (Verdict::Fine, "0.5 s ahead of the coordinator's".to_string());
        assert_eq!(of(999_999_500), fine);
        let (verdict, text) = of(1_000_090_000);
        assert!(verdict == Verdict::Note && text.starts_with("90.0 s behind"), "{text}");
        assert_eq!(of(0).0, Verdict::Note);
    }
}
