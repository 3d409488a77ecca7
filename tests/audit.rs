//! The audit: scores and curves against brute force, the files byte by byte, and the command on a tiny run.

mod program;

use std::fs;
use std::path::Path;

use mlnt::audit::history::{Trajectory, kept, losses};
use mlnt::audit::npy;
use mlnt::audit::roc::Roc;
use mlnt::audit::score::{Evidence, findings, otsu, ranking, scores};
use mlnt::audit::sheet::{Entry, Layout, draw};
use mlnt::audit::text::Pen;
use mlnt::data::open;
use mlnt::rng::{Purpose, below, stream};
use program::*;
use serde_json::Value;

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} and {b}");
}

#[test]
fn findings_of_hand_made_probabilities() {
    #[rustfmt::skip]
    let probabilities = [
        0.81, 0.09, 0.10, // right
        0.04, 0.48, 0.48, // wrong: two others alike, the first is suggested
        0.64, 0.30, 0.06,
        0.10, 0.90, 0.00,
        0.25, 0.49, 0.26,
        0.50, 0.50, 0.00, // held out
    ];
    let given = [0, 0, 0, 1, 1, 0];
    let past = Trajectory { mean: 1.0, last: 2.0, belief: 0.1 };
    let history = [None, None, None, None, Some(past), None];
    let trained = [true, true, true, true, true, false];
    let evidence =
        Evidence { probabilities: &probabilities, classes: 3, given: &given, history: &history, trained: &trained };
    let found = findings(&evidence).unwrap();
    let suggested: Vec<usize> = found.iter().map(|f| f.suggested).collect();
    assert_eq!(suggested, [2, 1, 1, 0, 2, 1]);
    assert_eq!((found[1].p_given, found[1].p_suggested), (0.04, 0.48));
    // Beliefs are √p, 0.9, 0.2, 0.8 of class 0 and √0.9 of class 1, and what the history says of the other one.
    let (zero, one) = ((0.9 + 0.2 + 0.8) / 3.0, (0.9f64.sqrt() + 0.1) / 2.0);
    let expected = [zero - 0.9, zero - 0.2, zero - 0.8, one - 0.9f64.sqrt(), one - 0.1, 0.0];
    found.iter().zip(expected).for_each(|(f, e)| close(f.score, e));
    // Of the trained ones, two stand apart; one sample alone has nothing to be compared with.
    assert_eq!(found.iter().map(|f| f.flagged).collect::<Vec<_>>(), [false, true, false, false, true, false]);
    assert_eq!(ranking(&found), [1, 4, 5, 2, 0, 3]);

    let refused = |evidence: Evidence<'_>| findings(&evidence).unwrap_err().exit_code();
    assert_eq!(refused(Evidence { given: &given[1..], ..evidence }), 2);
    assert_eq!(refused(Evidence { given: &[0, 0, 3, 1, 1, 0], ..evidence }), 2);
    assert_eq!(refused(Evidence { probabilities: &[f64::NAN; 18], ..evidence }), 2);
    assert_eq!(refused(Evidence { classes: 1, probabilities: &[1.0; 6], ..evidence }), 2);
}

#[test]
fn scores_and_thresholds_against_brute_force() {
    let mut rng = stream(5, Purpose::Test, 1, 0);
    for n in [1usize, 2, 7, 60] {
        let belief: Vec<f64> = (0..n).map(|_| below(20, &mut rng) as f64 / 20.0).collect();
        let given: Vec<usize> = (0..n).map(|_| below(3, &mut rng) as usize).collect();
        let made = scores(&belief, &given, 3);
        for i in 0..n {
            let alike: Vec<f64> = (0..n).filter(|j| given[*j] == given[i]).map(|j| belief[j]).collect();
            close(made[i], alike.iter().sum::<f64>() / alike.len() as f64 - belief[i]);
        }
        // The variance within both groups, for a cut at every value: the threshold's must be the least.
        let within = |cut: f64| -> f64 {
            let group = |high: bool| {
                let members: Vec<f64> = belief.iter().copied().filter(|v| (*v > cut) == high).collect();
                let mean = members.iter().sum::<f64>() / members.len().max(1) as f64;
                members.iter().map(|v| (v - mean).powi(2)).sum::<f64>()
            };
            group(false) + group(true)
        };
        match otsu(&belief) {
            None => assert!(belief.iter().all(|v| *v == belief[0])),
            Some(cut) => {
                let least = belief.iter().map(|v| within(*v)).fold(f64::INFINITY, f64::min);
                assert!(within(cut) <= least + 1e-12, "{} and {least}", within(cut));
                assert!(belief.iter().all(|v| *v != cut));
            }
        }
    }
    assert_eq!(otsu(&[]), None);
    assert_eq!(otsu(&[0.5; 4]), None);
    assert_eq!(otsu(&[0.0, 1.0]), Some(0.5));
}

