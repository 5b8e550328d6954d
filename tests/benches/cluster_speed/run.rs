//! A run of two workers and a server from the start of its launcher's process to the end of it. The group `run`.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::audit::{self, Request};
use crate::bare::{self, Bare, Deletion};
use crate::place::{Place, USER};
use crate::processes::cpu_ms;
use crate::replica::{FIRST_STEP, HERE, JOINED, LAST_STEP};
use crate::table::{Figure, Table, fact, goal};
use crate::witness::{Seen, State, pods};
use crate::{PATIENCE, now_ms, timeline};

/// Replicas of the run.
const REPLICAS: u32 = 3;

/// Time from the first step to the last, at least: what belongs to the launch is over by then.
const TRAINING: Duration = Duration::from_secs(2);

/// Between two looks at the launcher's memory and CPU time.
const NAP: Duration = Duration::from_millis(10);

/// What the API server has been asked is in its log by then.
const LOGGED: Duration = Duration::from_millis(300);

const FIRST: Figure = goal("launch to the first training step, ms", "4000", "2500");
const FLOOR_STARTED: Figure = fact("- bare Job of 3 pods: created to its last program running, ms");
const FLOOR_RUNNING: Figure = fact("- bare Job: created to the last being said to run, ms");
const ABOVE_RUNNING: Figure = fact("- difference to that, ms");
const ASKING: Figure = fact("- process started to the first request, ms");
const PREPARING: Figure = fact("- to the first pod being made, ms");
const STARTING: Figure = fact("- to the last replica's first instruction, ms");
const NAMING: Figure = fact("- to the server being said to run, and so having an address, ms");
const JOINING: Figure = fact("- to the first worker having joined, ms");
const STEPPING: Figure = fact("- to the first step, ms");
const LINE: Figure = goal("launch to the first line of a replica's log on the terminal, ms", "2500", "1500");
const FLOOR_LINE: Figure = fact("- bare Job: created to its first line readable, ms");
const ABOVE_LINE: Figure = fact("- difference to that line, ms");
const END: Figure = goal("last step to the caller's exit, model written, all deleted, ms", "3000", "1500");
const FLOOR_GONE: Figure = fact("- bare Job: last program's end to all deleted by force, ms");
const FLOOR_REPORTED: Figure = fact("- of that until the API server says that it has ended, ms");
const FLOOR_DELETED: Figure = fact("- of that from the deletion on, ms");
const ABOVE_GONE: Figure = fact("- difference of the two, ms");
const ENDING: Figure = fact("- last step to the last replica's end, ms");
const REPORTING: Figure = fact("- to the first deletion, ms");
const DELETING: Figure = fact("- to the last object being gone, ms");
const LEAVING: Figure = fact("- to the caller's exit, ms");
const OWN: Figure = goal("of it fairing's own: Kubernetes owes nothing, ms", "300", "100");
const CPU: Figure = fact("CPU time of the launcher from the last step on, ms");
const ALL_CPU: Figure = fact("CPU time of the launcher in all, ms");
const REQUESTS: Figure = goal("requests to the API server", "60", "30");
const MEMORY: Figure = fact("launcher's peak memory, 3 replicas, MiB");

/// What was seen of one run. Times are in ms since 1970.
pub(crate) struct Measured {
    pub(crate) began: f64,
    pub(crate) exited: f64,
    /// What the launcher printed, and when it could be read.
    pub(crate) lines: Vec<(f64, String)>,
    /// When the processes of each replica had ended, by its name, such as `worker-0`.
    pub(crate) ends: BTreeMap<String, f64>,
    /// All requests of the time, those of others too.
    pub(crate) requests: Vec<Request>,
    pub(crate) seen: Vec<Seen>,
    usage: Vec<Usage>,
    pub(crate) image: String,
}

/// A launcher's process.
pub(crate) struct Launcher {
    pub(crate) began: f64,
    pub(crate) id: u32,
    ending: JoinHandle<anyhow::Result<(f64, bool)>>,
    usage: JoinHandle<Vec<Usage>>,
    received: Receiver<(f64, String)>,
    lines: Vec<(f64, String)>,
}

/// How it ended.
pub(crate) struct Ended {
    pub(crate) exited: f64,
    pub(crate) success: bool,
    pub(crate) lines: Vec<(f64, String)>,
    pub(crate) usage: Vec<Usage>,
}

