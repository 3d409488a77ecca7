//! NumPy's `.npy` files, version 1.0, of two-dimensional probabilities and one-dimensional labels.
//!
//! The format: the magic `\x93NUMPY`, the version, the header's length as u16, the header as a Python dictionary padded
//! with blanks so that the values begin at a multiple of 64 bytes, and the values in little-endian C order
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

/// The bytes before the values of an array of type `descr` (`<f8`, `<i8`) and `shape`.
fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let extents: Vec<String> = shape.iter().map(|n| format!("{n},")).collect();
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", extents.join(" "));
    let fixed = 10; // magic, version and length
    let padding = 64 - (fixed + text.len() + 1) % 64;
    text.extend(std::iter::repeat_n(' ', padding % 64));
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

/// `values` `[rows, columns]` as a float64 array.
///
/// # Panics
/// If `columns` does not divide the number of values.
pub fn matrix_f64(values: &[f64], columns: usize) -> Vec<u8> {
    assert_eq!(values.len() % columns, 0, "whole rows of {columns}");
    let mut bytes = header("<f8", &[values.len() / columns, columns]);
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// `values` `[n]` as an int64 array.
pub fn vector_i64(values: impl ExactSizeIterator<Item = i64>) -> Vec<u8> {
    let mut bytes = header("<i8", &[values.len()]);
    bytes.extend(values.flat_map(i64::to_le_bytes));
    bytes
}
