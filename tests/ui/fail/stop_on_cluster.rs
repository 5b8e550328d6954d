use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training(target = "kubernetes", on_disconnect = "stop")]
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
