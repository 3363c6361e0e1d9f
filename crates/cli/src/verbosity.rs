//! How much a command says beside its result: `--quiet` and `--verbose`, the same for all.

use std::sync::OnceLock;

use clap::Args;
use lacuna_types::exit;

use crate::Coded;

/// How much is said on stderr. Errors always are.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Voice {
    /// Say nothing but results and errors.
    #[arg(long, short, global = true, help_heading = "Output", conflicts_with = "verbose")]
    quiet: bool,
    /// Say more: what is going on inside; twice for all of it.
    #[arg(long, short, global = true, help_heading = "Output", action = clap::ArgAction::Count)]
    verbose: u8,
    /// Do not ask for confirmation of what cannot be undone; asked on a terminal only.
    #[arg(long, short = 'y', global = true, help_heading = "Output")]
    yes: bool,
}

static VOICE: OnceLock<Voice> = OnceLock::new();

impl Voice {
    /// Makes it that of this process, once.
    pub fn set(self) {
        // It is set once, at the start.
        let _ = VOICE.set(self);
    }
}

/// Asks a person whether to go on, where one sits at a terminal and has not said `--yes`.
///
/// # Errors
/// Where the answer is anything but yes.
pub fn confirm(question: &str) -> anyhow::Result<()> {
    use std::io::{IsTerminal as _, Write as _};
    let sits_there = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !sits_there || VOICE.get().is_some_and(|voice| voice.yes) {
        return Ok(());
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if means_yes(&answer) {
        return Ok(());
    }
    Err(Coded::error(exit::FAILED, "nothing was done; `--yes` does not ask"))
}

fn means_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Tells whether only results and errors are wanted.
pub fn is_quiet() -> bool {
    VOICE.get().is_some_and(|voice| voice.quiet)
}

/// Tells whether more is wanted than usual.
pub fn is_verbose() -> bool {
    VOICE.get().is_some_and(|voice| voice.verbose > 0)
}

/// Returns which logs are shown, where `usual` ones are without a wish.
pub fn log_filter(usual: &'static str) -> &'static str {
    match VOICE.get() {
        Some(voice) if voice.quiet => "error",
        Some(voice) if voice.verbose == 1 => "info",
        Some(voice) if voice.verbose > 1 => "debug",
        _ => usual,
    }
}

/// Says something beside the result, unless nothing of the kind is wanted.
macro_rules! talk {
    ($($args:tt)*) => {
        if !$crate::verbosity::is_quiet() {
            eprintln!($($args)*);
        }
    };
}
pub(crate) use talk;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        assert!(["y\n", "Yes", " YES "].into_iter().all(means_yes));
        assert!(!["", "\n", "no", "yep", "ja"].into_iter().any(means_yes));
    }
}
