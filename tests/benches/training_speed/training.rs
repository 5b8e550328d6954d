//! Real training: the small CNN and the large MLP, against burn alone. The groups `cnn` and `mlp`.

use std::time::Instant;

use fairing_core::DistributedTraining;
use fairing_core::prelude::*;
use fairing_tests::data::Samples;
use fairing_tests::models::{Classifier, Cnn, Mlp};

use crate::floor::{self, Floor, mean_cpu_ms, total_speed, wire};
use crate::processes::CpuMs;
use crate::table::{Table, fact, goal};
use crate::{LARGE, cores, options};

/// Images per step of one process or worker.
pub(crate) const BATCH_SIZE: usize = 64;
pub(crate) const LEARNING_RATE: f64 = 1e-3;
pub(crate) const SEED: u64 = 0;

const WORKERS: u32 = 2;

/// How much one worker or process trains.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Load {
    /// Images of one worker, a multiple of [`BATCH_SIZE`].
    pub(crate) images: usize,
    /// Epochs before the clock starts: processor caches, allocator, frequency.
    pub(crate) warm_up: usize,
    /// Epochs on the clock.
    pub(crate) epochs: usize,
}

impl Load {
    /// Three to four seconds on the clock, long against the scheduler's whims.
    pub(crate) const CNN: Self = Self { images: 2_048, warm_up: 4, epochs: 48 };
    /// Twelve steps on the clock.
    pub(crate) const MLP: Self = Self { images: 4 * BATCH_SIZE, warm_up: 1, epochs: 3 };
    /// Hardly any data, so that memory is the program's.
    pub(crate) const LITTLE_DATA: Self = Self { images: BATCH_SIZE, warm_up: 0, epochs: 500 };

    /// Steps of one worker on the clock.
    pub(crate) fn steps(&self) -> usize {
        self.epochs * self.images / BATCH_SIZE
    }
}

#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
pub(crate) struct CnnTraining(pub(crate) Load);

impl Train for CnnTraining {
    type Model = Cnn<28>;

    fn train(&self, worker: &Worker) -> anyhow::Result<Cnn<28>> {
        train(&self.0, worker)
    }
}

#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct MlpTraining(Load);

impl Train for MlpTraining {
    type Model = Mlp;

    fn train(&self, worker: &Worker) -> anyhow::Result<Mlp> {
        train(&self.0, worker)
    }
}

fn train<M: Classifier>(load: &Load, worker: &Worker) -> anyhow::Result<M> {
    let samples = Samples::new(load.images * worker.workers(), M::FEATURES, M::CLASSES, worker.device());
    let mut model = worker.join(M::new(worker.device()), Adam::new())?;

    let (mut start, mut before) = (Instant::now(), CpuMs::of_this_run());
    for epoch in worker.epochs(load.warm_up + load.epochs) {
        if epoch.index() == load.warm_up {
            (start, before) = (Instant::now(), CpuMs::of_this_run());
        }
        for batch in epoch.batches(&samples, BATCH_SIZE) {
            let loss = model.loss(&batch);
            worker.metric("loss", loss.clone().into_scalar::<f64>());
            let gradient = Gradient::mean(loss.backward(), batch.len());
            model = worker.step(model, gradient, LEARNING_RATE)?;
        }
    }
    let (elapsed, after) = (start.elapsed(), CpuMs::of_this_run());

    // Every worker looks at all processes of the run; the mean over workers evens out when they looked.
    let worker_steps = (load.steps() * worker.workers()) as f64;
    worker.metric("steps_per_second", load.steps() as f64 / elapsed.as_secs_f64());
    worker.metric("workers_cpu_ms", (after.workers - before.workers) / worker_steps);
    worker.metric("servers_cpu_ms", (after.servers - before.servers) / worker_steps);
    worker.metric("caller_cpu_ms", (after.caller - before.caller) / worker_steps);
    Ok(model)
}

/// What a training with fairing reached.
struct Trained {
    /// Of all workers.
    steps_per_second: f64,
    /// CPU time per worker step.
    cpu_ms: CpuMs,
}

fn launch(job: &impl DistributedTraining, ps: u32) -> anyhow::Result<Trained> {
    let runs = tempfile::tempdir()?;
    let outcome = job.launch_with(options(WORKERS, ps, &runs))?;
    Ok(Trained {
        // A metric is the mean over the workers.
        steps_per_second: outcome.metric("steps_per_second")? * f64::from(WORKERS),
        cpu_ms: CpuMs {
            workers: outcome.metric("workers_cpu_ms")?,
            servers: outcome.metric("servers_cpu_ms")?,
            caller: outcome.metric("caller_cpu_ms")?,
        },
    })
}

