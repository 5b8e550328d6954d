use fairing_core::DistributedTraining;
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[derive(Serialize, Deserialize)]
struct Job;

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn launch(_: impl DistributedTraining) {}

fn main() {
    launch(Job);
}
