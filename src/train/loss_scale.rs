//! Scales of cotangents in f16: found from the data of a part's first steps, lowered where a step overflows.

use crate::error::Result;
use crate::mlnt::Scales;
use serde::{Deserialize, Serialize};

/// Largest exponent that is tried.
const HIGHEST: i32 = 32;
/// Smallest exponent: below it a step that overflows has diverged.
const LOWEST: i32 = -8;
/// Exponents between two tries.
const STRIDE: i32 = 2;
/// Exponents kept free above what the first steps need.
const HEADROOM: i32 = 3;
/// Steps that the scales are found from.
const FIRST_STEPS: u32 = 4;

/// The scales of a part as exponents of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossScale {
    passes: Passes,
    inner: i32,
    outer: i32,
    second: i32,
    /// Steps that they were found from.
    steps: u32,
}

/// Which scales a kind of step has; the others stay 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passes {
    /// Cross entropy alone.
    Inner,
    /// And the divergence at the fast weights.
    FirstOrder,
    /// And the second-order pass.
    Exact,
}

impl Passes {
    /// Those of an MLNT step.
    pub fn of_mlnt(first_order: bool) -> Self {
        if first_order { Passes::FirstOrder } else { Passes::Exact }
    }
}

/// The largest of `from, from − STRIDE, …` that `finite` accepts, or about LOWEST where it accepts none.
fn largest(from: i32, mut finite: impl FnMut(i32) -> Result<bool>) -> Result<i32> {
    let mut exponent = from;
    while exponent > LOWEST && !finite(exponent)? {
        exponent -= STRIDE;
    }
    Ok(exponent)
}

impl LossScale {
    /// The scales for a kind of step. `finite` makes the first step with the scales that it is given, without taking it, and
    /// says whether its gradients were finite.
    ///
    /// Inner, outer and second-order cotangents get [`HEADROOM`] below what overflows. The tangents on the way through the inner
    /// gradients carry `second / inner`: so the inner scale is halfway between where they overflow and where the
    /// inner cotangents do.
    ///
    /// # Errors
    /// Those of `finite`.
    pub fn find(passes: Passes, mut finite: impl FnMut(Scales) -> Result<bool>) -> Result<Self> {
        let mut try_scale = |scale: LossScale| finite(Scales { apply: false, ..scale.scales() });
        let mut scale = LossScale { passes, inner: 0, outer: 0, second: 0, steps: 1 };
        let most_inner = largest(HIGHEST, |inner| try_scale(LossScale { inner, ..scale }))?;
        scale.inner = most_inner - HEADROOM;
        if passes == Passes::Inner {
            return Ok(scale);
        }
        scale.outer = largest(HIGHEST, |outer| try_scale(LossScale { outer, ..scale }))? - HEADROOM;
        if passes == Passes::FirstOrder {
            return Ok(scale);
        }
        scale.second = largest(HIGHEST, |second| try_scale(LossScale { second, ..scale }))? - HEADROOM;
        let mut least_inner = scale.inner;
        while least_inner - STRIDE >= LOWEST && try_scale(LossScale { inner: least_inner - STRIDE, ..scale })? {
            least_inner -= STRIDE;
        }
        scale.inner = (most_inner + least_inner).div_euclid(2).min(scale.inner);
        Ok(scale)
    }

    /// Whether the next step is one of those that the scales are found from.
    pub fn is_open(&self) -> bool {
        self.steps < FIRST_STEPS
    }

    /// The scales for one of the first steps more: lowered where it leaves less than [`HEADROOM`]. `finite` as in [`LossScale::find`].
    ///
    /// # Errors
    /// Those of `finite`.
    pub fn with_step(self, mut finite: impl FnMut(Scales) -> Result<bool>) -> Result<Self> {
        let mut try_scale = |scale: LossScale| finite(Scales { apply: false, ..scale.scales() });
        let alone = LossScale { outer: 0, second: 0, steps: self.steps + 1, ..self };
        let inner = largest(self.inner + HEADROOM, |inner| try_scale(LossScale { inner, ..alone }))? - HEADROOM;
        let mut scale = LossScale { inner, ..alone };
        if self.passes != Passes::Inner {
            let outer = largest(self.outer + HEADROOM, |outer| try_scale(LossScale { outer, ..scale }))?;
            scale.outer = outer - HEADROOM;
        }
        if self.passes == Passes::Exact {
            // With the inner cotangents as much higher: tangents, which carry the ratio of both, have no headroom of this size.
            let wide = LossScale { inner: scale.inner + HEADROOM, ..scale };
            let second = largest(self.second + HEADROOM, |second| try_scale(LossScale { second, ..wide }))?;
            scale.second = second - HEADROOM;
        }
        Ok(scale)
    }

    /// What the step is given.
    pub fn scales(&self) -> Scales {
        let power = |exponent: i32| f64::from(exponent).exp2();
        Scales { inner: power(self.inner), outer: power(self.outer), second: power(self.second), apply: true }
    }

