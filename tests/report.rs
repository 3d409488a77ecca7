//! `mlnt report` on small run directories written by hand: what the page says, and that it is sound.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use mlnt::report::curves::{groups, spread};
use mlnt::report::read::open_all;
use serde_json::{Value, json};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["coat", "bag <b>", "shoe & lace"];

/// A folder with run directories.
struct Written {
    folder: TempDir,
}

impl Written {
    fn new() -> Self {
        Written { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a complete run of two iterations of two epochs, with accuracies that depend on the seed.
    fn run(&self, name: &str, seed: u64, noise: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        let config = format!(
            "data = \"/d/a b/<img src=x>\"\nval-fraction = 0.25\nval-labels = \"noisy\"\nnoise = \"{noise}\"\n\
             noise-rate = 0.5\nbatch = 2\nepochs = 2\nwidths = [4, 8]\nseed = {seed}\n"
        );
        fs::write(path.join("config.toml"), config).unwrap();
        let shift = seed as f64 / 1000.0;
        let record = |phase: &str, iteration: Value, epoch: usize, at: f64| {
            let mlnt = phase == "mlnt";
            json!({
                "phase": phase, "iteration": iteration, "epoch": epoch, "lr": 0.1, "eta": 0.0,
                "train_loss": 2.0 - at, "meta_loss": mlnt.then_some(0.01 + at / 100.0), "train_accuracy": at / 2.0,
                "val_accuracy": at - 0.1, "test_accuracy": at + shift,
                "teacher_val_accuracy": mlnt.then_some(at - 0.05), "teacher_test_accuracy": mlnt.then_some(at + 0.05 + shift),
            })
        };
        let records = [
            record("cross-entropy", Value::Null, 1, 0.5123),
            record("cross-entropy", Value::Null, 2, 0.4321),
            record("mlnt", json!(1), 1, 0.5517),
            record("mlnt", json!(1), 2, 0.6218),
            record("mlnt", json!(2), 1, 0.5934),
            record("mlnt", json!(2), 2, 0.6745),
        ];
        let times = records.iter().map(|r| {
            json!({"phase": r["phase"], "iteration": r["iteration"], "epoch": r["epoch"],
                   "train_seconds": 0.5, "eval_seconds": 0.25})
        });
        write_lines(&path.join("metrics.jsonl"), &records);
        write_lines(&path.join("timing.jsonl"), &times.collect::<Vec<_>>());
        let mentor = json!({"network": "teacher", "epoch": 2, "val_accuracy": 0.5718});
        let iterations = [
            json!({"iteration": 1, "mentor": mentor}),
            json!({"iteration": 2, "mentor": mentor, "kept": 6, "dropped": 3, "precision": 0.6667, "recall": 0.5}),
        ];
        write_lines(&path.join("iterations.jsonl"), &iterations);
        // 12 labels, of which 3 are wrong: 25 %.
        let wrong = [(0, 1), (3, 2), (7, 0)];
        let label = |i: usize| wrong.iter().find(|(at, _)| *at == i).map_or(i % 3, |(_, label)| *label);
        let lines: String = (0..12).map(|i| format!("{},{},{}\n", 10 + i, label(i), i % 3)).collect();
        fs::write(path.join("labels.csv"), format!("# noise: {noise}\nindex,label,true_label\n{lines}")).unwrap();
        fs::write(path.join("summary.json"), "{}").unwrap();
        let meta = json!({"meta": {"class_names": NAMES}}).to_string();
        let head = json!({"__metadata__": {"mlnt": meta}}).to_string();
        let file = [&(head.len() as u64).to_le_bytes()[..], head.as_bytes()].concat();
        fs::write(path.join("student.safetensors"), file).unwrap();
        path
    }
}

fn write_lines(path: &Path, records: &[Value]) {
    let text: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(path, text).unwrap();
}

fn mlnt() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("mlnt"))
}

