//! What is launched: the smallest training, which says when its steps were.

use std::thread;
use std::time::Duration;

use burn::nn::Linear;
use fairing_core::in_replica;
use fairing_core::prelude::*;
use fairing_tests::line;

use crate::now_ms;

/// Makes this program a launcher, and a replica in a pod; behind it stand the milliseconds that the training takes.
pub(crate) const ARGUMENT: &str = "launch";

/// Begins the first line of a replica. Behind this and the others stands the time in ms.
pub(crate) const HERE: &str = "here ";
/// Begins the line of a worker that all others have met.
pub(crate) const JOINED: &str = "joined ";
/// Begins the line of a worker's first step.
pub(crate) const FIRST_STEP: &str = "first step ";
/// Begins the line of a worker's last step.
pub(crate) const LAST_STEP: &str = "last step ";

/// Steps of a worker.
const STEPS: u32 = 41;

/// Launches, or takes a replica's part.
pub(crate) fn launch(milliseconds: &str) -> anyhow::Result<()> {
    if in_replica() {
        println!("{HERE}{:.3}", now_ms());
    }
    Timed { milliseconds: milliseconds.parse()? }.launch()?;
    Ok(())
}

/// Trains a line. There is no evaluation: what comes behind the last step is fairing's and the cluster's.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Timed {
    milliseconds: u64,
}

impl Train for Timed {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let xs = vec![0.5; STEPS as usize * line::BATCH * worker.workers()];
        let pause = Duration::from_millis(self.milliseconds) / (STEPS - 1);
        let mut model = worker.join(line::new(worker), Sgd::new())?;
        println!("{JOINED}{:.3}", now_ms());
        let mut last = None;
        for epoch in worker.epochs(1) {
            for batch in epoch.batches(&xs, line::BATCH) {
                if last.is_some() {
                    thread::sleep(pause);
                }
                let gradient = Gradient::mean(line::loss(&model, &batch, 1.0, worker).backward(), batch.len());
                model = worker.step(model, gradient, 0.01)?;
                if last.replace(now_ms()).is_none() {
                    println!("{FIRST_STEP}{:.3}", now_ms());
                }
            }
        }
        println!("{LAST_STEP}{:.3}", last.unwrap_or_default());
        Ok(model)
    }
}
