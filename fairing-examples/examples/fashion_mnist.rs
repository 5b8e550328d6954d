//! cargo run -p fairing-examples --example fashion_mnist [-- FOLDER]
//!
//! Two workers and one parameter server train a small convolutional network on the 60,000 images of Fashion-MNIST,
//! then measure its accuracy on the 10,000 test images. `FOLDER`, or the variable `FAIRING_DATA`, names another
//! folder with the data set's four files.

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::relu;
use fairing_core::prelude::*;
use fairing_examples::fashion_mnist::{self, CLASSES, ImageBatch};

/// One run: what it learns from and how fast.
#[distributed_training(workers = 2, ps = 1, data = "data/fashion-mnist")]
#[derive(Serialize, Deserialize)]
struct FashionMnist {
    epochs: usize,
    /// Images per worker and step.
    batch_size: usize,
    learning_rate: f64,
}

impl Train for FashionMnist {
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
    // Each replica comes through here too, with the same arguments; its launch trains and does not return.
    let mut options = LaunchOptions::new();
    if let Some(folder) = std::env::args_os().nth(1) {
        options = options.data(folder);
    }

    let demo = FashionMnist { epochs: 5, batch_size: 32, learning_rate: 1e-3 };
    let outcome = demo.launch_with(options)?;
    println!("accuracy {:.4}, model in {}", outcome.metric("accuracy")?, outcome.model().display());
    Ok(())
}
