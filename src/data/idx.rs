//! MNIST-like data sets in IDX format (LeCun, Cortes, Burges: <http://yann.lecun.com/exdb/mnist/>), plain or gzip.
//!
//! A file starts with big-endian 32-bit words: a magic number (0x00000803 images, 0x00000801 labels), the count and,
//! for images, rows and columns; then one byte per pixel or label. Plain image files are memory-mapped. Compressed
//! ones are decompressed into memory that grows with what really arrives and never past what the header promises.

use std::io::{ErrorKind, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use super::dataset::{DataPair, Dataset, Family, ImageShape, Segment, Source};
use super::map::Bytes;
use crate::error::{Error, Result};

const IMAGES: u32 = 0x0803;
const LABELS: u32 = 0x0801;
const CLASSES: usize = 10;

/// Deflate turns one byte into at most 1032 (zlib's technical details).
const MAX_DEFLATE_RATIO: u64 = 1032;

/// Names of the ten classes of Fashion-MNIST, in label order.
const FASHION: [&str; CLASSES] =
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"];

/// The four parts of the set, in the order of [`Files`].
const PARTS: [(&str, &str); 4] = [
    ("train-images", "idx3-ubyte"),
    ("train-labels", "idx1-ubyte"),
    ("t10k-images", "idx3-ubyte"),
    ("t10k-labels", "idx1-ubyte"),
];

/// The four files of a data set; each may be plain or gzip, told by its first bytes.
#[derive(Debug, Clone)]
pub struct Files {
    /// Training images.
    pub train_images: Source,
    /// Training labels.
    pub train_labels: Source,
    /// Test images.
    pub test_images: Source,
    /// Test labels.
    pub test_labels: Source,
}

/// The file names under which a part may come, in order of preference.
fn names((part, kind): (&str, &str)) -> [String; 4] {
    [format!("{part}-{kind}"), format!("{part}.{kind}"), format!("{part}-{kind}.gz"), format!("{part}.{kind}.gz")]
}

/// True if `folder` holds at least one of the files of an IDX data set.
pub fn recognises(folder: &Path) -> bool {
    PARTS.iter().flat_map(|&part| names(part)).any(|name| folder.join(name).exists())
}

/// Opens the IDX data set in `folder`. It has ten classes; they are named if the folder or its parent has `fashion`
/// in its name, and are `0` to `9` otherwise.
///
/// # Errors
/// As [`super::dataset::open`].
pub fn open(folder: &Path) -> Result<DataPair> {
    let find = |part| {
        let names = names(part);
        match names.iter().map(|name| folder.join(name)).find(|path| path.exists()) {
            Some(path) => Source::map(path),
            None => Err(Error::file(folder, format!("{} not found, nor {}", names[0], names[1..].join(", ")))),
        }
    };
    let [train_images, train_labels, test_images, test_labels] = PARTS.map(find);
    let files = Files {
        train_images: train_images?,
        train_labels: train_labels?,
        test_images: test_images?,
        test_labels: test_labels?,
    };
    let full = folder.canonicalize().map_err(Error::io(folder))?;
    let tail = |path: Option<&Path>| {
        path.and_then(Path::file_name).map_or(String::new(), |name| name.to_string_lossy().to_lowercase())
    };
    let own = tail(Some(&full));
    if own.contains("fashion") || tail(full.parent()).contains("fashion") {
        load(&files, "fashion-mnist", Family::FashionMnist)
    } else {
        load(&files, if own.is_empty() { "idx" } else { &own }, Family::Other)
    }
}

/// Reads the data set from the content of its four files.
///
/// # Errors
/// As [`super::dataset::open`].
pub fn load(files: &Files, name: &str, family: Family) -> Result<DataPair> {
    let train = split(&files.train_images, &files.train_labels, name, family)?;
    let test = split(&files.test_images, &files.test_labels, name, family)?;
    if train.shape() != test.shape() {
        return Err(files.test_images.error(format!(
            "test images are {}, the training images {}",
            test.shape(),
            train.shape()
        )));
    }
    Ok(DataPair { train, test })
}

/// One split from its two files.
fn split(images: &Source, labels: &Source, name: &str, family: Family) -> Result<Dataset> {
    let image_file = read::<3>(images, IMAGES)?;
    let label_file = read::<1>(labels, LABELS)?;
    let [count, height, width] = image_file.sizes;
    if label_file.sizes[0] != count {
        return Err(labels.error(format!(
            "holds {} labels, but {} holds {count} images",
            label_file.sizes[0],
            images.path.display()
        )));
    }
    let class_names: Vec<String> = match family {
        Family::FashionMnist => FASHION.iter().map(|&name| name.into()).collect(),
        _ => (0..CLASSES).map(|class| class.to_string()).collect(),
    };
    let given = &label_file.bytes[label_file.first..];
    if let Some(i) = given.iter().position(|&label| usize::from(label) >= CLASSES) {
        return Err(labels.error(format!("label {} of image {i} is outside 0..={}", given[i], CLASSES - 1)));
    }
    let given = given.iter().map(|&label| u16::from(label)).collect();
    let shape = ImageShape { channels: 1, height, width };
    let segment = Segment { bytes: image_file.bytes, first: image_file.first, stride: shape.numel(), count };
    Ok(Dataset::from_parts(name, family, shape, class_names, given, vec![segment]))
}

/// A checked IDX file: exactly `sizes[0]·sizes[1]·…` bytes from `first` to the end of `bytes`.
struct IdxFile<const D: usize> {
    sizes: [usize; D],
    bytes: Bytes,
    first: usize,
}

/// Checks the file's header and size against each other, decompressing if need be.
fn read<const D: usize>(source: &Source, magic: u32) -> Result<IdxFile<D>> {
    if source.bytes.starts_with(&[0x1f, 0x8b]) {
        return read_gzip(source, magic);
    }
    let first = 4 + 4 * D;
    let header = source.bytes.get(..first).unwrap_or(&source.bytes);
    let (sizes, payload) = parse_header::<D>(source, header, magic)?;
    let found = (source.bytes.len() - first) as u64;
    if found != payload {
        let word = if found < payload { "truncated" } else { "oversized" };
        return Err(source.error(format!(
            "{word}: the header promises {} = {payload} bytes after itself, found {found}",
            describe(&sizes)
        )));
    }
    Ok(IdxFile { sizes, bytes: source.bytes.clone(), first })
}

/// As [`read`], for a gzip file.
fn read_gzip<const D: usize>(source: &Source, magic: u32) -> Result<IdxFile<D>> {
    let mut stream = MultiGzDecoder::new(&source.bytes[..]);
    let mut header = vec![0; 4 + 4 * D];
    let got = fill(source, &mut stream, &mut header)?;
    let (sizes, payload) = parse_header::<D>(source, &header[..got], magic)?;
    let promise = format!("the header promises {} = {payload} bytes", describe(&sizes));
    let packed = source.bytes.len() as u64;
    if payload > packed.saturating_mul(MAX_DEFLATE_RATIO) {
        return Err(source.error(format!("truncated: {promise}, more than {packed} bytes of gzip can hold")));
    }
    let payload = usize::try_from(payload).map_err(|_| source.error(format!("too large: {promise}")))?;
    let mut bytes: Vec<u8> = Vec::new();
    while bytes.len() < payload {
        let step = (payload - bytes.len()).min(bytes.len().max(1 << 20));
        bytes.try_reserve_exact(step).map_err(|_| source.error(format!("no memory left: {promise}")))?;
        let start = bytes.len();
        bytes.resize(start + step, 0);
        let got = fill(source, &mut stream, &mut bytes[start..])?;
        if got < step {
            return Err(source.error(format!("truncated: {promise} after itself, found {}", start + got)));
        }
    }
    // Reading past the end also makes the decoder compare the checksum.
    if fill(source, &mut stream, &mut [0])? > 0 {
        return Err(source.error(format!("oversized: {promise} after itself, found more")));
    }
    Ok(IdxFile { sizes, bytes: bytes.into(), first: 0 })
}

/// Reads until `buffer` is full or the stream ends; returns how many bytes came.
fn fill(source: &Source, stream: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                return Err(source.error("truncated: the gzip stream ends early"));
            }
            Err(e) => return Err(source.error(format!("damaged gzip stream: {e}"))),
        }
    }
    Ok(filled)
}

