//! The MLNT training step as a tape. Section numbers and letters are those of `docs/method.md`.

use super::ce::images;
use super::names::{Inertia, StateKind, Tensors, complete, sgd, update_buffers};
use super::scaling::{Scales, Scaling, scaled};
use crate::error::Result;
use crate::model::{BnUpdate, ModelSpec, Scope};
use crate::tape::{Coef, Fan, Meta, Named, Tape, Tensor};

/// How the meta-gradient and the classification gradient become an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// The paper's: θ ← θ − η ∇L_meta, then an SGD step on cross entropy at the new θ, then the teacher.
    Sequential,
    /// The released code's: the teacher first, then one SGD step on ∇CE + η ∇L_meta at the same θ.
    Joint,
}

/// Divisor of the summed divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KlScale {
    /// k.
    BatchMean,
    /// k · classes.
    Mean,
}

/// Where the M sets of synthetic labels come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synthetic {
    /// Input `y_syn` `[M, k]`.
    Given,
    /// Label transfer within the step: the network of states `features.*` runs in evaluation mode, and a sample takes
    /// the label of one of its nearest neighbours by the pooled features. Input `ranks` `[M, k]`, as
    /// [`draw_ranks`](super::draw_ranks) makes them, in place of `y_syn`.
    Transfer {
        /// Neighbours to choose from.
        neighbours: usize,
    },
}

/// What decides the plan of a step.
#[derive(Clone, Debug)]
pub struct StepSpec {
    /// The network.
    pub model: ModelSpec,
    /// k, samples of a batch.
    pub batch: usize,
    /// Where the synthetic labels come from.
    pub synthetic: Synthetic,
    /// M, sets of synthetic labels.
    pub branches: usize,
    /// Order of the updates.
    pub recipe: Recipe,
    /// Divisor of the divergence.
    pub kl: KlScale,
    /// α, length of the fast step.
    pub alpha: f64,
    /// Whether a mentor is mixed into the target.
    pub mentor: bool,
    /// Drop the Hessian from the meta-gradient.
    pub first_order: bool,
    /// Cotangents are multiplied by [`StepScalars::scales`], and the step is not taken where its gradients are not finite.
    pub scaled: bool,
}

/// Numbers that change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepScalars {
    /// β, learning rate of SGD.
    pub lr: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Weight decay, added to the gradient of every parameter.
    pub weight_decay: f64,
    /// η, weight of the meta-gradient.
    pub eta: f64,
    /// γ, decay of the teacher.
    pub gamma: f64,
    /// λ, share of the teacher in the target; unused without a mentor.
    pub lambda: f64,
    /// Scales of cotangents; unused in a step that is not scaled.
    pub scales: Scales,
}

impl StepScalars {
    /// The same step with an SGD step that changes neither parameters nor velocity, for a batch whose `class_weight` is
    /// all zero: `v ← 1·v + 0 + 0·θ`, `θ ← θ − 0·v`.
    pub fn without_sgd(self) -> Self {
        StepScalars { lr: 0.0, momentum: 1.0, weight_decay: 0.0, ..self }
    }

    /// Values in the order of a plan's names.
    pub fn in_order(self, names: &[String]) -> impl Iterator<Item = f64> {
        let value = move |name: &String| match name.as_str() {
            "lr" => self.lr,
            "momentum" => self.momentum,
            "weight_decay" => self.weight_decay,
            "eta" => self.eta,
            "gamma" => self.gamma,
            "one_minus_gamma" => 1.0 - self.gamma,
            "lambda" => self.lambda,
            "one_minus_lambda" => 1.0 - self.lambda,
            other => match self.scales.value(other) {
                Some(value) => value,
                None => unreachable!("the step records no scalar {other}"),
            },
        };
        names.iter().map(value)
    }
}

/// What the host can read after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Losses only: training.
    Losses,
    /// Everything a golden step holds, and the decisions of all ReLUs and max-pools.
    Everything,
    /// Everything a golden step holds, with those decisions forced: they are inputs of the same names.
    Replay,
}

