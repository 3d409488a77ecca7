//! Compilations: side by side, and only those whose inputs have changed.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// One call of a compiler.
pub struct Job {
    pub command: Command,
    /// The file that the command writes.
    pub output: PathBuf,
    /// Every file of ours that the command reads.
    pub inputs: BTreeSet<PathBuf>,
    /// What else decides the output: the compiler's version, variables it reads.
    pub context: String,
}

impl Job {
    /// A hash of all that decides the output.
    fn key(&self) -> Result<String, String> {
        let mut hasher = DefaultHasher::new();
        format!("{:?}", self.command).hash(&mut hasher);
        self.context.hash(&mut hasher);
        for path in &self.inputs {
            path.hash(&mut hasher);
            std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?.hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }

    /// Where the key of the existing output is kept.
    fn key_path(&self) -> PathBuf {
        let mut path = self.output.clone().into_os_string();
        path.push(".key");
        path.into()
    }

    /// Runs the command if its output is not there or was made from something else. Returns what the compiler said.
    fn bring_up_to_date(&mut self) -> Result<String, String> {
        let (key, key_path) = (self.key()?, self.key_path());
        let known = std::fs::read_to_string(&key_path).ok();
        if known.as_ref() == Some(&key) && self.output.is_file() {
            return Ok(String::new());
        }
        // Without its key a half-written output is not taken for a good one.
        if known.is_some() {
            std::fs::remove_file(&key_path).map_err(|e| format!("{}: {e}", key_path.display()))?;
        }
        let done = self.command.output().map_err(|e| format!("{:?}: {e}", self.command))?;
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        if !done.status.success() {
            return Err(format!("{:?}\n{said}", self.command));
        }
        std::fs::write(&key_path, key).map_err(|e| format!("{}: {e}", key_path.display()))?;
        Ok(said)
    }
}

/// Does all jobs, `workers` at a time. Returns the warnings, each once; fails with the whole output of the jobs that failed.
///
/// After a failure no further job is begun: the same mistake would be reported once per architecture.
pub fn run(jobs: Vec<Job>, workers: usize) -> Result<BTreeSet<String>, String> {
    let todo = Mutex::new(jobs.into_iter());
    let done = Mutex::new((BTreeSet::new(), String::new()));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while done.lock().unwrap().1.is_empty() {
                    let Some(mut job) = todo.lock().unwrap().next() else { return };
                    let result = job.bring_up_to_date();
                    let mut done = done.lock().unwrap();
                    match result {
                        // Information is no warning.
                        Ok(said) => done.0.extend(
                            said.lines().filter(|l| !l.is_empty() && !l.starts_with("ptxas info")).map(String::from),
                        ),
                        Err(error) => done.1 += &error,
                    }
                }
            });
        }
    });
    let (warnings, errors) = done.into_inner().unwrap();
    if errors.is_empty() { Ok(warnings) } else { Err(errors) }
}
