//! Event files for TensorBoard, read back by a parser of their own.

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mlnt::train::event_file::EventFile;
use program::{Folder, metrics, mlnt};
use serde_json::json;

/// CRC-32C bit by bit: polynomial 0x1EDC6F41, reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 })
    })
}

fn masked(bytes: &[u8]) -> u32 {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The data of the TFRecords of a file, whose checksums are checked.
fn frames(file: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut list) = (file, Vec::new());
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(u32_at(rest, 8), masked(&rest[..8]));
        assert_eq!(u32_at(rest, 12 + length), masked(&rest[12..12 + length]));
        list.push(&rest[12..12 + length]);
        rest = &rest[16 + length..];
    }
    list
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut number, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        number |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return number;
        }
    }
}

/// The fields of a protobuf message: number and raw bytes (a varint as eight bytes).
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut list = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                list.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        list.push((key >> 3, bytes[..length].to_vec()));
        bytes = &bytes[length..];
    }
    list
}

/// The scalars of a folder's files in the order of their names: tag to steps and values.
fn scalars(folder: &Path) -> BTreeMap<String, Vec<(u64, f32)>> {
    let mut found: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
    for path in files(folder) {
        let bytes = fs::read(&path).unwrap();
        for (i, event) in frames(&bytes).into_iter().enumerate() {
            let event = fields(event);
            let field = |number: u64| event.iter().find(|(n, _)| *n == number).map(|(_, bytes)| bytes.clone());
            let time = f64::from_le_bytes(field(1).unwrap().try_into().unwrap());
            assert!((1.7e9..1e11).contains(&time), "seconds since 1970: {time}");
            assert_eq!(field(3).as_deref(), (i == 0).then_some(&b"brain.Event:2"[..]), "the version comes first");
            let step = u64::from_le_bytes(field(2).unwrap().try_into().unwrap());
            for (_, value) in fields(&field(5).unwrap_or_default()) {
                let value = fields(&value);
                assert_eq!(value.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2]);
                let tag = String::from_utf8(value[0].1.clone()).unwrap();
                let number = f32::from_le_bytes(value[1].1.clone().try_into().unwrap());
                found.entry(tag).or_default().push((step, number));
            }
        }
    }
    found
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.iter().all(|p| p.file_name().unwrap().to_string_lossy().starts_with("events.out.tfevents.")));
    paths
}

#[test]
fn the_checksum_is_that_of_the_format() {
    // The check value of CRC-32C in its definition.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn records_become_scalars_and_a_resumed_run_goes_on_in_a_file_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tensorboard");
    let record = |epoch: usize, loss: f64| json!({"phase": "mlnt", "iteration": 2, "epoch": epoch, "train_loss": loss, "meta_loss": null, "note": "text"});
    let mut first = EventFile::new(path.clone());
    assert!(!path.exists(), "nothing to write yet");
    first.append(&record(1, 2.5)).unwrap();
    first.append(&record(300, 1.25)).unwrap();
    first.append(&json!({"phase": "features", "iteration": null, "epoch": 1, "lr": 0.1})).unwrap();
    // Killed before the checkpoint that counts epoch 300, so that it is trained and written again.
    let mut second = EventFile::new(path.clone());
    second.append(&record(300, 1.25)).unwrap();
    second.append(&record(301, 1.0)).unwrap();
    assert_eq!(files(&path).len(), 2);
    let found = scalars(&path);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["features/lr", "mlnt-2/train_loss"]);
    assert_eq!(found["features/lr"], [(1, 0.1)]);
    assert_eq!(found["mlnt-2/train_loss"], [(1, 2.5), (300, 1.25), (300, 1.25), (301, 1.0)]);
    assert!(second.append(&3).is_err());
}

#[test]
fn a_run_writes_the_numbers_of_its_metrics() {
    let folder = Folder::new();
    let data = folder.idx();
    let run = folder.path("run");
    let settings = "train-size = 0\nepochs = 2\nfeature-epochs = 1\nwidths = [4]\nblocks = [1]\nbatch = 10\n\
                    neighbours = 2\nbranches = 1\naugment = \"none\"\n";
    let said = mlnt(&folder.train(settings, &data, &run));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let found = scalars(&run.join("tensorboard"));
    let mut numbers = 0;
    for record in metrics(&run) {
        let phase = record["phase"].as_str().unwrap();
        let part = record["iteration"].as_u64().map_or(phase.to_string(), |i| format!("{phase}-{i}"));
        for (key, value) in
            record.as_object().unwrap().iter().filter(|(key, _)| !["epoch", "iteration"].contains(&key.as_str()))
        {
            let Some(value) = value.as_f64() else { continue };
            let point = (record["epoch"].as_u64().unwrap(), value as f32);
            assert!(found[&format!("{part}/{key}")].contains(&point), "{part}/{key} {point:?}");
            numbers += 1;
        }
    }
    assert!(numbers > 25, "{numbers}");
    assert_eq!(found.values().map(Vec::len).sum::<usize>(), numbers);
}
