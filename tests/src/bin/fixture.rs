//! A program with many faces for the process tests; its first argument chooses one.
//!
//! The launcher runs a face to its end, each replica runs it up to its first `launch()`. What the launcher prints stands
//! alone, what a replica prints has its name before it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the tests read what the faces print")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, exit};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use clap::{Parser, Subcommand, ValueEnum};
use fairing_core::prelude::*;
use fairing_core::topology::Role;
use fairing_core::{Outcome, RunError, in_replica};
use fairing_tests::law::Law;
use fairing_tests::line::{self, Line};

/// Long enough for a process to be still there when it should have been ended.
const FOREVER: Duration = Duration::from_secs(600);

#[derive(Parser)]
struct Arguments {
    /// A text by which a test finds all processes of its run.
    #[arg(long, default_value = "")]
    marker: String,
    #[command(subcommand)]
    face: Face,
}

#[derive(Subcommand)]
enum Face {
    /// Trains until it is stopped.
    Endless {
        /// Worker 0 starts a process of its own.
        #[arg(long)]
        child: bool,
        /// `train` does not come to an end when it is told to stop.
        #[arg(long)]
        stubborn: bool,
    },
    /// One worker does something wrong.
    Fault { fault: Fault, rank: usize },
    /// `main` returns before `launch()` in a replica.
    ReturnBeforeLaunch,
    /// `main` fails before `launch()` in a replica.
    FailBeforeLaunch,
    /// `main` panics before `launch()` in a replica.
    PanicBeforeLaunch,
    /// `main` sleeps before `launch()` in a replica.
    SleepBeforeLaunch,
    /// Sleeps: what a replica starts as its child.
    Sleep,
    /// Two annotated types in one program.
    TwoTypes,
    /// One type, three values.
    ThreeValues,
    /// Prints, changes directory, and launches inside an async runtime.
    BusyMain,
    /// Trains without any process.
    InProcess,
    /// `start()` and `wait()` instead of `launch()`.
    StartAndWait,
    /// `start()`, `stop()` and `wait()`.
    StartAndStop,
    /// `start()` and then a drop.
    StartAndDrop,
    /// What `in_replica()` says.
    InReplica,
    /// Two types of one name in two functions of one module.
    Twins,
    /// A type of a library crate.
    Library,
    /// A value that other formats than the one used would change.
    ExactValue,
    /// Launches once a line has come on standard input.
    WaitThenLaunch,
    /// Replicas print what surrounds them.
    Surroundings { forwarded: Vec<String> },
    /// Replicas write to both streams.
    Lines,
    /// Workers write lines of 100 bytes, so many bytes in each of so many seconds, a line of a megabyte, and one that is no
    /// text.
    Flood { seconds: u32, bytes: u32 },
    /// Worker 0 takes so many mebibytes of memory and holds them.
    Memory { mebibytes: usize },
    /// Trains with a value of so many bytes and a few more.
    Large { bytes: usize },
    /// The workers' pods cannot start.
    Broken { how: Broken },
    /// `train` waits for a thread of its own that uses rayon, as one that prefetches batches may.
    Prefetch,
    /// Trains a [`Law`], given as JSON, and prints the fingerprint of its model.
    Law {
        law: String,
        workers: u32,
        ps: u32,
        /// A replica that is started again sleeps before `launch()`.
        #[arg(long)]
        once: bool,
    },
    /// Worker 1 takes five times as long for a step as worker 0.
    Uneven,
    /// The worker starts a program that trains for itself.
    Nested,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.face {
        Face::Endless { child, stubborn } => {
            let marker = child.then_some(arguments.marker);
            tell(Endless { marker, stubborn }.launch()).map(drop)
        }
        Face::Fault { fault, rank } => tell(Faulty { fault, rank }.launch()).map(drop),
        Face::Broken { how } => tell(Line { slope: 1.0, epochs: 5 }.launch_with(how.options())).map(drop),
        Face::Large { bytes } => tell(Up { text: "x".repeat(bytes) }.launch()).map(drop),
        Face::Prefetch => tell(Prefetch.launch()).map(drop),
        Face::Nested => tell(Nested { marker: arguments.marker }.launch()).map(drop),
        Face::Law { law, workers, ps, once } => {
            if once && in_replica() && !is_first(Path::new(&arguments.marker)) {
                thread::sleep(FOREVER);
            }
            let law: Law = serde_json::from_str(&law)?;
            let outcome = tell(law.launch_with(LaunchOptions::new().workers(workers).ps(ps)))?;
            let model = outcome.load(law.kind.model(u64::MAX, &Device::flex().autodiff()))?;
            println!("fingerprint {}", model.fingerprint());
            Ok(())
        }
        Face::Uneven => tell(Uneven.launch()).map(drop),
        Face::ReturnBeforeLaunch => {
            if in_replica() {
                println!("nothing to be done here");
                return Ok(());
            }
            launch_line(1.0)
        }
        Face::FailBeforeLaunch => {
            anyhow::ensure!(!in_replica(), "no such database");
            launch_line(1.0)
        }
        Face::PanicBeforeLaunch => {
            assert!(!in_replica(), "not in a replica");
            launch_line(1.0)
        }
        Face::SleepBeforeLaunch => {
            if in_replica() {
                println!("asleep");
                thread::sleep(FOREVER);
            }
            launch_line(1.0)
        }
        Face::Sleep => {
            thread::sleep(FOREVER);
            Ok(())
        }
        Face::TwoTypes => two_types(),
        Face::ThreeValues => [1.0, -2.0, 3.0].into_iter().try_for_each(launch_line),
        Face::BusyMain => busy_main(),
        Face::InProcess => in_process(),
        Face::StartAndWait => {
            let run = Line { slope: 2.0, epochs: 5 }.start()?;
            println!("started {} in {}", run.name(), run.folder().display());
            println!("slope {:.3}", run.wait()?.metric("slope")?);
            Ok(())
        }
        Face::StartAndStop => {
            let run = Endless::default().start()?;
            run.stop();
            println!("stopped {}", run.wait()?.is_stopped());
            Ok(())
        }
        Face::StartAndDrop => {
            drop(Endless::default().start()?);
            println!("dropped");
            wait_for_a_line()
        }
        Face::InReplica => {
            println!("in_replica {}", in_replica());
            launch_line(1.0)
        }
        Face::Twins => twins::first().and_then(|()| twins::second()),
        Face::Library => launch_line(0.5),
        Face::ExactValue => {
            let value = Exact::new();
            println!("sent {}", value.describe());
            value.launch()?;
            Ok(())
        }
        Face::WaitThenLaunch => {
            if !in_replica() {
                println!("ready");
                wait_for_a_line()?;
            }
            launch_line(1.0)
        }
        Face::Surroundings { .. } => Surroundings {}.launch().map(drop).map_err(Into::into),
        Face::Flood { seconds, bytes } => tell(Flood { seconds, bytes }.launch()).map(drop),
        Face::Memory { mebibytes } => tell(Memory { mebibytes }.launch()).map(drop),
        Face::Lines => Lines.launch().map(drop).map_err(Into::into),
    }
}