/// What the program says when it refuses.
fn refusal(args: &[&Path]) -> String {
    let output = mlnt().arg("report").args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap().trim_end().to_string()
}

/// The page, read as XML: every element is closed, every attribute quoted, every name escaped.
fn parsed(page: &str) -> String {
    let mut text = page.strip_prefix("<!DOCTYPE html>").expect("a document type").to_string();
    // The one element of the page that HTML leaves open.
    let mut from = 0;
    while let Some(at) = text[from..].find("<meta ") {
        let end = from + at + text[from + at..].find('>').unwrap();
        text.insert(end, '/');
        from = end;
    }
    text
}

/// The texts of the cells of the table under the section with this anchor, row by row.
fn rows(document: &roxmltree::Document<'_>, anchor: &str) -> Vec<Vec<String>> {
    let section = document.descendants().find(|n| n.attribute("id") == Some(anchor)).expect(anchor);
    let text = |n: roxmltree::Node<'_, '_>| -> String {
        n.descendants().filter(|d| d.is_text()).filter_map(|d| d.text()).collect::<String>().trim().to_string()
    };
    let row = |r: roxmltree::Node<'_, '_>| r.children().filter(|c| c.is_element()).map(text).collect();
    section.descendants().filter(|n| n.has_tag_name("tr")).map(row).collect()
}

fn report(runs: &[&Path]) -> String {
    mlnt::report::html(&runs.iter().map(|path| path.to_path_buf()).collect::<Vec<_>>()).unwrap()
}

/// No script, no address of another file, no event handler: nothing to fetch, nothing to run.
fn assert_self_contained(page: &str, document: &roxmltree::Document<'_>) {
    for word in ["http:", "https:", "//", "url(", "@import", "javascript:", "data:image"] {
        assert!(
            !page.contains(word),
            "{word} at {:?}",
            page.find(word).map(|at| &page[at.saturating_sub(40)..at + 40])
        );
    }
    for node in document.descendants().filter(|n| n.is_element()) {
        assert!(
            !["script", "link", "img", "iframe", "object", "image", "use"].contains(&node.tag_name().name()),
            "{node:?}"
        );
        for attribute in node.attributes() {
            let (name, value) = (attribute.name(), attribute.value());
            assert!(name != "src" && !name.starts_with("on"), "{name}");
            assert!(name != "href" || value.starts_with('#'), "{value}");
        }
    }
    let ids: Vec<&str> = document.descendants().filter_map(|n| n.attribute("id")).collect();
    for link in document.descendants().filter_map(|n| n.attribute("href")) {
        assert!(ids.contains(&&link[1..]), "{link} leads nowhere");
    }
    let unique: std::collections::BTreeSet<&&str> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
}

