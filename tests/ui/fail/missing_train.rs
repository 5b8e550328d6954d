use fairing_core::prelude::*;

#[distributed_training(workers = 2)]
#[derive(Serialize, Deserialize)]
struct Job {
    epochs: usize,
}

fn main() {}
