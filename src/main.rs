//! The `mlnt` binary: reads the command line, reports errors in one line, sets the exit status.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match mlnt::cli::parse().and_then(|cli| mlnt::cli::run(&cli)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "mlnt: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
