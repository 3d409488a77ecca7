//! Each fusion by itself, after those before it, and left out of all: the plan is that of the unfused step, at first and second order, and
//! another one than without the fusion.

mod common;
#[path = "common/fused.rs"]
mod fused;

use common::step_spec;
use fused::{FUSED, KERNELS, PLAIN, check_sums, model, plan, specs, states, worst};
use mlnt::cases::expand;
use mlnt::mlnt::{Recipe, StepSpec};
use mlnt::model::Arch;
use mlnt::ops::Operation;
use mlnt::plan::{Fusion, Fusions, Launch, Place, Plan, PlanOptions};
use mlnt::rng::{Purpose, below, stream};
use std::collections::{BTreeMap, BTreeSet};

/// Every fusion there is.
const EVERY: PlanOptions = PlanOptions { recompute: true, ..KERNELS };

/// The other fusions without which one finds nothing, as its documentation says, with those that these need; the others find something on a
/// recorded step.
const NEEDS: [(Fusion, &[Fusion]); 6] = [
    (Fusion::Recomputation, &[Fusion::BatchNormRelu]),
    (Fusion::BackwardSums, &[Fusion::BatchNormRelu, Fusion::BackwardPairs, Fusion::Recomputation]),
    (
        Fusion::BackwardStarts,
        &[
            Fusion::BatchNormRelu,
            Fusion::BackwardPairs,
            Fusion::Recomputation,
            Fusion::StartedSums,
            Fusion::BackwardSums,
        ],
    ),
    (
        Fusion::SecondOrder,
        &[
            Fusion::BatchNormRelu,
            Fusion::TangentPairs,
            Fusion::BackwardPairs,
            Fusion::Recomputation,
            Fusion::StartedSums,
            Fusion::BackwardSums,
        ],
    ),
    (
        Fusion::LoadedCotangents,
        &[Fusion::BatchNormRelu, Fusion::BackwardPairs, Fusion::Recomputation, Fusion::BackwardSums],
    ),
    (
        Fusion::ResidualChain,
        &[
            Fusion::BatchNormRelu,
            Fusion::BackwardPairs,
            Fusion::Recomputation,
            Fusion::StartedSums,
            Fusion::BackwardSums,
            Fusion::LoadedCotangents,
        ],
    ),
];

fn needs(fusion: Fusion) -> &'static [Fusion] {
    NEEDS.iter().find(|(of, _)| *of == fusion).map_or(&[], |(_, needs)| needs)
}

fn set(fusions: impl IntoIterator<Item = Fusion>) -> Fusions {
    fusions.into_iter().fold(Fusions::NONE, Fusions::with)
}

/// The fusions that are applied before one.
fn before(fusion: Fusion) -> Fusions {
    set(Fusion::ALL.into_iter().take_while(|other| *other != fusion))
}

/// A step and its states without any fusion.
struct Step {
    name: String,
    spec: StepSpec,
    unfused: Vec<(String, Vec<f64>)>,
}

impl Step {
    fn all(specs: Vec<(String, StepSpec)>) -> Vec<Step> {
        let of = |(name, spec)| Step { unfused: states(&spec, plan(&spec, PLAIN)), name, spec };
        specs.into_iter().map(of).collect()
    }

    fn plan(&self, options: PlanOptions) -> Plan {
        plan(&self.spec, options)
    }

    /// How far the states after the plan with these options are off: no more than rounding.
    fn off(&self, options: PlanOptions) -> f64 {
        let fused = self.plan(options);
        check_sums(&fused);
        let (off, state) = worst(&states(&self.spec, expand(&fused)), &self.unfused);
        assert!(off <= 1e-12, "{}, {options:?}: {state} is off by {off:.1e}", self.name);
        off
    }
}

/// How often each operation is executed, its parts included.
fn operations(plan: &Plan) -> BTreeMap<(&'static str, String), usize> {
    let mut counts = BTreeMap::new();
    for launch in &plan.launches {
        *counts.entry((launch.op.name(), format!("{:?}", launch.op))).or_default() += launch.args.len();
    }
    counts
}

