//! Both gradients of a convolution from one tile of δ, on the SIMT host machine with the kernels of warpgroups: odd images, runs of patches,
//! sums over branches, and what is found, added and kept. `simt_fused_conv.rs` runs the table of cases through the same kernels.
//!
//! Unit tests of the lowering (`src/device/cuda/lower/joint_cells.rs`) hold the sizes of runs to what is claimed of them here.

mod common;

use common::on_two_threads;
use mlnt::cases::{LOADED, Mixture, Planned, convolutions};
use mlnt::check::{Deviation, deviations, same_bits};
use mlnt::device::cpu::Cpu;
use mlnt::device::cuda::driver::Generation;
use mlnt::device::cuda::driver::simt::Simt;
use mlnt::device::cuda::{Cuda, KernelCost, Mode, Operands};
use mlnt::device::{Device, HostVec};
use mlnt::ops::{ConvForm, ConvGeom, Delta, Epilogue, FusedConv, Op};
use mlnt::plan::Plan;
use mlnt::tape::Meta;

/// Bits of `Mixture::half`: what is added, the first result, and the cotangent that is kept.
const ADDED: u32 = 1 << 4;
const FIRST: u32 = 1 << 5;
const KEPT: u32 = 1 << 10;
const DELTA: Delta = Delta::Backward { residual: true, kept: true };

fn convolution(case: &Planned) -> FusedConv {
    let Op::FusedConv(op) = case.case.op else { panic!("{} is no fused convolution", case.case.name) };
    op
}

/// Both gradients of 3 × 3 filters, `[n, c, h, w, k]`.
fn backward([n, c, h, w, k]: [usize; 5]) -> FusedConv {
    let geom = ConvGeom::new(&Meta::activation(n, c, h, w), &Meta::weight(k, c, 3, 3), 1, 1).unwrap();
    FusedConv::plain(ConvForm::Backward, geom)
}

/// The rule: few channels in eights, a 3 × 3 filter that keeps the size of the image, and two results for the same branches.
fn one_tile(case: &Planned) -> bool {
    let op = convolution(case);
    let g = op.geom;
    let sizes = [g.r, g.s, g.stride, g.pad] == [3, 3, 1, 1] && [g.c, g.k].iter().all(|n| [8, 16, 24, 32].contains(n));
    if op.form != ConvForm::Backward || !sizes {
        return false;
    }
    let branched = |of_delta: bool, or: &[&str]| {
        let delta = ["dy", "y", "y_g", "y_b", "y_mean", "y_var", "dg", "db", "residual"];
        let wanted = |name: &str| (of_delta && delta.contains(&name)) || or.contains(&name);
        case.case.branches > 1 && case.case.operands.iter().any(|o| o.meta.per_branch && wanted(o.name))
    };
    let of_x = ["x", "x_dot", "g", "b", "mean", "var", "g_dot", "b_dot", "x_dot_mean", "rho"];
    let results = case.case.results().unwrap();
    let summed = branched(true, &["w"]) == branched(true, &of_x);
    results[0].per_branch == results[1].per_branch && (results[0].per_branch || summed)
}

/// The kernel of a case.
fn kernel(case: &Planned, operands: Operands) -> &'static str {
    let plan = case.plan(true).unwrap();
    let at = plan.launches.iter().position(|launch| launch.op == case.case.op).unwrap();
    KernelCost::of(&plan, operands, Generation::Hopper).unwrap().kernels[at][0]
}

#[test]
fn cases_of_the_table_take_one_tile_wherever_they_can() {
    let (mut plain, mut pairs) = (0, 0);
    for case in convolutions().iter().filter(|case| convolution(case).form == ConvForm::Backward) {
        for operands in [Operands::F16, Operands::Bf16] {
            let name = kernel(case, operands);
            assert_eq!(name.starts_with("conv2d_wgmma_joint_"), one_tile(case), "{}: {name}", case.case.name);
            assert!(name.ends_with(operands.name()));
            pairs += usize::from(name.contains("joint_pair_"));
            plain += usize::from(name.contains("joint_") && !name.contains("pair_"));
        }
    }
    println!("{plain} plain, {pairs} of pairs");
    assert!(plain > 20 && pairs > 40, "{plain} {pairs}");
}

fn run(device: &mut dyn Device, case: &Planned, plan: Plan, values: &[HostVec]) -> Vec<HostVec> {
    let outputs = plan.outputs.clone();
    let id = device.load(plan).unwrap();
    for (operand, values) in case.case.operands.iter().zip(values) {
        device.write_input(id, operand.name, values.as_slice()).unwrap();
    }
    device.run(id, &[]).unwrap();
    // Twice: counters must be as they were.
    device.run(id, &[]).unwrap();
    outputs.iter().map(|port| device.read_output(id, &port.name).unwrap()).collect()
}

