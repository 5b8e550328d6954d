use fairing_core::prelude::*;

#[distributed_training(workers = 2)]
union Job {
    a: u8,
}

fn main() {}
