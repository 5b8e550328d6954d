use fairing_core::prelude::*;

#[distributed_training(workers = 2)]
fn train() {}

fn main() {}
