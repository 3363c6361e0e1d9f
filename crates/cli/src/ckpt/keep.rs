//! `lacuna ckpt hold` and `gc`: what stays, and removing what does not.

use std::num::NonZeroUsize;
use std::time::SystemTime;

use clap::Args;
use lacuna_checkpoint::catalog;
use lacuna_checkpoint::layout::RunDir;
use lacuna_checkpoint::retain::{self, Hold, Retention};
use lacuna_checkpoint::run_file::RunFile;
use lacuna_checkpoint::storage::Published;
use lacuna_coordinator::clock::rfc3339;
use lacuna_types::{Step, exit};

use super::{find, list, run_dir, split_step, stored_spec};
use crate::data::talk::{count, io, put, usage};
use crate::verbosity::confirm;

/// `lacuna ckpt hold`.
#[derive(Args, Debug)]
pub struct HoldArgs {
    /// A run's spec file or folder, and @STEP of the checkpoint to pin; without it the pins are
    /// listed.
    #[arg(value_name = "RUN[@STEP]")]
    run: String,
    /// Name of the pin.
    #[arg(long)]
    name: Option<String>,
    /// Why the checkpoint must stay.
    #[arg(long, default_value = "")]
    why: String,
    /// When the pin ends, YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ [default: never].
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Remove the pin instead.
    #[arg(long, requires = "name")]
    release: bool,
}

