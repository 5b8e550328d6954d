use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

const CORES: u32 = 0;

#[distributed_training(worker(cpu = CORES))]
#[derive(Serialize, Deserialize)]
struct Job {
    epochs: usize,
}

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn main() {}
