//! Every loader, given 100,000 damaged files: an error in one line that names the file, or a data set that holds
//! together; never a panic, and never more memory than a small multiple of the files.
#![allow(unsafe_code)]

mod files;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use files::{
    bytes, cifar_meta, cifar_n, cifar_n_pickle, cifar_records, cifar10_python, cifar100_python, fixture, gzip,
    idx_split, load_cifar, load_idx, source, zip,
};
use mlnt::data::cifar::{CIFAR_10, CIFAR_100};
use mlnt::data::cifar_python::{CIFAR_10_PYTHON, CIFAR_100_PYTHON, PythonLayout};
use mlnt::data::dataset::Source;
use mlnt::data::labels::{self, json, npy};
use mlnt::data::{DataPair, Dataset, NoiseKind, noise, open};
use mlnt::rng::{Purpose, Stream, below, stream};

/// The system's allocator, which keeps count of what each thread holds.
struct Counted;

thread_local! {
    /// Bytes that this thread has allocated and not freed, since the last reset; negative when it freed older ones.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// The most it held.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    let held = HELD.get() + change;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new block may exist at once.
        count(size as isize);
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The most bytes that this thread holds while `f` runs, beyond what it held before.
fn peak<T>(f: impl FnOnce() -> T) -> (usize, T) {
    HELD.set(0);
    PEAK.set(0);
    let result = f();
    (PEAK.get() as usize, result)
}

/// Damaged inputs for each loader.
const CASES: usize = 100_000;
/// Bytes that a loader may hold for each byte of its files, and besides.
const MULTIPLE: usize = 48;
const BESIDES: usize = 1 << 20;

/// Numbers that lengths and counts are replaced by.
const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// A damaged copy of `bytes`: bits flipped and bytes set (most often near the start, where headers are), numbers of 2, 4
/// or 8 bytes set to extremes, parts of it or of `other` moved elsewhere, cut short or extended.
fn mutate(bytes: &[u8], other: &[u8], rng: &mut Stream) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..below(4, rng) {
        if bytes.is_empty() {
            break;
        }
        let range = if below(2, rng) == 0 { bytes.len().min(64) } else { bytes.len() };
        let at = below(range as u64, rng) as usize;
        match below(8, rng) {
            0..3 => bytes[at] ^= 1 << below(8, rng),
            3..5 => bytes[at] = below(256, rng) as u8,
            5 => {
                let width = 2 << below(3, rng);
                let number = NUMBERS[below(8, rng) as usize].to_le_bytes();
                bytes[at..].iter_mut().zip(&number[..width]).for_each(|(byte, new)| *byte = *new);
            }
            6 => bytes[at] = bytes[at].wrapping_add(if below(2, rng) == 0 { 1 } else { 255 }),
            _ => {
                let from = if below(2, rng) == 0 { other } else { &bytes[..] };
                let start = below(from.len() as u64, rng) as usize;
                let length = below((from.len() - start).min(200) as u64 + 1, rng) as usize;
                let part = from[start..start + length].to_vec();
                let until = if below(2, rng) == 0 { at } else { (at + length).min(bytes.len()) };
                bytes.splice(at..until, part);
            }
        }
    }
    match below(8, rng) {
        0 => bytes.truncate(below(bytes.len() as u64 + 1, rng) as usize),
        1 => bytes.extend((0..below(40, rng)).map(|i| i as u8)),
        _ => {}
    }
    bytes
}

/// What a loader makes of its files: whether it took them.
type Load<'a> = &'a dyn Fn(&[Source]) -> mlnt::Result<()>;