/// Prints the facts of a failed run, which the error's text only tells in words.
fn tell(result: Result<Outcome, RunError>) -> anyhow::Result<Outcome> {
    if let Err(RunError::Failed { failure, exit, .. }) = &result {
        println!("cause: {}, {:?}, {exit:?}", failure.replica, failure.kind);
    }
    Ok(result?)
}

/// Whether no process of this replica was here before; leaves a file in `folder`.
fn is_first(folder: &Path) -> bool {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let name = format!("{}-{}", variable("FAIRING_PLACEMENT_ROLE"), variable("FAIRING_PLACEMENT_RANK"));
    File::create_new(folder.join(name)).is_ok()
}

fn launch_line(slope: f32) -> anyhow::Result<()> {
    let outcome = tell(Line { slope, epochs: 5 }.launch())?;
    println!("slope {:.3}", outcome.metric("slope")?);
    Ok(())
}

fn wait_for_a_line() -> anyhow::Result<()> {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// Trains for ever, with rounds that come quickly and an epoch that does not end.
#[distributed_training(workers = 2, ps = 2)]
#[derive(Default, Serialize, Deserialize)]
struct Endless {
    /// Given, worker 0 starts a child with this marker.
    marker: Option<String>,
    stubborn: bool,
}

impl Train for Endless {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        if let Some(marker) = self.marker.as_ref().filter(|_| worker.rank() == 0) {
            Command::new("/proc/self/exe").args(["--marker", marker, "sleep"]).spawn()?;
        }
        let xs = vec![0.5; 1 << 20];
        let mut model = worker.join(line::new(worker), Sgd::new())?;
        for epoch in worker.epochs(1_000_000) {
            for (step, batch) in epoch.batches(&xs, line::BATCH).enumerate() {
                let gradient = Gradient::mean(line::loss(&model, &batch, 1.0, worker).backward(), batch.len());
                model = worker.step(model, gradient, 0.01)?;
                if step == 0 {
                    println!("training");
                }
            }
        }
        if self.stubborn {
            println!("evaluating");
            thread::sleep(FOREVER);
        }
        worker.metric("evaluated", worker.evaluate(&xs[..1000], |batch| batch.len() as f64)?);
        Ok(model)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Fault {
    Panic,
    PanicBeforeJoin,
    Error,
    Nan,
    Layout,
    ExitZero,
    ExitThree,
    Abort,
    /// Returns from `train` without another word in the middle.
    ReturnEarly,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Broken {
    /// A variable comes from a key that its Secret does not have.
    Key,
    /// The container's command is not in the image.
    Command,
    /// No node has the label that the pod wants.
    Nowhere,
}

impl Broken {
    /// Such workers.
    fn options(self) -> LaunchOptions {
        LaunchOptions::new().pod(move |role, pod| {
            let spec = pod.spec.as_mut().expect("a pod has one");
            let container = &mut spec.containers[0];
            match self {
                _ if role == Role::Ps => {}
                Broken::Nowhere => {
                    spec.node_selector.get_or_insert_default().insert("disk".to_owned(), "none".to_owned());
                }
                Broken::Command => container.command = Some(vec!["/no/such/program".to_owned()]),
                Broken::Key => {
                    let variables = container.env.get_or_insert_default();
                    variables.push(Default::default());
                    let variable = variables.last_mut().expect("just pushed");
                    variable.name = "PASSWORD".to_owned();
                    let source = variable.value_from.get_or_insert_default().secret_key_ref.get_or_insert_default();
                    (source.name, source.key) = ("login".to_owned(), "password".to_owned());
                }
            }
        })
    }
}

/// Worker `rank` trains three rounds and then does something wrong.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Faulty {
    fault: Fault,
    rank: usize,
}

impl Train for Faulty {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let chosen = |fault| self.fault == fault && worker.rank() == self.rank;
        println!("worker {} begins", worker.rank());
        assert!(!chosen(Fault::PanicBeforeJoin), "before join on purpose");
        let outputs = if chosen(Fault::Layout) { 2 } else { 1 };
        let model = LinearConfig::new(1, outputs).with_bias(false).init(worker.device());
        let mut model = worker.join(model, Sgd::new())?;
        let xs = vec![0.5; 1000];
        for epoch in worker.epochs(1000) {
            for batch in epoch.batches(&xs, line::BATCH) {
                let mut loss = line::loss(&model, &batch, 1.0, worker);
                if worker.rank() == self.rank && epoch.index() == 1 {
                    println!("worker {} is about to fail", worker.rank());
                    match self.fault {
                        Fault::Panic => panic!("in round 20 on purpose"),
                        Fault::Error => Err(anyhow::anyhow!("the disk is full")).context("cannot read example 7")?,
                        Fault::Nan => loss = loss * f32::NAN,
                        Fault::ExitZero => exit(0),
                        Fault::ExitThree => exit(3),
                        Fault::Abort => std::process::abort(),
                        Fault::ReturnEarly => return Ok(model),
                        Fault::PanicBeforeJoin | Fault::Layout => {}
                    }
                }
                model = worker.step(model, Gradient::mean(loss.backward(), batch.len()), 0.01)?;
            }
        }
        Ok(model)
    }
}

/// Has a thread beside `train`, and asks the other workers something before it joins.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Prefetch;

impl Train for Prefetch {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let (half, other) = std::thread::spawn(|| rayon_core::join(|| 20.0, || 22.0)).join().expect("rayon works");
        anyhow::ensure!(worker.sum(&[half + other])? == [84.0]);
        line::fit(worker, 2.0, 5)
    }
}

