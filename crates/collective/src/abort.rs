//! Waking a blocked communicator from another thread.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::CollectiveError;

/// Kills one communicator, at any time of its life and from any thread.
///
/// Made before the group forms, so that forming can be aborted too. One handle belongs to one
/// generation's communicator; it cannot be reset.
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

type Hook = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Shared {
    reason: OnceLock<String>,
    hooks: Mutex<Vec<Hook>>,
}

impl AbortHandle {
    /// Makes a handle for a communicator that does not exist yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the call in progress, and every later one, fail with [`CollectiveError::Aborted`].
    ///
    /// Returns at once; a blocked call returns within about 100 ms. The first reason stays.
    pub fn abort(&self, reason: &str) {
        if self.shared.reason.set(reason.to_string()).is_ok() {
            self.hooks().drain(..).for_each(|hook| hook());
        }
    }

    /// Returns the reason of the first `abort`, if there was one.
    pub fn reason(&self) -> Option<&str> {
        self.shared.reason.get().map(String::as_str)
    }

    /// Fails once the handle was aborted; for implementations, inside their waits.
    ///
    /// # Errors
    /// [`CollectiveError::Aborted`] with the first reason.
    pub fn check(&self) -> Result<(), CollectiveError> {
        match self.reason() {
            Some(reason) => Err(CollectiveError::Aborted { reason: reason.to_string() }),
            None => Ok(()),
        }
    }

    /// Runs `hook` on the aborting thread when `abort` is called, at once if it was already.
    ///
    /// For implementations. The hook must be quick and must not own what the communicator owns:
    /// a handle may outlive its communicator for long.
    pub fn on_abort(&self, hook: impl Fn() + Send + 'static) {
        // `abort` sets the reason before it takes this lock: either the reason shows here, or the
        // hook is in the list before `abort` drains it.
        let mut hooks = self.hooks();
        if self.reason().is_some() {
            drop(hooks);
            hook();
        } else {
            hooks.push(Box::new(hook));
        }
    }

    fn hooks(&self) -> MutexGuard<'_, Vec<Hook>> {
        self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.reason()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