/// What is wrong with a case: how far it is from the plain operations in double precision, and whether the order of threads changes a bit.
fn faults(case: &Planned, operands: Operands) -> Vec<String> {
    let name = &case.case.name;
    assert!(kernel(case, operands).starts_with("conv2d_wgmma_joint_"), "{name} runs {}", kernel(case, operands));
    let values = case.values(11, |v| operands.stored(v));
    let want = run(&mut Cpu::<f64>::new(1).unwrap(), case, case.composition().unwrap(), &values);
    let on_simt = |seed: u64| {
        let machine = Simt::open(seed).unwrap().like(Generation::Hopper);
        run(&mut Cuda::new(Box::new(machine), operands, Mode::Eager), case, case.plan(true).unwrap(), &values)
    };
    let have = on_simt(1);
    let off = deviations(case, operands, &values, &want, &have).unwrap();
    let mut found: Vec<String> = off
        .into_iter()
        .filter(Deviation::is_fault)
        .map(|d| format!("{} {name}: {}: {:.1e} > {:.0e}", operands.name(), d.what, d.by, d.most))
        .collect();
    for seed in [2, 3] {
        let same = have.iter().zip(&on_simt(seed)).all(|(a, b)| same_bits(a, b));
        found.extend((!same).then(|| format!("{} {name}: seed {seed} changes a bit", operands.name())));
    }
    found
}

fn check(cases: &[Planned], operands: Operands) {
    let failures = on_two_threads(cases, |case| faults(case, operands));
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

/// Forms with the operands that are per-branch (bits of x, w and dy), what is summed, and widths.
fn forms(size: [usize; 5]) -> Vec<Planned> {
    let plain = backward(size);
    let sums = FusedConv { norm: true, epilogue: Epilogue::BackwardSums, ..plain };
    let tangent = FusedConv { norm: true, tangent: true, ..plain };
    let all = LOADED | ADDED | FIRST | KEPT;
    let (no, yes) = ([false; 2], [true; 2]);
    let list = [
        (plain, 1, 0, no, all),
        (FusedConv { start: true, ..sums }, 3, 7, no, LOADED),
        (FusedConv { norm: true, start: true, ..plain }, 3, 7, yes, all),
        // δ of all branches, x and w the same in all: dx and dw are sums, or are not.
        (FusedConv { delta: DELTA, start: true, ..sums }, 3, 4, yes, all),
        (FusedConv { delta: DELTA, ..sums }, 3, 4, no, LOADED | KEPT),
        // Tensors of 32 bits, which are not loaded in flights: all, what is kept, what is given.
        (FusedConv { delta: DELTA, ..sums }, 2, 7, no, 0),
        (FusedConv { delta: DELTA, start: true, ..tangent }, 2, 7, yes, LOADED | FIRST),
        (FusedConv { delta: DELTA, start: true, ..sums }, 1, 0, no, KEPT | FIRST),
        // δ is the same in all branches, and is stored once.
        (FusedConv { delta: DELTA, ..plain }, 3, 3, no, all),
        (FusedConv { delta: DELTA, ..plain }, 2, 3, yes, LOADED | KEPT),
        (FusedConv { delta: Delta::Backward { residual: false, kept: true }, ..tangent }, 2, 7, no, all),
    ];
    let planned = |(op, branches, branched, summed, half)| {
        Planned::convolution(op, Mixture { branches, branched, others: 0, summed, half })
    };
    list.map(planned).into()
}

/// Images that do not fill their cells, or their patches; one of many patches; several in a patch; few channels on either side.
#[test]
fn images_of_any_size_are_right() {
    let sizes = [[2, 24, 15, 11, 8], [1, 8, 7, 5, 32], [5, 32, 7, 5, 24], [2, 16, 3, 41, 32], [1, 32, 19, 24, 32]];
    let cases: Vec<Planned> = sizes.into_iter().flat_map(forms).collect();
    check(&cases, Operands::F16);
    check(&forms([3, 24, 9, 17, 32]), Operands::Bf16);
}

/// Blocks that work on several patches, the last on fewer, and runs enough for groups of them: of one branch, of several, of sums over branches
/// whose weights stay in shared memory, and of those that are loaded for every patch.
#[test]
fn runs_of_patches_are_right() {
    let case = |op, branches, branched, summed| {
        Planned::convolution(op, Mixture { branches, branched, others: 0, summed, half: LOADED | KEPT | FIRST })
    };
    let of = |size, start| FusedConv { norm: true, delta: DELTA, start, ..backward(size) };
    let sums = |size, start| FusedConv { epilogue: Epilogue::BackwardSums, ..of(size, start) };
    let cases = [
        case(sums([140, 8, 16, 16, 24], true), 1, 0, [false; 2]),
        case(sums([71, 24, 16, 16, 8], false), 4, 7, [false; 2]),
        case(FusedConv { tangent: true, ..of([139, 8, 9, 9, 8], true) }, 3, 7, [true; 2]),
        case(of([133, 8, 9, 9, 8], false), 5, 7, [true; 2]),
        case(FusedConv { norm: true, ..backward([3, 32, 40, 24, 16]) }, 3, 7, [false; 2]),
    ];
    check(&cases, Operands::F16);
}
