//! Labels as a JSON list of whole numbers, label `i` for image `i`: the noise files of DivideMix (Li et al. 2020).

use super::{Format, Found, Places};

/// Reads a list.
pub(super) fn read(bytes: &[u8]) -> Result<Found, String> {
    let labels: Vec<i64> = serde_json::from_slice(bytes).map_err(|e| format!("not a list of whole numbers: {e}"))?;
    let places = Places::Items(None);
    Ok(Found { format: Format::Json, labels, truth: None, index: None, places, provenance: None })
}

/// The labels as such a list.
pub fn write(labels: &[u16]) -> Vec<u8> {
    let list: Vec<String> = labels.iter().map(u16::to_string).collect();
    format!("[{}]", list.join(", ")).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_nothing_else() {
        assert_eq!(read(b" [3, 0,\n 12]").unwrap().labels, [3, 0, 12]);
        assert_eq!(read(&write(&[7, 0, 65535])).unwrap().labels, [7, 0, 65535]);
        // What Python's json.dump writes.
        assert_eq!(write(&[1, 2]), b"[1, 2]");
        for (text, what) in [
            ("[1, 2", "EOF while parsing a list at line 1 column 5"),
            ("[1, 2.0]", "invalid type: floating point `2.0`, expected i64 at line 1 column 7"),
            ("[1,\n \"2\"]", "invalid type: string \"2\", expected i64 at line 2 column 4"),
            ("[[1]]", "invalid type: sequence, expected i64 at line 1 column 1"),
            ("[1] 2", "trailing characters at line 1 column 5"),
        ] {
            assert_eq!(read(text.as_bytes()).unwrap_err(), format!("not a list of whole numbers: {what}"));
        }
    }
}