    /// Smaller ones, after a step with these overflowed; `None` where smaller ones would not help: the step has diverged.
    ///
    /// `inner` says that the inner gradients had overflowed already, so that the other scales are not to blame; the ratio of the
    /// second-order scale to the inner one then stays.
    #[must_use]
    pub fn lowered(&self, inner: bool) -> Option<Self> {
        let [by_inner, by_outer, by_second] = match (self.passes, inner) {
            (Passes::Inner, _) | (Passes::FirstOrder, true) => [STRIDE, 0, 0],
            (Passes::FirstOrder, false) => [STRIDE / 2, STRIDE, 0],
            (Passes::Exact, true) => [STRIDE, 0, STRIDE],
            (Passes::Exact, false) => [STRIDE / 2, STRIDE, STRIDE],
        };
        let lower = LossScale {
            passes: self.passes,
            inner: self.inner - by_inner,
            outer: self.outer - by_outer,
            second: self.second - by_second,
            steps: self.steps,
        };
        (lower.inner.min(lower.outer).min(lower.second) >= 2 * LOWEST).then_some(lower)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Limits of a step as exponents: of inner, outer and second-order cotangents, and of tangents.
    fn finite_below(limits: [i32; 4]) -> impl FnMut(Scales) -> Result<bool> {
        move |s| {
            assert!(!s.apply, "a try must not be taken");
            let exponents = [s.inner, s.outer, s.second, s.second / s.inner].map(f64::log2);
            Ok(exponents.iter().zip(limits).all(|(e, limit)| *e <= f64::from(limit)))
        }
    }

    #[test]
    fn scales_leave_room_below_the_first_overflow() {
        let found = LossScale::find(Passes::Exact, finite_below([19, 25, 22, 10])).unwrap();
        assert!((11..=16).contains(&found.inner), "{found:?}");
        assert!((19..=22).contains(&found.outer), "{found:?}");
        assert!((16..=19).contains(&found.second), "{found:?}");
        // Inner cotangents and tangents have about the same room.
        assert!(((19 - found.inner) - (10 - (found.second - found.inner))).abs() <= 3, "{found:?}");
    }

    #[test]
    fn only_what_a_step_has_is_searched() {
        let mut tries = 0;
        let mut count = |s: Scales| {
            tries += 1;
            assert_eq!((s.outer, s.second), (1.0, 1.0));
            Ok(s.inner <= 1024.0)
        };
        let found = LossScale::find(Passes::Inner, &mut count).unwrap();
        assert_eq!(
            (found, tries),
            (LossScale { passes: Passes::Inner, inner: 10 - HEADROOM, outer: 0, second: 0, steps: 1 }, 12)
        );
    }

    #[test]
    fn further_first_steps_lower_what_they_must() {
        for passes in [Passes::Inner, Passes::FirstOrder, Passes::Exact] {
            let limits = [19, 25, 22, 10];
            let found = LossScale::find(passes, finite_below(limits)).unwrap();
            // The same data asks for nothing else, and for one try of each scale.
            let mut tries = 0;
            let again = found.with_step(|s| {
                tries += 1;
                finite_below(limits)(s)
            });
            let same = LossScale { steps: 2, ..found };
            assert_eq!(again.unwrap(), same);
            assert_eq!(tries, 1 + passes as usize);
            // Larger cotangents of one kind, or larger tangents, lower what they must, to where there is room again.
            for (i, of) in [[4, 0, 0], [0, 8, 0], [0, 0, 7]].iter().enumerate().take(1 + passes as usize) {
                let less = [limits[0] - 2 * of[0], limits[1] - of[1], limits[2] - of[2], 10];
                let lower = found.with_step(finite_below(less)).unwrap();
                let [a, b] = [found, lower].map(|s| [s.inner, s.outer, s.second]);
                assert!(b[i] < a[i] && b[i] + HEADROOM <= less[i] && b[i] + HEADROOM + STRIDE > less[i], "{lower:?}");
                let kept = (0..3).filter(|j| *j != i && !(*j == 2 && i == 0)).all(|j| a[j] == b[j]);
                assert!(kept && finite_below(less)(Scales { apply: false, ..lower.scales() }).unwrap(), "{lower:?}");
            }
            // Four steps in all.
            let mut scale = found;
            while scale.is_open() {
                scale = scale.with_step(finite_below(limits)).unwrap();
            }
            assert_eq!(scale, LossScale { steps: 4, ..found });
        }
    }

    #[test]
    fn lowering_ends() {
        let of = |passes, [inner, outer, second]: [i32; 3]| LossScale { passes, inner, outer, second, steps: 1 };
        let starts =
            [of(Passes::Inner, [29, 0, 0]), of(Passes::FirstOrder, [12, 14, 0]), of(Passes::Exact, [12, 14, 20])];
        for (start, inner) in starts.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            let (mut scale, mut steps) = (start, 0);
            while let Some(lower) = scale.lowered(inner) {
                assert!(lower.inner < scale.inner);
                (scale, steps) = (lower, steps + 1);
            }
            assert!((14..=32).contains(&steps), "{start:?}: {steps}");
            // What a step does not have is neither lowered nor what ends the lowering.
            match start.passes {
                Passes::Inner => assert_eq!((scale.outer, scale.second), (0, 0)),
                Passes::FirstOrder => assert_eq!(scale.second, 0),
                Passes::Exact => assert!(scale.second < start.second),
            }
        }
    }
}
