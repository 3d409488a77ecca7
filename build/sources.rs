//! What stands under `kernels/`: the `.cu` files, the kernels they define, and the headers they reach.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One line `KERNEL(name, Params, threads)`.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    pub name: String,
    pub params: String,
    pub threads: u32,
}

/// One `.cu` file, compiled into one module of the same name.
pub struct Source {
    pub path: PathBuf,
    pub module: String,
    pub kernels: Vec<Kernel>,
    /// It has instructions of sm_90a alone, and says so by the line [`SM_90A`].
    pub sm_90a: bool,
}

/// The line of a source that is compiled for sm_90a and for no other card.
pub const SM_90A: &str = "#define KERNEL_SM_90A";

/// All `kernels/*.cu` in order of name. None if the folder is absent.
///
/// Errors: a file that cannot be read, a kernel that is written in a way the scan does not know, a name used twice.
pub fn find(folder: &Path) -> Result<Vec<Source>, String> {
    let mut sources = Vec::new();
    for path in with_extension(folder, "cu")? {
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let kernels = kernels_in(&text).map_err(|e| format!("{}:{e}", path.display()))?;
        let module = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let sm_90a = text.lines().any(|line| line == SM_90A);
        sources.push(Source { path, module, kernels, sm_90a });
    }
    let mut names = BTreeSet::new();
    for kernel in sources.iter().flat_map(|source| &source.kernels) {
        if !names.insert(&kernel.name) {
            return Err(format!("kernel {} is defined twice", kernel.name));
        }
    }
    Ok(sources)
}

/// The files of `folder` that end in `.extension`, in order of name. None if the folder is absent.
pub fn with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let describe = |e| format!("{}: {e}", folder.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(describe)? {
        let path = entry.map_err(describe)?.path();
        if path.extension().is_some_and(|e| e == extension) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The kernels that `text` defines. A definition that the pattern does not match is an error, so that none is lost in silence.
pub fn kernels_in(text: &str) -> Result<Vec<Kernel>, String> {
    let mut kernels = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if !line.trim_start().starts_with("KERNEL(") {
            continue;
        }
        let kernel = parse(line).ok_or_else(|| {
            format!(
                "{}: expected KERNEL(name, Params, threads) at the start of the line, with threads a multiple of 32 \
                 from 32 to 1024, found `{line}`",
                index + 1
            )
        })?;
        kernels.push(kernel);
    }
    Ok(kernels)
}

fn parse(line: &str) -> Option<Kernel> {
    let (inside, _) = line.strip_prefix("KERNEL(")?.split_once(')')?;
    let parts: Vec<&str> = inside.split(',').map(str::trim).collect();
    let [name, params, threads] = parts[..] else { return None };
    let threads: u32 = threads.parse().ok()?;
    let fits =
        is_identifier(name) && is_identifier(params) && threads.is_multiple_of(32) && (32..=1024).contains(&threads);
    fits.then(|| Kernel { name: name.into(), params: params.into(), threads })
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `file` and all files it includes by `#include "..."`, directly or not, in order of path.
///
/// An include is looked for beside the file that names it, then in `folders`; one that is found nowhere is the
/// compiler's own, or the compiler will complain.
pub fn reached_from(file: &Path, folders: &[&Path]) -> Result<BTreeSet<PathBuf>, String> {
    let mut reached = BTreeSet::new();
    let mut todo = vec![file.to_path_buf()];
    while let Some(path) = todo.pop() {
        if !reached.insert(path.clone()) {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let beside = path.parent().unwrap_or(Path::new(""));
        for name in text.lines().filter_map(included) {
            let places = std::iter::once(beside).chain(folders.iter().copied());
            todo.extend(places.map(|folder| folder.join(name)).find(|place| place.is_file()));
        }
    }
    Ok(reached)
}

fn included(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
    Some(rest.trim_start().strip_prefix('"')?.split_once('"')?.0)
}