/// Loads [`CASES`] times from one of the `sets` of files, one of the files damaged.
fn storm(name: &str, seed: u64, sets: &[Vec<Vec<u8>>], load: Load<'_>) {
    let mut rng = stream(seed, Purpose::Test, 1, 0);
    let named = |i: usize, bytes: Vec<u8>| source(format!("file{i}"), bytes);
    let good =
        |files: &Vec<Vec<u8>>| -> Vec<Source> { files.iter().cloned().enumerate().map(|(i, b)| named(i, b)).collect() };
    let good: Vec<Vec<Source>> = sets.iter().map(good).collect();
    good.iter().for_each(|sources| load(sources).unwrap());
    let (mut fine, mut most) = (0, 0);
    for case in 0..CASES {
        let chosen = below(sets.len() as u64, &mut rng) as usize;
        let (files, mut sources) = (&sets[chosen], good[chosen].clone());
        let which = below(files.len() as u64, &mut rng) as usize;
        let other = &sets[below(sets.len() as u64, &mut rng) as usize];
        let other = &other[below(other.len() as u64, &mut rng) as usize];
        sources[which] = named(which, mutate(&files[which], other, &mut rng));
        let size: usize = sources.iter().map(|file| file.bytes.len()).sum();
        let (held, result) = peak(|| load(&sources));
        assert!(held <= MULTIPLE * size + BESIDES, "{name}, case {case}: {held} bytes for {size}");
        most = most.max(held);
        match result {
            Ok(()) => fine += 1,
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("file") && !text.contains('\n'), "{name}, case {case}: {text}");
                assert_eq!(error.exit_code(), 2);
            }
        }
    }
    println!("{name}: {fine} of {CASES} taken, at most {most} bytes held");
    assert!((CASES / 100..CASES * 19 / 20).contains(&fine), "{name}: {fine} of {CASES} were taken");
}

/// Everything that a data set gives out.
fn touch(data: &Dataset) {
    assert_eq!(data.class_names.len(), data.classes);
    for i in 0..data.len() {
        assert!(data.label(i) < data.classes);
        assert_eq!(data.image(i).len(), data.shape().numel());
    }
}

fn touched(pair: DataPair) {
    touch(&pair.train);
    touch(&pair.test);
}

/// A data set of 40 images, and noisy labels for it.
fn labelled() -> (Dataset, Vec<u16>) {
    let data = open("sample").unwrap().train.subset(&(0..40).collect::<Vec<u32>>()).unwrap();
    let noisy = noise::inject(&data, NoiseKind::SymmetricExclusive, 0.4, 1).unwrap();
    (data, noisy.labels)
}

/// Storms on label files for [`labelled`].
fn label_storm(name: &str, seed: u64, files: Vec<Vec<u8>>, set: Option<&str>) {
    let (data, _) = labelled();
    let sets: Vec<Vec<Vec<u8>>> = files.into_iter().map(|file| vec![file]).collect();
    storm(name, seed, &sets, &|sources| {
        let file = labels::read(&sources[0].path, &sources[0].bytes, set, &data)?;
        assert_eq!(file.covered.len(), file.labels.len());
        assert!(file.covered.is_sorted_by(|a, b| a < b) && file.covered.iter().all(|&i| (i as usize) < data.len()));
        assert!(file.labels.iter().all(|&label| usize::from(label) < data.classes));
        Ok(())
    });
}

#[test]
fn idx() {
    let plain = [idx_split(12, 1), idx_split(7, 2)].concat();
    let packed = plain.iter().map(|bytes| gzip(bytes)).collect();
    storm("idx", 1, &[plain, packed], &|sources| load_idx(sources).map(touched));
}

#[test]
fn cifar_binary() {
    let names = |n: usize| (0..n).map(|i| format!("name {i}\n")).collect::<String>().into_bytes();
    let ten = (0..6).map(|file| cifar_records(1, file, |i| vec![i as u8 + 8])).chain([names(10)]).collect();
    storm("cifar-10", 3, &[ten], &|sources| load_cifar(&CIFAR_10, sources).map(touched));
    let hundred = (0..2).map(|file| cifar_records(2, file, |_| vec![19, 99])).chain([names(100)]).collect();
    storm("cifar-100", 4, &[hundred], &|sources| load_cifar(&CIFAR_100, sources).map(touched));
}

