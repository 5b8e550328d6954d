//! What the machine can do without fairing, measured in processes of its own.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use burn::optim::{AdamConfig, GradientsParams};
use burn::prelude::Device;
use fairing_core::data::permutation;
use fairing_tests::data::Samples;
use fairing_tests::models::{Classifier, Cnn, Mlp};
use serde::{Deserialize, Serialize};

use crate::processes::{cpu_ms, peak_mib, thread_cpu_ms};
use crate::table::median;
use crate::training::{BATCH_SIZE, LEARNING_RATE, Load, SEED};

/// First argument of a floor process.
pub(crate) const ARGUMENT: &str = "floor";

/// Bytes per `read` and `write` of the transport's floor: more than a socket's buffer takes at once.
const PIECE_BYTES: usize = 256 << 10;

/// What a floor process does.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Floor {
    /// Trains the small CNN with burn and burn's Adam.
    TrainCnn,
    /// Forward and backward of the small CNN, without an optimizer.
    BackwardCnn,
    /// As `TrainCnn`, the large MLP.
    TrainMlp,
    /// As `BackwardCnn`, the large MLP.
    BackwardMlp,
    /// Moves the memory of one pass of Adam over this many numbers, as copies.
    AdamTraffic(usize),
    /// Nothing.
    Idle,
    /// Sends back this many bytes as often as it gets them.
    Echo(usize),
}

/// What a floor process measured; 0 where it has nothing to say.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) steps_per_second: f64,
    pub(crate) cpu_ms_per_step: f64,
    /// The part of it that burn's optimizer takes.
    pub(crate) optimizer_cpu_ms_per_step: f64,
    pub(crate) peak_mib: f64,
}

/// Measures `floor` in `processes` processes at the same time, each pinned to a core of its own.
pub(crate) fn measure(floor: Floor, processes: usize) -> anyhow::Result<Vec<Measured>> {
    let mut processes = (0..processes).map(|core| Process::start(floor, core)).collect::<anyhow::Result<Vec<_>>>()?;
    for process in &mut processes {
        process.line()?;
    }
    for process in &mut processes {
        writeln!(process.stdin, "go")?;
    }
    processes.into_iter().map(Process::result).collect()
}

/// Mean CPU time of a step in ms.
pub(crate) fn mean_cpu_ms(processes: &[Measured]) -> f64 {
    processes.iter().map(|process| process.cpu_ms_per_step).sum::<f64>() / processes.len() as f64
}

/// Steps per second of all.
pub(crate) fn total_speed(processes: &[Measured]) -> f64 {
    processes.iter().map(|process| process.steps_per_second).sum()
}

/// What the transport itself takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wire {
    /// Median time to bring the bytes over and then as many back.
    pub(crate) wall_ms: f64,
    /// Mean CPU time that both ends take for it.
    pub(crate) cpu_ms: f64,
}

/// Sends `bytes` bytes over a Unix socket to another process and gets as many back, `times` times, with `streams` other
/// processes at once. Whoever sends writes from one buffer, whoever receives reads into one; the scheduler places the
/// processes, as it does with fairing's.
pub(crate) fn wire(bytes: usize, times: usize, streams: usize) -> anyhow::Result<Wire> {
    let mut streams = (0..streams).map(|_| Echo::start(bytes)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut run = |times: usize| -> anyhow::Result<Vec<f64>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = streams.iter_mut().map(|echo| scope.spawn(move || echo.run(times))).collect();
            let walls = threads.into_iter().map(|thread| thread.join().expect("no stream panics"));
            Ok(walls.collect::<std::io::Result<Vec<_>>>()?.concat())
        })
    };
    run(times.div_ceil(10))?;
    let walls = run(times)?;
    let cpu_ms = streams.iter().map(|echo| echo.cpu_ms).sum::<f64>() / walls.len() as f64;
    streams.into_iter().try_for_each(Echo::end)?;
    Ok(Wire { wall_ms: median(walls), cpu_ms })
}

/// This end of a stream, and the process at the other.
struct Echo {
    child: Child,
    stream: UnixStream,
    buffer: Vec<u8>,
    /// CPU time of both ends in the last call of [`Echo::run`].
    cpu_ms: f64,
}

impl Echo {
    fn start(bytes: usize) -> anyhow::Result<Self> {
        let (stream, far) = UnixStream::pair()?;
        let child = command(Floor::Echo(bytes), None)?.stdin(Stdio::from(OwnedFd::from(far))).spawn()?;
        Ok(Self { child, stream, buffer: vec![1; bytes], cpu_ms: 0.0 })
    }

    /// Wall times in ms of `times` ways there and back.
    fn run(&mut self, times: usize) -> std::io::Result<Vec<f64>> {
        let other = self.child.id();
        let cpu = || thread_cpu_ms() + cpu_ms(other);
        let before = cpu();
        let walls = (0..times).map(|_| {
            let start = Instant::now();
            send(&mut self.stream, &self.buffer)?;
            receive(&mut self.stream, &mut self.buffer)?;
            Ok(ms(start.elapsed()))
        });
        let walls = walls.collect();
        self.cpu_ms = cpu() - before;
        walls
    }

