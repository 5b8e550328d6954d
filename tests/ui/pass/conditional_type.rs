use fairing_core::__private::{Registration, inventory};
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training(workers = 2)]
#[cfg(any())]
#[derive(Serialize, Deserialize)]
struct Absent;

#[distributed_training(workers = 2)]
#[cfg(all())]
#[derive(Serialize, Deserialize)]
struct Present;

impl Train for Present {
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
    assert_eq!(registered(), [Present::NAME]);
}
