//! Conversions between types, over all patterns of bits that differ in how they round.

use crate::machine::{Try, floats, machine};
use half::{bf16, f16};
use mlnt::device::cuda::driver::simt::Simt;

/// f32 patterns: all 16-bit ends of each exponent's neighbourhood, ties, subnormals, infinities and NaN.
fn patterns() -> Vec<u32> {
    let mut list = Vec::new();
    for sign in [0, 0x8000_0000u32] {
        for exponent in 0..=255u32 {
            for high in [0, 1, 2, 3, 0x155, 0x2aa, 0x3fe, 0x3ff] {
                for low in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff] {
                    list.push(sign | exponent << 23 | high << 13 | low);
                }
            }
            for mantissa in [0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x1_8001, 0x7f_7fff, 0x7f_8000, 0x7f_ffff] {
                list.push(sign | exponent << 23 | mantissa);
            }
        }
        // Every place of the last bit among the subnormals of f16.
        for shift in 0..24u32 {
            list.extend([0, 1, 2].map(|d| sign | (0x32ff_ffff + (shift << 20) + d)));
        }
    }
    let mut state = 1u32;
    list.extend((0..100_000).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.rotate_left(16)
    }));
    list
}

/// Runs a conversion over `input` and compares with `want`; two NaNs are equal.
fn converts(kernel: &'static str, input: &[u32], want: impl Fn(u32) -> u32, is_nan: impl Fn(u32) -> bool) {
    let Some(simt) = machine(6) else { return };
    let got = Try::elements(kernel, input.len()).bits(&simt, input, &[], None).unwrap();
    for (&x, &y) in input.iter().zip(&got) {
        let right = want(x);
        assert!(y == right || is_nan(y) && is_nan(right), "{kernel}({x:#010x}) = {y:#x}, not {right:#x}");
    }
}

#[test]
fn conversions_round_as_documented() {
    let input = patterns();
    let f16_nan = |b: u32| f16::from_bits(b as u16).is_nan();
    let bf16_nan = |b: u32| bf16::from_bits(b as u16).is_nan();
    let f32_nan = |b: u32| f32::from_bits(b).is_nan();
    converts("to_f16_f32", &input, |b| f16::from_f32(f32::from_bits(b)).to_bits().into(), f16_nan);
    converts("to_bf16_f32", &input, |b| bf16::from_f32(f32::from_bits(b)).to_bits().into(), bf16_nan);
    // To the nearest multiple of 2^(exponent - 10), ties away from zero: in double precision, where it is exact.
    let tf32 = |b: u32| {
        let x = f32::from_bits(b);
        if !x.is_finite() {
            return b;
        }
        let step = 2.0f64.powi(((b >> 23 & 255).max(1)) as i32 - 127 - 10);
        (((f64::from(x) / step).round() * step) as f32).to_bits()
    };
    converts("to_tf32_f32", &input, tf32, f32_nan);
    let all: Vec<u32> = (0..=0xffff).collect();
    converts("from_f16_u16", &all, |b| f16::from_bits(b as u16).to_f32().to_bits(), f32_nan);
    converts("from_bf16_u16", &all, |b| bf16::from_bits(b as u16).to_f32().to_bits(), f32_nan);
}

/// That a tensor core of `simt` multiplies each of the numbers in f16 by one.
pub fn reads_every_f16(simt: &Simt) {
    let all: Vec<u32> = (0..=0xffff).collect();
    let each = Try { grid: [65_536, 1, 1], ..Try::warp("mma_reads_f16") };
    let got = each.bits(simt, &all, &[], None).unwrap();
    for (&x, y) in all.iter().zip(floats(got)) {
        let want = f16::from_bits(x as u16).to_f32();
        assert!(y == want || y.is_nan() && want.is_nan(), "{x:#06x}: {y}, not {want}");
    }
}

#[test]
fn tensor_cores_read_every_f16() {
    let Some(simt) = machine(7) else { return };
    reads_every_f16(&simt);
}
