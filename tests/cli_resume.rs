//! Interrupted runs: they end with the bytes of a run that nobody interrupted.
#![cfg(unix)]

mod program;

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use program::*;

/// Settings with many short steps per epoch, so that a signal finds a run in the middle of one.
const SETTINGS: &str = "train-size = 0\nepochs = 2\nfeature-epochs = 2\nwidths = [4, 6]\nblocks = [1, 1]\nbatch = 4\n\
                        neighbours = 2\nbranches = 2\naugment = \"pad-crop-flip\"\npad = 1\n";
/// Training images: 1,350 steps per epoch.
const IMAGES: usize = 6000;

/// A run in the background.
fn start(line: &str) -> Child {
    program(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits until the checkpoint stands at `epoch` of `phase` or later, and a little more.
fn wait_for(child: &mut Child, run: &Path, [phase, epoch]: [u64; 2]) {
    let begin = Instant::now();
    while !run.join("checkpoint.safetensors").exists() || position(run) < [phase, epoch, 0] {
        assert!(begin.elapsed() < Duration::from_secs(60), "epoch {epoch} of phase {phase} in {}", run.display());
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was interrupted");
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(25));
}

/// Runs `line` and interrupts it once it has come to `[phase, epoch]`; checks what it says.
/// Returns phase, epoch and step at which its checkpoint stands.
fn interrupt(line: &str, run: &Path, at: [u64; 2]) -> [u64; 3] {
    let mut child = start(line);
    wait_for(&mut child, run, at);
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    let (said, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!((output.status.code(), error.as_str()), (Some(130), ""), "{said}");
    let how = format!("mlnt train --resume {}", run.display());
    assert!(said.trim_end().ends_with(&how), "{said}");
    assert!(!run.join("student.safetensors").exists());
    position(run)
}

fn position(run: &Path) -> [u64; 3] {
    let meta = checkpoint(run).meta;
    ["phase", "epoch", "step"].map(|key| meta[key].as_u64().unwrap())
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let line = |out: &Path| folder.train(SETTINGS, &data, out);
    let whole = folder.path("whole");
    let said = mlnt(&format!("{} --threads 1", line(&whole)));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    let expected = results(&whole);
    assert_eq!(metrics(&whole).len(), 6);

    // Interrupted in the middle of each phase, and twice within MLNT, each time continued on other threads.
    let run = folder.path("interrupted");
    let resume = format!("train --resume {}", run.display());
    let first = interrupt(&format!("{} --threads 2", line(&run)), &run, [0, 1]);
    let mut stops = vec![first];
    // The checkpoint at the end of a phase counts all its epochs.
    for (at, threads) in [([0, 2], 1), ([1, 1], 2), ([1, 2], 1), ([2, 1], 2)] {
        stops.push(interrupt(&format!("{resume} --threads {threads}"), &run, at));
    }
    let phases: Vec<u64> = stops.iter().map(|[phase, ..]| *phase).collect();
    assert_eq!(phases, [0, 1, 1, 2, 2], "{stops:?}");
    let middle = stops.iter().filter(|[_, _, step]| *step > 0).count();
    assert!(middle >= 3, "in the middle of an epoch, but where a signal met a write: {stops:?}");
    let end = mlnt(&format!("{resume} --threads 2"));
    assert_eq!((end.status, end.stderr.as_str()), (Some(0), ""));
    assert!(end.stdout.contains("MLNT teacher"));
    assert_eq!(results(&run), expected);

    // And once more: it is complete.
    let again = mlnt(&resume);
    assert_eq!((again.status, again.stderr.as_str()), (Some(0), ""));
    assert_eq!(results(&run), expected);
}

#[test]
fn a_killed_run_continues_from_its_last_epoch() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let line = |out: &Path| format!("{} --no-baseline --feature-epochs 1", folder.train(SETTINGS, &data, out));
    let whole = folder.path("whole");
    assert_eq!(mlnt(&line(&whole)).status, Some(0));

    let run = folder.path("killed");
    let mut child = start(&format!("{} --threads 1", line(&run)));
    wait_for(&mut child, &run, [1, 1]);
    signal(&child, "-KILL");
    assert_eq!(child.wait().unwrap().code(), None);
    assert_eq!(position(&run), [1, 1, 0]);
    // What a machine that stops may leave: a line that no checkpoint counts, the temporary file of a write.
    let lines = fs::read(run.join("metrics.jsonl")).unwrap();
    fs::write(run.join("metrics.jsonl"), [&lines[..], b"{\"phase\":\"ml"].concat()).unwrap();
    fs::write(run.join(".mlnt-abc.tmp"), "half a checkpoint").unwrap();
    let said = mlnt(&format!("train --resume {}", run.display()));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert_eq!(results(&run), results(&whole));
}

#[test]
fn a_second_iteration_that_was_interrupted_and_killed_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let flags = "--no-baseline --feature-epochs 0 --iterations 2 --tau 0.08";
    let line = |out: &Path| format!("{} {flags}", folder.train(SETTINGS, &data, out));
    let all = |run: &Path| [results(run), vec![fs::read(run.join("kept.csv")).unwrap()]].concat();
    let whole = folder.path("whole");
    assert_eq!(mlnt(&line(&whole)).status, Some(0));

    // Interrupted in the first iteration, as the second begins, and within it; then killed within it.
    let run = folder.path("run");
    let resume = format!("train --resume {}", run.display());
    let mut stops = vec![interrupt(&line(&run), &run, [1, 1])];
    stops.push(interrupt(&format!("{resume} --threads 1"), &run, [1, 2]));
    stops.push(interrupt(&format!("{resume} --threads 2"), &run, [2, 0]));
    assert_eq!(stops.iter().map(|[part, ..]| *part).collect::<Vec<_>>(), [1, 2, 2], "{stops:?}");
    assert!(stops.iter().filter(|[part, _, step]| *part == 2 && *step > 0).count() >= 1, "{stops:?}");
    let mut child = start(&resume);
    wait_for(&mut child, &run, [2, 1]);
    signal(&child, "-KILL");
    assert_eq!(child.wait().unwrap().code(), None);
    let said = mlnt(&resume);
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert_eq!(all(&run), all(&whole));

    // Killed while the second iteration begins: what it had written is written again.
    let run = folder.path("killed");
    let mut child = start(&line(&run));
    wait_for(&mut child, &run, [1, 2]);
    signal(&child, "-KILL");
    assert_eq!(child.wait().unwrap().code(), None);
    assert_eq!(position(&run), [1, 2, 0]);
    let said = mlnt(&format!("train --resume {}", run.display()));
    assert_eq!((said.status, said.stderr.as_str()), (Some(0), ""));
    assert_eq!(all(&run), all(&whole));
}

#[test]
fn a_run_interrupted_before_its_first_step_continues() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let flags = "--no-baseline --feature-epochs 0 --epochs 1";
    let line = |out: &Path| format!("{} {flags}", folder.train(SETTINGS, &data, out));
    let whole = folder.path("whole");
    assert_eq!(mlnt(&line(&whole)).status, Some(0));
    let run = folder.path("run");
    let [phase, epoch, _] = interrupt(&line(&run), &run, [0, 0]);
    assert_eq!([phase, epoch], [1, 0]);
    assert_eq!(mlnt(&format!("train --resume {}", run.display())).status, Some(0));
    assert_eq!(results(&run), results(&whole));
}

#[test]
fn a_run_has_one_trainer_at_a_time() {
    let folder = Folder::new();
    let data = folder.idx_sized("tiny", IMAGES);
    let run = folder.path("run");
    let mut child = start(&folder.train(SETTINGS, &data, &run));
    wait_for(&mut child, &run, [0, 1]);
    let second = mlnt(&format!("train --resume {}", run.display()));
    assert_eq!(second.status, Some(2));
    assert!(second.error_line().contains("another process is training this run"), "{}", second.stderr);
    assert!(child.try_wait().unwrap().is_none(), "the first goes on");
    signal(&child, "-INT");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    assert_eq!(mlnt(&format!("train --resume {}", run.display())).status, Some(0));
}
