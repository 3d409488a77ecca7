//! The one error type of the project.
//!
//! Every variant carries what a person needs to act: the file and what is wrong with it, the flag and
//! the values it takes, or the operation and the shapes that did not fit.

use std::path::{Path, PathBuf};

/// Result with the project's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Anything that can go wrong, with its context.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, a configuration value or a combination of them that cannot work.
    #[error("{0}")]
    Usage(String),
    /// A file or folder whose content is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, in words.
        what: String,
    },
    /// The operating system refused to read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// An operation was given tensors that do not fit together.
    #[error("{op}: {what}")]
    Shape {
        /// The operation's name.
        op: &'static str,
        /// The shapes and the rule they break.
        what: String,
    },
    /// A derivative that the closed operation set does not contain (third order of batch norm or softmax).
    #[error("{op}: {what}")]
    NotDifferentiable {
        /// The operation's name.
        op: &'static str,
        /// Which derivative is missing.
        what: String,
    },
    /// A device cannot do what a plan asks of it.
    #[error("device {device}: {what}")]
    Device {
        /// The device's name.
        device: String,
        /// What it cannot do.
        what: String,
    },
    /// Training met a loss that is not a number.
    #[error("{0}")]
    Diverged(String),
}

impl Error {
    /// A [`Error::Usage`] from anything printable.
    pub fn usage(what: impl std::fmt::Display) -> Self {
        Error::Usage(what.to_string())
    }

    /// A [`Error::File`] for `path`.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), what: what.to_string() }
    }

    /// A [`Error::Io`] for `path`; for use in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A [`Error::Shape`] for operation `op`.
    pub fn shape(op: &'static str, what: impl std::fmt::Display) -> Self {
        Error::Shape { op, what: what.to_string() }
    }

    /// The process exit status: 2 for input a user can correct, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::File { .. } | Error::Io { .. } | Error::Diverged(_) => 2,
            _ => 1,
        }
    }
}