/// Records one step.
///
/// Inputs: `x` images, `y` labels `[k]`, `y_syn` synthetic labels `[M, k]`, `class_weight` `[k]`: weights of the
/// classification loss, `keep/Σkeep` (all zero where nothing is kept). Scalars: [`StepScalars`]. States: the student's `param.*`, `momentum.*`,
/// `buffer.*`, and `teacher.*`, `mentor.*`. Outputs: `class_loss`, `class_logits` `[k, classes, 1, 1]` of the
/// classification forward, `consistency` (J_m) `[M]`, `inner_loss` `[M]`; with
/// [`Report::Everything`] and [`Report::Replay`] also `logits`, `target`, `inner_grad.*`, `meta_grad.*`,
/// `meta_grad_first_order.*`. Decisions are those of [`Scope::decisions`], the passes being `teacher`, `mentor`,
/// `student`, `fast` (per branch) and, with [`Recipe::Sequential`], `classification`: outputs `relu.*` and `pool.*`
/// with [`Report::Everything`]; inputs of these names and outputs `own.*` and `forced.*` with [`Report::Replay`].
/// A scaled step has the output `finite` `[1]` too: 0 where its gradients were not finite and every state kept its value.
///
/// # Errors
/// When the description is no network.
pub fn record_step(spec: &StepSpec, report: Report) -> Result<Tape> {
    spec.model.check()?;
    let mut step = Step::new(spec, report)?;
    let target = match spec.recipe {
        Recipe::Joint => {
            let student = step.student.clone();
            let teacher = step.move_teacher(&student)?;
            step.target(&teacher)?
        }
        Recipe::Sequential => {
            let teacher = step.teacher.clone();
            step.target(&teacher)?
        }
    };
    let (fast, logits, updates) = step.inner()?;
    match spec.recipe {
        Recipe::Sequential => {
            let pulls = step.consistency(&fast, target, Coef::ONE)?;
            let (meta, unscale) = step.meta_gradient(&fast, &pulls, None)?;
            if step.everything() {
                step.report(&meta, unscale, "meta_grad")?;
            }
            step.update_sequential(&meta, unscale)?;
        }
        Recipe::Joint => {
            let eta = step.tape.scalar("eta");
            let pulls = step.consistency(&fast, target, eta)?;
            step.tape.set_phase("A forward");
            let class_loss = step.class_loss(logits)?;
            let (total, unscale) = step.meta_gradient(&fast, &pulls, Some(class_loss))?;
            step.update_joint(&total, unscale, &updates)?;
        }
    }
    Ok(step.tape)
}

/// A step while it is recorded.
struct Step<'a> {
    spec: &'a StepSpec,
    report: Report,
    scaling: Scaling,
    tape: Tape,
    x: Tensor,
    y: Tensor,
    student: Tensors,
    teacher: Tensors,
    velocity: Tensors,
    buffers: Tensors,
}

/// Fast weights and what they came from.
struct Fast {
    weights: Tensors,
    inner_grads: Tensors,
}

impl<'a> Step<'a> {
    fn new(spec: &'a StepSpec, report: Report) -> Result<Self> {
        let mut tape = Tape::new(spec.branches);
        let x = images(&mut tape, &spec.model, spec.batch)?;
        let y = tape.input("y", Meta::labels(spec.batch))?;
        let student = Tensors::states(&mut tape, &spec.model, "", StateKind::Param)?;
        let velocity = Tensors::states(&mut tape, &spec.model, "", StateKind::Momentum)?;
        let buffers = Tensors::states(&mut tape, &spec.model, "", StateKind::Buffer)?;
        let teacher = Tensors::states(&mut tape, &spec.model, "teacher.", StateKind::Param)?;
        let scaling = Scaling::new(&mut tape, spec.scaled);
        Ok(Step { spec, report, scaling, tape, x, y, student, teacher, velocity, buffers })
    }

    fn everything(&self) -> bool {
        self.report != Report::Losses
    }

    fn forced(&self) -> bool {
        self.report == Report::Replay
    }

    fn trace(&mut self, decisions: Vec<Named>) {
        if self.everything() {
            decisions.into_iter().for_each(|d| self.tape.output(d.name, d.tensor));
        }
    }

