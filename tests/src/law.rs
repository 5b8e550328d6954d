//! One training in two ways: [`Law`] through fairing, [`Law::plain`] with burn alone.
//!
//! Initial parameters come from a generator of their own, [`SplitMix`]. burn's generator is one per process, and the
//! tests of one binary run in threads of one process: parameters drawn from it would depend on what other tests draw in
//! between. So the laws hold for any number of tests at once. Only [`Kind::Dropout`] draws from burn's, and belongs
//! into a process of its own.

use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, AdamWConfig, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::activation::tanh;
use fairing_core::data::permutation;
use fairing_core::prelude::*;
use fairing_core::runtime::optimizer::Optimizer;
use sha2::{Digest, Sha256};

use crate::data::{Batch, Samples, SplitMix};
use crate::models::{Classifier, Cnn, Lopsided, Normalised, OddMlp, Unused};
use crate::plain::{self, Schedule};

/// A training: which model by which optimizer on how much data.
#[distributed_training(workers = 1, ps = 1)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Law {
    /// The model.
    pub kind: Kind,
    /// The optimizer.
    pub rule: Rule,
    /// Examples of the data set.
    pub examples: usize,
    /// Passes over all of them.
    pub epochs: usize,
    /// Examples per step of all workers together; a multiple of their number.
    pub batch_size: usize,
    /// Per step.
    pub learning_rate: f64,
    /// Slept through in every step, so that a test can look at the run while it goes on.
    pub pause_ms: u64,
}

/// The models that the laws are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// [`Cnn`].
    Cnn,
    /// [`OddMlp`].
    Odd,
    /// [`Lopsided`].
    Lopsided,
    /// [`Normalised`].
    Normalised,
    /// [`Unused`].
    Unused,
    /// [`Noisy`].
    Dropout,
}

/// The optimizers, each with a setting that changes every update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// Momentum 0.9, weight decay 0.01.
    Momentum,
    /// burn's defaults.
    Adam,
    /// Weight decay 0.1.
    AdamW,
}

impl Rule {
    fn burns(self) -> ModuleOptimizer {
        match self {
            Rule::Momentum => SgdConfig::new()
                .with_momentum(Some(MomentumConfig::new().with_momentum(0.9)))
                .with_weight_decay(Some(WeightDecayConfig::new(0.01)))
                .init(),
            Rule::Adam => AdamConfig::new().init(),
            Rule::AdamW => AdamWConfig::new().with_weight_decay(0.1).init(),
        }
    }

    fn fairings(self) -> Optimizer {
        match self {
            Rule::Momentum => Sgd::new().momentum(0.9).weight_decay(0.01).into(),
            Rule::Adam => Adam::new().into(),
            Rule::AdamW => AdamW::new().weight_decay(0.1).into(),
        }
    }
}

/// Any of the models, so that one annotated type trains all of them.
#[derive(Module, Debug)]
pub enum AnyModel {
    /// See [`Kind::Cnn`].
    Cnn(Cnn<12>),
    /// See [`Kind::Odd`].
    Odd(OddMlp),
    /// See [`Kind::Lopsided`].
    Lopsided(Lopsided),
    /// See [`Kind::Normalised`].
    Normalised(Normalised),
    /// See [`Kind::Unused`].
    Unused(Unused),
    /// See [`Kind::Dropout`].
    Noisy(Noisy),
}

/// Drops half of its hidden values at random, from burn's generator.
#[derive(Module, Debug)]
pub struct Noisy {
    first: Linear,
    dropout: Dropout,
    second: Linear,
}

impl Classifier for Noisy {
    const FEATURES: usize = 8;
    const CLASSES: usize = 3;

    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(Self::FEATURES, 16).init(device),
            dropout: DropoutConfig::new(0.5).init(),
            second: LinearConfig::new(16, Self::CLASSES).init(device),
        }
    }

    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        self.second.forward(self.dropout.forward(tanh(self.first.forward(inputs))))
    }
}

impl Kind {
    /// A model with initial parameters that depend on `seed` and nothing else; [`Kind::Dropout`] has burn's.
    pub fn model(self, seed: u64, device: &Device) -> AnyModel {
        let model = match self {
            Kind::Cnn => AnyModel::Cnn(Cnn::new(device)),
            Kind::Odd => AnyModel::Odd(OddMlp::new(device)),
            Kind::Lopsided => AnyModel::Lopsided(Lopsided::new(device)),
            Kind::Normalised => AnyModel::Normalised(Normalised::new(device)),
            Kind::Unused => AnyModel::Unused(Unused::new(device)),
            Kind::Dropout => return AnyModel::Noisy(Noisy::new(device)),
        };
        model.map(&mut Fill { random: SplitMix::new(seed) })
    }

