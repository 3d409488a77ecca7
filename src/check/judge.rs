//! How far two results are apart, and whether they are the same bits.

use crate::cases::{Planned, Tolerance};
use crate::device::HostVec;
use crate::device::cuda::Operands;
use crate::error::Result;

/// Largest deviation of what an epilogue finds of a result, relative to the size of what is added up.
const FOUND: f64 = 3e-7;

/// Largest relative error of statistics of a result, against those of the result as it is in memory.
const STATISTICS: f64 = 2e-6;

/// How far a result of a case is off.
#[derive(Clone, Debug, PartialEq)]
pub struct Deviation {
    /// What it is: `result 0`, or what an epilogue finds by its name.
    pub what: String,
    /// How far it is off, relative.
    pub by: f64,
    /// How far it may be.
    pub most: f64,
}

impl Deviation {
    /// Whether that is too far.
    pub fn is_fault(&self) -> bool {
        self.by > self.most
    }
}

/// How far the results `have` of a case, on a device with these operands, are from what they must be, given the `values` of the case's
/// operands: from the results `want` of the plain operations that it stands for, and what an epilogue finds from what it should find
/// of the first result as this is.
///
/// # Errors
/// When the case holds operands that its operation refuses.
pub fn deviations(
    case: &Planned,
    operands: Operands,
    values: &[HostVec],
    want: &[HostVec],
    have: &[HostVec],
) -> Result<Vec<Deviation>> {
    let found = case.found(values, &have[0])?;
    let delta = case.kept();
    let mut list = Vec::new();
    for (i, (want, tolerance)) in want.iter().zip(case.tolerances()?).enumerate() {
        if found.iter().any(|f| f.result == i) {
            continue;
        }
        let what = if delta == Some(i) { "delta".to_string() } else { format!("result {i}") };
        list.push(Deviation { what, by: deviation(&have[i].to_f64(), &want.to_f64()), most: of(tolerance, operands) });
    }
    for f in found {
        let have = have[f.result].to_f64();
        list.push(Deviation { what: f.what.into(), by: sum_deviation(&have, &f.values, &f.sizes), most: FOUND });
        if f.statistics {
            list.push(Deviation { what: f.what.into(), by: deviation(&have, &f.values), most: STATISTICS });
        }
    }
    Ok(list)
}

/// The tolerance on a device with these operands.
fn of(tolerance: Tolerance, operands: Operands) -> f64 {
    match operands {
        Operands::F32 => tolerance.f32,
        Operands::Tf32 => tolerance.tf32,
        Operands::F16 => tolerance.f16,
        Operands::Bf16 => tolerance.bf16,
    }
}

/// `‖have − want‖ / ‖sizes‖` in the Euclidean norm, for sums whose terms cancel: `sizes` are the same sums of absolute values. Infinite as
/// [`deviation`] is.
pub fn sum_deviation(have: &[f64], want: &[f64], sizes: &[f64]) -> f64 {
    if have.len() != want.len() {
        return f64::INFINITY;
    }
    let off = norm(&mut have.iter().zip(want).map(|(h, w)| h - w));
    let relative = off / norm(&mut sizes.iter().copied()).max(f64::MIN_POSITIVE);
    if relative.is_nan() { f64::INFINITY } else { relative }
}

fn norm(values: &mut dyn Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// `‖have − want‖ / ‖want‖` in the Euclidean norm, or `‖have‖` where `want` is zero; infinite where a number is none
/// or the lengths differ.
pub fn deviation(have: &[f64], want: &[f64]) -> f64 {
    if have.len() != want.len() {
        return f64::INFINITY;
    }
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
    use super::{deviation, same_bits, sum_deviation};
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
    fn sums_that_cancel_are_held_against_their_terms() {
        assert_eq!(sum_deviation(&[3.0, 5.0], &[3.0, 4.0], &[6.0, 8.0]), 0.1);
        assert_eq!(sum_deviation(&[0.0], &[0.0], &[0.0]), 0.0);
        assert!(sum_deviation(&[1e-3], &[0.0], &[0.0]) > 1e100);
        for have in [&[f64::NAN][..], &[1.0, 1.0]] {
            assert_eq!(sum_deviation(have, &[1.0], &[1.0]), f64::INFINITY, "{have:?}");
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
