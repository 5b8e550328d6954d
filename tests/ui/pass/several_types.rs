use fairing_core::__private::{Registration, inventory};
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training(workers = 2)]
#[derive(Serialize, Deserialize)]
struct Job;

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

mod inner {
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[distributed_training(workers = 3)]
    pub(crate) struct Job(pub(crate) Vec<u8>);
}

impl Train for inner::Job {
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
    // A type of a function is found, too.
    #[distributed_training(workers = 1)]
    #[derive(Serialize, Deserialize)]
    struct Local {
        rate: f64,
    }

    impl Train for Local {
        type Model = Point;

        fn train(&self, _: &Worker) -> anyhow::Result<Point> {
            Ok(Point(0.0))
        }
    }

    let mut names = [Job::NAME, inner::Job::NAME, Local::NAME];
    names.sort();
    assert_eq!(registered(), names);
    assert!(inner::Job::NAME.ends_with("::inner::Job"));
    assert_eq!(inner::Job::ATTRIBUTE.workers, Some(3));
}
