use fairing_core::config::{Attribute, AttributeCpu};
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training(
    workers = 2,
    ps = 1,
    mode = "async",
    staleness = 4,
    rejoin = "1m 30s",
    seed = 18446744073709551615,
    env = ["HF_HOME", "WANDB_MODE"],
    data = "data",
    target = "local",
    runs = "runs",
    worker(cpu = 2, memory = "1Gi"),
    ps(cpu = 1.5, memory = "512MB"),
)]
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

fn main() {
    let expected = Attribute {
        workers: Some(2),
        ps: Some(1),
        mode: Some("async"),
        staleness: Some(4),
        rejoin: Some("1m 30s"),
        seed: Some(u64::MAX),
        env: Some(&["HF_HOME", "WANDB_MODE"]),
        data: Some("data"),
        target: Some("local"),
        runs: Some("runs"),
        worker_cpu: Some(AttributeCpu::Cores(2)),
        worker_memory: Some("1Gi"),
        ps_cpu: Some(AttributeCpu::Text("1.5")),
        ps_memory: Some("512MB"),
    };
    assert_eq!(Job::ATTRIBUTE, expected);
}
