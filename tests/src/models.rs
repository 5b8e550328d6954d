//! Small models, each with the one property that a law is about.

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::{relu, tanh};

use crate::data::Batch;

/// A model that puts rows of numbers into classes.
pub trait Classifier: Module + 'static {
    /// Numbers per example.
    const FEATURES: usize;
    /// Number of labels.
    const CLASSES: usize;

    /// A model with initial parameters from the generator of `device`.
    fn new(device: &Device) -> Self;

    /// `[n, FEATURES]` to scores `[n, CLASSES]`.
    fn forward(&self, inputs: Tensor<2>) -> Tensor<2>;

    /// Mean cross entropy over the batch, `[1]`.
    fn loss(&self, batch: &Batch) -> Tensor<1> {
        let scores = self.forward(batch.inputs.clone());
        CrossEntropyLossConfig::new().init(&scores.device()).forward(scores, batch.labels.clone())
    }

    /// The share of the batch that is put into the right class.
    fn accuracy(&self, batch: &Batch) -> f64 {
        let classes = self.forward(batch.inputs.clone()).argmax(1).squeeze_dim(1);
        classes.equal(batch.labels.clone()).float().mean().into_scalar()
    }
}

/// A convolution of `SIDE` x `SIDE` pixels (8 filters of 3x3, stride 2), then one linear layer to 10 classes.
///
/// `Cnn<28>` is the demo's model, 13,610 parameters; the laws use the smaller `Cnn<12>`.
#[derive(Module, Debug)]
pub struct Cnn<const SIDE: usize> {
    filters: Conv2d,
    classes: Linear,
}

impl<const SIDE: usize> Classifier for Cnn<SIDE> {
    const FEATURES: usize = SIDE * SIDE;
    const CLASSES: usize = 10;

    fn new(device: &Device) -> Self {
        let out = (SIDE - 3) / 2 + 1;
        Self {
            filters: Conv2dConfig::new([1, 8], [3, 3]).with_stride([2, 2]).init(device),
            classes: LinearConfig::new(8 * out * out, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        let [examples, _] = inputs.dims();
        let features = relu(self.filters.forward(inputs.reshape([examples, 1, SIDE, SIDE])));
        self.classes.forward(features.flatten(1, 3))
    }
}

/// Two hidden layers of 4,096 between 784 inputs and 10 classes: 20,037,642 parameters, 80 MB. For benchmarks.
#[derive(Module, Debug)]
pub struct Mlp {
    first: Linear,
    second: Linear,
    third: Linear,
}

impl Classifier for Mlp {
    const FEATURES: usize = 784;
    const CLASSES: usize = 10;

    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(Self::FEATURES, 4_096).init(device),
            second: LinearConfig::new(4_096, 4_096).init(device),
            third: LinearConfig::new(4_096, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        let hidden = relu(self.second.forward(relu(self.first.forward(inputs))));
        self.third.forward(hidden)
    }
}

/// Layers of 7, 13, 5 and 3: no size divides by a number of servers, 190 parameters in six tensors.
#[derive(Module, Debug)]
pub struct OddMlp {
    first: Linear,
    second: Linear,
    third: Linear,
}

impl Classifier for OddMlp {
    const FEATURES: usize = 7;
    const CLASSES: usize = 3;

    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(Self::FEATURES, 13).init(device),
            second: LinearConfig::new(13, 5).init(device),
            third: LinearConfig::new(5, Self::CLASSES).with_bias(false).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        let hidden = tanh(self.second.forward(tanh(self.first.forward(inputs))));
        self.third.forward(hidden)
    }
}

/// The first layer's weight, 40 x 64, is 95 % of all 2,690 parameters: it has to be spread over the servers.
#[derive(Module, Debug)]
pub struct Lopsided {
    large: Linear,
    small: Linear,
}

impl Classifier for Lopsided {
    const FEATURES: usize = 40;
    const CLASSES: usize = 2;

    fn new(device: &Device) -> Self {
        Self {
            large: LinearConfig::new(Self::FEATURES, 64).with_bias(false).init(device),
            small: LinearConfig::new(64, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        self.small.forward(tanh(self.large.forward(inputs)))
    }
}

/// With batch norm: running mean and variance are state, neither trained nor frozen.
///
/// The examples of a batch influence each other, so N workers equal one process only for N = 1.
#[derive(Module, Debug)]
pub struct Normalised {
    first: Linear,
    norm: BatchNorm,
    second: Linear,
}

impl Classifier for Normalised {
    const FEATURES: usize = 9;
    const CLASSES: usize = 4;

    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(Self::FEATURES, 11).init(device),
            norm: BatchNormConfig::new(11).init(device),
            second: LinearConfig::new(11, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(self.first.forward(inputs));
        self.second.forward(tanh(hidden))
    }
}

/// With a layer between the others that no input ever passes: its tensors are trained and never get a gradient.
#[derive(Module, Debug)]
pub struct Unused {
    first: Linear,
    unused: Linear,
    second: Linear,
}

impl Classifier for Unused {
    const FEATURES: usize = 6;
    const CLASSES: usize = 3;

    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(Self::FEATURES, 8).init(device),
            unused: LinearConfig::new(8, 8).init(device),
            second: LinearConfig::new(8, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        self.second.forward(tanh(self.first.forward(inputs)))
    }
}
