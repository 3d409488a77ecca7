//! Golden steps: the engine against whole training steps computed in float64 by another framework.

use mlnt::device::Device;
use mlnt::device::cpu::Cpu;
use mlnt::mlnt::golden::Golden;
use mlnt::plan::PlanOptions;
use std::path::Path;

const FILES: [&str; 4] = ["step_sequential", "step_joint", "step_mentor", "step_bottleneck"];

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
    Golden::read(&path).unwrap()
}

fn worst(name: &str, device: &mut dyn Device, fuse: bool, group: Option<usize>) -> (f64, String) {
    let golden = golden(name);
    let result = golden.run(device, &PlanOptions { fuse, group, ..PlanOptions::default() }).unwrap();
    let groups = golden.compare(&result);
    assert_eq!(groups.len(), 13);
    groups.into_iter().map(|(g, d)| (d.rel, g)).fold((0.0, String::new()), |a, b| if b.0 > a.0 { b } else { a })
}

#[test]
fn every_group_matches_in_double_precision() {
    for name in FILES {
        for (fuse, branches) in [(false, None), (true, None), (false, Some(1)), (true, Some(1)), (true, Some(2))] {
            let (rel, group) = worst(name, &mut Cpu::<f64>::new(2).unwrap(), fuse, branches);
            println!("{name} fuse={fuse} in groups of {branches:?}: worst {group} {rel:.2e}");
            assert!(rel <= 1e-10, "{name} (fused: {fuse}, in groups of {branches:?}): {group} is off by {rel:.3e}");
        }
    }
}
