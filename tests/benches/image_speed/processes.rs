//! What Linux tells about processes: their memory, and how much of the cores went to others.

use std::collections::HashMap;
use std::fs;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Length of one tick in `/proc`: `USER_HZ` is 100 on all processors that images are built for.
const TICK_MS: f64 = 10.0;

/// Pause between two looks at the memory of a program.
const NAP: Duration = Duration::from_millis(2);

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// CPU time used since the machine was started.
pub(crate) struct Used {
    at: Instant,
    /// By all processes, in ms.
    all: f64,
    /// By this one, its children and theirs, those that have ended included, in ms.
    own: f64,
}

impl Used {
    pub(crate) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks: Vec<f64> = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map(number).collect();
        // Without idle time and waiting for disks, the fourth and the fifth, and what guests had, which is in the first two.
        let all = ticks.iter().take(8).sum::<f64>() - ticks.iter().skip(3).take(2).sum::<f64>();
        Self { at: Instant::now(), all: all * TICK_MS, own: family_ms() }
    }

    /// Share of the cores that other processes had since `before`, in percent. Both ends are whole ticks, so that what
    /// takes less than a tenth of a second has no exact share.
    pub(crate) fn others_since(&self, before: &Self) -> f64 {
        let cores = thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
        let all = cores * self.at.duration_since(before.at).as_secs_f64() * 1_000.0;
        let others = (self.all - before.all) - (self.own - before.own);
        (100.0 * others / all).clamp(0.0, 100.0)
    }
}

/// CPU time of this process and all that descend from it, in ms.
fn family_ms() -> f64 {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let processes: HashMap<u32, (u32, f64)> = ids.filter_map(|id| Some((id, process(id)?))).collect();
    let own = std::process::id();
    let is_family = |mut id: u32| {
        while id != own {
            match processes.get(&id) {
                Some((parent, _)) if *parent != 0 => id = *parent,
                _ => return false,
            }
        }
        true
    };
    processes.iter().filter(|(id, _)| is_family(**id)).map(|(_, (_, ms))| ms).sum()
}

/// Parent and CPU time in ms of a process, its ended children included.
fn process(id: u32) -> Option<(u32, f64)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The program's name before may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11..15)?.iter().map(|ticks| number(ticks)).sum();
    Some((fields.get(1)?.parse().ok()?, ticks * TICK_MS))
}

fn number(text: &str) -> f64 {
    text.parse().unwrap_or_default()
}

/// A value in KiB from `/proc/ID/status`.
pub(crate) fn status_kib(id: &str, key: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// The load averages, on which it depends whether the figures mean anything.
pub(crate) fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().take(3).collect::<Vec<_>>().join(", ")
}

/// Runs a program to its successful end and gives what it prints.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    Ok(watched(command)?.0.stdout)
}

/// [`run`], and the peak of the program's memory in MiB as seen a few ms before its end.
pub(crate) fn run_with_peak(command: &mut Command) -> anyhow::Result<f64> {
    Ok(watched(command)?.1)
}

fn watched(command: &mut Command) -> anyhow::Result<(Output, f64)> {
    let name = format!("{command:?}");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.as_mut().map_err(|error| anyhow::anyhow!("{error}")).with_context(|| format!("no {name}"))?;
    let (mut stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let id = child.id().to_string();
    let deadline = Instant::now() + PATIENCE;
    let (mut peak, mut killed) = (0.0, false);
    let (status, out, error) = thread::scope(|scope| {
        let out = scope.spawn(move || read(&mut stdout));
        let error = scope.spawn(move || read(&mut stderr));
        let status = loop {
            peak = status_kib(&id, "VmHWM").unwrap_or_default().max(peak);
            match child.try_wait() {
                Ok(None) if Instant::now() < deadline => thread::sleep(NAP),
                Ok(None) => {
                    killed = true;
                    _ = child.kill();
                    break child.wait();
                }
                Ok(Some(status)) => break Ok(status),
                Err(error) => break Err(error),
            }
        };
        (status, out.join().expect("reading does not panic"), error.join().expect("reading does not panic"))
    });
    let (status, stderr) = (status?, String::from_utf8_lossy(&error).trim().to_owned());
    anyhow::ensure!(!killed, "{name} takes longer than {PATIENCE:?}");
    anyhow::ensure!(status.success(), "{name}: {status}: {stderr}");
    Ok((Output { status, stdout: out, stderr: error }, peak / 1_024.0))
}

fn read(from: &mut impl std::io::Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    _ = from.read_to_end(&mut bytes);
    bytes
}