/// Starts a run of its own, of which the replica's variables know nothing.
#[distributed_training(workers = 1, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Nested {
    marker: String,
}

impl Train for Nested {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let mut nested = Command::new("/proc/self/exe");
        nested
            .args(["--marker", &self.marker, "start-and-wait"])
            .env("FAIRING_RUNS", std::env::temp_dir().join("runs"));
        anyhow::ensure!(nested.status()?.success(), "the run in the run failed");
        line::fit(worker, 2.0, 5)
    }
}

/// Both workers sleep in every step, so that what they compute, on whatever machine, is a small part of it.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Uneven;

impl Train for Uneven {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let xs = vec![0.5; 1000];
        let mut model = worker.join(line::new(worker), Sgd::new())?;
        for epoch in worker.epochs(8) {
            for batch in epoch.batches(&xs, line::BATCH) {
                thread::sleep(Duration::from_millis(if worker.rank() == 1 { 50 } else { 10 }));
                let gradient = Gradient::mean(line::loss(&model, &batch, 1.0, worker).backward(), batch.len());
                model = worker.step(model, gradient, 0.01)?;
            }
        }
        Ok(model)
    }
}

/// Says `up`.
#[distributed_training(workers = 1, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Up {
    text: String,
}

impl Train for Up {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        println!("up with {}", self.text);
        line::fit(worker, 1.0, 5)
    }
}