/// What is more or less often there in one plan than in another, by name; with an equal number of a name, how many have other parts.
fn difference(have: &Plan, without: &Plan) -> BTreeMap<&'static str, String> {
    let [after, before] = [have, without].map(operations);
    let keys: BTreeSet<_> = after.keys().chain(before.keys()).collect();
    let mut by_name: BTreeMap<&'static str, (i64, i64)> = BTreeMap::new();
    for key in keys {
        let [after, before] = [&after, &before].map(|counts| counts.get(key).copied().unwrap_or(0) as i64);
        let (sum, other) = by_name.entry(key.0).or_default();
        (*sum, *other) = (*sum + after - before, *other + (after - before).max(0));
    }
    let text = |(name, (sum, other)): (_, (i64, i64))| match (sum, other) {
        (0, 0) => None,
        (0, other) => Some((name, format!("{other} other"))),
        (sum, _) => Some((name, format!("{sum:+}"))),
    };
    by_name.into_iter().filter_map(text).collect()
}

/// Which others are applied.
#[derive(Clone, Copy, Debug)]
enum Among {
    /// What the fusion needs.
    Needed,
    /// Those before it.
    Earlier,
    /// All others; here the plan without it is the one that is run.
    All,
}

impl Among {
    /// The fusions with this one, and without.
    fn sets(self, fusion: Fusion) -> [Fusions; 2] {
        let others = match self {
            Among::Needed => set(needs(fusion).iter().copied()),
            Among::Earlier => before(fusion),
            Among::All => Fusions::ALL.without(fusion),
        };
        [others.with(fusion), others]
    }
}

/// Sees that steps are as they are without fusions, and that each fusion changes the plan of one at least.
fn judge(steps: &[Step], options: PlanOptions, fusions: &[Fusion], among: Among) {
    for &fusion in fusions {
        let [with, without] = among.sets(fusion).map(|fusions| PlanOptions { fusions, ..options });
        let run = if matches!(among, Among::All) { without } else { with };
        let off = steps.iter().map(|step| step.off(run)).fold(0.0, f64::max);
        let mut changed = 0;
        for step in steps {
            let [with, without] = [with, without].map(|options| step.plan(options));
            let found = difference(&with, &without);
            if !found.is_empty() && changed == 0 {
                let launches = [&without, &with].map(|plan| plan.launches.len());
                println!("{fusion:?}, {}: {} to {} launches, {found:?}", step.name, launches[0], launches[1]);
            }
            changed += usize::from(!found.is_empty());
        }
        println!("{fusion:?} among {among:?}: off by {off:.1e}, changes {changed} of {}", steps.len());
        assert!(changed > 0, "{fusion:?} among {among:?} changes no plan");
    }
}

#[test]
fn each_fusion_stands_for_what_it_replaces() {
    for m in [1, 3] {
        let steps = Step::all(specs(m));
        judge(&steps, EVERY, &Fusion::ALL, Among::Earlier);
        judge(&steps, EVERY, &Fusion::ALL, Among::All);
    }
}

#[test]
fn each_fusion_stands_for_what_it_replaces_in_groups_of_branches() {
    let of = |(arch, first_order): (Arch, bool)| {
        let name = format!("{arch:?} first order {first_order}, groups of 5 branches");
        (name, step_spec(model(arch), 4, 5, Recipe::Joint, first_order))
    };
    let archs = [Arch::PreactResnet, Arch::ResnetBottleneck].into_iter();
    let steps = Step::all(archs.flat_map(|arch| [false, true].map(|first_order| of((arch, first_order)))).collect());
    let in_groups = PlanOptions { group: Some(2), ..EVERY };
    judge(&steps, in_groups, &Fusion::ALL, Among::Earlier);
    judge(&steps, in_groups, &Fusion::ALL, Among::All);
}

#[test]
fn each_fusion_needs_what_its_documentation_says() {
    let steps = Step::all(specs(3));
    judge(&steps, EVERY, &Fusion::ALL, Among::Needed);
    for (fusion, needs) in NEEDS {
        for need in needs {
            // The largest set without it.
            let with = Fusions::ALL.without(*need);
            for step in &steps {
                let [with, without] =
                    [with, with.without(fusion)].map(|fusions| step.plan(PlanOptions { fusions, ..EVERY }));
                let found = difference(&with, &without);
                assert!(found.is_empty(), "{}: {fusion:?} without {need:?} finds {found:?}", step.name);
            }
        }
    }
}

