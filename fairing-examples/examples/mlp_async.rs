//! cargo run -p fairing-examples --example mlp_async
//!
//! One small network, trained three times on Fashion-MNIST by two workers that are not equally quick in every step: sync,
//! async, and async with a bound on staleness. At the end stands a table. A sync step takes as long as the slowest worker; an
//! async worker waits for nobody, but its gradient is of parameters that the other may have moved meanwhile. How often it
//! did is the staleness of a step. The bound is on the lead in steps: with 4, the other may go from four behind to five ahead
//! within one step, so the staleness stays below ten.

use std::thread;
use std::time::Duration;

use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::relu;
use fairing_core::prelude::*;
use fairing_examples::fashion_mnist::{self, CLASSES, ImageBatch, SIDE};

/// Every so many steps of a worker one takes longer, as on a machine that others use too.
const STEPS_PER_PAUSE: usize = 10;
const PAUSE: Duration = Duration::from_millis(20);

// The mode is no field: `main` sets it for each launch, and `train` is the same in all three.
#[distributed_training(workers = 2, ps = 1, data = "data/fashion-mnist")]
#[derive(Serialize, Deserialize)]
struct FashionMlp {
    epochs: usize,
    /// Images per worker and step.
    batch_size: usize,
    learning_rate: f64,
}

impl Train for FashionMlp {
    type Model = Mlp;

    fn train(&self, worker: &Worker) -> anyhow::Result<Mlp> {
        let data = fashion_mnist::load(worker.data_dir(), worker.device())?;

        let mut model = worker.join(Mlp::new(worker.device()), Sgd::new().momentum(0.9))?;
        for epoch in worker.epochs(self.epochs) {
            for (step, batch) in epoch.batches(&data.train, self.batch_size).enumerate() {
                // Worker 1 pauses in the middle between two pauses of worker 0, so that no two fall into one step.
                if (step + worker.rank() * STEPS_PER_PAUSE / 2).is_multiple_of(STEPS_PER_PAUSE) {
                    thread::sleep(PAUSE);
                }
                let loss = model.loss(&batch);
                worker.metric("loss", loss.clone().into_scalar::<f64>());
                let gradient = Gradient::mean(loss.backward(), batch.len());
                model = worker.step(model, gradient, self.learning_rate)?;
            }
        }

        let accuracy = worker.evaluate(&data.test, |images| model.accuracy(images))?;
        worker.metric("accuracy", accuracy);
        Ok(model)
    }
}

/// 50,890 parameters: 28 x 28 pixels to 64 hidden units to 10 classes.
#[derive(Module, Debug)]
struct Mlp {
    hidden: Linear,
    classes: Linear,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        Self {
            hidden: LinearConfig::new(SIDE * SIDE, 64).init(device),
            classes: LinearConfig::new(64, CLASSES).init(device),
        }
    }

    /// `[n, 1, 28, 28]` to `[n, 10]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        self.classes.forward(relu(self.hidden.forward(images.flatten(1, 3))))
    }

    fn loss(&self, batch: &ImageBatch) -> Tensor<1> {
        let scores = self.forward(batch.images.clone());
        CrossEntropyLossConfig::new().init(&scores.device()).forward(scores, batch.labels.clone())
    }

    /// The share of the batch that is put into the right class.
    fn accuracy(&self, batch: &ImageBatch) -> f64 {
        let classes = self.forward(batch.images.clone()).argmax(1).squeeze_dim(1);
        classes.equal(batch.labels.clone()).float().mean().into_scalar()
    }
}

fn main() -> anyhow::Result<()> {
    // A replica comes through here too, and the first launch that it reaches trains and does not return, whichever it was.
    let mlp = FashionMlp { epochs: 2, batch_size: 32, learning_rate: 0.02 };
    let mut rows = Vec::new();
    for (name, mode) in [("sync", Mode::Sync), ("async", Mode::Async), ("staleness 4", Mode::Bounded { staleness: 4 })]
    {
        let outcome = mlp.launch_with(LaunchOptions::new().mode(mode))?;
        let summary = outcome.summary();
        let rate = summary.examples_per_second.unwrap_or_default();
        // Both make equally many steps, so the mean of the workers' means is that of all steps.
        let mean = summary.workers.iter().map(|worker| worker.staleness_mean).sum::<f64>() / 2.0;
        let max = summary.workers.iter().map(|worker| worker.staleness_max).max().unwrap_or_default();
        rows.push(format!(
            "{name:<12} {:>8.4} {rate:>12.0} {mean:>15.2} {max:>4} {:>8.1}",
            outcome.metric("accuracy")?,
            summary.seconds
        ));
    }

    println!(
        "{:<12} {:>8} {:>12} {:>15} {:>4} {:>8}",
        "mode", "accuracy", "examples/s", "staleness: mean", "max", "seconds"
    );
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}
