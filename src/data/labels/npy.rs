//! Labels as a NumPy file of one axis, label `i` for image `i` (format: `numpy.lib.format`, versions 1 to 3): the PMD
//! noise of Zhang et al. 2021, 45,000 labels for the first 45,000 training images.
//!
//! The header is a Python dictionary, but always one with these three entries: reading just that needs no parser of
//! Python's syntax, whose nesting would have to be bounded.

use super::{Format, Found, Places};

/// The first bytes of the file.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// What the header says.
#[derive(Debug, PartialEq)]
struct Header {
    big_endian: bool,
    signed: bool,
    /// Bytes of an element: 1, 2, 4 or 8.
    size: usize,
    count: u64,
}

/// Reads an array of whole numbers.
pub(super) fn read(bytes: &[u8]) -> Result<Found, String> {
    let short = || format!("truncated: {} bytes end within the header", bytes.len());
    let rest = bytes.get(MAGIC.len()..).ok_or_else(short)?;
    let (length, start) = match *rest {
        [1, _, a, b, ..] => (u32::from_le_bytes([a, b, 0, 0]), MAGIC.len() + 4),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([a, b, c, d]), MAGIC.len() + 6),
        [version, _, ..] if version == 0 || version > 3 => return Err(format!("byte 6: format version {version}")),
        _ => return Err(short()),
    };
    let text = bytes[start..].get(..length as usize).ok_or_else(short)?;
    let text = std::str::from_utf8(text).map_err(|_| "the header is not text")?;
    let header = header(text).map_err(|what| format!("header: {what}"))?;
    let payload = &bytes[start + length as usize..];
    let promised = header.count.checked_mul(header.size as u64);
    if promised != Some(payload.len() as u64) {
        let (count, size, found) = (header.count, header.size, payload.len());
        return Err(format!("the header promises {count} labels of {size} bytes, {found} bytes follow"));
    }
    let labels = payload.chunks_exact(header.size).map(|element| number(element, &header)).collect();
    let places = Places::Items(None);
    Ok(Found { format: Format::Npy, labels, truth: None, index: None, places, provenance: None })
}

/// One element; what does not fit becomes the largest number, which is no label either.
fn number(element: &[u8], header: &Header) -> i64 {
    let join = |number: u64, &byte: &u8| number << 8 | u64::from(byte);
    let raw = match header.big_endian {
        true => element.iter().fold(0, join),
        false => element.iter().rev().fold(0, join),
    };
    match header.signed {
        true => {
            let shift = 64 - 8 * header.size as u32;
            (raw << shift) as i64 >> shift
        }
        false => i64::try_from(raw).unwrap_or(i64::MAX),
    }
}

/// Reads `{'descr': '<i8', 'fortran_order': False, 'shape': (45000,), }`, entries in any order.
fn header(text: &str) -> Result<Header, String> {
    let inner = text.trim().strip_prefix('{').and_then(|text| text.strip_suffix('}')).ok_or("no dictionary")?;
    let value = |key: &str| {
        let (_, rest) = inner.split_once(&format!("'{key}':")).ok_or_else(|| format!("no entry '{key}'"))?;
        Ok::<&str, String>(rest.trim_start())
    };
    let fortran = value("fortran_order")?;
    if !fortran.starts_with("False") && !fortran.starts_with("True") {
        return Err("'fortran_order' is neither True nor False".into());
    }
    let descr = value("descr")?.strip_prefix('\'').and_then(|rest| rest.split_once('\''));
    let (descr, _) = descr.ok_or("'descr' is no simple type; labels are whole numbers")?;
    let (big_endian, signed, size) = match descr.as_bytes() {
        [order @ (b'<' | b'>' | b'|'), kind @ (b'i' | b'u'), size @ (b'1' | b'2' | b'4' | b'8')] => {
            (*order == b'>', *kind == b'i', usize::from(size - b'0'))
        }
        _ => return Err(format!("elements of type '{}'; labels are whole numbers", descr.escape_debug())),
    };
    let shape = value("shape")?.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    let (shape, _) = shape.ok_or("'shape' is no tuple")?;
    let count = shape.trim().strip_suffix(',').and_then(|count| count.trim().parse().ok());
    let count = count.ok_or_else(|| format!("shape ({}); labels have one axis", shape.escape_debug()))?;
    Ok(Header { big_endian, signed, size, count })
}

