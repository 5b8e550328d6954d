//! The smallest training: a line through points, as an annotated type in a library crate and as a function.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use fairing_core::prelude::*;

/// Examples per worker and step.
pub const BATCH: usize = 25;

/// Finds the slope of points that lie on a line through zero.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// The slope that is to be found.
    pub slope: f32,
    /// Times that the points are seen.
    pub epochs: usize,
}

impl Train for Line {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        fit(worker, self.slope, self.epochs)
    }
}

/// Trains with 500 points; the metric `slope` is the slope that was found.
///
/// # Errors
///
/// Those of [`Worker::join`] and [`Worker::step`].
pub fn fit(worker: &Worker, slope: f32, epochs: usize) -> anyhow::Result<Linear> {
    let xs: Vec<f32> = (0..500).map(|i| i as f32 / 250.0 - 1.0).collect();
    let mut line = worker.join(new(worker), Sgd::new())?;
    for epoch in worker.epochs(epochs) {
        for batch in epoch.batches(&xs, BATCH) {
            let gradient = Gradient::mean(loss(&line, &batch, slope, worker).backward(), batch.len());
            line = worker.step(line, gradient, 0.2)?;
        }
    }
    worker.metric("slope", slope_of(&line, worker));
    Ok(line)
}

/// A model of one input, one output and no bias.
pub fn new(worker: &Worker) -> Linear {
    LinearConfig::new(1, 1).with_bias(false).init(worker.device())
}

/// Mean squared distance from the line through zero with `slope`, `[1]`.
pub fn loss(line: &Linear, xs: &[f32], slope: f32, worker: &Worker) -> Tensor<1> {
    let x = Tensor::<1>::from_floats(xs, worker.device()).unsqueeze_dim::<2>(1);
    (line.forward(x.clone()) - x * slope).square().mean()
}

/// What the model has learnt.
pub fn slope_of(line: &Linear, worker: &Worker) -> f64 {
    line.forward(Tensor::<2>::from_floats([[1.0]], worker.device())).into_scalar()
}