#[test]
fn roc_against_brute_force() {
    let mut rng = stream(6, Purpose::Test, 1, 0);
    for n in [2usize, 3, 10, 80] {
        for levels in [2, 1000] {
            // Few levels make many equal scores.
            let scores: Vec<f64> = (0..n).map(|_| below(levels, &mut rng) as f64 / 7.0).collect();
            let mut wrong: Vec<bool> = (0..n).map(|_| below(2, &mut rng) == 1).collect();
            (wrong[0], wrong[1]) = (true, false);
            let roc = Roc::new(&scores, &wrong).unwrap();
            let (mut pairs, mut won) = (0.0, 0.0);
            for i in (0..n).filter(|i| wrong[*i]) {
                for j in (0..n).filter(|j| !wrong[*j]) {
                    pairs += 1.0;
                    won += if scores[i] > scores[j] { 1.0 } else { 0.5 * f64::from(scores[i] == scores[j]) };
                }
            }
            close(roc.auc(), won / pairs);
            for p in &roc.points {
                let called = |i: &usize| scores[*i] >= p.threshold;
                let hits = (0..n).filter(called).filter(|i| wrong[*i]).count();
                assert_eq!((p.called, p.hits), ((0..n).filter(called).count(), hits));
                close(p.true_positive_rate, hits as f64 / roc.wrong as f64);
                close(p.false_positive_rate, (p.called - hits) as f64 / (n - roc.wrong) as f64);
            }
            assert_eq!(roc.points.last().map(|p| p.called), Some(n));
            let f1 = |p: &mlnt::audit::roc::RocPoint| 2.0 * p.hits as f64 / (p.called + roc.wrong) as f64;
            assert!(roc.points.iter().all(|p| f1(p) <= f1(&roc.best())));
        }
    }
    let roc = Roc::new(&[0.9, 0.8, 0.7, 0.6, 0.5], &[true, false, true, true, false]).unwrap();
    close(roc.precision_at_errors(), 2.0 / 3.0);
    // All equal: as good as chance.
    close(Roc::new(&[1.0; 4], &[true, false, false, false]).unwrap().precision_at_errors(), 0.25);
    assert!(Roc::new(&[1.0, 2.0], &[true; 2]).is_none() && Roc::new(&[1.0, 2.0], &[false; 2]).is_none());
}

#[test]
fn npy_files_byte_by_byte() {
    let bytes = npy::matrix_f64(&[0.25, 0.75, 1.0, 0.0, 0.5, 0.5], 2);
    let header = "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2,), }";
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    assert_eq!(u16::from_le_bytes([bytes[8], bytes[9]]), 118);
    assert_eq!(bytes[10..128], *format!("{header:117}\n").as_bytes());
    let values: Vec<f64> = bytes[128..].chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values, [0.25, 0.75, 1.0, 0.0, 0.5, 0.5]);

    let bytes = npy::vector_i64([3, -1].into_iter());
    assert!(bytes[10..].starts_with(b"{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }  "));
    assert_eq!((bytes.len() - 16) % 64, 0);
    assert_eq!(bytes[bytes.len() - 16..], [3i64.to_le_bytes(), (-1i64).to_le_bytes()].concat());
}

