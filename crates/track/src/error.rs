//! Why a run cannot be tracked.

use std::io;
use std::path::{Path, PathBuf};

/// A file or folder of a tracker that failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The system refused.
    #[error("failed to {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another tracker writes there.
    #[error("`{}` is being written by another process", path.display())]
    Taken {
        /// The locked file.
        path: PathBuf,
    },
    /// A file was changed by something else; it is left as it is.
    #[error("`{}` ends with something that no tracker wrote: {detail}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// An earlier call failed, so it is not known what the files hold; opening again finds out.
    #[error("tracking into `{}` failed before and was not opened again", folder.display())]
    Broken {
        /// The tracker's folder.
        folder: PathBuf,
    },
}

/// Makes errors of the system say what was tried with which file.
pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrackError {
    let path = path.to_path_buf();
    move |source| TrackError::Io { action, path, source }
}
