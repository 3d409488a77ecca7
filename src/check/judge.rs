//! How far two results are apart, and whether they are the same bits.

use crate::device::HostVec;

/// `‖have − want‖ / ‖want‖` in the Euclidean norm, or `‖have‖` where `want` is zero; infinite where a number is none
/// or the lengths differ.
pub fn deviation(have: &[f64], want: &[f64]) -> f64 {
    if have.len() != want.len() {
        return f64::INFINITY;
    }
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut have.iter().zip(want).map(|(h, w)| h - w));
    let size = norm(&mut want.iter().copied());
    let relative = if size == 0.0 { difference } else { difference / size };
    if relative.is_nan() { f64::INFINITY } else { relative }
}

/// Whether two results are the same, bit by bit: NaN equals itself, and 0 is not -0.
pub fn same_bits(a: &HostVec, b: &HostVec) -> bool {
    match (a, b) {
        (HostVec::F32(a), HostVec::F32(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
        (HostVec::F64(a), HostVec::F64(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
        (HostVec::I32(a), HostVec::I32(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{deviation, same_bits};
    use crate::device::HostVec;

    #[test]
    fn deviations_are_relative_and_never_hide_a_number_that_is_none() {
        assert_eq!(deviation(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
        assert_eq!(deviation(&[0.0, 2.0], &[0.0, 0.0]), 2.0);
        assert_eq!(deviation(&[], &[]), 0.0);
        for have in [&[1.0, f64::NAN][..], &[1.0, f64::INFINITY], &[1.0]] {
            assert_eq!(deviation(have, &[1.0, 1.0]), f64::INFINITY, "{have:?}");
        }
    }

    #[test]
    fn bits_are_compared_not_values() {
        let f32s = |v: &[f32]| HostVec::F32(v.to_vec());
        assert!(same_bits(&f32s(&[f32::NAN, 1.0]), &f32s(&[f32::NAN, 1.0])));
        assert!(!same_bits(&f32s(&[0.0]), &f32s(&[-0.0])));
        assert!(!same_bits(&f32s(&[1.0]), &f32s(&[1.0f32.next_up()])));
        assert!(!same_bits(&f32s(&[1.0]), &f32s(&[1.0, 1.0])));
        assert!(!same_bits(&f32s(&[1.0]), &HostVec::F64(vec![1.0])));
        assert!(same_bits(&HostVec::I32(vec![-1, 7]), &HostVec::I32(vec![-1, 7])));
        assert!(!same_bits(&HostVec::F64(vec![0.5]), &HostVec::F64(vec![0.25])));
    }
}
