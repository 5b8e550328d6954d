//! What Linux tells about processes: the run's own are the children of the one that called `launch`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Length of one tick in `/proc/PID/stat`: `USER_HZ` is 100 on all processors that burn's CPU backend runs on.
const TICK_MS: f64 = 10.0;

/// Pause between two looks at the memory of a run's replicas.
const NAP: Duration = Duration::from_millis(5);

/// CPU time in ms, user and system, of the processes of a run since each was started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CpuMs {
    pub(crate) workers: f64,
    pub(crate) servers: f64,
    /// The process that called `launch`.
    pub(crate) caller: f64,
}

impl CpuMs {
    /// Of the run that the calling replica belongs to. Resolution 10 ms per process.
    pub(crate) fn of_this_run() -> Self {
        let caller = std::os::unix::process::parent_id();
        let mut times = Self { caller: cpu_ms(caller), ..Self::default() };
        for (process, name) in replicas(caller) {
            let role = if name.starts_with("ps") { &mut times.servers } else { &mut times.workers };
            *role += cpu_ms(process);
        }
        times
    }
}

/// CPU time of a process in ms, user and system; 0 if it is gone.
pub(crate) fn cpu_ms(process: u32) -> f64 {
    stat_cpu_ms(&stat(&process.to_string()))
}

/// CPU time of the calling thread in ms, user and system.
pub(crate) fn thread_cpu_ms() -> f64 {
    stat_cpu_ms(&stat("thread-self"))
}

fn stat_cpu_ms(stat: &[String]) -> f64 {
    let ticks = |field: usize| stat.get(field).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or_default();
    (ticks(11) + ticks(12)) * TICK_MS
}

/// Peak resident memory of a process in MiB, program text included; `None` if it is gone.
pub(crate) fn peak_mib(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(peak.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

/// The load averages, on which it depends whether the figures mean anything.
pub(crate) fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().take(3).collect::<Vec<_>>().join(", ")
}

/// Watches the peak memory of this process's replicas until it is asked for them.
pub(crate) struct Peaks {
    stop: Arc<AtomicBool>,
    watcher: JoinHandle<BTreeMap<String, f64>>,
}

impl Peaks {
    pub(crate) fn watch() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let watcher = std::thread::spawn(move || {
            let mut peaks = BTreeMap::new();
            while !stopped.load(Ordering::Relaxed) {
                for (process, name) in replicas(std::process::id()) {
                    if let Some(peak) = peak_mib(process) {
                        peaks.insert(name, peak);
                    }
                }
                std::thread::sleep(NAP);
            }
            peaks
        });
        Self { stop, watcher }
    }

    /// Peak in MiB by the replica's name, such as `worker-0`, as seen a few ms before its end.
    pub(crate) fn end(self) -> BTreeMap<String, f64> {
        self.stop.store(true, Ordering::Relaxed);
        self.watcher.join().expect("the watcher does not panic")
    }
}

/// The replicas that `caller` has started: process and name.
fn replicas(caller: u32) -> Vec<(u32, String)> {
    let caller = caller.to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|&process| stat(&process.to_string()).get(1).is_some_and(|parent| *parent == caller))
        .filter_map(|process| Some((process, replica_name(process)?)))
        .collect()
}

fn replica_name(process: u32) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{process}/environ")).ok()?;
    let environment = String::from_utf8_lossy(&environment);
    let variable = |name: &str| environment.split('\0').find_map(|line| line.strip_prefix(name));
    Some(format!("{}-{}", variable("FAIRING_PLACEMENT_ROLE=")?, variable("FAIRING_PLACEMENT_RANK=")?))
}

/// The fields of `/proc/PROCESS/stat` behind the program's name, which may hold spaces: state, parent, ...
fn stat(process: &str) -> Vec<String> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
    fields.split_whitespace().map(str::to_owned).collect()
}
