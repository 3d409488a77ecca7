//! Data sets and label files as bytes, each in its format's true layout, made by the tests themselves.
#![allow(dead_code)] // every test binary uses its own part

use std::io::Write;
use std::path::{Path, PathBuf};

use mlnt::data::DataPair;
use mlnt::data::cifar::Layout;
use mlnt::data::dataset::{Family, Source};
use mlnt::data::idx::{self, Files};
use mlnt::rng::{Purpose, below, stream};

/// A file as a loader takes it.
pub fn source(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Source {
    Source { path: name.into(), bytes: bytes.into() }
}

/// A file of `tests/data-fixtures`, made by `scripts/make_label_fixtures.py`.
pub fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

/// The folder of these files.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data-fixtures")
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// Random bytes.
pub fn bytes(n: usize, seed: u64) -> Vec<u8> {
    let mut rng = stream(seed, Purpose::Test, 0, 0);
    (0..n).map(|_| below(256, &mut rng) as u8).collect()
}

// ---------------------------------------------------------------- IDX and CIFAR in its binary version

/// An IDX file of the given sizes.
pub fn idx_file(magic: u32, sizes: &[u32], payload: &[u8]) -> Vec<u8> {
    let words = std::iter::once(&magic).chain(sizes);
    words.flat_map(|word| word.to_be_bytes()).chain(payload.iter().copied()).collect()
}

/// Images and labels of `n` samples of 5×3 pixels.
pub fn idx_split(n: usize, seed: u64) -> [Vec<u8>; 2] {
    let labels: Vec<u8> = (0..n).map(|i| (i * 3 % 10) as u8).collect();
    [idx_file(0x803, &[n as u32, 5, 3], &bytes(n * 15, seed)), idx_file(0x801, &[n as u32], &labels)]
}

pub fn load_idx(sources: &[Source]) -> mlnt::Result<DataPair> {
    let [train_images, train_labels, test_images, test_labels] = sources.to_vec().try_into().unwrap();
    idx::load(&Files { train_images, train_labels, test_images, test_labels }, "test", Family::Other)
}

/// `n` CIFAR records with the given label bytes, then random pixels.
pub fn cifar_records(n: usize, seed: u64, labels: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    (0..n).flat_map(|i| [labels(i), bytes(3072, seed * 1000 + i as u64)].concat()).collect()
}

/// Training files, test file and class names.
pub fn load_cifar(layout: &Layout, sources: &[Source]) -> mlnt::Result<DataPair> {
    let [train @ .., test, names] = sources else { panic!("too few files") };
    layout.load(train, test, Some(names))
}

// ---------------------------------------------------------------- pickles

/// A byte string as Python 2 pickles it.
fn string(text: &[u8]) -> Vec<u8> {
    match u8::try_from(text.len()) {
        Ok(length) => [b"U", &[length][..], text].concat(),
        Err(_) => [b"T", &(text.len() as u32).to_le_bytes()[..], text].concat(),
    }
}

/// A text as Python 3 pickles it.
fn unicode(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A whole number from 0 to 65535.
fn number(n: usize) -> Vec<u8> {
    if n < 256 { vec![b'K', n as u8] } else { [b"M", &(n as u16).to_le_bytes()[..]].concat() }
}

/// Some items: one by `one`, more by `(` … `many`.
fn batch(items: &[Vec<u8>], one: u8, many: u8) -> Vec<u8> {
    match items {
        [item] => [item, &[one][..]].concat(),
        items => [b"(", &items.concat()[..], &[many]].concat(),
    }
}

/// A file of CIFAR-10's Python version: images `[n, 3072]`, in the order and with the memo numbers of Python 2's
/// `cPickle`, which gives none to values that nobody else holds.
pub fn cifar10_python(title: &str, images: &[u8], labels: &[u8]) -> Vec<u8> {
    let items: Vec<Vec<u8>> = labels.iter().map(|&label| vec![b'K', label]).collect();
    let names: Vec<Vec<u8>> = (0..labels.len())
        .map(|i| [string(format!("image_{i}.png").as_bytes()), vec![b'q', 13 + i as u8]].concat())
        .collect();
    [
        b"\x80\x02}q\x01(".to_vec(),
        [string(b"data"), b"q\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04".to_vec()].concat(),
        [b"K\0\x85".to_vec(), string(b"b"), b"\x87Rq\x05(K\x01".to_vec(), number(labels.len())].concat(),
        [b"M\0\x0c\x86cnumpy\ndtype\nq\x06".to_vec(), string(b"u1"), b"K\0K\x01\x87Rq\x07(K\x03".to_vec()].concat(),
        [string(b"|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89".to_vec(), string(images), b"tb".to_vec()]
            .concat(),
        [string(b"labels"), b"q\x08]q\x09".to_vec(), batch(&items, b'a', b'e')].concat(),
        [string(b"batch_label"), b"q\x0a".to_vec(), string(title.as_bytes())].concat(),
        [string(b"filenames"), b"q\x0b]q\x0c".to_vec(), batch(&names, b'a', b'e')].concat(),
        b"u.".to_vec(),
    ]
    .concat()
}

/// A file of CIFAR-100's Python version, with the entries that are read.
pub fn cifar100_python(images: &[u8], labels: &[u8]) -> Vec<u8> {
    let ten = cifar10_python("", images, labels);
    let at = ten.windows(8).position(|window| window == b"U\x06labels").unwrap();
    [&ten[..at], b"U\x0bfine_labels", &ten[at + 8..]].concat()
}

/// The file of class names, with entries that are not read.
pub fn cifar_meta(key: &str, names: &[String]) -> Vec<u8> {
    let items: Vec<Vec<u8>> = names.iter().map(|name| string(name.as_bytes())).collect();
    let entries =
        [string(b"num_vis"), number(3072), string(key.as_bytes()), b"]q\x02".to_vec(), batch(&items, b'a', b'e')];
    [b"\x80\x02}q\x01(", &entries.concat()[..], b"u."].concat()
}

/// The pickle of a dictionary of int64 arrays, as `torch.save` writes it (protocol 2, Python 3): an array's bytes are
/// text, one character for each, and whatever was there before is taken from the memo.
pub fn cifar_n_pickle(sets: &[(&str, Vec<i64>)]) -> Vec<u8> {
    let mut memo = 0u8;
    let mut out = b"\x80\x02}".to_vec();
    let mut put = |parts: &[&[u8]], out: &mut Vec<u8>| {
        out.extend(parts.concat());
        out.extend([b'q', memo]);
        memo += 1;
    };
    put(&[], &mut out);
    out.push(b'(');
    for (i, (name, labels)) in sets.iter().enumerate() {
        let first = i == 0;
        let raw: String = labels.iter().flat_map(|label| label.to_le_bytes()).map(char::from).collect();
        put(&[&unicode(name)], &mut out);
        if first {
            put(&[b"cnumpy._core.multiarray\n_reconstruct\n"], &mut out); // 2
            put(&[b"cnumpy\nndarray\n"], &mut out); // 3
            put(&[b"K\0\x85"], &mut out);
            put(&[b"c_codecs\nencode\n"], &mut out); // 5
            put(&[&unicode("b")], &mut out);
            put(&[&unicode("latin1")], &mut out); // 7
            put(&[b"\x86"], &mut out);
            put(&[b"R"], &mut out); // 9: b'b'
        } else {
            put(&[b"h\x02h\x03K\0\x85"], &mut out);
            out.extend(b"h\x09");
        }
        put(&[b"\x87"], &mut out);
        put(&[b"R"], &mut out);
        put(&[b"(K\x01", &number(labels.len()), b"\x85"], &mut out);
        if first {
            put(&[b"cnumpy\ndtype\n"], &mut out);
            put(&[&unicode("i8")], &mut out);
            put(&[b"\x89\x88\x87"], &mut out);
            put(&[b"R"], &mut out); // 16: the element type
            put(&[b"(K\x03", &unicode("<")], &mut out);
            put(&[b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"], &mut out);
            out.push(b'b');
        } else {
            out.extend(b"h\x10");
        }
        put(&[b"\x89h\x05", &unicode(&raw)], &mut out);
        put(&[b"h\x07\x86"], &mut out);
        put(&[b"R"], &mut out);
        put(&[b"t"], &mut out);
        out.push(b'b');
    }
    out.extend(b"u.");
    out
}

// ---------------------------------------------------------------- zip

/// A zip archive of one entry, stored or deflated.
pub fn zip(name: &str, content: &[u8], deflate: bool) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(content);
    let packed = if deflate {
        let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        out.write_all(content).unwrap();
        out.finish().unwrap()
    } else {
        content.to_vec()
    };
    let method = if deflate { 8u16 } else { 0 };
    let common = [
        &[20, 0, 0, 0][..],
        &method.to_le_bytes(),
        &[0, 0, 0x21, 0x28], // midnight of 2000-01-01
        &crc.sum().to_le_bytes(),
        &(packed.len() as u32).to_le_bytes(),
        &(content.len() as u32).to_le_bytes(),
        &(name.len() as u16).to_le_bytes(),
        &[0, 0],
    ]
    .concat();
    let local = [b"PK\x03\x04", &common[..], name.as_bytes(), &packed].concat();
    let central = [b"PK\x01\x02", &[20, 0][..], &common, &[0; 14], name.as_bytes()].concat();
    let end = [
        b"PK\x05\x06\0\0\0\0\x01\0\x01\0",
        &(central.len() as u32).to_le_bytes()[..],
        &(local.len() as u32).to_le_bytes(),
        &[0, 0],
    ];
    [local, central, end.concat()].concat()
}

/// A CIFAR-N file.
pub fn cifar_n(sets: &[(&str, Vec<i64>)]) -> Vec<u8> {
    zip("archive/data.pkl", &cifar_n_pickle(sets), false)
}
