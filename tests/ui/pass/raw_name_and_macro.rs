use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

macro_rules! annotated {
    ($name:ident, $workers:expr) => {
        #[distributed_training(workers = $workers)]
        #[derive(Serialize, Deserialize)]
        struct $name;
    };
}

annotated!(Job, 2);

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

#[allow(non_camel_case_types)]
#[distributed_training]
#[derive(Serialize, Deserialize)]
struct r#type;

impl Train for r#type {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn main() {
    assert_eq!(Job::ATTRIBUTE.workers, Some(2));
    assert!(r#type::NAME.ends_with("::type"));
}
