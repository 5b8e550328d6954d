//! The reference: training with burn alone, in one process.

use std::path::Path;

use burn::module::{ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;
use fairing_examples::fashion_mnist::{self, DatasetError, ImageBatch};

use crate::data::Batch;
use crate::models::{Classifier, Cnn};

/// How long and in which portions to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Passes over all examples.
    pub epochs: usize,
    /// Examples per step; the last batch of an epoch is what remains, possibly one example.
    pub batch_size: usize,
    /// Per step.
    pub learning_rate: f64,
}

/// Trains `model` and returns it with the loss of every step before its update.
///
/// Running statistics are shared between clones of a burn module: train a model made anew, not a clone of one that is
/// still needed as it was.
///
/// `order(epoch)` names the examples of an epoch, `select` fetches some of them.
pub fn train<M: Module, B>(
    mut model: M,
    mut optimizer: ModuleOptimizer,
    schedule: &Schedule,
    order: impl Fn(u64) -> Vec<usize>,
    select: impl Fn(&[usize]) -> B,
    loss: impl Fn(&M, &B) -> Tensor<1>,
) -> (M, Vec<f64>) {
    let mut losses = Vec::new();
    for epoch in 0..schedule.epochs as u64 {
        for indices in order(epoch).chunks(schedule.batch_size) {
            let loss = loss(&model, &select(indices));
            losses.push(loss.clone().into_scalar());
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(schedule.learning_rate, model, gradients);
        }
    }
    (model, losses)
}

/// A parameter or a running statistic of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Field names from the model to the tensor, joined by dots.
    pub path: String,
    /// The values, flat.
    pub values: Vec<f32>,
}

/// All float tensors of `model` in the order in which burn visits them, running statistics included.
pub fn parameters<M: Module>(model: &M) -> Vec<Parameter> {
    // Running statistics keep their updates pending, per thread, until `valid` is called.
    let _ = model.valid();
    let mut visitor = Parameters::default();
    model.visit(&mut visitor);
    visitor.parameters
}

/// The values of [`parameters`] in one vector.
pub fn flat<M: Module>(model: &M) -> Vec<f32> {
    parameters(model).into_iter().flat_map(|parameter| parameter.values).collect()
}

#[derive(Default)]
struct Parameters {
    path: Vec<String>,
    parameters: Vec<Parameter>,
}

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        let values = parameter.val().into_data().iter().collect();
        self.parameters.push(Parameter { path: self.path.join("."), values });
    }
}

/// Trains the demo's model on Fashion-MNIST with batch 64, Adam and learning rate 1e-3 for five epochs, and returns
/// its accuracy on the test set.
///
/// `seed` gives the initial parameters, `order(epoch)` the order of the 60,000 images.
///
/// # Errors
///
/// If the data set in `folder` cannot be loaded.
pub fn fashion_mnist(folder: &Path, seed: u64, order: impl Fn(u64) -> Vec<usize>) -> Result<f64, DatasetError> {
    let device = Device::flex().autodiff();
    device.seed(seed);
    let data = fashion_mnist::load(folder, &device)?;
    let schedule = Schedule { epochs: 5, batch_size: 64, learning_rate: 1e-3 };

    let (model, _) = train(
        Cnn::<28>::new(&device),
        AdamConfig::new().init(),
        &schedule,
        order,
        |indices| rows(&data.train.select(indices)),
        Cnn::loss,
    );

    let indices: Vec<usize> = (0..data.test.labels().len()).collect();
    let right: f64 = indices
        .chunks(500)
        .map(|indices| model.accuracy(&rows(&data.test.select(indices))) * indices.len() as f64)
        .sum();
    Ok(right / indices.len() as f64)
}

/// Images as the rows of pixels that a [`Classifier`] takes.
pub fn rows(batch: &ImageBatch) -> Batch {
    Batch { inputs: batch.images.clone().flatten(1, 3), labels: batch.labels.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Samples;
    use crate::models::{Lopsided, Mlp, Normalised, OddMlp, Unused};

    /// Trains on 33 examples in batches of 16, 16 and 1, expects the loss to fall, and returns the parameters before and
    /// after.
    fn learns<M: Classifier>() -> (Vec<Parameter>, Vec<Parameter>) {
        let device = Device::flex().autodiff();
        device.seed(0);
        let samples = Samples::new(33, M::FEATURES, M::CLASSES, &device);
        let model = M::new(&device);
        let before = parameters(&model);
        let schedule = Schedule { epochs: 40, batch_size: 16, learning_rate: 0.01 };
        let (after, losses) = train(
            model,
            AdamConfig::new().init(),
            &schedule,
            |_| (0..33).collect(),
            |indices| samples.select(indices),
            M::loss,
        );
        assert_eq!(losses.len(), 40 * 3);
        assert!(losses[losses.len() - 3] < losses[0] / 2.0, "{losses:?}");
        (before, parameters(&after))
    }

    fn values(parameters: &[Parameter], path: &str) -> Vec<f32> {
        parameters.iter().find(|parameter| parameter.path == path).unwrap().values.clone()
    }

    #[test]
    fn every_model_learns() {
        learns::<Cnn<12>>();
        learns::<OddMlp>();
        learns::<Lopsided>();
    }

    #[test]
    fn demo_model_has_13610_parameters() {
        assert_eq!(flat(&Cnn::<28>::new(&Device::flex())).len(), 13_610);
    }

    #[test]
    fn large_model_has_20_million_parameters() {
        assert_eq!(flat(&Mlp::new(&Device::flex())).len(), 20_037_642);
    }

    #[test]
    fn one_tensor_of_the_lopsided_model_is_95_percent() {
        let parameters = parameters(&Lopsided::new(&Device::flex()));
        let total: usize = parameters.iter().map(|parameter| parameter.values.len()).sum();
        assert!(parameters[0].values.len() * 100 >= total * 95);
    }

    #[test]
    fn running_statistics_are_among_the_parameters_and_up_to_date() {
        let (before, after) = learns::<Normalised>();
        assert_eq!(values(&before, "norm.running_mean"), [0.0; 11]);
        assert_ne!(values(&after, "norm.running_mean"), [0.0; 11]);
    }

    #[test]
    fn unused_layer_keeps_its_values() {
        let (before, after) = learns::<Unused>();
        assert_eq!(values(&before, "unused.weight"), values(&after, "unused.weight"));
        assert_ne!(values(&before, "first.weight"), values(&after, "first.weight"));
    }
}
