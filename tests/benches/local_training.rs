//! cargo run -p fairing-tests --bin local_training [-- REPETITIONS]
//!
//! How much of the machine's speed training with fairing keeps, and how soon it starts. The floor is measured in the
//! same run, alternating: two processes that have nothing to do with each other, each training the same model with burn
//! alone, each on a core of its own. See `README.md` beside this file.

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use burn::optim::AdamConfig;
use burn::prelude::Device;
use fairing_core::prelude::*;
use fairing_tests::data::Samples;
use fairing_tests::models::{Classifier as _, Cnn};
use fairing_tests::plain::{self, Schedule};

type Model = Cnn<28>;

/// Processes, and cores, that train at a time.
const WORKERS: usize = 2;
/// Images per step of one process or worker.
const BATCH_SIZE: usize = 64;
/// Images of one process per epoch: few, so that making them does not count as launch time.
const IMAGES: usize = 2_048;
/// Epochs before the clock starts: processor caches, allocator, frequency.
const WARM_UP: usize = 4;
/// Epochs on the clock: three to four seconds, long against the scheduler's whims.
const EPOCHS: usize = 48;
const LEARNING_RATE: f64 = 1e-3;
const SEED: u64 = 0;

fn main() -> anyhow::Result<()> {
    if fairing_core::in_replica() {
        launch()?;
    }
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("floor") {
        let core = std::env::args().nth(2).context("no core")?.parse()?;
        return floor_process(core);
    }
    let repetitions = argument.map_or(Ok(5), |number| number.parse()).context("expected a number of repetitions")?;
    if repetitions == 0 {
        bail!("expected at least one repetition");
    }

    println!("load of the machine before the start: {}", load());
    let (mut floor, mut fairing, mut first_step) = (Vec::new(), Vec::new(), Vec::new());
    for repetition in 1..=repetitions {
        floor.push(measure_floor()?);
        let (images_per_second, first_step_s) = launch()?;
        fairing.push(images_per_second);
        first_step.push(first_step_s);
        println!(
            "{repetition} of {repetitions}: floor {:.0} images/s, fairing {images_per_second:.0} images/s, first step after \
             {first_step_s:.3} s",
            floor[repetition - 1]
        );
    }

    let ratios: Vec<f64> = floor.iter().zip(&fairing).map(|(floor, fairing)| fairing / floor).collect();
    println!("\n{:<44}{:>10}{:>20}", "small CNN, batch 64, Adam", "median", "min to max");
    row("two independent processes, images/s", &floor, 0);
    row("fairing, 1 server + 2 workers, images/s", &fairing, 0);
    row("fairing : independent", &ratios, 3);
    row("launch to first step, s", &first_step, 3);
    Ok(())
}

/// One of the two sides of the comparison: two workers and a server.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Fairing {
    /// When `launch` was called, by the clock that the processes of a machine share.
    launched: SystemTime,
}

impl Train for Fairing {
    type Model = Model;

    fn train(&self, worker: &Worker) -> anyhow::Result<Model> {
        let samples = Samples::new(IMAGES * WORKERS, Model::FEATURES, Model::CLASSES, worker.device());
        let mut model = worker.join(Model::new(worker.device()), Adam::new())?;

        let mut first_step = None;
        let mut start = Instant::now();
        for epoch in worker.epochs(WARM_UP + EPOCHS) {
            if epoch.index() == WARM_UP {
                start = Instant::now();
            }
            for batch in epoch.batches(&samples, BATCH_SIZE) {
                let loss = model.loss(&batch);
                worker.metric("loss", loss.clone().into_scalar::<f64>());
                let gradient = Gradient::mean(loss.backward(), batch.len());
                model = worker.step(model, gradient, LEARNING_RATE)?;
                first_step.get_or_insert_with(|| self.launched.elapsed().unwrap_or_default());
            }
        }

        worker.metric("images_per_second", per_second(start.elapsed()));
        worker.metric("first_step_s", first_step.unwrap_or_default().as_secs_f64());
        Ok(model)
    }
}

/// Images per second of all workers, and seconds from the call of `launch` to the end of the first step.
fn launch() -> anyhow::Result<(f64, f64)> {
    let options = LaunchOptions::new().seed(SEED);
    let outcome = Fairing { launched: SystemTime::now() }.launch_with(options)?;
    // A metric is the mean over the workers.
    Ok((outcome.metric("images_per_second")? * WORKERS as f64, outcome.metric("first_step_s")?))
}

/// Images per second of all floor processes, which train at the same time.
fn measure_floor() -> anyhow::Result<f64> {
    let mut processes = (0..WORKERS).map(FloorProcess::start).collect::<anyhow::Result<Vec<_>>>()?;
    for process in &mut processes {
        process.line()?;
    }
    for process in &mut processes {
        writeln!(process.stdin, "go")?;
    }
    let mut sum = 0.0;
    for mut process in processes {
        sum += process.line()?.trim().parse::<f64>().context("no number of images per second")?;
        let status = process.child.wait()?;
        if !status.success() {
            bail!("a floor process failed: {status}");
        }
    }
    Ok(sum)
}

struct FloorProcess {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl FloorProcess {
    fn start(core: usize) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["floor", &core.to_string()])
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self { child, stdin, stdout })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.is_empty() {
            bail!("a floor process ended early");
        }
        Ok(line)
    }
}

/// Trains with burn alone: warms up, says so, waits for a line, trains and prints its images per second.
fn floor_process(core: usize) -> anyhow::Result<()> {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    // Without a core of that number, the scheduler decides.
    let _ = rustix::thread::sched_setaffinity(None, &cores);

    let device = Device::flex().autodiff();
    device.seed(SEED);
    let samples = Samples::new(IMAGES, Model::FEATURES, Model::CLASSES, &device);
    let train = |model, epochs| {
        let schedule = Schedule { epochs, batch_size: BATCH_SIZE, learning_rate: LEARNING_RATE };
        let order = |epoch| fairing_core::data::permutation(SEED, epoch, IMAGES);
        plain::train(model, AdamConfig::new().init(), &schedule, order, |indices| samples.select(indices), Model::loss)
    };

    let (model, _) = train(Model::new(&device), WARM_UP);
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    let start = Instant::now();
    train(model, EPOCHS);
    println!("{}", per_second(start.elapsed()));
    Ok(())
}

/// Images per second of one process or worker that took `elapsed` for all epochs on the clock.
fn per_second(elapsed: Duration) -> f64 {
    (IMAGES * EPOCHS) as f64 / elapsed.as_secs_f64()
}

fn row(name: &str, values: &[f64], decimals: usize) {
    let mut sorted = values.to_owned();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
    let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    let range = format!("{min:.decimals$} to {max:.decimals$}");
    println!("{name:<44}{median:>10.decimals$}{range:>20}");
}

/// The load averages, on which it depends whether the figures mean anything.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let averages: Vec<&str> = load.split_whitespace().take(3).collect();
    if averages.is_empty() { "unknown".to_owned() } else { averages.join(", ") }
}