/// Steps that are taken only where their gradients are finite: all states are written under a guard, in one launch.
#[test]
fn the_update_stands_for_guarded_states() {
    let scaled = |(name, spec)| (format!("{name}, scaled"), StepSpec { scaled: true, ..spec });
    for options in [EVERY, PlanOptions { group: Some(2), ..EVERY }] {
        let steps = Step::all(specs(3).into_iter().map(scaled).collect());
        for among in [Among::Needed, Among::Earlier, Among::All] {
            judge(&steps, options, &[Fusion::Update], among);
        }
        for step in &steps {
            let plan = step.plan(options);
            step.off(options);
            let writes = |launch: &&Launch| {
                let mut outputs = launch.args.iter().flat_map(|args| &args.outputs);
                outputs.any(|b| matches!(plan.buffers[*b].place, Place::State(_)))
            };
            let writers: Vec<&str> = plan.launches.iter().filter(writes).map(|launch| launch.op.name()).collect();
            assert_eq!(writers, ["update"], "{}", step.name);
        }
    }
}

/// Fusions drawn by chance, with all branches at a time and in groups.
#[test]
fn any_set_of_fusions_stands_for_the_unfused_step() {
    let mut rng = stream(11, Purpose::Test, 0, 0);
    for step in Step::all(specs(3)) {
        let mut off: f64 = 0.0;
        for draw in 0..60 {
            let drawn: Vec<Fusion> = Fusion::ALL.into_iter().filter(|_| below(2, &mut rng) == 1).collect();
            let group = (draw % 2 == 1).then_some(2);
            off = off.max(step.off(PlanOptions { fusions: set(drawn), group, ..EVERY }));
        }
        println!("{}, any set: off by {off:.1e}", step.name);
    }
}

#[test]
fn the_fusions_for_every_device_stand_for_what_they_replace() {
    let plain = [Fusion::BatchNormRelu, Fusion::StartedSums];
    let steps = Step::all([specs(1), specs(3)].concat());
    judge(&steps, FUSED, &plain, Among::Needed);
    judge(&steps, FUSED, &plain, Among::All);
    for step in &steps {
        // The CPU device runs them as they are.
        for fusions in plain.map(|fusion| Fusions::NONE.with(fusion)) {
            let (off, state) = worst(&states(&step.spec, step.plan(PlanOptions { fusions, ..FUSED })), &step.unfused);
            assert!(off <= 1e-12, "{}, {fusions:?}: {state} is off by {off:.1e}", step.name);
        }
        let same = |options: PlanOptions, fusions| {
            let difference = difference(&step.plan(options), &step.plan(PlanOptions { fusions, ..options }));
            assert!(difference.is_empty(), "{}, {fusions:?}: {difference:?}", step.name);
        };
        same(FUSED, set(plain));
        same(KERNELS, Fusions::ALL.without(Fusion::ResidualChain));
        same(PLAIN, Fusions::NONE);
    }
}

#[test]
fn without_a_fusion_linear_combinations_share_launches_and_nothing_else_changes() {
    for step in Step::all(specs(3)) {
        let options = PlanOptions { fusions: Fusions::NONE, ..EVERY };
        let [none, plain] = [options, PLAIN].map(|options| step.plan(options));
        let found = difference(&none, &plain);
        assert!(found.is_empty(), "{}: {found:?}", step.name);
        assert!(none.launches.len() < plain.launches.len(), "{}", step.name);
        step.off(options);
    }
}

#[test]
fn a_plan_applies_every_fusion_unless_it_is_told_not_to() {
    assert_eq!(PlanOptions::default().fusions, Fusions::ALL);
    assert_eq!(set(Fusion::ALL), Fusions::ALL);
    for fusion in Fusion::ALL {
        let without = Fusions::ALL.without(fusion);
        assert!(Fusions::ALL.has(fusion) && !Fusions::NONE.has(fusion) && !without.has(fusion));
        assert_eq!(without.with(fusion), Fusions::ALL);
        assert_eq!(format!("{:?}", Fusions::NONE.with(fusion)), format!("{{{fusion:?}}}"));
    }
}
