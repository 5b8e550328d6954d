//! cargo run -p fairing-examples --example linear_regression
//!
//! The smallest story: two workers find the line that 1,000 points lie on.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use fairing_core::prelude::*;

const SLOPE: f32 = 3.0;
const INTERCEPT: f32 = -1.0;

#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Line {
    epochs: usize,
}

impl Train for Line {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let xs: Vec<f32> = (0..1_000).map(|i| i as f32 / 500.0 - 1.0).collect();

        let mut line = worker.join(LinearConfig::new(1, 1).init(worker.device()), Sgd::new())?;
        for epoch in worker.epochs(self.epochs) {
            for batch in epoch.batches(&xs, 25) {
                let x = Tensor::<1>::from_floats(batch.as_slice(), worker.device()).unsqueeze_dim::<2>(1);
                let y = x.clone() * SLOPE + INTERCEPT;
                let loss = (line.forward(x) - y).square().mean();
                line = worker.step(line, Gradient::mean(loss.backward(), batch.len()), 0.1)?;
            }
        }

        let y_at = |x: f32| line.forward(Tensor::<2>::from_floats([[x]], worker.device())).into_scalar::<f64>();
        worker.metric("slope", y_at(1.0) - y_at(0.0));
        worker.metric("intercept", y_at(0.0));
        Ok(line)
    }
}

fn main() -> anyhow::Result<()> {
    let outcome = Line { epochs: 10 }.launch()?;
    let (slope, intercept) = (outcome.metric("slope")?, outcome.metric("intercept")?);
    println!("y = {slope:.3} x + {intercept:.3}");
    anyhow::ensure!((slope - f64::from(SLOPE)).abs() < 0.01, "the slope should be {SLOPE}");
    anyhow::ensure!((intercept - f64::from(INTERCEPT)).abs() < 0.01, "the intercept should be {INTERCEPT}");
    Ok(())
}
