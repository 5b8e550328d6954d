//! cargo run -p fairing-tests --bin accuracy [-- plain]
//!
//! Test accuracy of the demo's model after five epochs, for seeds 0 to 2: burn alone in one process with batch 64
//! against fairing with two workers of batch 32. Fails if fairing's mean is below 0.86 or more than 0.005 away from
//! burn's. With `plain`, only the first column. See `README.md` beside this file.

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::path::Path;

use anyhow::ensure;
use fairing_core::prelude::*;
use fairing_examples::fashion_mnist;
use fairing_tests::models::{Classifier as _, Cnn};
use fairing_tests::plain;

const SEEDS: std::ops::Range<u64> = 0..3;
const IMAGES: usize = 60_000;

/// The demo's data set, seen from this package.
const DATA: &str = "../fairing-examples/data/fashion-mnist";

#[distributed_training(workers = 2, ps = 1, data = "../fairing-examples/data/fashion-mnist")]
#[derive(Serialize, Deserialize)]
struct FashionMnist;

impl Train for FashionMnist {
    type Model = Cnn<28>;

    fn train(&self, worker: &Worker) -> anyhow::Result<Cnn<28>> {
        let data = fashion_mnist::load(worker.data_dir(), worker.device())?;

        let mut model = worker.join(Cnn::new(worker.device()), Adam::new())?;
        for epoch in worker.epochs(5) {
            for batch in epoch.batches(&data.train, 32) {
                let loss = model.loss(&plain::rows(&batch));
                let gradient = Gradient::mean(loss.backward(), batch.len());
                model = worker.step(model, gradient, 1e-3)?;
            }
        }
        let accuracy = worker.evaluate(&data.test, |images| model.accuracy(&plain::rows(images)))?;
        worker.metric("accuracy", accuracy);
        Ok(model)
    }
}

fn main() -> anyhow::Result<()> {
    if fairing_core::in_replica() {
        FashionMnist.launch()?;
    }
    let only_plain = std::env::args().nth(1).as_deref() == Some("plain");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(DATA);

    let mut rows = Vec::new();
    for seed in SEEDS {
        let order = |epoch| fairing_core::data::permutation(seed, epoch, IMAGES);
        let burn = plain::fashion_mnist(&folder, seed, order)?;
        println!("seed {seed}: burn alone {burn:.4}");
        if !only_plain {
            let fairing = FashionMnist.launch_with(LaunchOptions::new().seed(seed))?.metric("accuracy")?;
            println!("seed {seed}: fairing {fairing:.4}");
            rows.push((seed, burn, fairing));
        }
    }
    if only_plain {
        return Ok(());
    }

    println!("\n{:<8}{:>12}{:>12}{:>12}", "seed", "burn alone", "fairing", "difference");
    for (seed, burn, fairing) in &rows {
        println!("{seed:<8}{burn:>12.4}{fairing:>12.4}{:>+12.4}", fairing - burn);
    }
    let mean = |values: &dyn Fn(&(u64, f64, f64)) -> f64| rows.iter().map(values).sum::<f64>() / rows.len() as f64;
    let (burn, fairing) = (mean(&|row| row.1), mean(&|row| row.2));
    println!("{:<8}{burn:>12.4}{fairing:>12.4}{:>+12.4}", "mean", fairing - burn);

    ensure!(fairing >= 0.86, "the mean accuracy with fairing is below 0.86");
    ensure!((fairing - burn).abs() <= 0.005, "the mean accuracies differ by more than 0.005");
    Ok(())
}
