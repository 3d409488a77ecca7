//! Rules of the house that the compiler does not check: where `unsafe` may stand, which layer may know which, and that every pass of the planner
//! has a name by which it is tested.

use mlnt::plan::Fusion;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A layer, and those that it may import.
type Rule = (String, Vec<String>);

/// The layers in the table of `docs/architecture.md`, each with those that its row names.
fn rules() -> Vec<Rule> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    rules_of(&std::fs::read_to_string(path).unwrap())
}

/// The rules in the table below the heading "Who may know whom": the room in the first column, in backquotes; what it may
/// use in the last.
fn rules_of(document: &str) -> Vec<Rule> {
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    let lines = document.lines().skip_while(|line| *line != "## Who may know whom").skip(1);
    let table = lines.take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with("| `"));
    let rule = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 3, "{line}");
        let [layer] = &quoted(cells[0])[..] else { panic!("one room in a row: {line}") };
        (layer.clone(), quoted(cells[2]))
    };
    table.map(rule).collect()
}

/// The tests that need `unsafe`, and the items of each that may have it, by how they begin: allocators that count,
/// and the loading of kernels that a test has compiled.
const UNSAFE_TESTS: [(&str, &[&str]); 4] = [
    ("tests/allocation.rs", &["unsafe impl GlobalAlloc for"]),
    ("tests/loader_fuzz.rs", &["unsafe impl GlobalAlloc for"]),
    ("tests/simt/machine.rs", &["pub fn load(", "pub fn machine_of("]),
    ("tests/simt_banks.rs", &["fn load("]),
];

/// Where `unsafe` may stand: launchers and drivers, the memory map of data files, and parts of some tests.
fn may_be_unsafe(path: &str) -> bool {
    let tests = UNSAFE_TESTS.map(|(test, _)| test);
    path.starts_with("src/device/") || path == "src/data/map.rs" || tests.contains(&path)
}

/// `source` with comments, strings and characters replaced by spaces; lines stay where they are.
fn code_only(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut i = 0;
    while i < text.len() {
        let before = if i == 0 { ' ' } else { text[i - 1] };
        let hashes = |from: usize| (from..).take_while(|&j| at(j) == '#').count();
        let raw_prefix = match (at(i), at(i + 1)) {
            _ if word(before) => None,
            ('r', '"' | '#') => Some(1),
            ('b' | 'c', 'r') => Some(2),
            _ => None,
        };
        let raw = raw_prefix.map(|n| (n, hashes(i + n))).filter(|(n, h)| at(i + n + h) == '"');
        let end = if at(i) == '/' && at(i + 1) == '/' {
            (i..).find(|&j| j == text.len() || at(j) == '\n').unwrap_or(text.len())
        } else if at(i) == '/' && at(i + 1) == '*' {
            let (mut depth, mut j) = (1, i + 2);
            while depth > 0 && j < text.len() {
                let step = match (at(j), at(j + 1)) {
                    ('/', '*') => 1,
                    ('*', '/') => -1,
                    _ => 0,
                };
                depth += step;
                j += if step == 0 { 1 } else { 2 };
            }
            j
        } else if let Some((n, h)) = raw {
            let closes = |&j: &usize| at(j) == '"' && hashes(j + 1) >= h;
            (i + n + h + 1..text.len()).find(closes).map_or(text.len(), |j| j + 1 + h)
        } else if at(i) == '"' || (at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'')) {
            let quote = at(i);
            let mut j = i + 1;
            while j < text.len() && at(j) != quote {
                j += if at(j) == '\\' { 2 } else { 1 };
            }
            j + 1
        } else {
            code.push(at(i));
            i += 1;
            continue;
        };
        code.extend((i..end.min(text.len())).map(|j| if at(j) == '\n' { '\n' } else { ' ' }));
        i = end;
    }
    code
}

/// One word, number or other character of Rust, and the line it stands on.
fn tokens(code: &str) -> Vec<(usize, String)> {
    let mut list: Vec<(usize, String)> = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut open = false;
        for c in line.chars() {
            let word = c.is_alphanumeric() || c == '_';
            match list.last_mut() {
                Some((_, last)) if word && open => last.push(c),
                _ if c.is_whitespace() => {}
                _ => list.push((number + 1, c.to_string())),
            }
            open = word;
        }
    }
    list
}

/// The uses of `unsafe` in a file: the keyword, and attributes that allow it.
fn unsafe_lines(source: &str) -> Vec<usize> {
    let found = tokens(&code_only(source));
    let keyword = found.iter().filter(|(_, t)| t == "unsafe").map(|(line, _)| *line);
    let allow = ["allow", "(", "unsafe_code"];
    let allowed = found.windows(3).filter(|w| w.iter().map(|(_, t)| t).eq(allow)).map(|w| w[0].0);
    keyword.chain(allowed).collect()
}

