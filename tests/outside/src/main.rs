//! A program that uses fairing without burn: the model is one number, the slope of a line through zero.

use std::path::Path;

use fairing_core::Model;
use fairing_core::prelude::*;
use fairing_core::runtime::layout::{Class, Layout, LayoutError, TensorSpec};

#[derive(Clone)]
struct Slope(f32);

impl Model for Slope {
    type Gradients = f32;

    const EXTENSION: &'static str = "slope";

    fn layout(&self) -> Result<Layout, LayoutError> {
        let slope = TensorSpec { path: "slope".into(), shape: vec![1], dtype: "f32".into(), class: Class::Trained };
        Layout::new(vec![slope])
    }

    fn read_trained(&self, out: &mut [f32]) {
        out[0] = self.0;
    }

    fn write_trained(self, values: &[f32]) -> Self {
        Self(values[0])
    }

    fn read_frozen(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_frozen(self, _: &[u8]) -> Self {
        self
    }

    fn read_state(&self, _: &mut [f32]) {}

    fn write_state(self, _: &[f32]) -> Self {
        self
    }

    fn read_gradients(&self, gradient: f32, out: &mut [f32], present: &mut [bool]) {
        out[0] = gradient;
        present[0] = true;
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        Ok(self.0.to_le_bytes().to_vec())
    }

    fn load(self, path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let bytes = bytes.try_into().map_err(|_| "a slope has four bytes".to_owned())?;
        Ok(Self(f32::from_le_bytes(bytes)))
    }

    fn seed(_: u64) {}
}

#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Line {
    slope: f32,
}

impl Train for Line {
    type Model = Slope;

    fn train(&self, worker: &Worker) -> anyhow::Result<Slope> {
        let xs: Vec<f32> = (0..500).map(|i| i as f32 / 250.0 - 1.0).collect();
        let mut model = worker.join(Slope(0.0), Sgd::new())?;
        for epoch in worker.epochs(5) {
            for batch in epoch.batches(&xs, 25) {
                // Of the squared distance, summed over the batch.
                let gradient = batch.iter().map(|x| 2.0 * x * x * (model.0 - self.slope)).sum();
                model = worker.step(model, Gradient::sum(gradient, batch.len()), 0.2)?;
            }
        }
        worker.metric("slope", f64::from(model.0));
        Ok(model)
    }
}

fn main() -> anyhow::Result<()> {
    let outcome = Line { slope: 3.0 }.launch()?;
    let loaded = outcome.load(Slope(0.0))?;
    anyhow::ensure!(f64::from(loaded.0) == outcome.metric("slope")?, "the model is the one that was trained");
    println!("slope {:.3}", loaded.0);
    Ok(())
}