/// `lacuna ckpt gc`.
#[derive(Args, Debug)]
pub struct GcArgs {
    /// The run: its spec file, or its folder (checkpoint.to/NAME).
    run: std::path::PathBuf,
    /// Keep so many of the newest [default: checkpoint.keep.last of the run].
    #[arg(long, value_name = "N")]
    keep_last: Option<NonZeroUsize>,
    /// Say what would be removed and why the rest stays; remove nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Pins, releases or lists.
pub(super) fn hold(args: &HoldArgs) -> anyhow::Result<u8> {
    let (run, step) = split_step(&args.run);
    let dir = run_dir(run)?;
    let holds = retain::holds(&dir).map_err(|error| io(&error))?;
    let Some(name) = &args.name else {
        if step.is_some() {
            return Err(usage("a pin needs a name: --name NAME"));
        }
        put(&holds.iter().map(line).collect::<String>())?;
        return Ok(exit::OK);
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(is_name) {
        return Err(usage(format!("`{name}` is not a name of letters, digits, `-`, `_` and `.`")));
    }
    if args.release {
        if !holds.iter().any(|hold| hold.name == *name) {
            return Err(usage(format!("`{}` has no pin `{name}`", dir.path().display())));
        }
        retain::release(&dir, name).map_err(|error| io(&error))?;
        put(&format!("pin {name} is released\n"))?;
        return Ok(exit::OK);
    }
    let step = step.ok_or_else(|| usage("name the checkpoint: RUN@STEP"))?;
    find(&dir, list(&dir)?, step)?;
    let until = args.until.as_deref().map(time).transpose()?;
    let (why, step) = (args.why.clone(), Step(step));
    let hold = Hold { name: name.clone(), step, why, until };
    match retain::hold(&dir, &hold).map_err(|error| io(&error))? {
        Published::Created => {
            // Somebody may have been removing it before the pin was there.
            if catalog::find(&dir, step).map_err(|error| io(&error))?.is_none() {
                retain::release(&dir, name).map_err(|error| io(&error))?;
                return Err(usage(format!("step {step} was removed meanwhile")));
            }
            put(&line(&hold))?;
        }
        Published::Exists => {
            return Err(usage(format!(
                "there is a pin `{name}` already: release it first, or take another name"
            )));
        }
    }
    Ok(exit::OK)
}

fn line(hold: &Hold) -> String {
    let until = hold.until.as_ref().map_or(String::new(), |until| format!(" until {until}"));
    let over = if hold.is_over(&rfc3339(SystemTime::now())) { ", over" } else { "" };
    let why = if hold.why.is_empty() { String::new() } else { format!(": {}", hold.why) };
    format!("step {} is held by {}{until}{over}{why}\n", hold.step, hold.name)
}

/// Reads a day or a second, in UTC.
fn time(text: &str) -> anyhow::Result<String> {
    let full = if text.len() == 10 { format!("{text}T00:00:00Z") } else { text.to_string() };
    let shape = "dddd-dd-ddTdd:dd:ddZ";
    let fits = |(c, want): (char, char)| if want == 'd' { c.is_ascii_digit() } else { c == want };
    if full.len() != shape.len() || !full.chars().zip(shape.chars()).all(fits) {
        let shown = text.escape_debug();
        return Err(usage(format!("`{shown}` is neither YYYY-MM-DD nor YYYY-MM-DDThh:mm:ssZ")));
    }
    Ok(full)
}

/// Removes what no rule keeps, and what crashes left.
pub(super) fn gc(args: &GcArgs) -> anyhow::Result<u8> {
    let dir = run_dir(&args.run)?;
    let now = rfc3339(SystemTime::now());
    // Attempts of the newest generation may be under way; a run that goes on removes them itself.
    let generation = catalog::highest_generation(&dir).map_err(|error| io(&error))?;
    let (last, kept) = rules(&dir, args)?;
    let plan = match last {
        Some(last) => retain::plan_retention(&dir, last, &kept, &now),
        None => Ok(Retention::default()),
    };
    let plan = plan.map_err(|error| io(&error))?;
    let garbage = retain::plan_garbage(&dir, generation, &[]).map_err(|error| io(&error))?;
    if !args.dry_run {
        if !plan.delete.is_empty() {
            let steps: Vec<String> = plan.delete.iter().map(ToString::to_string).collect();
            let (n, run) = (count(steps.len() as u64, "checkpoint"), args.run.display());
            confirm(&format!("remove {n} of {run} for good (steps {})?", steps.join(", ")))?;
        }
        if let Some(last) = last {
            retain::retain(&dir, last, &kept, &now).map_err(|error| io(&error))?;
        }
        retain::collect_garbage(&dir, generation, &[]).map_err(|error| io(&error))?;
    }
    let mut text = String::new();
    plan.keep.iter().for_each(|(step, why)| text += &format!("step {step} stays: {why}\n"));
    let verb = if args.dry_run { "would be removed" } else { "removed" };
    plan.delete.iter().for_each(|step| text += &format!("step {step} {verb}\n"));
    garbage.iter().for_each(|path| text += &format!("{} {verb}\n", path.display()));
    if last.is_none() {
        text +=
            "no checkpoint is removed: there is none that is sound, or checkpoint.keep.last is 0\n";
    }
    let n = (plan.delete.len() + garbage.len()) as u64;
    put(&format!("{text}{} {verb}\n", count(n, "folder")))?;
    Ok(exit::OK)
}

/// Returns how many of the newest stay, and which steps stay by the cadence of the run's spec.
fn rules(dir: &RunDir, args: &GcArgs) -> anyhow::Result<(Option<NonZeroUsize>, Vec<Step>)> {
    let entries = list(dir)?;
    let Some(newest) = catalog::newest_good(&entries) else { return Ok((None, Vec::new())) };
    let keep = stored_spec(newest)?.checkpoint.keep;
    let last = args.keep_last.or(NonZeroUsize::new(keep.last as usize));
    let run = RunFile::read(dir).map_err(|error| io(&error))?;
    let every = match (keep.every, run) {
        (Some(every), Some(run)) => every.steps(run.steps_per_epoch),
        (Some(_), None) => {
            return Err(usage(
                "the run has no run.json, without which checkpoint.keep.every is not known in \
                 steps",
            ));
        }
        (None, _) => None,
    };
    Ok((last, every.map_or_else(Vec::new, |every| retain::chosen(&entries, every))))
}