/// Says `down`.
#[distributed_training(workers = 3, ps = 2)]
#[derive(Serialize, Deserialize)]
struct Down(i32);

impl Train for Down {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        println!("down with {}", self.0);
        line::fit(worker, -1.0, 5)
    }
}

fn two_types() -> anyhow::Result<()> {
    let up = Up { text: "a text".to_owned() }.launch()?;
    println!("up {:.3}", up.metric("slope")?);
    let down = Down(-7).launch()?;
    println!("down {:.3}", down.metric("slope")?);
    Ok(())
}

#[tokio::main]
async fn busy_main() -> anyhow::Result<()> {
    println!("main speaks");
    std::env::set_current_dir("/")?;
    launch_line(4.0)?;
    println!("runtime {}", tokio::spawn(async { "works" }).await?);
    println!("directory {}", std::env::current_dir()?.display());
    Ok(())
}

fn in_process() -> anyhow::Result<()> {
    let line = Line { slope: 2.0, epochs: 5 };
    println!("here {:.3}", line.train_here()?.metric("slope")?);
    println!("memory {:.3}", line.train_in_memory(Topology::new(3, 2))?.metric("slope")?);
    println!("asked {:.3}", Prefetch.train_in_memory(Topology::new(2, 1))?.metric("slope")?);
    Ok(())
}

/// Two functions, each with a type of its own, and both types with one name.
mod twins {
    use super::*;

    pub(super) fn first() -> anyhow::Result<()> {
        #[distributed_training]
        #[derive(Serialize, Deserialize)]
        struct Twin;

        impl Train for Twin {
            type Model = Linear;

            fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
                line::fit(worker, 1.0, 1)
            }
        }
        tell(Twin.launch()).map(drop)
    }

    pub(super) fn second() -> anyhow::Result<()> {
        #[distributed_training]
        #[derive(Serialize, Deserialize)]
        struct Twin;

        impl Train for Twin {
            type Model = Linear;

            fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
                line::fit(worker, -1.0, 1)
            }
        }
        tell(Twin.launch()).map(drop)
    }
}

