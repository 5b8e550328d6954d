//! cargo run -p fairing-examples --example all_reduce
//!
//! The convolutional network of `fashion_mnist`, trained without a parameter server. With `ps = 0` each of the two workers
//! also owns half of the parameters: in every step it sends the other the half of its gradient that the other owns, adds
//! up the half that it owns itself, applies the optimizer to that half, and sends the new parameters back. So the state of
//! the optimizer lies on the workers too, each with its share.
//!
//! Nothing else differs, and nothing in `train` does: the sums are added in the same order, so the parameters are those of a
//! run with servers, to the bit. `FAIRING_PS=1 cargo run ...` shows it. There is one process less, and nothing waits beside
//! the workers for a core; but a worker that is lost takes its share with it, so there is no `rejoin` and no `mode = "async"`.

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::relu;
use fairing_core::prelude::*;
use fairing_examples::fashion_mnist::{self, CLASSES, ImageBatch};

#[distributed_training(workers = 2, ps = 0, data = "data/fashion-mnist")]
#[derive(Serialize, Deserialize)]
struct AllReduce {
    epochs: usize,
    /// Images per worker and step.
    batch_size: usize,
    learning_rate: f64,
}

impl Train for AllReduce {
    type Model = Cnn;

    // Runs in both workers; each sees its own half of every batch.
    fn train(&self, worker: &Worker) -> anyhow::Result<Cnn> {
        let data = fashion_mnist::load(worker.data_dir(), worker.device())?;

        let mut model = worker.join(Cnn::new(worker.device()), Adam::new())?;
        for epoch in worker.epochs(self.epochs) {
            for batch in epoch.batches(&data.train, self.batch_size) {
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

/// 13,610 parameters: 8 filters of 3x3 pixels, then one linear layer.
#[derive(Module, Debug)]
struct Cnn {
    filters: Conv2d,
    classes: Linear,
}

impl Cnn {
    fn new(device: &Device) -> Self {
        Self {
            filters: Conv2dConfig::new([1, 8], [3, 3]).with_stride([2, 2]).init(device),
            classes: LinearConfig::new(8 * 13 * 13, CLASSES).init(device),
        }
    }

    /// `[n, 1, 28, 28]` to `[n, 10]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let features = relu(self.filters.forward(images));
        self.classes.forward(features.flatten(1, 3))
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
    let outcome = AllReduce { epochs: 2, batch_size: 32, learning_rate: 1e-3 }.launch()?;
    println!("accuracy {:.4}, trained by {}", outcome.metric("accuracy")?, outcome.summary().topology);
    Ok(())
}
