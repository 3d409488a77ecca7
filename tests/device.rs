//! The CPU device refuses plans that it cannot run soundly, and shows what is broken.

use mlnt::device::cpu::Cpu;
use mlnt::device::{Device, HostSlice};
use mlnt::ops::{Conv, ConvGeom, ConvKind};
use mlnt::plan::{Place, Plan, PlanOptions};
use mlnt::tape::{Meta, Tape};

fn plan(tape: &Tape) -> Plan {
    Plan::build(tape, &PlanOptions::default()).unwrap()
}

fn refusal(plan: Plan) -> String {
    Cpu::<f32>::new(1).unwrap().load(plan).unwrap_err().to_string()
}

#[test]
fn indices_are_no_reals() {
    let mut tape = Tape::new(1);
    let y = tape.input("y", Meta::labels(4)).unwrap();
    let r = tape.relu(y).unwrap();
    tape.output("r", r);
    assert!(refusal(plan(&tape)).contains("relu: takes reals"));

    let mut tape = Tape::new(1);
    let s = tape.state("s", Meta::labels(4)).unwrap();
    let y = tape.input("y", Meta::labels(4)).unwrap();
    tape.assign(s, y).unwrap();
    assert!(refusal(plan(&tape)).contains("state of indices"));
}

#[test]
fn a_shared_sum_does_not_start_from_values_per_branch() {
    let mut tape = Tape::new(3);
    let geom = ConvGeom::new(&Meta::activation(2, 3, 5, 5), &Meta::weight(4, 3, 3, 3), 1, 1).unwrap();
    let operands = [("x", geom.x().branched()), ("w", geom.weight()), ("start", geom.y().branched())];
    let operands = operands.map(|(name, meta)| tape.input(name, meta).unwrap());
    let y = tape.record1(Conv { kind: ConvKind::Fprop, geom }, &operands, true).unwrap();
    tape.output("y", y);
    let error = refusal(plan(&tape));
    assert!(error.contains("conv2d_fprop: a result that is shared cannot start from values per branch"), "{error}");
}

#[test]
fn a_state_has_one_number_of_branches() {
    let record = |branches: usize| {
        let mut tape = Tape::new(branches);
        let s = tape.state("s", Meta::vector(64).branched()).unwrap();
        let r = tape.relu(s).unwrap();
        tape.output("r", r);
        plan(&tape)
    };
    let mut device = Cpu::<f32>::new(1).unwrap();
    device.load(record(2)).unwrap();
    let error = device.load(record(64)).unwrap_err().to_string();
    assert!(error.contains("kept for 2 branches, the plan has 64"), "{error}");
}

#[test]
fn an_edited_plan_does_not_leave_its_memory() {
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::vector(64)).unwrap();
    let a = tape.relu(x).unwrap();
    let b = tape.scale(mlnt::tape::Coef::constant(2.0), a).unwrap();
    tape.output("b", b);
    for buffer in 0..plan(&tape).buffers.len() {
        let mut edited = plan(&tape);
        match edited.buffers[buffer].place {
            Place::Arena(_) => edited.buffers[buffer].place = Place::Arena(1 << 20),
            _ => edited.buffers[buffer].meta = Meta::vector(1 << 20),
        }
        assert!(refusal(edited).contains("does not lie in its memory"));
    }
}

#[test]
fn relu_keeps_a_nan() {
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::vector(3)).unwrap();
    let y = tape.relu(x).unwrap();
    tape.output("y", y);
    let mut device = Cpu::<f32>::new(1).unwrap();
    let id = device.load(plan(&tape)).unwrap();
    device.write_input(id, "x", HostSlice::F32(&[f32::NAN, -1.0, 2.0])).unwrap();
    device.run(id, &[]).unwrap();
    let y = device.read_output(id, "y").unwrap().to_f64();
    assert!(y[0].is_nan() && y[1] == 0.0 && y[2] == 2.0, "{y:?}");
}

#[test]
fn a_stride_wider_than_the_image_works() {
    // One pixel in the middle of the padded 3×3 window: only the centre tap sees it.
    let mut tape = Tape::new(1);
    let x = tape.input("x", Meta::activation(1, 1, 1, 1)).unwrap();
    let w = tape.input("w", Meta::weight(1, 1, 3, 3)).unwrap();
    let y = tape.conv2d(x, w, 3, 1).unwrap();
    tape.output("y", y);
    let mut device = Cpu::<f64>::new(1).unwrap();
    let id = device.load(plan(&tape)).unwrap();
    device.write_input(id, "x", HostSlice::F64(&[3.0])).unwrap();
    let weights: Vec<f64> = (0..9).map(f64::from).collect();
    device.write_input(id, "w", HostSlice::F64(&weights)).unwrap();
    device.run(id, &[]).unwrap();
    assert_eq!(device.read_output(id, "y").unwrap().to_f64(), [12.0]);
}

#[test]
fn sets_of_one_launch_stay_apart() {
    let mut tape = Tape::new(1);
    let pairs: Vec<_> = (0..2)
        .map(|i| {
            let x = tape.input(&format!("x{i}"), Meta::vector(64)).unwrap();
            tape.scale(mlnt::tape::Coef::constant(2.0), x).unwrap()
        })
        .collect();
    pairs.iter().enumerate().for_each(|(i, y)| tape.output(format!("y{i}"), *y));
    let good = plan(&tape);
    let launch = good.launches.iter().position(|l| l.args.len() == 2).expect("both are one launch");
    Cpu::<f32>::new(1).unwrap().load(good.clone()).unwrap();
    let mut edited = good;
    let [first, second] = [0, 1].map(|set| edited.launches[launch].args[set].outputs[0]);
    edited.buffers[second].place = edited.buffers[first].place;
    assert!(refusal(edited).contains("another set"));
}
