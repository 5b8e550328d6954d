//! From `cargo run` to the first step in containers. The group `run`.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::Place;
use crate::engine::Engine;
use crate::table::{Figure, Measured, Table, fact, goal, measure};

/// Far above what a run takes to its first step, or to end when it is interrupted.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first run of all compiles what is not compiled yet.
const BUILD: Duration = Duration::from_secs(30 * 60);

/// A worker's first word about how far it is comes with its first step.
const FIRST_STEP: &str = "epoch 1/";

const LOCAL: Figure = fact("cargo run to the first step, without containers, ms");
const NEW: Figure = goal("cargo run to the first step, nothing at the engine, ms", "3000 / 1500");
const THERE: Figure = goal("cargo run to the first step, image at the engine, ms", "3000 / 1500");
const PUSHED: Figure = goal("cargo run to the first step, image there, by digest from the registry, ms", "3000 / 1500");

pub(crate) fn run(place: &Place) -> anyhow::Result<Table> {
    let mut table = Table::new("cargo run of fashion_mnist, already built, in containers");
    let Some(engine) = &place.engine else {
        table.fail(THERE, &anyhow::anyhow!("there is no engine"));
        return Ok(table);
    };
    for number in 0..=place.few() {
        eprintln!("run: repetition {number} of {} (0 warms up)", place.few());
        let pushed = place.registry.repository("run");
        for (figure, repository) in [(LOCAL, None), (NEW, None), (THERE, None), (PUSHED, Some(pushed.as_str()))] {
            if figure == NEW {
                // What was packed is still in fairing's cache.
                engine.docker(&["image", "prune", "--all", "--force"])?;
            }
            let patience = if number == 0 { BUILD } else { PATIENCE };
            let target = if figure == LOCAL { "local" } else { "docker" };
            match once(place, engine, target, repository, patience) {
                Ok(Measured { value: ms, others, .. }) if number > 0 => table.record(figure, ms, others),
                Ok(_) => {}
                Err(error) => table.fail(figure, &error),
            }
        }
    }
    Ok(table)
}

/// Time in ms to the first step of one run, which is interrupted then.
fn once(
    place: &Place,
    engine: &Engine,
    target: &str,
    repository: Option<&str>,
    patience: Duration,
) -> anyhow::Result<Measured<f64>> {
    measure(|| {
        let began = Instant::now();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        if let Some(repository) = repository {
            command.env("FAIRING_REPOSITORY", repository);
        }
        let mut child = command
            .args(["run", "--quiet", "--offline", "-p", "fairing-examples", "--example", "fashion_mnist"])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .env("FAIRING_TARGET", target)
            .env("FAIRING_RUNS", place.folder.path().join("runs"))
            .env("FAIRING_CACHE", place.folder.path().join("cache-run"))
            .env("DOCKER_HOST", engine.host())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (told, lines) = mpsc::channel();
        follow(child.stdout.take().expect("piped"), told.clone());
        follow(child.stderr.take().expect("piped"), told);
        let step = first_step(&lines, began, patience);
        interrupt(&mut child)?;
        step
    })
}

/// Sends every line of `from` and when it came.
fn follow(from: impl Read + Send + 'static, told: mpsc::Sender<(Instant, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if told.send((Instant::now(), line)).is_err() {
                // Whoever writes must not find the pipe full.
                continue;
            }
        }
    });
}

fn first_step(lines: &mpsc::Receiver<(Instant, String)>, began: Instant, patience: Duration) -> anyhow::Result<f64> {
    let mut last = Vec::new();
    loop {
        let rest = patience.saturating_sub(began.elapsed());
        match lines.recv_timeout(rest) {
            Ok((at, line)) if line.contains(FIRST_STEP) => {
                return Ok(at.duration_since(began).as_secs_f64() * 1_000.0);
            }
            Ok((_, line)) => last.push(line),
            Err(_) => anyhow::bail!("no step within {patience:?}: {}", last.join(" | ")),
        }
    }
}

/// Ends a run as Ctrl-C does, and waits until it has cleaned up.
fn interrupt(child: &mut Child) -> anyhow::Result<()> {
    let group = rustix::process::Pid::from_child(child);
    _ = rustix::process::kill_process_group(group, rustix::process::Signal::INT);
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            child.wait()?;
            anyhow::bail!("the run does not end within {PATIENCE:?} after an interrupt");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