#[test]
fn cifar_pickles() {
    let load = |layout: &PythonLayout, sources: &[Source]| {
        let [train @ .., test, meta] = sources else { panic!("too few files") };
        layout.load(train, test, Some(meta)).map(touched)
    };
    let names = |n: usize| -> Vec<String> { (0..n).map(|i| format!("name {i}")).collect() };
    let ten = |file: u64| cifar10_python("training batch", &bytes(3072, file), &[file as u8]);
    let ten: Vec<Vec<u8>> = (0..6).map(ten).chain([cifar_meta("label_names", &names(10))]).collect();
    storm("cifar-10 python", 5, &[ten], &|sources| load(&CIFAR_10_PYTHON, sources));
    let hundred = |file: u64| cifar100_python(&bytes(2 * 3072, file), &[99, file as u8]);
    let hundred = (0..2).map(hundred).chain([cifar_meta("fine_label_names", &names(100))]).collect();
    storm("cifar-100 python", 6, &[hundred], &|sources| load(&CIFAR_100_PYTHON, sources));
}

#[test]
fn npy_labels() {
    let (_, given) = labelled();
    label_storm("npy", 7, vec![npy::write(&given), fixture("labels-u1.npy"), npy::write(&given[..30])], None);
}

#[test]
fn json_labels() {
    let (_, given) = labelled();
    label_storm("json", 8, vec![json::write(&given), fixture("labels.json")], None);
}

#[test]
fn csv_labels() {
    let (data, given) = labelled();
    let comments = [("noise", "pair".to_string()), ("nominal rate", "0.5".into()), ("seed", "1".into())];
    let full = labels::csv::write(&data, &given, &comments).unwrap();
    label_storm("csv", 9, vec![full, b"label\n3\n4\n5\n".to_vec()], None);
}

/// The sets of a CIFAR-N file for [`labelled`].
fn sets() -> Vec<(&'static str, Vec<i64>)> {
    let (data, given) = labelled();
    let wide = |labels: &[u16]| labels.iter().map(|&label| label.into()).collect();
    vec![("clean_label", wide(data.labels())), ("worse_label", wide(&given)), ("aggre_label", wide(data.labels()))]
}

/// The archive is damaged.
#[test]
fn cifar_n_archives() {
    let deflated = zip("archive/data.pkl", &cifar_n_pickle(&sets()), true);
    label_storm("pt archive", 10, vec![cifar_n(&sets()), deflated], Some("worse_label"));
}

/// The pickle in a good archive is damaged.
#[test]
fn cifar_n_pickles() {
    let (data, _) = labelled();
    storm("pt pickle", 11, &[vec![cifar_n_pickle(&sets())]], &|sources| {
        let file = zip("archive/data.pkl", &sources[0].bytes, false);
        labels::read(&sources[0].path, &file, Some("worse_label"), &data).map(drop)
    });
}

/// Small files that ask for much.
#[test]
fn greedy_files_are_refused() {
    let (data, _) = labelled();
    let read =
        |bytes: &[u8]| peak(|| labels::read(Path::new("file"), bytes, Some("a"), &data).unwrap_err().to_string());
    let bomb = zip("archive/data.pkl", &vec![b'N'; 200 << 20], true);
    let (held, error) = read(&bomb);
    assert_eq!(error, "file: data.pkl has more than 16777216 bytes, too many for sets of labels");
    assert!(held < 64 << 20, "{held} bytes");
    // A value for each byte; and one list that is added to itself again and again.
    let many = zip("archive/data.pkl", &[b"\x80\x02", &vec![b']'; 15 << 20][..]].concat(), true);
    let (held, error) = read(&many);
    assert_eq!(error, "file: data.pkl: byte 400002: more than 400000 values");
    assert!(held < 64 << 20, "{held} bytes");
    let marks = zip("archive/data.pkl", &[b"\x80\x02", &vec![b'('; 15 << 20][..]].concat(), true);
    assert_eq!(read(&marks).1, "file: data.pkl: byte 400002: more than 400000 values");
    let mut same = b"\x80\x02]q\0(".to_vec();
    (0..2_000_000).for_each(|_| same.extend(b"h\0"));
    let (held, error) = read(&zip("archive/data.pkl", &same, true));
    assert_eq!(error, "file: data.pkl: byte 800004: more than 400000 values");
    assert!(held < 64 << 20, "{held} bytes");
}