/// What a process had used until a moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    at: f64,
    /// User and system; in steps of 10.
    pub(crate) cpu_ms: f64,
    pub(crate) peak_mib: f64,
    /// Of the program's file and its libraries', now.
    pub(crate) file_mib: f64,
}

/// The last look before `time`.
pub(crate) fn usage_at(usage: &[Usage], time: f64) -> Usage {
    usage.iter().take_while(|usage| usage.at <= time).last().copied().unwrap_or_default()
}

impl Launcher {
    pub(crate) fn start(command: &mut std::process::Command) -> anyhow::Result<Self> {
        let began = now_ms();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let id = child.id();
        let (sender, received) = channel();
        follow(child.stdout.take().expect("piped"), sender.clone());
        follow(child.stderr.take().expect("piped"), sender);
        let usage = thread::spawn(move || watch_usage(id));
        let ending = thread::spawn(move || wait(&mut child));
        Ok(Self { began, id, ending, usage, received, lines: Vec::new() })
    }

    /// Waits for a line that contains `text`.
    pub(crate) fn wait_for(&mut self, text: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.lines.iter().any(|(_, line)| line.contains(text)) {
            match self.received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.lines.push(line),
                Err(_) => anyhow::bail!("the launcher does not say `{text}`: {}", said(&self.lines)),
            }
        }
        Ok(())
    }

    /// Waits for its end.
    pub(crate) fn end(self) -> anyhow::Result<Ended> {
        let Self { ending, usage, received, mut lines, .. } = self;
        let (exited, success) = ending.join().expect("waiting does not panic")?;
        let usage = usage.join().expect("looking does not panic");
        lines.extend(received.iter());
        Ok(Ended { exited, success, lines, usage })
    }
}

/// What was printed, on one line.
pub(crate) fn said(lines: &[(f64, String)]) -> String {
    lines.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join(" | ")
}

fn follow(from: impl Read + Send + 'static, sender: Sender<(f64, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = (now_ms(), String::from_utf8_lossy(&line).into_owned());
            if sender.send(line).is_err() {
                return;
            }
        }
    });
}

fn wait(child: &mut Child) -> anyhow::Result<(f64, bool)> {
    let status = child.wait()?;
    Ok((now_ms(), status.success()))
}

/// Looks at a process until it is gone; what its last 10 ms added is not seen.
fn watch_usage(id: u32) -> Vec<Usage> {
    let mut usage = Vec::new();
    while let Ok(status) = std::fs::read_to_string(format!("/proc/{id}/status")) {
        let mib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1_024.0)
        };
        // A process that has ended has no memory.
        let (Some(peak_mib), Some(file_mib)) = (mib("VmHWM:"), mib("RssFile:")) else { break };
        usage.push(Usage { at: now_ms(), cpu_ms: cpu_ms(id), peak_mib, file_mib });
        thread::sleep(NAP);
    }
    usage
}

/// Runs it once; the training takes longer than it must by `phase_ms`.
pub(crate) fn measure(place: &Place, phase_ms: u64) -> anyhow::Result<Measured> {
    let begin = place.audit.end()?;
    let training = TRAINING + Duration::from_millis(phase_ms);
    let mut launcher = Launcher::start(&mut place.launch(REPLICAS, training)?)?;
    let began = launcher.began;
    launcher.wait_for(FIRST_STEP)?;
    // All have joined, so that all are there.
    let ends = watch_ends()?;
    let list = place.runtime.block_on(place.api::<Pod>().list(&ListParams::default().limit(1)))?;
    let image = list.items.into_iter().next().and_then(|pod| pod.spec?.containers.into_iter().next()?.image);
    let Ended { exited, success, lines, usage } = launcher.end()?;
    let left = place.left()?;
    anyhow::ensure!(success, "the run failed: {}", said(&lines));
    anyhow::ensure!(left.is_empty(), "when the launcher had ended there still was: {}", left.join(", "));
    let mut last: BTreeMap<String, f64> = BTreeMap::new();
    for (name, end) in ends {
        let end = end.join().expect("waiting does not panic")?;
        last.entry(name).and_modify(|last| *last = last.max(end)).or_insert(end);
    }
    anyhow::ensure!(last.len() == REPLICAS as usize, "of the replicas only {:?} were found", last.keys());
    thread::sleep(LOGGED);
    Ok(Measured {
        began,
        exited,
        lines,
        ends: last,
        requests: place.audit.since(begin)?,
        seen: place.witness.since(began),
        usage,
        image: image.context("the pods have no image")?,
    })
}

