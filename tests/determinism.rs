//! The same step on any number of threads gives the same bits.

mod common;

use common::{load_step, step_spec};
use mlnt::mlnt::{Recipe, Report};
use mlnt::model::{Arch, ModelSpec};

#[test]
fn states_do_not_depend_on_the_number_of_threads() {
    for arch in [Arch::PreactResnet, Arch::ResnetBottleneck] {
        // Large enough for several tiles and several partial sums of the weight gradients.
        let model =
            ModelSpec { arch, in_channels: 3, size: [28, 28], classes: 5, widths: vec![4, 6], blocks: vec![1, 1] };
        let spec = step_spec(model, 9, 3, Recipe::Joint, false);
        let run = |threads: usize| {
            let mut step = load_step::<f32>(&spec, Report::Losses, true, threads);
            (0..2).for_each(|_| step.run());
            step.states()
        };
        let one = run(1);
        assert!(one.iter().all(|(_, v)| v.to_f64().iter().all(|x| x.is_finite())));
        for threads in [2, 3] {
            for ((name, want), (_, have)) in one.iter().zip(&run(threads)) {
                assert_eq!(have, want, "{arch:?}: {name} on {threads} threads");
            }
        }
    }
}