/// Images per second and CPU time of the small CNN.
pub(crate) fn cnn(repetitions: usize) -> anyhow::Result<Table> {
    let mut table = Table::new("small CNN, 13,610 parameters, batch 64, Adam");
    for _ in 0..repetitions {
        let alone = floor::measure(Floor::TrainCnn, 2)?;
        let backward_ms = mean_cpu_ms(&floor::measure(Floor::BackwardCnn, 2)?);
        let floor_speed = total_speed(&alone);
        table.record(fact("burn alone, two processes, images/s", 0), floor_speed * BATCH_SIZE as f64);
        table.record(fact("burn alone, CPU ms per step", 3), mean_cpu_ms(&alone));
        table.record(fact("forward, backward, loss alone, CPU ms per step", 3), backward_ms);

        let speed = fact("1 server + 2 workers, images/s", 0);
        match launch(&CnnTraining(Load::CNN), 1) {
            Err(error) => table.fail(speed, &error),
            Ok(Trained { steps_per_second, cpu_ms }) => {
                table.record(speed, steps_per_second * BATCH_SIZE as f64);
                let ratio = goal("1 server + 2 workers : burn alone", 3, "0.75 / 0.90");
                table.record(ratio, steps_per_second / floor_speed);
                table.record(fact("  CPU ms per worker step, workers", 3), cpu_ms.workers);
                table.record(fact("  CPU ms per worker step, server", 3), cpu_ms.servers);
                table.record(fact("  CPU ms per worker step, caller", 3), cpu_ms.caller);
                let added = goal("  all processes - forward, backward, loss, CPU ms", 3, "0.3 / 0.15");
                table.record(added, cpu_ms.workers + cpu_ms.servers + cpu_ms.caller - backward_ms);
            }
        }
        let speed = fact("ps = 0, 2 workers, images/s", 0);
        match launch(&CnnTraining(Load::CNN), 0) {
            Err(error) => table.fail(speed, &error),
            Ok(Trained { steps_per_second, cpu_ms }) => {
                table.record(speed, steps_per_second * BATCH_SIZE as f64);
                let ratio = goal("ps = 0, 2 workers : burn alone", 3, "0.80 / 0.92");
                table.record(ratio, steps_per_second / floor_speed);
                table.record(fact("  ps = 0, CPU ms per worker step, caller", 3), cpu_ms.caller);
                let added = goal("  ps = 0, all processes - forward, backward, loss, CPU ms", 3, "0.3 / 0.15");
                table.record(added, cpu_ms.workers + cpu_ms.caller - backward_ms);
            }
        }
    }
    Ok(table)
}

/// Steps per second of the large MLP, and what the machine leaves for it.
pub(crate) fn mlp(repetitions: usize) -> anyhow::Result<Table> {
    let mut table = Table::new("MLP 784-4096-4096-10, 20,037,642 parameters, batch 64, Adam");
    for _ in 0..repetitions {
        let alone = floor::measure(Floor::TrainMlp, 2)?;
        let backward_one = mean_cpu_ms(&floor::measure(Floor::BackwardMlp, 1)?);
        let backward_two = mean_cpu_ms(&floor::measure(Floor::BackwardMlp, 2)?);
        let traffic = mean_cpu_ms(&floor::measure(Floor::AdamTraffic(LARGE), 1)?);
        let adam = alone.iter().map(|process| process.optimizer_cpu_ms_per_step).sum::<f64>() / 2.0;
        let wire = wire(LARGE * size_of::<f32>(), 10, 2)?;
        table.record(fact("burn alone, two processes, steps/s of both", 2), total_speed(&alone));
        table.record(fact("forward + backward, one process, CPU ms", 1), backward_one);
        table.record(fact("forward + backward, two at once, CPU ms each", 1), backward_two);
        table.record(fact("burn's Adam on all parameters, CPU ms", 1), adam);
        table.record(fact("Adam's memory traffic alone, CPU ms", 1), traffic);
        table.record(fact("wire, 80 MB there and back, two at once, CPU ms of both ends", 1), wire.cpu_ms);

        // A round with a server: two workers compute, Adam once, everything there and back for each worker. Without one,
        // each worker sends and receives half of everything twice: as much as one worker's way to a server and back.
        let workers = f64::from(WORKERS);
        let leaves = |wires: f64| workers * cores() * 1e3 / (workers * backward_two + traffic + wires * wire.cpu_ms);
        for (ps, bound, bound_name, speed_name, ratio_name) in [
            (
                1,
                leaves(2.0),
                "bound with 1 server, steps/s",
                "1 server + 2 workers, steps/s of both",
                "1 server + 2 workers : bound",
            ),
            (
                0,
                leaves(1.0),
                "bound with ps = 0, steps/s",
                "ps = 0, 2 workers, steps/s of both",
                "ps = 0, 2 workers : bound",
            ),
        ] {
            table.record(fact(bound_name, 2), bound);
            let speed = goal(speed_name, 2, if ps == 0 { "4.5 / 5.5" } else { "4.5 / 5" });
            match launch(&MlpTraining(Load::MLP), ps) {
                Err(error) => table.fail(speed, &error),
                Ok(trained) => {
                    table.record(speed, trained.steps_per_second);
                    table.record(goal(ratio_name, 3, "or 0.85"), trained.steps_per_second / bound);
                }
            }
        }
    }
    Ok(table)
}
