#![forbid(unsafe_code)]
#![deny(warnings)]

use fairing_core::__private::{Registration, inventory};
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training]
#[derive(Serialize, Deserialize)]
struct Job;

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn registered() -> Vec<&'static str> {
    let mut names: Vec<_> = inventory::iter::<Registration>.into_iter().map(|entry| entry.name).collect();
    names.sort();
    names
}

fn main() {
    assert_eq!(registered(), [Job::NAME]);
    assert!(Job::NAME.ends_with("::Job"));
    let entry = inventory::iter::<Registration>.into_iter().next().unwrap();
    assert!(entry.file.ends_with("no_argument.rs"));
    assert_eq!(entry.line, 11);
}
