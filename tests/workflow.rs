//! From images to the list of wrong labels and the page about them, on the embedded sample: the three commands of the
//! README in small, and within a minute.

mod program;

use std::fs;
use std::time::{Duration, Instant};

use program::*;

/// Images to train on, validation part included.
const IMAGES: usize = 200;

#[test]
fn train_audit_and_report_on_the_embedded_sample_take_less_than_a_minute() {
    let folder = Folder::new();
    let run = folder.path("run");
    let begin = Instant::now();
    let settings = "--train-size 200 --epochs 1 --feature-epochs 1 --widths 4,8 --blocks 1,1 --batch 20 --tau 0.05";
    let lines = [
        format!("train --iterations 2 {settings} --no-baseline --device cpu --out {}", run.display()),
        format!("audit {} --device cpu", run.display()),
        format!("report {}", run.display()),
    ];
    for line in &lines {
        let said = mlnt(line);
        assert_eq!(said.status, Some(0), "{line}: {}", said.stderr);
    }
    let taken = begin.elapsed();
    assert!(taken < Duration::from_secs(60), "{taken:?}");

    let iterations = fs::read_to_string(run.join("iterations.jsonl")).unwrap();
    assert_eq!(iterations.lines().count(), 2);
    let audit = fs::read_to_string(run.join("audit/audit.csv")).unwrap();
    assert_eq!(audit.lines().count(), 1 + IMAGES);
    let flagged = audit.lines().skip(1).filter(|line| line.split(',').nth(10) == Some("1")).count();
    assert!((1..IMAGES).contains(&flagged), "{flagged} are flagged");
    // The page counts what the audit says.
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    let counted = format!("Given against suggested labels: {flagged} of {IMAGES} differ");
    for text in [counted.as_str(), "iteration 2", "Filter"] {
        assert!(page.contains(text), "{text}");
    }
}