/// Values at the edges of their types.
#[distributed_training(workers = 1, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Exact {
    floats: Vec<f64>,
    small_floats: Vec<f32>,
    largest: u64,
    smallest: i64,
    map: BTreeMap<(u32, bool), Option<String>>,
    text: String,
}

impl Exact {
    fn new() -> Self {
        let all_bits = f64::from_bits(0x4009_21fb_5444_2d18);
        Self {
            floats: vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.1 + 0.2, all_bits, f64::from_bits(1)],
            small_floats: vec![f32::NAN, f32::MIN_POSITIVE, 0.1, f32::from_bits(1)],
            largest: u64::MAX,
            smallest: i64::MIN,
            map: BTreeMap::from([((7, true), Some("seven".to_owned())), ((u32::MAX, false), None)]),
            text: "line\nbreak \u{1f980} \0".to_owned(),
        }
    }

    fn describe(&self) -> String {
        let floats: Vec<u64> = self.floats.iter().map(|float| float.to_bits()).collect();
        let small_floats: Vec<u32> = self.small_floats.iter().map(|float| float.to_bits()).collect();
        let Self { largest, smallest, map, text, .. } = self;
        format!("{floats:x?} {small_floats:x?} {largest} {smallest} {map:?} {text:?}")
    }
}

impl Train for Exact {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        println!("got {}", self.describe());
        line::fit(worker, 1.0, 1)
    }
}

/// Prints what a replica finds around itself.
#[distributed_training(workers = 2, ps = 1, env = ["NAMED"])]
#[derive(Serialize, Deserialize)]
struct Surroundings {}

impl Train for Surroundings {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let mut input = Vec::new();
        std::io::stdin().read_to_end(&mut input)?;
        println!("stdin {} bytes", input.len());
        println!("threads {}", worker.threads());
        println!("directory {}", std::env::current_dir()?.display());
        std::env::vars().for_each(|(name, value)| println!("variable {name}={value}"));
        std::env::args().skip(1).for_each(|argument| println!("argument {argument:?}"));
        line::fit(worker, 1.0, 1)
    }
}

/// Writes to both streams, and a last line without an end.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Lines;

impl Train for Lines {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        println!("to stdout");
        eprintln!("to stderr");
        let model = line::fit(worker, 1.0, 1)?;
        std::io::stderr().write_all(b"no end of stderr")?;
        print!("no end of stdout");
        Ok(model)
    }
}

/// Writes more than a slow reader takes at once.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Flood {
    seconds: u32,
    bytes: u32,
}

impl Train for Flood {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        const LINE: u32 = 100;
        let mut number = 0;
        let mut stdout = std::io::stdout().lock();
        for _ in 0..self.seconds {
            let second = std::time::Instant::now();
            for _ in 0..self.bytes / LINE {
                let head = format!("line {number} ");
                writeln!(stdout, "{head}{}", "x".repeat(LINE as usize - 1 - head.len()))?;
                number += 1;
            }
            stdout.flush()?;
            thread::sleep(Duration::from_secs(1).saturating_sub(second.elapsed()));
        }
        writeln!(stdout, "{}", "m".repeat(1 << 20))?;
        stdout.write_all(b"no text: \xff\xfe\n")?;
        drop(stdout);
        line::fit(worker, 1.0, 1)
    }
}

/// Takes memory.
#[distributed_training(workers = 2, ps = 1)]
#[derive(Serialize, Deserialize)]
struct Memory {
    mebibytes: usize,
}

impl Train for Memory {
    type Model = Linear;

    fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
        let model = line::fit(worker, 1.0, 1)?;
        let mut held = Vec::new();
        while worker.rank() == 0 && held.len() < self.mebibytes {
            // Not zero, so that the pages are really taken.
            held.push(vec![held.len() as u8 | 1; 1 << 20]);
        }
        std::hint::black_box(&held);
        Ok(model)
    }
}