    fn end(mut self) -> anyhow::Result<()> {
        drop(self.stream);
        self.child.wait()?;
        Ok(())
    }
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn send(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    bytes.chunks(PIECE_BYTES).try_for_each(|piece| stream.write_all(piece))
}

fn receive(stream: &mut UnixStream, bytes: &mut [u8]) -> std::io::Result<()> {
    bytes.chunks_mut(PIECE_BYTES).try_for_each(|piece| stream.read_exact(piece))
}

/// This program again, as a floor process.
fn command(floor: Floor, core: Option<usize>) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([ARGUMENT, &serde_json::to_string(&floor)?]);
    command.args(core.map(|core| core.to_string())).env("RAYON_NUM_THREADS", "1");
    Ok(command)
}

struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(floor: Floor, core: usize) -> anyhow::Result<Self> {
        let mut child = command(floor, Some(core))?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
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

    fn result(mut self) -> anyhow::Result<Measured> {
        let measured = serde_json::from_str(&self.line()?)?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("a floor process failed: {status}");
        }
        Ok(measured)
    }
}

/// The `main` of a floor process: `floor`, and a core to stay on, if any.
pub(crate) fn run(floor: &str, core: Option<&str>) -> anyhow::Result<()> {
    if let Some(core) = core {
        let mut cores = rustix::thread::CpuSet::new();
        cores.set(core.parse()?);
        // Without a core of that number, the scheduler decides.
        let _ = rustix::thread::sched_setaffinity(None, &cores);
    }
    let measured = match serde_json::from_str(floor)? {
        Floor::TrainCnn => train::<Cnn<28>>(&Load::CNN, true),
        Floor::BackwardCnn => train::<Cnn<28>>(&Load::CNN, false),
        Floor::TrainMlp => train::<Mlp>(&Load::MLP, true),
        Floor::BackwardMlp => train::<Mlp>(&Load::MLP, false),
        Floor::AdamTraffic(len) => adam_traffic(len),
        Floor::Idle => go().map(|()| Measured { peak_mib: own_peak_mib(), ..Measured::default() }),
        Floor::Echo(bytes) => return echo(bytes),
    };
    println!("{}", serde_json::to_string(&measured?)?);
    Ok(())
}

/// Says that the preparations are done and waits until all floor processes may start.
fn go() -> anyhow::Result<()> {
    println!("ready");
    if std::io::stdin().read_line(&mut String::new())? == 0 {
        bail!("nobody waits for this floor process");
    }
    Ok(())
}

fn own_peak_mib() -> f64 {
    peak_mib(std::process::id()).unwrap_or_default()
}

/// Trains with burn alone, or only computes loss and gradients, after a warm-up.
fn train<M: Classifier>(load: &Load, optimize: bool) -> anyhow::Result<Measured> {
    let device = Device::flex().autodiff();
    device.seed(SEED);
    let samples = Samples::new(load.images, M::FEATURES, M::CLASSES, &device);
    let mut optimizer = optimize.then(|| AdamConfig::new().init());
    let own_cpu = || cpu_ms(std::process::id());
    let optimizer_cpu_ms = Cell::new(0.0);
    let mut epochs = |mut model: M, epochs: Range<usize>| {
        for epoch in epochs {
            for indices in permutation(SEED, epoch as u64, load.images).chunks(BATCH_SIZE) {
                let loss = model.loss(&samples.select(indices));
                let _: f64 = loss.clone().into_scalar();
                let gradients = loss.backward();
                if let Some(optimizer) = &mut optimizer {
                    let before = own_cpu();
                    let gradients = GradientsParams::from_grads(gradients, &model);
                    model = optimizer.step(LEARNING_RATE, model, gradients);
                    optimizer_cpu_ms.set(optimizer_cpu_ms.get() + own_cpu() - before);
                }
            }
        }
        model
    };

    let model = epochs(M::new(&device), 0..load.warm_up);
    go()?;
    optimizer_cpu_ms.take();
    let (start, before) = (Instant::now(), own_cpu());
    epochs(model, load.warm_up..load.warm_up + load.epochs);
    let steps = load.steps() as f64;
    Ok(Measured {
        steps_per_second: steps / start.elapsed().as_secs_f64(),
        cpu_ms_per_step: (own_cpu() - before) / steps,
        optimizer_cpu_ms_per_step: optimizer_cpu_ms.get() / steps,
        peak_mib: own_peak_mib(),
    })
}

/// Moves what Adam has to, whatever the code: it reads gradient, parameters and two moments and writes all but the
/// gradient, which is seven times the vector, or three and a half copies of it.
fn adam_traffic(len: usize) -> anyhow::Result<Measured> {
    const PASSES: usize = 20;
    let gradient = vec![1e-3_f32; len];
    let mut vectors = [(); 3].map(|()| gradient.clone());
    go()?;
    let before = cpu_ms(std::process::id());
    for _ in 0..PASSES {
        vectors.iter_mut().for_each(|vector| vector.copy_from_slice(&gradient));
        vectors[0][..len / 2].copy_from_slice(&gradient[..len / 2]);
    }
    let cpu_ms_per_step = (cpu_ms(std::process::id()) - before) / PASSES as f64;
    Ok(Measured { cpu_ms_per_step, ..Measured::default() })
}

/// The other end of [`wire`], on the socket that is this process's standard input.
fn echo(bytes: usize) -> anyhow::Result<()> {
    let mut stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut buffer = vec![0; bytes];
    while receive(&mut stream, &mut buffer).is_ok() {
        send(&mut stream, &buffer)?;
    }
    Ok(())
}