/// Threads that wait for the ends of the replicas' processes, each with the replica's name.
fn watch_ends() -> anyhow::Result<Vec<(String, JoinHandle<anyhow::Result<f64>>)>> {
    let mut ends = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment);
        let variable = |name: &str| environment.split('\0').find_map(|line| line.strip_prefix(name));
        let (Some(role), Some(rank)) = (variable("FAIRING_PLACEMENT_ROLE="), variable("FAIRING_PLACEMENT_RANK="))
        else {
            continue;
        };
        let Some(pid) = Pid::from_raw(id) else { continue };
        let process = pidfd_open(pid, PidfdFlags::empty()).context("cannot wait for a replica's process")?;
        let end = thread::spawn(move || -> anyhow::Result<f64> {
            let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into()?, tv_nsec: 0 };
            let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience))?;
            anyhow::ensure!(ended > 0, "a replica does not end within {PATIENCE:?}");
            Ok(now_ms())
        });
        ends.push((format!("{role}-{rank}"), end));
    }
    Ok(ends)
}

impl Measured {
    /// The times behind `mark` in the lines of the replicas.
    fn marks(&self, mark: &str) -> impl Iterator<Item = f64> {
        self.lines.iter().filter_map(move |(_, line)| {
            let (_, text) = line.split_once(" | ")?;
            text.strip_prefix(mark)?.parse().ok()
        })
    }

    fn first(&self, mark: &str) -> anyhow::Result<f64> {
        self.marks(mark)
            .min_by(f64::total_cmp)
            .with_context(|| format!("no replica said `{mark}`: {}", said(&self.lines)))
    }

    fn last(&self, mark: &str) -> anyhow::Result<f64> {
        self.marks(mark)
            .max_by(f64::total_cmp)
            .with_context(|| format!("no replica said `{mark}`: {}", said(&self.lines)))
    }

    /// When the first line of a replica could be read on the terminal.
    fn first_line(&self) -> anyhow::Result<f64> {
        let lines = self.lines.iter().filter(|(_, line)| line.contains(&format!(" | {HERE}")));
        lines.map(|(at, _)| *at).min_by(f64::total_cmp).context("no replica said anything")
    }

    /// The launcher's requests.
    pub(crate) fn own_requests(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().filter(|request| request.user == USER && request.received <= self.exited)
    }

    fn last_end(&self) -> f64 {
        self.ends.values().copied().fold(f64::MIN, f64::max)
    }

    /// When the launcher, after the last step, first asked for something to be deleted.
    fn first_deletion(&self) -> anyhow::Result<f64> {
        let last = self.last(LAST_STEP)?;
        let is_it = |request: &&Request| request.verb.starts_with("delete") && request.received >= last;
        let mut deletions = self.own_requests().filter(is_it);
        Ok(deletions.next().context("nothing was deleted")?.received)
    }

    /// When the last object was gone.
    fn gone(&self) -> f64 {
        let deleted = self.seen.iter().filter(|seen| seen.state == State::Deleted);
        deleted.map(|seen| seen.at).fold(f64::MIN, f64::max)
    }

    /// Time from the last step to the exit in which Kubernetes owed nothing that was waited for. It owes: the answer to a
    /// request; once a replica's processes have ended, that its pod is said to have ended or is gone; from the first
    /// deletion on, that everything is gone.
    fn own_time(&self) -> anyhow::Result<f64> {
        let from = self.last(LAST_STEP)?;
        let requests = self.own_requests().filter(|request| !request.is_stream);
        let mut owed: Vec<[f64; 2]> = requests.map(|request| [request.received, request.ended]).collect();
        for (replica, end) in &self.ends {
            let told = self.seen.iter().find(|seen| {
                seen.kind == "pod" && seen.state >= State::Ended && seen.name.contains(&format!("-{replica}-"))
            });
            owed.push([*end, told.map_or(self.exited, |told| told.at)]);
        }
        owed.push([self.first_deletion()?, self.gone()]);
        Ok(self.exited - from - covered(owed, from, self.exited))
    }
}

