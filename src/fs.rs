//! Files that are either whole or not there.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes `bytes` to `path` so that a reader, or a machine that stops half-way, sees the old file or the new one:
/// a temporary name in the same folder, write, sync, rename, sync of the folder.
///
/// # Errors
/// [`Error::Io`] for `path`; its old content then still stands and the temporary file is gone.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    write_synced(path, bytes).map_err(|error| Error::io(path)(without_path(error)))
}

/// The system's error inside one of `tempfile`, which adds the temporary name that nobody asked for.
fn without_path(error: std::io::Error) -> std::io::Error {
    let inner = error.get_ref().and_then(|e| e.source()).and_then(|e| e.downcast_ref::<std::io::Error>());
    inner.and_then(std::io::Error::raw_os_error).map_or(error, std::io::Error::from_raw_os_error)
}

/// [`write_atomic`] with the system's own error.
fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = folder_of(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".mlnt-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as any new file
    let mut file = builder.tempfile_in(&folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(&folder)
}

/// Creates the run directory `path`, and the folders above it.
///
/// # Errors
/// [`Error::File`] when `path` exists, [`Error::Io`] when it cannot be made.
pub fn create_run_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let folder = folder_of(path);
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let what = "this run directory exists; choose another --out or continue it with --resume";
            Err(Error::file(path, format_args!("{what} {}", path.display())))
        }
        Err(error) => Err(Error::io(path)(error)),
        Ok(()) => sync_folder(&folder).map_err(Error::io(&folder)),
    }
}

/// The folder that holds `path`; the current one for a bare name.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Makes a rename within `folder` last, where the system lets a folder be opened.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { std::fs::File::open(folder)?.sync_all() } else { Ok(()) }
}