/// The layers that a file at `path` below `src/` names, with the line: paths from `crate`, or from `super` up to it.
fn layers_named(path: &str, source: &str) -> Vec<(usize, String)> {
    // Modules from the root down to the file's own.
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    let depth = inner.split('/').filter(|part| *part != "mod").count();
    let all = tokens(&code_only(source));
    let is = |i: usize, text: &str| all.get(i).is_some_and(|(_, t)| t == text);
    let colons = |i: usize| is(i, ":") && is(i + 1, ":");
    let mut named = Vec::new();
    for start in 0..all.len() {
        // The token behind `crate::` or behind as many `super::` as lead to the root.
        let mut at = start;
        if is(start, "crate") && colons(start + 1) {
            at = start + 3;
        } else if is(start, "super") && !(start > 2 && is(start - 3, "super") && colons(start - 2)) {
            let mut ups = 0;
            while is(at, "super") && colons(at + 1) {
                (ups, at) = (ups + 1, at + 3);
            }
            if ups < depth {
                continue;
            }
        } else {
            continue;
        }
        if !is(at, "{") {
            named.extend(all.get(at).cloned());
            continue;
        }
        // The first name of each item between the braces.
        let (mut nesting, mut first) = (1, true);
        for (line, token) in &all[at + 1..] {
            match token.as_str() {
                "{" => nesting += 1,
                "}" => nesting -= 1,
                "," if nesting == 1 => first = true,
                name if nesting == 1 && first => {
                    named.push((*line, name.to_string()));
                    first = false;
                }
                _ => {}
            }
            if nesting == 0 {
                break;
            }
        }
    }
    named
}

/// The layer of a file below `src/`.
fn layer_of(path: &str) -> &str {
    path.trim_start_matches("src/").split(['/', '.']).next().unwrap_or_default()
}

/// The other layers that a file imports, with the line.
fn imports(rules: &[Rule], path: &str, source: &str) -> Vec<(usize, String)> {
    let known = |name: &String| name != layer_of(path) && rules.iter().any(|(layer, _)| layer == name);
    layers_named(path, source).into_iter().filter(|(_, name)| known(name)).collect()
}

/// The imports of a file that its layer must not have. All may import `error`.
fn forbidden_imports(rules: &[Rule], path: &str, source: &str) -> Vec<(usize, String)> {
    let Some((_, allowed)) = rules.iter().find(|(layer, _)| layer == layer_of(path)) else { return Vec::new() };
    let forbidden = |name: &String| name != "error" && !allowed.contains(name);
    imports(rules, path, source).into_iter().filter(|(_, name)| forbidden(name)).collect()
}