#[test]
fn the_page_of_a_run_is_sound_and_has_the_numbers_of_its_files() {
    let written = Written::new();
    let run = written.run("one", 1, "symmetric");
    mlnt().arg("report").arg(&run).assert().success();
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert_eq!(page, report(&[&run]), "the same files give the same page");
    let text = parsed(&page);
    let document = roxmltree::Document::parse(&text).unwrap();
    assert_self_contained(&page.replace("/d/a b/", ""), &document);

    let title = document.descendants().find(|n| n.has_tag_name("h1")).and_then(|n| n.text()).unwrap();
    assert_eq!(title, "<img src=x>: symmetric noise, nominal 50\u{a0}%, 25.0\u{a0}% of the labels wrong");
    let captions: Vec<&str> =
        document.descendants().filter(|n| n.has_tag_name("figcaption")).filter_map(|n| n.text()).collect();
    assert!(captions[0].contains("25.0\u{a0}% of the labels wrong"), "{captions:?}");

    // Accuracy in two sizes, fit in two sizes, two losses, one heat map.
    let plots: Vec<_> = document.descendants().filter(|n| n.has_tag_name("svg")).collect();
    assert_eq!(plots.len(), 7);
    for plot in &plots {
        assert_eq!(plot.attribute("role"), Some("img"));
        let child = |name| plot.children().find(|c| c.has_tag_name(name)).and_then(|c| c.text()).unwrap_or_default();
        assert!(child("title").len() > 10 && child("desc").len() > 20, "{} / {}", child("title"), child("desc"));
        assert!(plot.children().filter(|c| c.is_element()).count() > 10);
    }

    // Epoch by epoch: cross entropy, student, teacher, test and validation each.
    let accuracy = rows(&document, "g1-accuracy");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let percent = |value: &Value| format!("{:.2}", 100.0 * value.as_f64().unwrap());
    let keys = ["test_accuracy", "val_accuracy", "teacher_test_accuracy", "teacher_val_accuracy"];
    for (i, record) in records[2..].iter().enumerate() {
        let cells = &accuracy[i + 1];
        assert_eq!(cells[0], (i + 1).to_string());
        assert_eq!(cells[3..], keys.map(|key| percent(&record[key])), "epoch {i}");
        let baseline =
            records[..2].get(i).map_or(["–".into(), "–".into()], |r| [0, 1].map(|k| percent(&r[keys[k]])));
        assert_eq!(cells[1..3], baseline);
    }

    let summary = rows(&document, "g1-summary");
    assert_eq!(summary[1], ["cross entropy", "51.33", "1", "43.31", "51.33", "1"]);
    assert_eq!(summary[2], ["MLNT student, iteration 1", "62.28", "2", "62.28", "62.28", "2"]);
    assert_eq!(summary[5], ["MLNT teacher, iteration 2", "72.55", "2", "72.55", "72.55", "2"]);

    let filter = rows(&document, "g1-filter");
    assert_eq!(filter[1], ["1", "–", "–", "–", "–", "teacher, epoch 2", "57.18"]);
    assert_eq!(filter[2], ["2", "6", "3", "66.67", "50.00", "teacher, epoch 2", "57.18"]);

    // 12 images, 3 held out, whole batches of 2: 8 images in half a second.
    let throughput = rows(&document, "g1-throughput");
    assert_eq!(throughput[1], ["cross entropy", "2", "0.50", "0.25", "16", "1.5 s"]);
    assert_eq!(throughput[3][0], "MLNT, iteration 2");

    let configuration = document.descendants().find(|n| n.attribute("id") == Some("g1-configuration")).unwrap();
    let settings: Vec<&str> = configuration.descendants().filter(|n| n.is_text()).filter_map(|n| n.text()).collect();
    assert!(settings.windows(2).any(|w| w == ["widths", "4, 8"]), "{settings:?}");
    assert_eq!(settings.len(), 1 + 2 * 9, "{settings:?}");
}

#[test]
fn labels_are_counted_against_suggested_ones_where_an_audit_is_there() {
    let written = Written::new();
    let run = written.run("one", 1, "symmetric");
    let without = report(&[&run]);
    assert!(without.contains("mlnt audit") && without.contains("Given against true labels: 3 of 12 differ"));
    assert!(without.contains("bag &lt;b&gt;") && !without.contains("<b>bag"), "names are escaped");

    fs::create_dir(run.join("audit")).unwrap();
    // Of what is not flagged the given label stays, whatever the most probable other class is.
    let lines = "rank,given_name,score,suggested_name,flagged\n1,coat,0.1,bag <b>,1\n2,coat,0.2,shoe & lace,0\n\
                 3,shoe & lace,0.3,coat,1\n";
    fs::write(run.join("audit/audit.csv"), lines).unwrap();
    let runs = open_all(std::slice::from_ref(&run)).unwrap();
    let matrix = runs[0].audit.as_ref().unwrap();
    assert_eq!(
        (&matrix.names[..], &matrix.counts[..]),
        (&NAMES.map(String::from)[..], &[vec![1, 1, 0], vec![0; 3], vec![1, 0, 0]][..])
    );
    assert_eq!((matrix.share(0, 1), matrix.share(1, 1)), (0.5, 0.0));
    assert_eq!(matrix.top(5), [(0, 1, 1), (2, 0, 1)]);
    let page = report(&[&run]);
    assert!(!page.contains("No suggested labels") && page.contains("Given against suggested labels: 2 of 3 differ"));
    roxmltree::Document::parse(&parsed(&page)).unwrap();
}

