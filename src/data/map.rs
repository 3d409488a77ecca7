//! The bytes of one file: memory-mapped, in memory, or embedded in the program.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of one file, shared: a clone is a pointer.
#[derive(Debug, Clone)]
pub struct Bytes(Arc<Inner>);

#[derive(Debug)]
enum Inner {
    Mapped(Mmap),
    Owned(Vec<u8>),
    Embedded(&'static [u8]),
}

impl Bytes {
    /// Bytes that are part of the program.
    pub fn embedded(bytes: &'static [u8]) -> Self {
        Bytes(Arc::new(Inner::Embedded(bytes)))
    }

    /// Maps the file at `path` read-only; an empty file gives no bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses, [`Error::File`] if `path` is not a regular file.
    #[allow(unsafe_code)]
    pub fn map(path: &Path) -> Result<Self> {
        let meta = path.metadata().map_err(Error::io(path))?;
        if !meta.is_file() {
            return Err(Error::file(path, "not a regular file"));
        }
        if meta.len() == 0 {
            return Ok(Bytes::from(Vec::new()));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the mapping is read-only and private to this value. Rust also asks that nobody changes the file
        // while it is mapped. As with every program that maps its input, that is the user's to keep: the pixels are
        // plain bytes for which every value is valid, so a writer can change the images but break no invariant, and
        // one who shortens the file makes the system end the program with a bus error.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Bytes(Arc::new(Inner::Mapped(map))))
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes(Arc::new(Inner::Owned(bytes)))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &*self.0 {
            Inner::Mapped(map) => map,
            Inner::Owned(bytes) => bytes,
            Inner::Embedded(bytes) => bytes,
        }
    }
}