/// All Rust files below `folders`, as paths from the project's root with their text.
fn rust_files(folders: &[&str]) -> Vec<(String, String)> {
    fn walk(folder: &Path, list: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, list),
                false => list.push(path),
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    folders.iter().for_each(|folder| walk(&root.join(folder), &mut paths));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    paths.sort();
    let name = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The files of the library and the program.
fn sources() -> Vec<(String, String)> {
    let list = rust_files(&["src"]);
    assert!(list.len() > 40, "{} files", list.len());
    list
}

#[test]
fn unsafe_stands_with_launchers_drivers_the_memory_map_and_named_tests_only() {
    for folders in [&["src"][..], &["tests", "benches"]] {
        let mut inside = 0;
        for (path, source) in rust_files(folders) {
            let lines = unsafe_lines(&source);
            inside += lines.len();
            assert!(lines.is_empty() || may_be_unsafe(&path), "{path}: `unsafe` in lines {lines:?}");
        }
        assert!(inside > 0, "the scan finds what is there in {folders:?}");
    }
}

/// The uses of `unsafe` outside the items that begin with `allowed`, each of which must be there and have some.
fn unsafe_outside(source: &str, allowed: &[&str]) -> Vec<usize> {
    let code = code_only(source);
    let mut found = unsafe_lines(source);
    for item in allowed {
        let from = code.lines().position(|line| line.starts_with(item)).unwrap_or_else(|| panic!("{item} is gone"));
        let to = from + code.lines().skip(from).position(|line| line == "}").unwrap();
        let before = found.len();
        found.retain(|line| !(from + 1..=to + 1).contains(line));
        assert!(found.len() < before, "{item} is not unsafe");
    }
    // The attribute that lets the file have it at all.
    let attribute = code.lines().position(|line| line == "#![allow(unsafe_code)]").unwrap();
    found.retain(|line| *line != attribute + 1);
    found
}

#[test]
fn unsafe_tests_are_unsafe_where_they_must_be_only() {
    for (test, allowed) in UNSAFE_TESTS {
        let (_, source) = rust_files(&["tests"]).into_iter().find(|(path, _)| path == test).unwrap();
        let found = unsafe_outside(&source, allowed);
        assert!(found.is_empty(), "{test}: `unsafe` in lines {found:?}");
    }
    let text = "#![allow(unsafe_code)]\nfn f() {\n    unsafe { g() }\n}\nfn h() {\n    unsafe { g() }\n}\n";
    assert_eq!(unsafe_outside(text, &["fn f("]), [6]);
    assert_eq!(unsafe_outside(text, &["fn f(", "fn h("]), [0usize; 0]);
}

#[test]
fn no_layer_knows_one_that_the_table_does_not_give_it() {
    let (rules, mut named) = (rules(), 0);
    for (path, source) in sources() {
        named += layers_named(&path, &source).len();
        let bad = forbidden_imports(&rules, &path, &source);
        assert!(bad.is_empty(), "{path}: (line, layer) {bad:?}");
    }
    assert!(named > 100, "the scan finds what is there: {named}");
}

/// The tables are data: of devices they know how values are held, and nothing that runs.
#[test]
fn cases_know_values_of_devices_and_no_device() {
    let mut uses = 0;
    for (path, source) in sources().into_iter().filter(|(path, _)| path.starts_with("src/cases/")) {
        let found = tokens(&code_only(&source));
        for (i, (line, _)) in found.iter().enumerate().filter(|(_, (_, token))| token == "device") {
            let behind: Vec<&str> = found[i + 1..].iter().take(3).map(|(_, t)| t.as_str()).collect();
            assert_eq!(behind, [":", ":", "HostVec"], "{path}, line {line}");
            uses += 1;
        }
    }
    assert!(uses > 2);
}

#[test]
fn the_table_gives_no_layer_what_it_does_not_use() {
    let rules = rules();
    let used: BTreeSet<(String, String)> = sources()
        .iter()
        .flat_map(|(path, source)| {
            let of = |(_, name)| (layer_of(path).to_string(), name);
            imports(&rules, path, source).into_iter().map(of).collect::<Vec<_>>()
        })
        .collect();
    for (layer, allowed) in &rules {
        for name in allowed {
            assert!(used.contains(&(layer.clone(), name.clone())), "{layer} does not use {name}");
        }
    }
}

#[test]
fn every_layer_has_its_rule() {
    let rules = rules();
    for (path, _) in sources() {
        let known = rules.iter().any(|(layer, _)| layer == layer_of(&path));
        assert!(known || ["main", "lib"].contains(&layer_of(&path)), "{path}: a layer without a rule");
    }
    for (i, (layer, allowed)) in rules.iter().enumerate() {
        let there = |name: &String| sources().iter().any(|(path, _)| layer_of(path) == name);
        assert!(there(layer) && allowed.iter().all(there), "{layer}: {allowed:?}");
        assert!(rules[..i].iter().all(|(other, _)| other != layer), "{layer} has two rows");
    }
}

/// The fusions and the passes they are, by file and function, as the planner's table has them: `Fusion::Name => file::function`.
fn passes(source: &str) -> Vec<(String, [String; 2])> {
    let text: Vec<String> = tokens(&code_only(source)).into_iter().map(|(_, token)| token).collect();
    let arm = |w: &[String]| match w {
        [of, _, _, name, eq, more, file, ..] if [of, eq, more] == ["Fusion", "=", ">"] && w[7] == ":" => {
            Some((name.clone(), [file.clone(), w[9].clone()]))
        }
        _ => None,
    };
    text.windows(10).filter_map(arm).collect()
}

/// The functions of a file that rewrite a graph and nothing else, and that others may call.
fn rewriters(source: &str) -> Vec<String> {
    let text: Vec<String> = tokens(&code_only(source)).into_iter().map(|(_, token)| token).collect();
    let head = ["pub", "(", "super", ")", "fn"];
    let tail = ["(", "graph", ":", "&", "mut", "Graph", ")", "{"];
    let is = |w: &&[String]| w[..5] == head && w[6..] == tail;
    text.windows(14).filter(is).map(|w| w[5].clone()).collect()
}

/// Each is tested by its name, so that one without a name would go untested.
#[test]
fn every_pass_of_the_planner_is_a_fusion_with_a_name() {
    let folder = "src/plan/fuse/";
    let (mut found, mut table) = (BTreeSet::new(), Vec::new());
    for (path, source) in sources() {
        let Some(file) = path.strip_prefix(folder).and_then(|file| file.strip_suffix(".rs")) else { continue };
        if file == "mod" {
            table = passes(&source);
        }
        found.extend(rewriters(&source).into_iter().map(|function| [file.to_string(), function]));
    }
    let names: Vec<&String> = table.iter().map(|(name, _)| name).collect();
    assert_eq!(names, Fusion::ALL.map(|fusion| format!("{fusion:?}")).each_ref());
    let named: BTreeSet<[String; 2]> = table.iter().map(|(_, pass)| pass.clone()).collect();
    assert_eq!(named.len(), table.len(), "two names for one pass");
    assert_eq!(named, found);
}

#[test]
fn the_table_is_read_as_it_stands() {
    let text = "| `x` | before | `y` |\n## Who may know whom\n\n| room | what | may use |\n|---|---|---|\n| `a` | of `z` | — |\n\
                | `b` | things | `a` (parts), `c` |\n\nAll may use `error`.\n## Next\n| `d` | after | `a` |\n";
    let rule = |layer: &str, allowed: &[&str]| (layer.to_string(), allowed.iter().map(|s| s.to_string()).collect());
    assert_eq!(rules_of(text), [rule("a", &[]), rule("b", &["a", "c"])]);
}

#[test]
fn the_scan_for_unsafe_finds_planted_ones_and_passes_over_text() {
    assert_eq!(unsafe_lines("fn f() {\n    unsafe { g() }\n}"), [2]);
    assert_eq!(unsafe_lines("unsafe impl Send for A {}"), [1]);
    assert_eq!(unsafe_lines("#[allow( unsafe_code )]\nfn f() {}"), [1]);
    assert_eq!(unsafe_lines("#![allow(unsafe_code)]"), [1]);
    assert_eq!(unsafe_lines("let c = '\"'; unsafe { f() } // \""), [1]);
    assert_eq!(unsafe_lines("fn f<'a>(x: &'a str) { unsafe { g(x) } }"), [1]);
    assert_eq!(unsafe_lines("let r = r#\"quote \" \"#; unsafe { f() }"), [1]);
    assert_eq!(unsafe_lines("let q = b'\\''; unsafe { f() }"), [1]);
    let text = "// unsafe\n/* unsafe /* unsafe */ unsafe */\n#![deny(unsafe_code)]\nlet s = \"unsafe \\\" unsafe\";\n\
                let r = r##\"unsafe \"# unsafe\"##;\nlet unsafer = not_unsafe;\n/// unsafe\n";
    assert_eq!(unsafe_lines(text), [0usize; 0]);
    assert!(may_be_unsafe("src/device/cpu/conv.rs") && may_be_unsafe("src/data/map.rs"));
    assert!(!may_be_unsafe("src/data/idx.rs") && !may_be_unsafe("src/devices.rs"));
    assert!(may_be_unsafe("tests/allocation.rs") && may_be_unsafe("tests/simt/machine.rs"));
    assert!(!may_be_unsafe("tests/device.rs") && !may_be_unsafe("src/tests/allocation.rs"));
}

#[test]
fn the_scan_of_layers_finds_planted_imports() {
    let rules = rules();
    let found = |path: &str, source: &str| -> Vec<String> {
        forbidden_imports(&rules, path, source).into_iter().map(|(line, name)| format!("{line} {name}")).collect()
    };
    assert_eq!(found("src/ops/conv.rs", "use crate::error::Error;\nuse crate::plan::Plan;"), ["2 plan"]);
    assert_eq!(found("src/ops/conv.rs", "use super::super::plan::Plan;"), ["1 plan"]);
    assert_eq!(found("src/ops/conv.rs", "use super::plan::Plan;"), [""; 0]);
    assert_eq!(found("src/tape/mod.rs", "use super::device;"), ["1 device"]);
    assert_eq!(found("src/rng.rs", "use super::{data, error::Error};"), ["1 data"]);
    let braces = "use crate::{\n    error::{Error, Result},\n    ops::Op,\n    model,\n    data::{self, map},\n};";
    assert_eq!(found("src/plan/mod.rs", braces), ["4 model", "5 data"]);
    assert_eq!(found("src/device/cpu/mod.rs", "fn f(x: crate::mlnt::StepSpec) {}"), ["1 mlnt"]);
    assert_eq!(found("src/model/mod.rs", "pub(crate) use crate :: train :: run;"), ["1 train"]);
    assert_eq!(found("src/train/run.rs", "use crate::cli::Cli;\nuse crate::data::open;"), ["1 cli"]);
    assert_eq!(found("src/data/mod.rs", "use crate::mlnt::Neighbours;"), ["1 mlnt"]);
    assert_eq!(found("src/mlnt/golden.rs", "use crate::train::config::Config;"), ["1 train"]);
    assert_eq!(found("src/fs.rs", "use crate::rng;\nuse crate::error::Result;"), ["1 rng"]);
    let text = "// use crate::cli;\n/// [`crate::cli`]\nlet s = \"use crate::cli\";";
    assert_eq!(found("src/train/run.rs", text), [""; 0]);
}