/// The sizes in the header and their product in bytes.
fn parse_header<const D: usize>(source: &Source, header: &[u8], magic: u32) -> Result<([usize; D], u64)> {
    let words: Vec<u32> =
        header.chunks_exact(4).map(|b| b.iter().fold(0, |word, &byte| word << 8 | u32::from(byte))).collect();
    if let Some(&found) = words.first().filter(|&&found| found != magic) {
        let name = |magic| match magic {
            IMAGES => " (an image file)",
            LABELS => " (a label file)",
            _ => "",
        };
        return Err(source.error(format!(
            "IDX magic number {found:#010x}{}, expected {magic:#010x}{}",
            name(found),
            name(magic)
        )));
    }
    if words.len() < 1 + D {
        return Err(source.error(format!(
            "truncated: {} bytes are too few for the {}-byte IDX header",
            header.len(),
            4 + 4 * D
        )));
    }
    let sizes: [usize; D] = std::array::from_fn(|i| words[1 + i] as usize);
    if sizes.contains(&0) {
        return Err(source.error(format!("empty: the header promises {}", describe(&sizes))));
    }
    let payload = words[1..].iter().try_fold(1u64, |product, &size| product.checked_mul(u64::from(size)));
    match payload.filter(|&bytes| bytes < 1 << 62) {
        Some(payload) => Ok((sizes, payload)),
        None => Err(source.error(format!("impossible header: {}", describe(&sizes)))),
    }
}

/// `60000 labels` or `60000 images of 28×28`.
fn describe(sizes: &[usize]) -> String {
    match sizes {
        [count, height, width] => format!("{count} images of {height}×{width}"),
        _ => format!("{} labels", sizes[0]),
    }
}