    /// θ̃ ← γ θ̃ + (1−γ) θ; returns the new teacher.
    fn move_teacher(&mut self, student: &Tensors) -> Result<Tensors> {
        self.tape.set_phase("update");
        let (gamma, rest) = (self.tape.scalar("gamma"), self.tape.scalar("one_minus_gamma"));
        let new = Tensors::lin_comb(&mut self.tape, &[(gamma, &self.teacher), (rest, student)])?;
        self.teacher.assign(&mut self.tape, &new)?;
        Ok(new)
    }

    /// T: the consistency target, from the teacher with batch statistics and the mentor with running ones.
    fn target(&mut self, teacher: &Tensors) -> Result<Tensor> {
        let (forced, tape) = (self.forced(), &mut self.tape);
        tape.set_phase("T teacher");
        let model = &self.spec.model;
        let buffers = Tensors::states(tape, model, "teacher.", StateKind::Buffer)?;
        let mut scope = Scope::train(&teacher.by_name).pass("teacher", forced);
        let out = model.forward(tape, &mut scope, self.x)?;
        let (updates, mut decisions) = (scope.bn_updates, scope.decisions);
        update_buffers(tape, &buffers, &updates)?;
        let mut target = tape.softmax(out.logits)?;
        if self.spec.mentor {
            let params = Tensors::states(tape, model, "mentor.", StateKind::Param)?;
            let buffers = Tensors::states(tape, model, "mentor.", StateKind::Buffer)?;
            let mut scope = Scope::eval(&params.by_name, &buffers.by_name).pass("mentor", forced);
            let out = model.forward(tape, &mut scope, self.x)?;
            decisions.extend(scope.decisions);
            let mentor = tape.softmax(out.logits)?;
            let (lambda, rest) = (tape.scalar("lambda"), tape.scalar("one_minus_lambda"));
            target = tape.lin_comb(&[(lambda, target), (rest, mentor)])?;
        }
        self.trace(decisions);
        if self.everything() {
            self.tape.output("target", target);
        }
        Ok(target)
    }

    /// S: the M sets of synthetic labels.
    fn synthetic_labels(&mut self) -> Result<Tensor> {
        let (spec, tape) = (self.spec, &mut self.tape);
        let labels = Meta::labels(spec.batch).branched();
        let Synthetic::Transfer { neighbours } = spec.synthetic else { return tape.input("y_syn", labels) };
        tape.set_phase("S synthetic labels");
        let params = Tensors::states(tape, &spec.model, "features.", StateKind::Param)?;
        let buffers = Tensors::states(tape, &spec.model, "features.", StateKind::Buffer)?;
        let mut scope = Scope::eval(&params.by_name, &buffers.by_name);
        let features = spec.model.forward(tape, &mut scope, self.x)?.features;
        let nearest = tape.nearest_neighbours(features, neighbours)?;
        let ranks = tape.input("ranks", labels)?;
        tape.transfer_labels(self.y, nearest, ranks)
    }

    /// A and B: the shared forward at θ, the M inner gradients, the fast weights θ_m = θ − α g_m.
    fn inner(&mut self) -> Result<(Fast, Tensor, Vec<BnUpdate>)> {
        let (k, forced, tape) = (self.spec.batch, self.forced(), &mut self.tape);
        tape.set_phase("A forward");
        let mut scope = Scope::train(&self.student.by_name).pass("student", forced);
        let out = self.spec.model.forward(tape, &mut scope, self.x)?;
        let (updates, decisions) = (scope.bn_updates, scope.decisions);
        let y_syn = self.synthetic_labels()?;
        let tape = &mut self.tape;
        tape.set_phase("A forward");
        let weights = tape.fill(Meta::vector(k), Coef::constant(1.0 / k as f64))?;
        let losses = tape.ce_loss(out.logits, y_syn, weights)?;
        tape.output("inner_loss", losses);

        tape.set_phase("B inner gradients");
        let inner = self.scaling.inner;
        let seed = tape.fill(Meta::vector(1), inner.up)?;
        let grads = complete(tape.vjp(&[(losses, seed)], &self.student.list(), Fan::Keep)?)?;
        let inner_grads = self.student.with(grads);
        tape.set_phase("fast weights");
        let alpha = inner.down.times(-self.spec.alpha);
        let weights = Tensors::lin_comb(tape, &[(Coef::ONE, &self.student), (alpha, &inner_grads)])?;
        self.trace(decisions);
        if self.everything() {
            self.tape.output("logits", out.logits);
            self.report(&inner_grads, inner.down, "inner_grad")?;
        }
        Ok((Fast { weights, inner_grads }, out.logits, updates))
    }

