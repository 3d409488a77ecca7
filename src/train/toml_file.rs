//! A flat TOML file into a struct, with errors that name the file, the line, the key and what it might have meant.

use std::path::Path;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, Error as TomlError};

use crate::error::{Error, Result};

/// Reads `path` into a `T` whose TOML keys are `known`.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read; [`Error::File`] for bad syntax, a key that is not in `known`, a value
/// of the wrong type and a missing key that `T` needs.
pub fn read<T: DeserializeOwned>(path: &Path, known: &[String]) -> Result<T> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "not a TOML file: the text is not UTF-8"))?;
    let at = |start: usize, what: String| Error::file(path, format_args!("line {}: {what}", line(&text, start)));
    let table = DeTable::parse(&text).map_err(|error| at(start(&error), one_line(&error)))?;

    for key in table.get_ref().keys() {
        if !known.iter().any(|name| name == key.get_ref()) {
            let what = format!("unknown key `{}`; {}", key.get_ref(), suggestion(key.get_ref(), known));
            return Err(at(key.span().start, what));
        }
    }
    toml::from_str(&text).map_err(|error| {
        let position = error.span().map(|span| span.start);
        let entry = table.get_ref().iter().find(|(_, value)| {
            let span = value.span();
            position.is_some_and(|position| (span.start..=span.end).contains(&position))
        });
        match entry {
            Some((key, value)) => at(value.span().start, format!("`{}`: {}", key.get_ref(), one_line(&error))),
            None => Error::file(path, one_line(&error)),
        }
    })
}

/// Where in the text an error lies, bytes.
fn start(error: &TomlError) -> usize {
    error.span().map_or(0, |span| span.start)
}

/// The number of the line that holds byte `position`, from 1.
fn line(text: &str, position: usize) -> usize {
    1 + text.bytes().take(position).filter(|&byte| byte == b'\n').count()
}

/// An error's message without its excerpt of the file.
fn one_line(error: &TomlError) -> String {
    error.message().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What `key` might have meant: the nearest known names, within a third of their length.
fn suggestion(key: &str, known: &[String]) -> String {
    let mut near: Vec<(usize, &String)> = known
        .iter()
        .map(|name| (edit_distance(key, name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 3)
        .collect();
    near.sort();
    if near.is_empty() {
        return "`mlnt train --help` lists the names".into();
    }
    let names: Vec<String> = near.iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
    format!("did you mean {}?", names.join(" or "))
}

/// Levenshtein distance, in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{edit_distance, line, suggestion};

    #[test]
    fn edit_distance_counts_insertions_deletions_and_replacements() {
        let cases = [("", "abc", 3), ("rho", "rho", 0), ("kitten", "sitting", 3), ("η", "e", 1)];
        for (a, b, distance) in cases {
            assert_eq!(edit_distance(a, b), distance, "{a} to {b}");
            assert_eq!(edit_distance(b, a), distance, "{b} to {a}");
        }
    }

    #[test]
    fn lines_count_from_one() {
        assert_eq!([0, 1, 2, 3, 99].map(|position| line("a\nb\n", position)), [1, 1, 2, 2, 3]);
    }

    #[test]
    fn suggestions_are_the_nearest_names_first() {
        let known = ["eta".to_string(), "eta-ramp".into(), "noise-rate".into()];
        assert_eq!(suggestion("noise_rate", &known), "did you mean `noise-rate`?");
        assert_eq!(suggestion("quantum", &known), "`mlnt train --help` lists the names");
    }
}