/// How much of the time between `from` and `to` is in one of the intervals at least.
fn covered(mut intervals: Vec<[f64; 2]>, from: f64, to: f64) -> f64 {
    intervals.sort_by(|one, other| one[0].total_cmp(&other[0]));
    let (mut sum, mut reached) = (0.0, from);
    for [begin, end] in intervals {
        let (begin, end) = (begin.max(reached), end.min(to));
        if end > begin {
            sum += end - begin;
            reached = end;
        }
    }
    sum
}

/// Measures a run and a bare Job in turn.
pub(crate) fn table(place: &Place, repetitions: usize, warm: &Measured, timeline: bool) -> anyhow::Result<Table> {
    let mut table = Table::new("A run of 2 workers and a server, image present");
    let mut last = None;
    for number in 1..=repetitions {
        eprintln!("run: repetition {number} of {repetitions}");
        match once(place, &mut table, warm, 1_000 * number as u64 / repetitions as u64) {
            Ok(run) if timeline => {
                timeline::print(&run);
                last = Some(run);
            }
            Ok(run) => last = Some(run),
            Err(error) => table.fail(FIRST, &error),
        }
    }
    if let Some(last) = last {
        table.note(format!("requests of the last repetition: {}", audit::by_kind(last.own_requests())));
    }
    Ok(table)
}

/// One repetition. kubelet looks at its containers once a second, and what it does comes right behind such a look: the end of
/// what was before, and the address by which the workers find the server. `phase_ms` puts the launch and the last step of
/// each repetition at another distance from it, so that the figures are not those of a lucky or of the worst moment.
fn once(place: &Place, table: &mut Table, warm: &Measured, phase_ms: u64) -> anyhow::Result<Measured> {
    let phase = Duration::from_millis(phase_ms);
    thread::sleep(phase);
    let bare = bare::measure(place, &warm.image, 1_000 + phase_ms, Deletion::ReportedByForce)?;
    thread::sleep(phase);
    let run = measure(place, phase_ms)?;
    record(table, &run, &bare)?;
    Ok(run)
}

fn record(table: &mut Table, run: &Measured, bare: &Bare) -> anyhow::Result<()> {
    let (first, first_line) = (run.first(FIRST_STEP)?, run.first_line()?);
    let asked = run.own_requests().next().context("nothing was asked")?.received;
    let made = pods(&run.seen, "", State::There).next().context("no pod was made")?.at;
    let here = run.last(HERE)?;
    table.record(FIRST, first - run.began);
    table.record(ASKING, asked - run.began);
    table.record(PREPARING, made - asked);
    table.record(STARTING, here - made);
    let joined = run.first(JOINED)?;
    let mut servers = pods(&run.seen, "", State::Running).filter(|pod| pod.name.contains("-ps-0-"));
    let named = servers.next().context("the server was never said to run")?.at;
    table.record(NAMING, named - here);
    table.record(JOINING, joined - named);
    table.record(STEPPING, first - joined);
    table.record(FLOOR_STARTED, bare.started);
    table.record(FLOOR_RUNNING, bare.running);
    table.record(ABOVE_RUNNING, first - run.began - bare.running);
    table.record(LINE, first_line - run.began);
    table.record(FLOOR_LINE, bare.line);
    table.record(ABOVE_LINE, first_line - run.began - bare.line);
    let (last, end) = (run.last(LAST_STEP)?, run.last_end());
    let (deletion, gone) = (run.first_deletion()?, run.gone());
    table.record(END, run.exited - last);
    table.record(ENDING, end - last);
    table.record(REPORTING, deletion - end);
    table.record(DELETING, gone - deletion);
    table.record(LEAVING, run.exited - gone);
    table.record(FLOOR_GONE, bare.gone);
    table.record(FLOOR_REPORTED, bare.reported);
    table.record(FLOOR_DELETED, bare.deleted);
    table.record(ABOVE_GONE, run.exited - last - bare.gone);
    table.record(OWN, run.own_time()?);
    let all = usage_at(&run.usage, run.exited);
    table.record(CPU, all.cpu_ms - usage_at(&run.usage, last).cpu_ms);
    table.record(ALL_CPU, all.cpu_ms);
    table.record(REQUESTS, run.own_requests().count() as f64);
    table.record(MEMORY, all.peak_mib);
    Ok(())
}
