//! Networks, written in the operations of the tape, with PyTorch's parameter names.

mod init;
mod preact_resnet;
mod resnet_bottleneck;
mod scope;

pub use init::he_init;
pub use scope::{BnUpdate, Forward, Scope};

use crate::error::{Error, Result};
use crate::tape::{Kind, Meta, Tape, Tensor};

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// Pre-activation ResNet with basic blocks (He et al. 2016), as used on CIFAR.
    PreactResnet,
    /// ResNet with bottleneck blocks of expansion 4, the stride in the 3×3 convolution: ResNet-50's shape.
    ResnetBottleneck,
}

/// A network's description: everything that decides its parameters.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ModelSpec {
    /// Which network.
    pub arch: Arch,
    /// Channels of an image.
    pub in_channels: usize,
    /// Height and width of an image.
    pub size: [usize; 2],
    /// Number of classes.
    pub classes: usize,
    /// Channels of every stage; the first block of every stage but the first halves the image.
    pub widths: Vec<usize>,
    /// Blocks of every stage.
    pub blocks: Vec<usize>,
}

/// A parameter tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// PyTorch's name, e.g. `layer1.0.conv1.weight`.
    pub name: String,
    /// PyTorch's shape.
    pub shape: Vec<usize>,
    /// Its meta on the tape, shared.
    pub meta: Meta,
    /// How it starts.
    pub init: Init,
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Normal with variance 2/fan_out (He et al. 2015), the ResNet convention for convolutions.
    He,
    /// Uniform in ±1/√fan_in, PyTorch's default for linear layers and their biases.
    Linear {
        /// Inputs of the layer.
        fan_in: usize,
    },
    /// Ones: batch-norm gains.
    One,
    /// Zeros: batch-norm biases.
    Zero,
}

/// Largest number of channels, classes, and pixels on a side of an image.
const MAX_EXTENT: usize = 65_536;
/// Largest number of stages: each but the first halves the image.
const MAX_STAGES: usize = 16;
/// Largest number of blocks in all stages together.
const MAX_BLOCKS: usize = 1000;

impl ModelSpec {
    /// Refuses what cannot be a network, and what is so large that its sizes could not be counted.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field.
    pub fn check(&self) -> Result<()> {
        let positive = |list: &[usize]| !list.is_empty() && list.iter().all(|v| *v > 0);
        if !positive(&self.widths) || !positive(&self.blocks) || self.widths.len() != self.blocks.len() {
            let (w, b) = (&self.widths, &self.blocks);
            return Err(Error::usage(format!("widths {w:?} and blocks {b:?} must be as many, and all at least 1")));
        }
        if self.in_channels == 0 || self.classes < 2 || self.size.contains(&0) {
            let (c, size, k) = (self.in_channels, self.size, self.classes);
            return Err(Error::usage(format!("images of {c} channels and size {size:?} in {k} classes: no network")));
        }
        let largest =
            [self.in_channels, self.classes, self.size[0], self.size[1]].into_iter().chain(self.widths.clone());
        if let Some(extent) = largest.max().filter(|extent| *extent > MAX_EXTENT) {
            return Err(Error::usage(format!("a network with an extent of {extent}; the largest is {MAX_EXTENT}")));
        }
        let blocks = self.blocks.iter().fold(0usize, |sum, count| sum.saturating_add(*count));
        if self.blocks.len() > MAX_STAGES || blocks > MAX_BLOCKS {
            let stages = self.blocks.len();
            return Err(Error::usage(format!(
                "a network of {stages} stages with {blocks} blocks; the most are {MAX_STAGES} and {MAX_BLOCKS}"
            )));
        }
        Ok(())
    }

    /// All parameters, in a fixed order.
    pub fn params(&self) -> Vec<ParamSpec> {
        match self.arch {
            Arch::PreactResnet => preact_resnet::params(self),
            Arch::ResnetBottleneck => resnet_bottleneck::params(self),
        }
    }

    /// Names (without `.running_mean`) and channels of all batch norms, in the order of the parameters.
    pub fn batch_norms(&self) -> Vec<(String, usize)> {
        let gains = self.params().into_iter().filter(|p| p.init == Init::One);
        gains.map(|p| (p.name.trim_end_matches(".weight").to_string(), p.shape[0])).collect()
    }

    /// Names and lengths of the running statistics.
    pub fn buffers(&self) -> Vec<(String, usize)> {
        let both =
            |(name, c): (String, usize)| [(format!("{name}.running_mean"), c), (format!("{name}.running_var"), c)];
        self.batch_norms().into_iter().flat_map(both).collect()
    }

    /// Number of parameters.
    pub fn param_count(&self) -> usize {
        self.params().iter().map(|p| p.meta.len()).sum()
    }

    /// Length of the pooled features.
    pub fn features(&self) -> usize {
        let last = self.widths.last().copied().unwrap_or(0);
        match self.arch {
            Arch::PreactResnet => last,
            Arch::ResnetBottleneck => last * resnet_bottleneck::EXPANSION,
        }
    }

    /// Records the network on images `x` with `scope`'s parameters.
    ///
    /// # Errors
    /// When the images do not have the network's size.
    pub fn forward(&self, tape: &mut Tape, scope: &mut Scope<'_>, x: Tensor) -> Result<Forward> {
        let meta = tape.meta(x);
        let [_, c, h, w] = meta.dims;
        if meta.kind != Kind::Activation || c != self.in_channels || [h, w] != self.size {
            let want = format!("{} channels of {:?}", self.in_channels, self.size);
            return Err(Error::shape("model", format!("images are {meta}, the network takes {want}")));
        }
        match self.arch {
            Arch::PreactResnet => preact_resnet::forward(self, tape, scope, x),
            Arch::ResnetBottleneck => resnet_bottleneck::forward(self, tape, scope, x),
        }
    }
}

/// A convolution weight `[k, c, r, r]`.
fn conv_param(name: String, k: usize, c: usize, r: usize) -> ParamSpec {
    ParamSpec { name, shape: vec![k, c, r, r], meta: Meta::weight(k, c, r, r), init: Init::He }
}

/// Gain and bias of a batch norm.
fn bn_params(name: &str, c: usize) -> [ParamSpec; 2] {
    let param =
        |field: &str, init| ParamSpec { name: format!("{name}.{field}"), shape: vec![c], meta: Meta::vector(c), init };
    [param("weight", Init::One), param("bias", Init::Zero)]
}

/// Weight and bias of the last layer.
fn linear_params(name: &str, classes: usize, features: usize) -> [ParamSpec; 2] {
    let init = Init::Linear { fan_in: features };
    let (weight, bias) = (Meta::weight(classes, features, 1, 1), Meta::vector(classes));
    [
        ParamSpec { name: format!("{name}.weight"), shape: vec![classes, features], meta: weight, init },
        ParamSpec { name: format!("{name}.bias"), shape: vec![classes], meta: bias, init },
    ]
}
