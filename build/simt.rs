//! The same kernels as C++, for the SIMT host machine.

use crate::jobs::Job;
use crate::sources::{self, Source};
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDERS: [&str; 2] = ["kernels/include", "kernels/simt"];

/// The system's C++ compiler, with all settings but the file.
pub struct Compiler {
    build: cc::Build,
    tool: cc::Tool,
    version: String,
}

/// The compiler that `cc` finds, if it works and knows C++20.
pub fn find() -> Option<Compiler> {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).warnings(true).define("MLNT_SIMT", None).includes(FOLDERS);
    // Kernels read shared memory as several types, as CUDA allows.
    build.flag("-fno-strict-aliasing");
    // Where no compiler works, build.rs says so, once.
    build.cargo_warnings(false);
    if !build.is_flag_supported("-std=c++20").unwrap_or(false) {
        return None;
    }
    let tool = build.try_get_compiler().ok()?;
    let said = Command::new(tool.path()).arg("--version").output().ok()?;
    Some(Compiler { build, tool, version: String::from_utf8_lossy(&said.stdout).into_owned() })
}

impl Compiler {
    /// The jobs that make an object of every `.cu` file, of the machine itself (`kernels/simt/*.cpp`), and of the table.
    pub fn jobs(&self, kernels: &[Source], table: PathBuf, out: &Path) -> Result<Vec<Job>, String> {
        let mut files: Vec<PathBuf> = kernels.iter().map(|source| source.path.clone()).collect();
        files.extend(sources::with_extension(Path::new("kernels/simt"), "cpp")?);
        files.push(table);
        files.iter().map(|file| self.job(file, out)).collect()
    }

    fn job(&self, file: &Path, out: &Path) -> Result<Job, String> {
        let output = out.join(format!("{}.o", file.file_name().unwrap_or_default().to_string_lossy()));
        let mut command = self.tool.to_command();
        command.args(["-x", "c++", "-c", "-o"]).arg(&output).arg(file);
        let inputs = sources::reached_from(file, &FOLDERS.map(Path::new))?;
        Ok(Job { command, output, inputs, context: self.version.clone() })
    }

    /// Makes one static library of the objects and tells cargo to link it.
    pub fn archive(mut self, objects: &[PathBuf]) -> Result<(), String> {
        self.build.objects(objects).try_compile("mlnt_simt").map_err(|e| e.to_string())
    }
}

/// C++ that lists the descriptors of all kernels, which is also what makes the linker keep them.
pub fn table<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let (mut declared, mut listed) = (String::new(), String::new());
    for name in names {
        declared += &format!("extern const simt::Kernel mlnt_simt_{name};\n");
        listed += &format!("    &mlnt_simt_{name},\n");
    }
    format!(
        "namespace simt {{\nstruct Kernel;\n}}\n\nextern \"C\" {{\n{declared}\
         extern const simt::Kernel* const mlnt_simt_kernels[];\n\
         const simt::Kernel* const mlnt_simt_kernels[] = {{\n{listed}    nullptr,\n}};\n}}\n"
    )
}