/// The labels as such a file, int64, as `numpy.save` writes it.
pub fn write(labels: &[u16]) -> Vec<u8> {
    let mut header = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({},), }}", labels.len());
    // NumPy ends the header with a line feed at a multiple of 64 bytes.
    let start = MAGIC.len() + 4;
    let end = (start + header.len() + 1).next_multiple_of(64);
    header += &" ".repeat(end - 1 - start - header.len());
    header.push('\n');
    let mut bytes = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
    bytes.extend(labels.iter().flat_map(|&label| i64::from(label).to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, payload: &[u8]) -> Vec<u8> {
        [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), payload].concat()
    }

    fn one(descr: &str, payload: &[u8]) -> Result<Vec<i64>, String> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}\n");
        read(&file(&header, payload)).map(|found| found.labels)
    }

    #[test]
    fn every_whole_number_type_is_read() {
        assert_eq!(read(&write(&[9, 0, 300])).unwrap().labels, [9, 0, 300]);
        assert_eq!(one("|u1", &[200]), Ok(vec![200]));
        assert_eq!(one("|i1", &[200]), Ok(vec![-56]));
        assert_eq!(one(">u2", &[1, 2]), Ok(vec![258]));
        assert_eq!(one("<i4", &(-5i32).to_le_bytes()), Ok(vec![-5]));
        assert_eq!(one(">i8", &7i64.to_be_bytes()), Ok(vec![7]));
        assert_eq!(one("<u8", &u64::MAX.to_le_bytes()), Ok(vec![i64::MAX]));
        let wide = [MAGIC, &[2, 0], &[56, 0, 0, 0], &[b' '; 0]].concat();
        let text = "{'shape': (2,), 'fortran_order': True, 'descr': '|u1'} \n ";
        assert_eq!(text.len(), 57);
        let wide = [&wide, &text.as_bytes()[..56], &[4, 5]].concat();
        assert_eq!(read(&wide).unwrap().labels, [4, 5]);
    }

    #[test]
    fn everything_else_is_refused() {
        let cases = [
            (one("<f8", &[0; 8]), "header: elements of type '<f8'; labels are whole numbers"),
            (one("<i8", &[0; 7]), "the header promises 1 labels of 8 bytes, 7 bytes follow"),
            (one("O", &[0; 8]), "header: elements of type 'O'; labels are whole numbers"),
        ];
        for (found, what) in cases {
            assert_eq!(found.unwrap_err(), what);
        }
        let header = |text: &str| read(&file(text, &[])).unwrap_err();
        assert_eq!(header("[]"), "header: no dictionary");
        assert_eq!(header("{}"), "header: no entry 'fortran_order'");
        let rest = "'descr': '<i8', 'fortran_order': False, 'shape': ";
        assert_eq!(header(&format!("{{{rest}(2, 3)}}")), "header: shape (2, 3); labels have one axis");
        assert_eq!(header(&format!("{{{rest}()}}")), "header: shape (); labels have one axis");
        let most = header(&format!("{{{rest}({},)}}", u64::MAX));
        assert_eq!(most, format!("the header promises {} labels of 8 bytes, 0 bytes follow", u64::MAX));
        assert_eq!(read(MAGIC).unwrap_err(), "truncated: 6 bytes end within the header");
        assert_eq!(read(b"\x93NUMPY\x01\0\xff\xff{").unwrap_err(), "truncated: 11 bytes end within the header");
        assert_eq!(read(b"\x93NUMPY\x04\0\xff\xff{").unwrap_err(), "byte 6: format version 4");
    }
}