#[test]
fn runs_that_differ_in_their_seed_become_a_mean_and_others_do_not() {
    let written = Written::new();
    let runs = [1, 2, 6].map(|seed| written.run(&format!("s{seed}"), seed, "symmetric"));
    let mut paths: Vec<PathBuf> = runs.to_vec();
    // The same folder by another name counts once.
    paths.push(written.path("s1/../s2"));
    let group = groups(open_all(&paths).unwrap()).remove(0);
    assert_eq!(group.runs.len(), 3);
    assert_eq!(
        group.methods.iter().map(|m| m.label.as_str()).collect::<Vec<_>>(),
        ["cross entropy", "MLNT student", "MLNT teacher"]
    );
    let mean = group.methods[1].mean(|p| p.test);
    assert_eq!(mean.len(), 4);
    assert!((mean[3].1.mean - (0.6745 + 0.003)).abs() < 1e-12 && mean[3].1.count == 3);
    // Of 0.001, 0.002, 0.006: squares of -2, -1, 3 thousandths are 14, by two is 7.
    assert!((mean[3].1.std.unwrap() - 7f64.sqrt() / 1000.0).abs() < 1e-12);
    assert_eq!(spread(&[2.0]).unwrap().std, None);
    assert_eq!(spread(&[]), None);

    let page = report(&[&runs[0], &runs[1], &runs[2]]);
    let text = parsed(&page);
    let document = roxmltree::Document::parse(&text).unwrap();
    assert_self_contained(&page.replace("/d/a b/", "").replace(written.folder.path().to_str().unwrap(), ""), &document);
    let summary = rows(&document, "g1-summary");
    assert_eq!(
        summary[1],
        ["cross entropy", "mean ± std of 3", "51.53 ± 0.26", "", "43.51 ± 0.26", "51.53 ± 0.26", ""]
    );
    assert_eq!(summary[2][..3], ["", "s1", "51.33"]);
    let configuration = rows(&document, "g1-configuration");
    assert_eq!(configuration, [vec!["setting", "s1", "s2", "s6"], vec!["seed", "1", "2", "6"]]);

    // Another setting is another method, not another seed.
    let config = runs[2].join("config.toml");
    fs::write(&config, fs::read_to_string(&config).unwrap() + "recipe = \"paper\"\n").unwrap();
    let group = groups(open_all(&runs).unwrap()).remove(0);
    let labels: Vec<(&str, usize)> = group.methods.iter().map(|m| (m.label.as_str(), m.curves.len())).collect();
    assert_eq!(labels[2..4], [("MLNT student (recipe unset)", 2), ("MLNT student (recipe paper)", 1)]);
    roxmltree::Document::parse(&parsed(&report(&[&runs[0], &runs[1], &runs[2]]))).unwrap();
}

#[test]
fn runs_on_other_noise_get_a_part_of_their_own() {
    let written = Written::new();
    let (a, b) = (written.run("a", 1, "symmetric"), written.run("b", 1, "pair"));
    let out = written.path("both.html");
    mlnt().arg("report").args([&a, &b]).arg("--out").arg(&out).assert().success();
    let page = fs::read_to_string(out).unwrap();
    let text = parsed(&page);
    let document = roxmltree::Document::parse(&text).unwrap();
    assert_self_contained(&page.replace("/d/a b/", "").replace(written.folder.path().to_str().unwrap(), ""), &document);
    let titles: Vec<&str> = document.descendants().filter(|n| n.has_tag_name("h2")).filter_map(|n| n.text()).collect();
    assert_eq!(titles.len(), 2, "{titles:?}");
    assert!(titles[1].contains("pair noise, nominal 50\u{a0}%, 25.0\u{a0}%"), "{titles:?}");
    assert_eq!(rows(&document, "g2-summary")[1][0], "cross entropy");
}

