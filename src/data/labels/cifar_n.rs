//! CIFAR-10N and CIFAR-100N (Wei et al. 2022): several sets of human labels in one file of `torch.save`, which is a zip
//! archive with a pickle `…/data.pkl` of a dictionary of int64 NumPy arrays, one per set, label `i` for image `i`.
//!
//! CIFAR-10N has `aggre_label`, `worse_label` and `random_label1` to `3`, CIFAR-100N has `noisy_label`; both have the
//! true labels as `clean_label`.

use std::io::{Cursor, Read};

use zip::ZipArchive;

use super::super::pickle::{Id, Pickle};
use super::{Format, Found, Places};

/// The first bytes of the file.
pub(super) const MAGIC: &[u8] = b"PK";

/// The set of true labels.
const TRUTH: &str = "clean_label";

/// Most bytes of the pickle: CIFAR-10N has 2.4 million.
const MAX_PICKLE: u64 = 16 << 20;

/// Most names of sets that an error lists.
const MAX_NAMES: usize = 20;

/// Reads label set `set`, which may be missing if the file has one besides the true labels.
pub(super) fn read(bytes: &[u8], set: Option<&str>) -> Result<Found, String> {
    let pickle = unzip(bytes)?;
    let at = |what| format!("data.pkl: {what}");
    let pickle = Pickle::read(&pickle).map_err(at)?;
    let sets = pickle.dict(pickle.root()).map_err(at)?;
    let name = match set {
        Some(name) => name,
        None => {
            let mut noisy = sets.iter().filter(|(name, _)| *name != TRUTH);
            match (noisy.next(), noisy.next()) {
                (Some((name, _)), None) => name,
                _ => return Err(format!("choose one of its sets of labels with --label-set: {}", names(&sets))),
            }
        }
    };
    let find = |name: &str| sets.iter().rev().find(|(key, _)| *key == name).map(|&(_, id)| id);
    let id = find(name).ok_or_else(|| format!("no set of labels `{name}`; it has {}", names(&sets)))?;
    let labels = array(&pickle, name, id)?;
    let truth = find(TRUTH).map(|id| array(&pickle, TRUTH, id)).transpose()?;
    let places = Places::Items(Some(name.to_string()));
    Ok(Found { format: Format::CifarN, labels, truth, index: None, places, provenance: None })
}

/// The pickle in the archive.
fn unzip(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let damaged = |e: zip::result::ZipError| format!("damaged zip archive: {e}");
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
    let is_pickle = |name: &str| name == "data.pkl" || name.ends_with("/data.pkl");
    let names = archive.file_names().filter_map(|name| name.ok().map(|name| name.into_owned()));
    let found: Vec<String> = names.filter(|name| is_pickle(name)).take(2).collect();
    let [name] = found.as_slice() else {
        return Err(match found.len() {
            0 => "a zip archive without data.pkl: not written by torch.save".into(),
            _ => "a zip archive with more than one data.pkl".into(),
        });
    };
    let entry = archive.by_name(name).map_err(damaged)?;
    let mut pickle = Vec::new();
    entry.take(MAX_PICKLE + 1).read_to_end(&mut pickle).map_err(|e| format!("data.pkl in the zip archive: {e}"))?;
    if pickle.len() as u64 > MAX_PICKLE {
        return Err(format!("data.pkl has more than {MAX_PICKLE} bytes, too many for sets of labels"));
    }
    Ok(pickle)
}

/// The array of a set.
fn array(pickle: &Pickle<'_>, name: &str, id: Id) -> Result<Vec<i64>, String> {
    let array = pickle.array(id).map_err(|what| format!("data.pkl: {name}: {what}"))?;
    match (array.shape.as_slice(), array.dtype.as_str()) {
        ([_], "<i8") => Ok(array.bytes.as_chunks().0.iter().map(|&element| i64::from_le_bytes(element)).collect()),
        (shape, dtype) => Err(format!("data.pkl: {name}: array {shape:?} of type `{dtype}`, not a row of int64")),
    }
}

/// The names of the sets, in the file's order.
fn names(sets: &[(&str, Id)]) -> String {
    let names: Vec<String> = sets.iter().take(MAX_NAMES).map(|(name, _)| name.escape_debug().to_string()).collect();
    names.join(", ") + if sets.len() > MAX_NAMES { ", …" } else { "" }
}