#[test]
fn what_training_left_is_read_and_defects_are_named() {
    let folder = Folder::new();
    let path = folder.path("losses.f32");
    let rows: [[f32; 3]; 3] = [[2.0, f32::NAN, 0.5], [1.0, f32::NAN, f32::NAN], [0.0, f32::NAN, 0.25]];
    fs::write(&path, rows.concat().iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let read = losses(&path, 3).unwrap();
    let first = read[0].unwrap();
    assert_eq!((first.mean, first.last), (1.0, 0.0));
    close(first.belief, ((-1.0f64).exp() + (-0.5f64).exp() + 1.0) / 3.0);
    assert_eq!(read[1], None);
    assert_eq!(read[2].map(|t| (t.mean, t.last)), Some((0.375, 0.25)));
    let error = losses(&path, 4).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("36 bytes"), "{error}");

    let path = folder.path("kept.csv");
    let with = |text: &str| {
        fs::write(&path, text).unwrap();
        kept(&path, [7, 3, 9].into_iter())
    };
    let good = "index,given,probability,kept\n3,1,0.2,1\n9,0,0.001,0\n";
    assert_eq!(with(good).unwrap(), [None, Some(true), Some(false)]);
    for bad in ["index,given\n3,1\n", "index,given,probability,kept\nx,1,0.2,1\n", &format!("{good}3,1,0.2,1\n")] {
        assert_eq!(with(bad).unwrap_err().exit_code(), 2, "{bad}");
    }
}

/// Every image at its place, pixel by pixel, in a sheet of the layout's size; `colour` is what a pixel must look like.
fn check_sheet(images: &mlnt::data::Dataset, count: usize, wrong: Option<bool>) -> image::RgbImage {
    let entry = |i: usize| Entry {
        position: i * 2,
        index: i as u32,
        given: "a class name that is far too long for any cell".into(),
        p_given: 0.01,
        suggested: "Ünïcode → Жук".into(),
        p_suggested: 0.9,
        wrong,
    };
    let entries: Vec<Entry> = (0..count).map(entry).collect();
    let png =
        draw(images, &entries, "A title that is too long for a sheet of one image, but must not break it").unwrap();
    let sheet = image::load_from_memory_with_format(&png, image::ImageFormat::Png).unwrap().to_rgb8();
    let layout = Layout::new(count, images.width, images.height);
    assert_eq!([sheet.width(), sheet.height()], layout.size());
    assert!((layout.columns * layout.rows) as usize >= count && layout.columns as usize <= count);
    assert!(images.width.max(images.height) as u32 * layout.scale >= 100);
    for i in 0..count {
        let [left, top] = layout.image_at(i);
        let pixels = images.image(i * 2);
        for y in 0..layout.image[1] {
            for x in 0..layout.image[0] {
                let at = (y / layout.scale) as usize * images.width + (x / layout.scale) as usize;
                let plane = images.width * images.height;
                let expected = [0, 1, 2].map(|c| pixels[(c % images.channels) * plane + at]);
                assert_eq!(sheet.get_pixel(left + x, top + y).0, expected, "image {i}, pixel {x}, {y}");
            }
        }
        // Something is written below the image.
        let below = top + layout.image[1] + 4;
        let dark = |y: u32| (left..left + layout.image[0]).any(|x| sheet.get_pixel(x, y).0 != [255; 3]);
        assert!((below..below + 40).any(dark));
    }
    sheet
}

#[test]
fn the_sheet_has_every_image_in_its_place() {
    let grey = open("sample").unwrap().test;
    for count in [1, 5, 12] {
        check_sheet(&grey, count, None);
    }
    let folder = Folder::new();
    let colour = open(folder.cifar("cifar").to_str().unwrap()).unwrap().train;
    assert_eq!(colour.channels, 3);
    // The frame tells what is known.
    let frame = |wrong| {
        let layout = Layout::new(2, colour.width, colour.height);
        let [x, y] = layout.image_at(0);
        check_sheet(&colour, 2, wrong).get_pixel(x - 1, y - 1).0
    };
    let frames = [frame(None), frame(Some(true)), frame(Some(false))];
    assert!(frames[0] != frames[1] && frames[1] != frames[2] && frames[0] != frames[2]);
}

#[test]
fn text_fits_its_room() {
    let pen = Pen::new().unwrap();
    assert_eq!(pen.fit("Coat", 14.0, 100.0), "Coat");
    let short = pen.fit("a name that is much too long", 14.0, 60.0);
    assert!(short.ends_with('…') && short.starts_with("a na") && pen.width(&short, 14.0) <= 60.0, "{short}");
    assert_eq!(pen.fit("wide", 14.0, 0.0), "…");
    assert_eq!(pen.width("", 14.0), 0.0);
    assert!(pen.width("→", 14.0) > 5.0);
}

