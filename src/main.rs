//! The `mlnt` binary: reads the command line, reports errors in one line, sets the exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    match mlnt::cli::run(&mlnt::cli::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("mlnt: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