    /// Examples that this model can learn.
    pub fn samples(self, examples: usize, device: &Device) -> Samples {
        let (features, classes) = match self {
            Kind::Cnn => sizes::<Cnn<12>>(),
            Kind::Odd => sizes::<OddMlp>(),
            Kind::Lopsided => sizes::<Lopsided>(),
            Kind::Normalised => sizes::<Normalised>(),
            Kind::Unused => sizes::<Unused>(),
            Kind::Dropout => sizes::<Noisy>(),
        };
        Samples::new(examples, features, classes, device)
    }
}

fn sizes<M: Classifier>() -> (usize, usize) {
    (M::FEATURES, M::CLASSES)
}

/// Replaces trained parameters; running statistics require no gradient and stay.
struct Fill {
    random: SplitMix,
}

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !parameter.is_require_grad() {
            return parameter;
        }
        parameter.map(|old| {
            let values: Vec<f32> = (0..old.shape().num_elements()).map(|_| (self.random.unit() - 0.5) * 0.4).collect();
            Tensor::from_data(TensorData::new(values, old.shape()), &old.device()).set_require_grad(true)
        })
    }
}

impl AnyModel {
    /// `[n, features]` to scores `[n, classes]`.
    pub fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        match self {
            AnyModel::Cnn(model) => model.forward(inputs),
            AnyModel::Odd(model) => model.forward(inputs),
            AnyModel::Lopsided(model) => model.forward(inputs),
            AnyModel::Normalised(model) => model.forward(inputs),
            AnyModel::Unused(model) => model.forward(inputs),
            AnyModel::Noisy(model) => model.forward(inputs),
        }
    }

    /// Mean cross entropy over the batch, `[1]`.
    pub fn loss(&self, batch: &Batch) -> Tensor<1> {
        let scores = self.forward(batch.inputs.clone());
        CrossEntropyLossConfig::new().init(&scores.device()).forward(scores, batch.labels.clone())
    }

    /// 52 bits of a hash over all parameters and running statistics: as many as an `f64`, and so a metric, holds.
    pub fn fingerprint(&self) -> f64 {
        let mut hash = Sha256::new();
        for value in plain::flat(self) {
            hash.update(value.to_bits().to_le_bytes());
        }
        let bytes: [u8; 8] = hash.finalize()[..8].try_into().expect("a hash has 32 bytes");
        (u64::from_le_bytes(bytes) >> 12) as f64
    }
}

impl Train for Law {
    type Model = AnyModel;

    fn train(&self, worker: &Worker) -> anyhow::Result<AnyModel> {
        let samples = self.kind.samples(self.examples, worker.device());
        let mut model = worker.join(self.kind.model(worker.seed(), worker.device()), self.rule.fairings())?;
        for epoch in worker.epochs(self.epochs) {
            for batch in epoch.batches(&samples, self.batch_size / worker.workers()) {
                std::thread::sleep(Duration::from_millis(self.pause_ms));
                let loss = model.loss(&batch);
                worker.metric("loss", loss.clone().into_scalar());
                worker.metric("examples", batch.len() as f64);
                model = worker.step(model, Gradient::mean(loss.backward(), batch.len()), self.learning_rate)?;
            }
        }
        worker.metric("fingerprint", model.fingerprint());
        Ok(model)
    }
}

impl Law {
    /// The same training by one process, burn's loop and burn's optimizer, with the loss of every step.
    ///
    /// Of fairing it takes the order of the examples and nothing else.
    pub fn plain(&self, seed: u64) -> (AnyModel, Vec<f64>) {
        let device = Device::flex().autodiff();
        let samples = self.kind.samples(self.examples, &device);
        let schedule = Schedule { epochs: self.epochs, batch_size: self.batch_size, learning_rate: self.learning_rate };
        plain::train(
            self.kind.model(seed, &device),
            self.rule.burns(),
            &schedule,
            |epoch| permutation(seed, epoch, self.examples),
            |indices| samples.select(indices),
            AnyModel::loss,
        )
    }
}
