//! How much a command says beside its result: `--quiet` and `--verbose`, the same for all.

use std::sync::OnceLock;

use clap::Args;

/// How much is said on stderr. Errors always are.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Voice {
    /// Say nothing but results and errors.
    #[arg(long, short, global = true, help_heading = "Talk", conflicts_with = "verbose")]
    quiet: bool,
    /// Say more: what is going on inside; twice for all of it.
    #[arg(long, short, global = true, help_heading = "Talk", action = clap::ArgAction::Count)]
    verbose: u8,
}

static VOICE: OnceLock<Voice> = OnceLock::new();

impl Voice {
    /// Makes it that of this process, once.
    pub fn set(self) {
        // It is set once, at the start.
        let _ = VOICE.set(self);
    }
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
        if !$crate::voice::is_quiet() {
            eprintln!($($args)*);
        }
    };
}
pub(crate) use talk;
