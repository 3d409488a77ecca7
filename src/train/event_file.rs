//! Event files for TensorBoard: the scalars of every epoch.
//!
//! A file is a row of TFRecords, each: length of the data (u64), masked CRC-32C of these eight bytes (u32), the data,
//! masked CRC-32C of the data (u32), all little-endian. The data are a protobuf message, of which these fields are
//! written:
//!
//! ```text
//! Event   { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; }
//! Summary { repeated Value value = 1; }
//! Value   { string tag = 1; float simple_value = 2; }
//! ```
//!
//! The tag is `PART/KEY`, with the keys of `metrics.jsonl`; the part is the phase, with the iteration's number for a
//! phase that has iterations (`mlnt-2/test_accuracy`). The step is the epoch within the part, so that curves of
//! different parts lie over each other.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The event file of this process in a run's `tensorboard` folder; made when there is something to write.
///
/// A resumed run goes on in a file of its own. An epoch is written before the checkpoint that counts it, so none is
/// lost; if the run is killed between the two, the epoch is trained again and written again, with the same step
/// and the same values, since a resumed run repeats itself bit for bit.
#[derive(Debug)]
pub struct EventFile {
    folder: PathBuf,
    open: Option<(PathBuf, File)>,
}

impl EventFile {
    /// A file to be made in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        EventFile { folder, open: None }
    }

    /// Writes the numbers of a record of `metrics.jsonl` as scalars, and makes them last.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a record that is no JSON object.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let object = match serde_json::to_value(record) {
            Ok(Value::Object(object)) => object,
            other => return Err(Error::file(&self.folder, format_args!("no record of an epoch: {other:?}"))),
        };
        let mut bytes = Vec::new();
        if self.open.is_none() {
            let (path, file) = self.create()?;
            self.open = Some((path, file));
            // Readers want this first; "2" is the version that every TensorBoard of today reads.
            put_record(&mut bytes, &event(0, Content::Version("brain.Event:2")));
        }
        let step = object.get("epoch").and_then(Value::as_u64).unwrap_or(0);
        put_record(&mut bytes, &event(step, Content::Scalars(&scalars(&object))));
        if let Some((path, file)) = &mut self.open {
            file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// A new file. Readers take the files of a folder in the order of their names: first by time, then by number.
    fn create(&self) -> Result<(PathBuf, File)> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let there = std::fs::read_dir(&self.folder).map_err(Error::io(&self.folder))?.count();
        let path = self.folder.join(format!("events.out.tfevents.{:010}.mlnt.{there:04}", wall_time() as u64));
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(Error::io(&path))?;
        Ok((path, file))
    }
}

/// The tags and values of a record.
fn scalars(record: &Map<String, Value>) -> Vec<(String, f32)> {
    let phase = record.get("phase").and_then(Value::as_str).unwrap_or("run");
    let part = match record.get("iteration").and_then(Value::as_u64) {
        Some(iteration) => format!("{phase}-{iteration}"),
        None => phase.to_string(),
    };
    let counters = ["epoch", "iteration"];
    let numbers = record.iter().filter(|(key, _)| !counters.contains(&key.as_str()));
    numbers.filter_map(|(key, value)| Some((format!("{part}/{key}"), value.as_f64()? as f32))).collect()
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// What an event says.
enum Content<'a> {
    Version(&'a str),
    Scalars(&'a [(String, f32)]),
}

/// An `Event` message of now.
fn event(step: u64, content: Content<'_>) -> Vec<u8> {
    let mut message = Vec::new();
    put_key(&mut message, 1, Wire::Fixed64);
    message.extend(wall_time().to_le_bytes());
    put_key(&mut message, 2, Wire::Varint);
    put_varint(&mut message, step);
    match content {
        Content::Version(version) => put_bytes(&mut message, 3, version.as_bytes()),
        Content::Scalars(scalars) => {
            let mut summary = Vec::new();
            for (tag, number) in scalars {
                let mut value = Vec::new();
                put_bytes(&mut value, 1, tag.as_bytes());
                put_key(&mut value, 2, Wire::Fixed32);
                value.extend(number.to_le_bytes());
                put_bytes(&mut summary, 1, &value);
            }
            put_bytes(&mut message, 5, &summary);
        }
    }
    message
}

/// Protobuf's wire types.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn put_key(message: &mut Vec<u8>, field: u64, wire: Wire) {
    put_varint(message, field << 3 | wire as u64);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(message, field, Wire::Bytes);
    put_varint(message, bytes.len() as u64);
    message.extend(bytes);
}

/// Seven bits per byte, lowest first; the high bit says that more follow.
fn put_varint(message: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        message.push(number as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}

/// Frames `data` as a TFRecord.
fn put_record(file: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked_crc(&length).to_le_bytes());
    file.extend(data);
    file.extend(masked_crc(data).to_le_bytes());
}

/// CRC-32C, rotated and shifted as the format asks, so that the CRC of data with CRCs in them stays good.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}
