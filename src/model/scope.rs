//! What a forward pass is recorded with: parameters by name, and the kind of batch norm.

use crate::error::{Error, Result};
use crate::ops::PoolGather;
use crate::tape::{Named, Tape, Tensor};
use std::collections::HashMap;

/// Batch statistics of one batch norm, for the running averages.
#[derive(Clone, Debug)]
pub struct BnUpdate {
    /// The batch norm's name.
    pub name: String,
    /// Batch mean per channel.
    pub mean: Tensor,
    /// Biased batch variance per channel.
    pub var: Tensor,
    /// Values per channel that went into them, for the unbiased variance.
    pub count: usize,
}

/// Result of a forward pass.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[N, classes, 1, 1]`
    pub logits: Tensor,
    /// Pooled features `[N, features, 1, 1]`.
    pub features: Tensor,
}

/// Parameters by name and the kind of batch norm of one forward pass; collects what the pass leaves behind.
pub struct Scope<'a> {
    params: &'a HashMap<String, Tensor>,
    buffers: Option<&'a HashMap<String, Tensor>>,
    pass: &'a str,
    forced: bool,
    /// Statistics of the batch norms passed, in order (training mode).
    pub bn_updates: Vec<BnUpdate>,
    /// What the ReLUs and max-pools passed decided: of a ReLU its result, as `relu.{pass}.{layer in front of it}`,
    /// positive where it lets through; of a max-pool its positions, as `pool.{pass}.{layer}`. Where decisions are
    /// forced, what came of them as `forced.{name}` beside what would have come of the operand's own as `own.{name}`.
    pub decisions: Vec<Named>,
}

impl<'a> Scope<'a> {
    /// A pass with batch statistics.
    pub fn train(params: &'a HashMap<String, Tensor>) -> Self {
        Scope { params, buffers: None, pass: "", forced: false, bn_updates: Vec::new(), decisions: Vec::new() }
    }

    /// A pass with running statistics `buffers`, by names like `bn.running_mean`.
    pub fn eval(params: &'a HashMap<String, Tensor>, buffers: &'a HashMap<String, Tensor>) -> Self {
        Scope { buffers: Some(buffers), ..Scope::train(params) }
    }

    /// Names the pass. With `forced` its ReLUs and max-pools take their decisions from inputs of the tape, which have
    /// the names of the decisions that the same pass reports when it makes them itself.
    pub fn pass(self, name: &'a str, forced: bool) -> Self {
        Scope { pass: name, forced, ..self }
    }

    fn find(map: &HashMap<String, Tensor>, name: &str) -> Result<Tensor> {
        map.get(name).copied().ok_or_else(|| Error::shape("model", format!("no tensor named {name}")))
    }

    fn param(&self, name: &str) -> Result<Tensor> {
        Self::find(self.params, name)
    }

    /// Convolution with `{name}.weight`, padded so that stride 1 keeps the size.
    pub(super) fn conv(&mut self, tape: &mut Tape, name: &str, x: Tensor, stride: usize) -> Result<Tensor> {
        let w = self.param(&format!("{name}.weight"))?;
        let pad = tape.meta(w).dims[2] / 2;
        tape.conv2d(x, w, stride, pad)
    }

    /// Batch norm with `{name}.weight` and `{name}.bias`.
    pub(super) fn bn(&mut self, tape: &mut Tape, name: &str, x: Tensor) -> Result<Tensor> {
        let (g, b) = (self.param(&format!("{name}.weight"))?, self.param(&format!("{name}.bias"))?);
        match self.buffers {
            Some(buffers) => {
                let mean = Self::find(buffers, &format!("{name}.running_mean"))?;
                let var = Self::find(buffers, &format!("{name}.running_var"))?;
                tape.batch_norm_eval(x, g, b, mean, var)
            }
            None => {
                let out = tape.batch_norm(x, g, b)?;
                let [n, _, h, w] = tape.meta(x).dims;
                let update = BnUpdate { name: name.to_string(), mean: out.mean, var: out.var, count: n * h * w };
                self.bn_updates.push(update);
                Ok(out.y)
            }
        }
    }

    /// ReLU after the layer `name`.
    pub(super) fn relu(&mut self, tape: &mut Tape, name: &str, x: Tensor) -> Result<Tensor> {
        let name = format!("relu.{}.{name}", self.pass);
        let own = tape.relu(x)?;
        if !self.forced {
            return Ok(self.decided(name, own, own));
        }
        let reference = tape.input(&name, *tape.meta(own))?;
        let y = tape.mask(x, reference, false)?;
        Ok(self.obeyed(&name, own, y))
    }

    /// Max-pooling after the layer `name`, with windows of `[size, stride, padding]`.
    pub(super) fn max_pool(
        &mut self,
        tape: &mut Tape,
        name: &str,
        x: Tensor,
        [size, stride, pad]: [usize; 3],
    ) -> Result<Tensor> {
        let name = format!("pool.{}.{name}", self.pass);
        let own = tape.max_pool(x, size, stride, pad)?;
        if !self.forced {
            return Ok(self.decided(name, own.index, own.y));
        }
        let index = tape.input(&name, *tape.meta(own.index))?;
        let y = tape.record1(PoolGather(own.window), &[x, index], false)?;
        Ok(self.obeyed(&name, own.y, y))
    }

    /// Notes a decision of the pass's own; returns `y`, what came of it.
    fn decided(&mut self, name: String, tensor: Tensor, y: Tensor) -> Tensor {
        self.decisions.push(Named { name, tensor });
        y
    }

    /// Notes what came of a forced decision, and what would have come of the pass's own; returns the former.
    fn obeyed(&mut self, name: &str, own: Tensor, forced: Tensor) -> Tensor {
        self.decisions.push(Named { name: format!("own.{name}"), tensor: own });
        self.decisions.push(Named { name: format!("forced.{name}"), tensor: forced });
        forced
    }

    /// Global average pooling and the linear layer `name`.
    pub(super) fn head(&mut self, tape: &mut Tape, name: &str, x: Tensor) -> Result<Forward> {
        let features = tape.avg_pool(x)?;
        let logits = self.conv(tape, name, features, 1)?;
        let bias = self.param(&format!("{name}.bias"))?;
        Ok(Forward { logits: tape.add_bias(logits, bias)?, features })
    }
}