/// A tiny run on the IDX images of `folder`.
fn tiny(folder: &Folder, flags: &str) -> (std::path::PathBuf, std::path::PathBuf) {
    let (data, out) = (folder.idx(), folder.path("run"));
    let said = mlnt(&format!("{} --no-baseline --device cpu {flags}", folder.train(TINY, &data, &out)));
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    (data, out)
}

fn audited(run: &Path, flags: &str) -> Value {
    let said = mlnt(&format!("audit {} --json --device cpu {flags}", run.display()));
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    serde_json::from_str(&said.stdout).unwrap()
}

#[test]
fn a_tiny_run_is_audited() {
    let folder = Folder::new();
    let (data, run) = tiny(&folder, "--noise-rate 0.3");
    let said = audited(&run, "--top 7");
    let audit = run.join("audit");
    let files = ["audit.csv", "given_labels.npy", "pred_probs.npy", "roc.csv", "roc.svg", "sheet.png"];
    assert_eq!(names_in(&audit), files);
    assert_eq!((&said["labels"], &said["data"]), (&Value::from(TRAIN), &Value::from("tiny")));

    let mut csv = csv::Reader::from_path(audit.join("audit.csv")).unwrap();
    let header: Vec<String> = csv.headers().unwrap().iter().map(String::from).collect();
    let at = |name: &str| header.iter().position(|h| h == name).unwrap_or_else(|| panic!("column {name}"));
    let lines: Vec<csv::StringRecord> = csv.records().map(Result::unwrap).collect();
    assert_eq!(lines.len(), TRAIN);
    let text = fs::read_to_string(run.join("labels.csv")).unwrap();
    let labels: Vec<Vec<usize>> = text
        .lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
        .map(|line| line.split(',').map(|v| v.parse().unwrap()).collect())
        .collect();
    let bytes = fs::read(audit.join("pred_probs.npy")).unwrap();
    let values: Vec<f64> = bytes[128..].chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
    let rows: Vec<&[f64]> = values.chunks_exact(CLASSES).collect();
    assert_eq!(rows.len(), TRAIN);
    rows.iter().for_each(|row| close(row.iter().sum(), 1.0));
    let bytes = fs::read(audit.join("given_labels.npy")).unwrap();
    let given: Vec<i64> =
        bytes[bytes.len() - 8 * TRAIN..].chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(given, labels.iter().map(|l| l[1] as i64).collect::<Vec<_>>());

    let number = |line: &csv::StringRecord, name: &str| -> f64 { line[at(name)].parse().unwrap() };
    let (mut seen, mut flagged, mut hits, mut wrong) = (vec![false; TRAIN], 0, 0, 0);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(number(line, "rank") as usize, i + 1);
        assert!(i == 0 || number(&lines[i - 1], "score") >= number(line, "score"));
        let index = number(line, "index") as usize;
        assert!(!std::mem::replace(&mut seen[index], true));
        let (row, given) = (rows[index], number(line, "given") as usize);
        assert_eq!((given, number(line, "true") as usize), (labels[index][1], labels[index][2]));
        assert_eq!(number(line, "wrong") == 1.0, labels[index][1] != labels[index][2]);
        assert!((number(line, "p_given") - row[given]).abs() < 1e-5);
        let suggested = number(line, "suggested") as usize;
        assert!(suggested != given && (0..CLASSES).all(|c| c == given || row[c] <= row[suggested]));
        let trained = &line[at("split")] == "train";
        assert_eq!(line[at("mean_loss")].is_empty(), !trained, "held-out samples have no losses");
        assert!(line[at("kept")].is_empty(), "one iteration has no filter");
        flagged += usize::from(&line[at("flagged")] == "1");
        wrong += usize::from(&line[at("wrong")] == "1");
        hits += usize::from(&line[at("wrong")] == "1" && &line[at("flagged")] == "1");
    }
    let known = &said["known_errors"];
    assert_eq!((&said["flagged"], &known["wrong"]), (&Value::from(flagged), &Value::from(wrong)));
    close(known["precision"].as_f64().unwrap(), hits as f64 / flagged as f64);
    close(known["recall"].as_f64().unwrap(), hits as f64 / wrong as f64);
    let svg = fs::read_to_string(audit.join("roc.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));

    // The same again, byte by byte, and elsewhere.
    let first: Vec<Vec<u8>> = files.iter().map(|name| fs::read(audit.join(name)).unwrap()).collect();
    let other = folder.path("other");
    audited(&run, &format!("--top 7 --threads 1 --out {}", other.display()));
    files.iter().zip(&first).for_each(|(name, bytes)| assert!(fs::read(other.join(name)).unwrap() == *bytes, "{name}"));

    // An older run has no losses and no best network: it says so, and the scores come from the teacher.
    ["losses.f32", "best.safetensors"].iter().for_each(|name| fs::remove_file(run.join(name)).unwrap());
    let said = audited(&run, "");
    assert!(said["network"].as_str().unwrap().ends_with("teacher.safetensors"));
    assert!(said["missing"].to_string().contains("losses.f32"), "{said}");
    let text = mlnt(&format!("audit {} --model student", run.display()));
    assert_eq!(text.status, Some(0));
    assert!(text.stdout.contains("known to be wrong") && text.stdout.contains("no losses.f32"), "{}", text.stdout);

    // What cannot be audited: one line that says why, status 2.
    let refused = |line: &str, names: &str| {
        let said = mlnt(line);
        assert_eq!(said.status, Some(2), "{line}: {}", said.stderr);
        assert!(said.error_line().contains(names), "`{}` does not name `{names}`", said.stderr);
    };
    let line = format!("audit {}", run.display());
    refused(&format!("audit {}", folder.path("none").display()), "no such run directory");
    refused(&format!("audit {}", data.display()), "no config.toml");
    refused(&format!("{line} --model best"), "best.safetensors");
    refused(&format!("{line} --data sample"), "the network takes");
    refused(&format!("{line} --top 0"), "whole number");
    refused(&format!("{line} --data {}", folder.path("moved").display()), "does not exist");
    let good = fs::read_to_string(run.join("labels.csv")).unwrap();
    let edits: [(&str, String); 4] = [
        ("labels, but the run has", good.lines().take(9).map(|l| format!("{l}\n")).collect()),
        ("nothing to audit", "index,label,true_label\n".into()),
        ("not in order", good.replace("\n3,", "\n2,")),
        ("true label", good.replace("\n0,", "\n0,0,5\n#")),
    ];
    for (names, text) in edits {
        fs::write(run.join("labels.csv"), text).unwrap();
        refused(&line, names);
    }
    fs::write(run.join("labels.csv"), good).unwrap();
    fs::remove_file(run.join("student.safetensors")).unwrap();
    refused(&line, "not complete");
}

#[test]
fn without_known_errors_there_is_no_curve_and_an_old_one_goes() {
    let folder = Folder::new();
    let (_, run) = tiny(&folder, "--noise none --epochs 1");
    fs::create_dir(run.join("audit")).unwrap();
    fs::write(run.join("audit/roc.csv"), "old").unwrap();
    let said = audited(&run, "");
    assert_eq!(said["known_errors"], Value::Null);
    assert_eq!(names_in(&run.join("audit")), ["audit.csv", "given_labels.npy", "pred_probs.npy", "sheet.png"]);
    let text = fs::read_to_string(run.join("audit/audit.csv")).unwrap();
    assert!(text.lines().next().is_some_and(|header| header.ends_with("mean_loss,last_loss")));
}

#[test]
fn the_filters_decision_stands_in_the_table() {
    let folder = Folder::new();
    let (_, run) = tiny(&folder, "--noise-rate 0.3 --epochs 1 --iterations 2 --tau 0.1");
    let said = audited(&run, "");
    assert_eq!(said["missing"], serde_json::json!([]));
    let mut csv = csv::Reader::from_path(run.join("audit/audit.csv")).unwrap();
    let columns: Vec<String> = csv.headers().unwrap().iter().map(String::from).collect();
    let at = |name: &str| columns.iter().position(|c| c == name).unwrap();
    let kept = fs::read_to_string(run.join("kept.csv")).unwrap();
    let decided =
        |index: &str| kept.lines().find(|l| l.split(',').next() == Some(index)).map(|l| l.rsplit(',').next().unwrap());
    for line in csv.records().map(Result::unwrap) {
        assert_eq!(line[at("kept")], *decided(&line[at("index")]).unwrap_or(""));
        assert_eq!(line[at("kept")].is_empty(), &line[at("split")] == "validation");
    }
}