    /// C and D: the divergences J_m at the fast weights and their gradients `scale/M · ∇J_m(θ_m)`.
    fn consistency(&mut self, fast: &Fast, target: Tensor, scale: Coef) -> Result<Tensors> {
        let (k, m) = (self.spec.batch, self.spec.branches as f64);
        self.tape.set_phase("C fast forward");
        let mut scope = Scope::train(&fast.weights.by_name).pass("fast", self.forced());
        let out = self.spec.model.forward(&mut self.tape, &mut scope, self.x)?;
        self.trace(scope.decisions);
        let divisor = match self.spec.kl {
            KlScale::BatchMean => k as f64,
            KlScale::Mean => (k * self.spec.model.classes) as f64,
        };
        let weights = self.tape.fill(Meta::vector(k), Coef::constant(1.0 / divisor))?;
        let losses = self.tape.kl_loss(out.logits, target, weights)?;
        self.tape.output("consistency", losses);

        let wrt = fast.weights.list();
        if self.everything() && scale != Coef::ONE {
            // The plain meta-gradient beside the one that training uses, which carries η.
            self.tape.set_phase("report");
            let seed = self.tape.fill(Meta::vector(1), self.scaling.outer.up.times(1.0 / m))?;
            let pulls = fast.weights.with(complete(self.tape.vjp(&[(losses, seed)], &wrt, Fan::Sum)?)?);
            self.report_first_order(&pulls)?;
            let meta = self.exact(fast, &pulls, None)?;
            self.report(&meta, self.scaling.second.down, "meta_grad")?;
        }
        self.tape.set_phase("D fast backward");
        let seed = self.tape.fill(Meta::vector(1), scale.by(self.scaling.outer.up).times(1.0 / m))?;
        let pulls = fast.weights.with(complete(self.tape.vjp(&[(losses, seed)], &wrt, Fan::Sum)?)?);
        if self.everything() && scale == Coef::ONE {
            self.report_first_order(&pulls)?;
        }
        Ok(pulls)
    }

    fn report_first_order(&mut self, pulls: &Tensors) -> Result<()> {
        self.first_order(pulls)?.output(&mut self.tape, "meta_grad_first_order");
        Ok(())
    }

    /// Lets the host read `unscale · tensors` as `{group}.{name}`.
    fn report(&mut self, tensors: &Tensors, unscale: Coef, group: &str) -> Result<()> {
        scaled(&mut self.tape, unscale, tensors)?.output(&mut self.tape, group);
        Ok(())
    }

    /// `Σ_m v_m`.
    fn first_order(&mut self, pulls: &Tensors) -> Result<Tensors> {
        self.summed(pulls, self.scaling.outer.down)
    }

    /// `c Σ_m v_m`.
    fn summed(&mut self, pulls: &Tensors, c: Coef) -> Result<Tensors> {
        let sums: Result<Vec<Tensor>> = pulls.list().into_iter().map(|t| self.tape.scaled_sum_branches(c, t)).collect();
        Ok(pulls.with(sums?))
    }

    /// `Σ_m (I − α H_m) v_m [+ ∇ class loss]`, scaled as second-order cotangents are, by differentiating the record of A and B.
    fn exact(&mut self, fast: &Fast, pulls: &Tensors, class_loss: Option<Tensor>) -> Result<Tensors> {
        let Scaling { outer, second, tangent, .. } = self.scaling;
        // The cotangents of g_m in θ_m = θ − α g_m; θ itself has those of θ_m.
        let tangents = Tensors::lin_comb(&mut self.tape, &[(tangent.times(-self.spec.alpha), pulls)])?;
        let mut seeds: Vec<(Tensor, Tensor)> = fast.inner_grads.list().into_iter().zip(tangents.list()).collect();
        if let Some(loss) = class_loss {
            seeds.push((loss, self.tape.fill(Meta::vector(1), second.up)?));
        }
        let grads = complete(self.tape.vjp(&seeds, &self.student.list(), Fan::Sum)?)?;
        let sums = self.summed(pulls, second.up.by(outer.down))?;
        Tensors::lin_comb(&mut self.tape, &[(Coef::ONE, &self.student.with(grads)), (Coef::ONE, &sums)])
    }

