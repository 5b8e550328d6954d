//! A launcher that watches 100 replicas on nodes that are fake, so that its memory can be looked at. The group `fake`.

use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

use crate::audit;
use crate::now_ms;
use crate::place::{Place, USER, kubectl};
use crate::run::{Ended, Launcher, said, usage_at};
use crate::table::{Figure, Table, fact, goal};
use crate::witness::State;

/// 90 workers and 10 servers, the most that a run may have of those.
const REPLICAS: u32 = 100;

/// Nodes, so that a node has as many pods as real ones do.
const NODES: usize = 10;

/// How long the run is watched once all of its pods run. Each has a log of one line, and nothing comes of it: in a fake pod is
/// no program.
const WATCHED: Duration = Duration::from_secs(10);

const MEMORY: Figure = goal("launcher's peak memory, 100 replicas rendered, watched and removed, MiB", "80", "50");
const WATCHING_MEMORY: Figure = fact("- of that until Ctrl-C, MiB");
const FILE_MEMORY: Figure = fact("- of that the program's file and its libraries', MiB");
const RUNNING: Figure = fact("launch to 100 pods running, ms");
const REQUESTS: Figure = fact("requests to the API server until then");
const WATCHING: Figure =
    fact("requests in 10 s of watching, where logs can be followed and no way to a pod can be had");
const CPU: Figure = fact("CPU time of the launcher in these 10 s, ms");
const END: Figure = fact("Ctrl-C to the launcher's exit, all deleted, ms");

pub(crate) fn table(place: &Place, repetitions: usize) -> anyhow::Result<Table> {
    let mut table = Table::new("100 replicas on fake nodes");
    if !place.cluster.join("kwok.pid").exists() {
        table.fail(MEMORY, &anyhow::anyhow!("there are no fake nodes: start the cluster with `--with kwok`"));
        return Ok(table);
    }
    kubectl(&["apply", "--filename", "-"], &(0..NODES).map(node).collect::<String>())?;
    for number in 1..=repetitions {
        eprintln!("fake: repetition {number} of {repetitions}");
        if let Err(error) = once(place, &mut table) {
            table.fail(MEMORY, &error);
        }
    }
    Ok(table)
}

fn node(number: usize) -> String {
    format!(
        "---
apiVersion: v1
kind: Node
metadata:
  name: fake-{number}
  annotations: {{kwok.x-k8s.io/node: fake}}
  labels: {{speed: fake}}
spec:
  taints: [{{key: speed, value: fake, effect: NoSchedule}}]
"
    )
}

fn once(place: &Place, table: &mut Table) -> anyhow::Result<()> {
    let begin = place.audit.end()?;
    let mut command = place.launch(REPLICAS, Duration::ZERO)?;
    command.env("FAIRING_NODE_SELECTOR", "speed=fake").env("FAIRING_TOLERATIONS", "speed=fake:NoSchedule");
    let launcher = Launcher::start(&mut command)?;
    let (began, id) = (launcher.began, launcher.id);
    let count = usize::try_from(REPLICAS)?;
    let running = place.witness.wait("", count, State::Running, began).map(|()| now_ms());
    if running.is_ok() {
        thread::sleep(WATCHED);
    }
    let interrupted = now_ms();
    let process = i32::try_from(id).ok().and_then(Pid::from_raw).context("no process id")?;
    // It may have ended already.
    let _ = kill_process(process, Signal::INT);
    let Ended { exited, lines, usage, .. } = launcher.end()?;
    let running = running.with_context(|| said(&lines))?;
    anyhow::ensure!(exited > interrupted, "the launcher ended before it was told to: {}", said(&lines));
    let left = place.left()?;
    anyhow::ensure!(left.is_empty(), "when the launcher had ended there still was: {}", left.join(", "));
    let requests = place.audit.since(begin)?;
    let own = |from: f64, to: f64| {
        requests.iter().filter(move |request| request.user == USER && (from..to).contains(&request.received))
    };
    let at = |time: f64| usage_at(&usage, time);
    table.record(MEMORY, at(exited).peak_mib);
    table.record(WATCHING_MEMORY, at(interrupted).peak_mib);
    table.record(FILE_MEMORY, at(interrupted).file_mib);
    table.record(RUNNING, running - began);
    table.record(REQUESTS, own(began, running).count() as f64);
    table.record(WATCHING, own(running, interrupted).count() as f64);
    table.record(CPU, at(interrupted).cpu_ms - at(running).cpu_ms);
    table.record(END, exited - interrupted);
    table.note(format!("requests until all ran: {}", audit::by_kind(own(began, running))));
    table.note(format!("requests in 10 s of watching: {}", audit::by_kind(own(running, interrupted))));
    table.note(format!("requests from Ctrl-C on: {}", audit::by_kind(own(interrupted, exited))));
    Ok(())
}
