use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

const WORKERS: u32 = 4;
const SEED: u64 = 0;

mod limits {
    pub const CORES: u32 = 1;

    pub const fn double(count: u32) -> u32 {
        2 * count
    }
}

#[distributed_training(
    workers = WORKERS,
    ps = if WORKERS > 2 { 1 + 1 } else { 1 },
    seed = SEED,
    worker(cpu = limits::double(limits::CORES)),
)]
#[derive(Serialize, Deserialize)]
struct Job;

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn main() {
    let attribute = Job::ATTRIBUTE;
    assert_eq!((attribute.workers, attribute.ps, attribute.seed), (Some(4), Some(2), Some(0)));
    assert_eq!(attribute.worker_cpu, Some(fairing_core::config::AttributeCpu::Cores(2)));
}