    /// E: the gradient of the update, exact or first order, with the classification gradient riding along; and the factor
    /// that undoes its scale.
    fn meta_gradient(&mut self, fast: &Fast, pulls: &Tensors, class_loss: Option<Tensor>) -> Result<(Tensors, Coef)> {
        debug_assert_eq!(fast.inner_grads.names, pulls.names);
        self.tape.set_phase("E meta-gradient");
        if !self.spec.first_order {
            let from = self.tape.nodes().len();
            let grads = self.exact(fast, pulls, class_loss)?;
            self.tape.rename_shared_phase(from, "E3 shared chain");
            return Ok((grads, self.scaling.second.down));
        }
        let sums = self.first_order(pulls)?;
        let Some(loss) = class_loss else { return Ok((sums, Coef::ONE)) };
        self.tape.set_phase("classification");
        let grads = self.class_gradient(loss, &self.student.clone())?;
        self.tape.set_phase("update");
        let unscale = self.scaling.inner.down;
        let total = Tensors::lin_comb(&mut self.tape, &[(unscale, &grads), (Coef::ONE, &sums)])?;
        Ok((total, Coef::ONE))
    }

    fn class_loss(&mut self, logits: Tensor) -> Result<Tensor> {
        let k = self.spec.batch;
        let weights = self.tape.input("class_weight", Meta::vector(k))?;
        let loss = self.tape.ce_loss(logits, self.y, weights)?;
        self.tape.output("class_loss", loss);
        self.tape.output("class_logits", logits);
        Ok(loss)
    }

    /// The gradient of cross entropy, scaled as its cotangents are.
    fn class_gradient(&mut self, loss: Tensor, wrt: &Tensors) -> Result<Tensors> {
        let seed = self.tape.fill(Meta::vector(1), self.scaling.inner.up)?;
        Ok(wrt.with(complete(self.tape.vjp(&[(loss, seed)], &wrt.list(), Fan::Sum)?)?))
    }

    fn update_sequential(&mut self, meta: &Tensors, unscale: Coef) -> Result<()> {
        self.tape.set_phase("update");
        let eta = self.tape.scalar("eta").by(unscale);
        let moved = Tensors::lin_comb(&mut self.tape, &[(Coef::ONE, &self.student), (eta.times(-1.0), meta)])?;
        self.tape.set_phase("classification");
        let mut scope = Scope::train(&moved.by_name).pass("classification", self.forced());
        let out = self.spec.model.forward(&mut self.tape, &mut scope, self.x)?;
        let updates = scope.bn_updates;
        self.trace(scope.decisions);
        let loss = self.class_loss(out.logits)?;
        let grads = self.class_gradient(loss, &moved)?;
        self.tape.set_phase("update");
        update_buffers(&mut self.tape, &self.buffers, &updates)?;
        let new = self.sgd(&moved, &grads, self.scaling.inner.down)?;
        self.student.assign(&mut self.tape, &new)?;
        self.move_teacher(&new)?;
        self.scaling.guard(&mut self.tape, &[meta, &grads])
    }

    fn update_joint(&mut self, total: &Tensors, unscale: Coef, updates: &[BnUpdate]) -> Result<()> {
        self.tape.set_phase("update");
        update_buffers(&mut self.tape, &self.buffers, updates)?;
        let student = self.student.clone();
        let new = self.sgd(&student, total, unscale)?;
        self.student.assign(&mut self.tape, &new)?;
        self.scaling.guard(&mut self.tape, &[total])
    }

    fn sgd(&mut self, params: &Tensors, grads: &Tensors, unscale: Coef) -> Result<Tensors> {
        let inertia = Inertia::scalars(&mut self.tape);
        sgd(&mut self.tape, params, &self.velocity, (unscale, grads), inertia)
    }
}