#[test]
fn an_unfinished_or_older_run_is_shown_as_far_as_it_is() {
    let written = Written::new();
    let run = written.run("half", 1, "symmetric");
    fs::remove_file(run.join("summary.json")).unwrap();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    // As a program that still writes may leave it: the third line is not whole.
    let cut = metrics.match_indices('\n').nth(1).unwrap().0 + 30;
    fs::write(run.join("metrics.jsonl"), &metrics[..cut]).unwrap();
    let page = report(&[&run]);
    assert!(page.contains("Not complete: ") && page.contains("stands after epoch 2 of cross entropy."));
    let text = parsed(&page);
    assert_eq!(rows(&roxmltree::Document::parse(&text).unwrap(), "g1-accuracy").len(), 3);

    for name in ["metrics.jsonl", "timing.jsonl", "iterations.jsonl", "labels.csv", "student.safetensors"] {
        fs::remove_file(run.join(name)).unwrap();
        roxmltree::Document::parse(&parsed(&report(&[&run]))).unwrap();
    }
    fs::write(run.join("config.toml"), "").unwrap();
    let page = report(&[&run]);
    for words in [
        "has no finished epoch yet",
        "noise unknown",
        "realised level unknown (no labels.csv)",
        "iterations.jsonl is not there",
        "timing.jsonl is not there",
        "metrics.jsonl is not there",
        "Nor are there true labels",
    ] {
        assert!(page.contains(words), "{words}");
    }
    roxmltree::Document::parse(&parsed(&page)).unwrap();

    // Lines of before iterations were counted: a phase that starts again is in its second one.
    let line = |epoch: usize| json!({"phase": "mlnt", "epoch": epoch, "test_accuracy": 0.5, "val_accuracy": 0.5});
    write_lines(&run.join("metrics.jsonl"), &[line(1), line(2), line(1)]);
    let runs = open_all(&[run]).unwrap();
    assert_eq!(runs[0].epochs.iter().map(|e| e.iteration).collect::<Vec<_>>(), [Some(1), Some(1), Some(2)]);
}

#[test]
fn what_is_no_run_is_refused_in_one_line() {
    let written = Written::new();
    let run = written.run("one", 1, "symmetric");
    let missing = written.path("none");
    assert_eq!(refusal(&[&missing]), format!("mlnt: {}: no such run directory", missing.display()));
    let folder = written.folder.path();
    assert_eq!(
        refusal(&[&run, folder]),
        format!("mlnt: {}: not a run directory: it has no config.toml", folder.display())
    );
    assert_eq!(refusal(&[]), "mlnt: the following required arguments were not provided: <RUN>...");
    let out = Path::new("--out");
    assert!(refusal(&[&run, out, folder]).ends_with("a folder; --out takes the name of a file"));

    let damage = |name: &str, text: &str, said: &str| {
        let path = run.join(name);
        let before = fs::read(&path).unwrap();
        fs::write(&path, text).unwrap();
        let line = refusal(&[&run]);
        assert!(line.starts_with(&format!("mlnt: {}: {said}", path.display())) && !line.contains('\n'), "{line}");
        fs::write(&path, before).unwrap();
    };
    damage("metrics.jsonl", "{\"phase\":1}\n", "line 1: invalid type");
    damage("timing.jsonl", "\n{}\n", "line 2: missing field");
    damage("labels.csv", "index,label\n1,2\n", "has no column `true_label`");
    damage("labels.csv", "index,label,true_label\n1,2,cat\n", "`cat` is no label");
    damage("config.toml", "a = \n", "");
    assert!(!run.join("report.html").exists());
}
