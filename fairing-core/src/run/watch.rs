//! Watches one run to its end: one thread that takes everything that happens, shows and keeps it, and comes to one ending.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::RunError;
use super::caller::{self, Heard};
use super::outcome::Outcome;
use super::signals::Interrupts;
use crate::exit::ExitCode;
use crate::launch::{Cancel, LaunchPlan, Launched, Launcher, ReplicaEvent};
use crate::observe::events::{Event, Exit, Progress};
use crate::observe::git::{self, Commit};
use crate::observe::hashes::{self, HASHES_DEADLINE, Hashes, Hashing};
use crate::observe::html;
use crate::observe::metrics::{Metrics, MetricsWriter};
use crate::observe::report::{Files, Host, Phase, Status, Summary, Versions, WorkerFacts};
use crate::observe::run_folder::{LogFiles, RunFolder};
use crate::observe::tensorboard::TensorBoard;
use crate::observe::terminal::View;
use crate::protocol::connection::Connection;
use crate::protocol::deadline::{GRACE, HEARTBEAT, WORST_LOSS, WORST_WAIT};
use crate::protocol::failure::{Failure, FailureKind, TOLD_TO_END};
use crate::protocol::message::{FromCoordinator, Numbered, ToCoordinator, WorkerEnd};
use crate::secure::Identity;
use crate::topology::{Placement, Rank, Replica, Role, Topology};

/// Messages that may wait for the watcher; a replica that writes faster than the terminal shows waits itself.
pub(super) const QUEUE: usize = 1024;

/// How often the watcher looks at clocks and signals while nothing happens.
const TICK: Duration = Duration::from_millis(50);

/// How long the coordinator has to make itself heard after a replica has ended that it has not mentioned yet. A quick
/// replica can end before the watcher has attached, or before it has read what the coordinator wrote; of a replica that
/// the coordinator never met there is nothing to be heard, and the others should not wait for it longer than this.
const HEARSAY: Duration = HEARTBEAT;

/// How often a thread that works is looked after: what it does is to be over as soon as it is.
const NAP: Duration = Duration::from_millis(2);

/// How long the start of the replicas may take before it is said that it is waited for.
const SILENCE: Duration = Duration::from_secs(2);

/// The signal of an end that is forced.
const SIGKILL: i32 = 9;

/// The signal by which a process is told to end.
const SIGTERM: i32 = 15;

/// What the watcher is told.
pub(super) enum Message {
    Replica(ReplicaEvent),
    Coordinator(Heard),
    /// Finish the round, evaluate, save.
    Stop,
    /// End everything now.
    Kill,
}

/// What the watcher needs to begin.
pub(super) struct Watch {
    pub(super) plan: LaunchPlan,
    pub(super) launcher: Box<dyn Launcher>,
    /// With what the caller proves to the coordinator who it is.
    pub(super) identity: Option<Identity>,
    pub(super) view: Box<dyn View>,
    pub(super) folder: RunFolder,
    pub(super) type_name: String,
    pub(super) hyperparameters: serde_json::Value,
    /// The folder of the user's Cargo.toml.
    pub(super) manifest: PathBuf,
    /// The data folder on this machine, which replicas elsewhere see at another place.
    pub(super) data_dir: Option<PathBuf>,
    pub(super) seed: u64,
    pub(super) extension: String,
    pub(super) started: (Instant, SystemTime),
    pub(super) messages: SyncSender<Message>,
    /// Whether somebody else has launched the run.
    pub(super) attached: bool,
}

impl Watch {
    /// Starts the replicas, and the threads that watch them.
    pub(super) fn start(self, received: Receiver<Message>) -> Result<JoinHandle<Result<Outcome, RunError>>, RunError> {
        let topology = self.plan.placements[0].topology;
        let metrics_file = MetricsWriter::create(self.folder.metrics())?;
        let workers = topology.workers.get() as usize;
        let mut tensorboard = TensorBoard::create(&self.folder.tensorboard(), workers, self.started.1)?;
        tensorboard.text("hyperparameters", &format!("{:#}", self.hyperparameters), self.started.1)?;
        let mut view = self.view;
        if let Some(advice) = unoptimised() {
            // Said, not shown: a shown warning is one line, and these lines are to be pasted.
            view.say(&format!("warning: {advice}"));
        }
        let placement = &self.plan.placements[0];
        let mode = if placement.mode.is_sync() { String::new() } else { format!(", {}", placement.mode) };
        view.say(&format!("{} with {topology}{mode}, seed {}", self.type_name, self.seed));
        let held = placement.rejoin;
        view.say(&format!(
            "a replica that is lost is reported within {}, a worker that keeps the others waiting within {}",
            humantime::format_duration(WORST_LOSS + held),
            humantime::format_duration(WORST_WAIT + held * 2),
        ));
        let manifest = self.manifest;
        let asking_git = std::thread::Builder::new().name("fairing-git".into());
        let asking_git = asking_git.spawn(move || git::commit(&manifest, git::GIT_DEADLINE)).ok();
        let hashing = Hashing::start(hashes::program(), self.data_dir);
        let interrupts = Interrupts::count();
        let (replica_events, from_replicas) = sync_channel(QUEUE);
        let (plan, launched) = launch(self.launcher, self.plan, &replica_events, &interrupts, view.as_mut())?;
        let messages = self.messages.clone();
        std::thread::spawn(move || {
            for event in from_replicas {
                if messages.send(Message::Replica(event)).is_err() {
                    return;
                }
            }
        });
        let ended = Arc::new(AtomicBool::new(false));
        let (messages, caller_ended) = (self.messages, ended.clone());
        let Placement { run, servers, join, .. } = plan.placements[0].clone();
        let way = caller::Route::new(launched.way(), self.identity);
        std::thread::spawn(move || {
            caller::listen(&way, &servers[0], &run, join, &caller_ended, |heard| {
                messages.send(Message::Coordinator(heard)).is_ok()
            });
        });
        let now = Instant::now();
        let watcher = Watcher {
            topology,
            launched,
            replica_events,
            view,
            logs: LogFiles::new(&self.folder),
            metrics_file: Some(metrics_file),
            tensorboard,
            metrics: Metrics::default(),
            folder: self.folder,
            plan,
            type_name: self.type_name,
            hyperparameters: self.hyperparameters,
            asking_git,
            commit: None,
            hashing: Some(hashing),
            hashes: Hashes::default(),
            seed: self.seed,
            extension: self.extension,
            started: self.started,
            spawned: now,
            interrupts,
            attached: self.attached,
            left: false,
            interrupts_seen: 0,
            stopping: false,
            killed: false,
            replaced: false,
            is_gone: false,
            ended,
            coordinator: None,
            joined: BTreeSet::new(),
            progress: BTreeMap::new(),
            exits: BTreeMap::new(),
            order_of_exit: Vec::new(),
            ended_here: BTreeSet::new(),
            awaited: BTreeSet::new(),
            restarted: BTreeSet::new(),
            overdue: BTreeMap::new(),
            lost: BTreeMap::new(),
            workers: Vec::new(),
            verdict: None,
            failure: None,
            out_of_time: None,
            complete: None,
            model: None,
            trouble: None,
            deadline: None,
            all_joined: None,
            training: None,
            trained: None,
        };
        Ok(std::thread::spawn(move || watcher.run(&received)))
    }
}

/// Starts the replicas; [`RunError::Killed`] if that is interrupted, once what was started is removed or has been waited for
/// long enough, which after a second interrupt is shorter.
///
/// In a thread of its own, since an engine may be stuck. Whatever it makes after that is removed: by that thread, or if the
/// program ends by what ends replicas without a launcher.
pub(super) fn launch(
    mut launcher: Box<dyn Launcher>,
    plan: LaunchPlan,
    events: &SyncSender<ReplicaEvent>,
    interrupts: &Interrupts,
    view: &mut dyn View,
) -> Result<(LaunchPlan, Box<dyn Launched>), RunError> {
    let events = events.clone();
    let cancel = Cancel::default();
    launcher.heed(cancel.clone());
    let patience = launcher.patience(&plan.run);
    let (done, starting) = sync_channel(1);
    std::thread::spawn(move || {
        let launched = launcher.launch(&plan, events);
        // With nobody waiting any more, what was started is dropped, which ends it.
        let _ = done.send((plan, launched));
    });
    let mut silent_until = Some(Instant::now() + SILENCE);
    let mut seen = 0;
    let mut give_up: Option<Instant> = None;
    loop {
        match starting.recv_timeout(TICK) {
            // An interrupt is left to the watcher, which ends a run that has not begun to train.
            Ok((plan, Ok(launched))) => return Ok((plan, launched)),
            Ok((_, Err(error))) => {
                let Some(left) = error.cancelled() else { return Err(error.into()) };
                for left in left {
                    view.show(&Event::Warning(left.clone()), Instant::now());
                }
                let nothing = if left.is_empty() { "; nothing of them is left" } else { "" };
                view.say(&format!("stopped before the replicas were started{nothing}"));
                return Err(RunError::Killed);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(RunError::Watcher("starting the replicas panicked".to_owned()));
            }
        }
        let (count, now) = (interrupts.so_far().min(2), Instant::now());
        if count == 0 && silent_until.take_if(|until| *until <= now).is_some() {
            view.say(&format!("waiting for {}", patience.what));
        }
        if count > seen {
            cancel.set();
            let wait = if count > 1 { patience.second } else { patience.first };
            give_up = Some(give_up.map_or(now + wait, |earlier| earlier.min(now + wait)));
            if !wait.is_zero() {
                let time = humantime::format_duration(wait);
                view.say(&format!(
                    "interrupted: waiting up to {time} for what was started of the replicas to be removed"
                ));
            }
            seen = count;
        }
        if give_up.is_some_and(|give_up| give_up <= now) {
            view.say(&format!("stopped before the replicas were started; {}", patience.then));
            return Err(RunError::Killed);
        }
    }
}

/// Does `work` and, if it takes long, says that `what` is waited for.
pub(super) fn patiently<T: Send>(view: &mut dyn View, what: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut silent_until = Some(Instant::now() + SILENCE);
        while !working.is_finished() {
            std::thread::sleep(NAP);
            if silent_until.take_if(|until| *until <= Instant::now()).is_some() {
                view.say(&format!("waiting for {what}"));
            }
        }
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What to say if fairing, and so most probably burn, was compiled without optimisation.
fn unoptimised() -> Option<String> {
    matches!(crate::build::OPT_LEVEL, "0" | "1").then(|| {
        "fairing was compiled with little or no optimisation, so training is about ten times slower than it could be. Use \
         `--release`, or add to the Cargo.toml of your workspace:\n\n    [profile.dev]\n    opt-level = 1\n\n    [profile.dev.package.\"*\"]\n    opt-level = 3\n"
            .to_owned()
    })
}

struct Watcher {
    topology: Topology,
    plan: LaunchPlan,
    launched: Box<dyn Launched>,
    /// For replicas that are started again.
    replica_events: SyncSender<ReplicaEvent>,
    view: Box<dyn View>,
    logs: LogFiles,
    metrics_file: Option<MetricsWriter>,
    tensorboard: TensorBoard,
    metrics: Metrics,
    folder: RunFolder,
    type_name: String,
    hyperparameters: serde_json::Value,
    /// Asks for the commit as it is when the run starts, beside the start of the replicas.
    asking_git: Option<JoinHandle<Option<Commit>>>,
    commit: Option<Commit>,
    /// Beside the run, as above.
    hashing: Option<Hashing>,
    hashes: Hashes,
    seed: u64,
    extension: String,
    started: (Instant, SystemTime),
    spawned: Instant,
    interrupts: Interrupts,
    interrupts_seen: usize,
    /// Whether somebody else has launched the run.
    attached: bool,
    /// Whether it is left to itself because the user wants that.
    left: bool,
    stopping: bool,
    killed: bool,
    /// Another process follows the run now.
    replaced: bool,
    /// Its end has removed all of it.
    is_gone: bool,
    ended: Arc<AtomicBool>,
    coordinator: Option<Connection>,
    joined: BTreeSet<Replica>,
    progress: BTreeMap<Rank, Progress>,
    exits: BTreeMap<Replica, Exit>,
    order_of_exit: Vec<Replica>,
    /// Replicas that were ended from here.
    ended_here: BTreeSet<Replica>,
    /// Replicas that the coordinator wants to be started again, as soon as their process has ended.
    awaited: BTreeSet<Replica>,
    /// Replicas that were started again.
    restarted: BTreeSet<Replica>,
    /// Lost replicas that the target has not ended or replaced by then, and that have to be ended from here.
    overdue: BTreeMap<Replica, Instant>,
    /// Workers that the run goes on without, and why.
    lost: BTreeMap<Replica, String>,
    /// How the workers' steps went, by rank.
    workers: Vec<WorkerEnd>,
    /// When what is known of an ended replica decides how long the others may go on.
    verdict: Option<Instant>,
    failure: Option<Failure>,
    /// How long it might have taken, if the target has ended it for that.
    out_of_time: Option<Duration>,
    /// Whether the completed run was stopped.
    complete: Option<bool>,
    model: Option<Vec<u8>>,
    /// What kept a file from being written.
    trouble: Option<RunError>,
    /// When the replicas that still run are ended.
    deadline: Option<Instant>,
    all_joined: Option<Instant>,
    training: Option<Instant>,
    trained: Option<Instant>,
}

impl Watcher {
    fn run(mut self, received: &Receiver<Message>) -> Result<Outcome, RunError> {
        while self.exits.len() < self.plan.placements.len() && !self.replaced {
            match received.recv_timeout(TICK) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => self.view.tick(Instant::now()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.look_at_clocks();
        }
        // What the coordinator said before its process ended may still be in the queue.
        let until = Instant::now() + GRACE;
        while (self.complete.is_none() || self.model.is_none())
            && !(self.replaced || self.killed || self.failure.is_some())
            && Instant::now() < until
        {
            match received.recv_timeout(TICK) {
                Ok(message) => self.take(message),
                Err(_) => break,
            }
        }
        self.ended.store(true, Ordering::Release);
        if self.replaced {
            // Whoever follows it now ends it.
            self.launched.let_go();
        } else {
            let launched = &mut self.launched;
            let what = "what is left of the run to be removed";
            let left = patiently(self.view.as_mut(), what, || launched.end());
            self.is_gone = left.is_empty();
            for left in left {
                self.show(&Event::Warning(left));
            }
        }
        self.finish()
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Replica(ReplicaEvent::Line { replica, stream, text }) => {
                let logged = self.logs.append(replica, &text);
                self.keep(logged.map_err(RunError::from));
                self.show(&Event::Line { replica, stream, text });
            }
            Message::Replica(ReplicaEvent::Exited { replica, exit }) => self.exited(replica, exit),
            Message::Replica(ReplicaEvent::Replaced { replica, exit }) => self.replaced(replica, exit),
            Message::Replica(ReplicaEvent::Doomed { replica, reason }) => self.doomed(replica, reason),
            Message::Replica(ReplicaEvent::Condemned { replica, reason }) => self.condemned(replica, reason),
            Message::Replica(ReplicaEvent::OutOfTime { deadline }) => self.out_of_time(deadline),
            Message::Replica(ReplicaEvent::Note { text }) => self.view.say(&text),
            Message::Coordinator(Heard::Attached(connection)) => {
                self.coordinator = Some(connection);
                if self.stopping {
                    self.tell_coordinator(ToCoordinator::Stop);
                }
                for replica in self.order_of_exit.clone() {
                    self.tell_coordinator(ToCoordinator::Ended(replica));
                }
            }
            Message::Coordinator(Heard::Said(message)) => self.hear(message),
            Message::Coordinator(Heard::Model { model, tensors }) => {
                let written = self.folder.write_model(&self.extension, &model);
                self.keep(written.map(drop).map_err(RunError::from));
                if !tensors.is_empty() {
                    let written = self.folder.write_safetensors(&tensors);
                    self.keep(written.map(drop).map_err(RunError::from));
                }
                self.model = Some(model);
                self.tell_coordinator(ToCoordinator::Acknowledged);
                self.end_by(Instant::now() + GRACE);
            }
            Message::Coordinator(Heard::Gone) => {
                self.coordinator = None;
                if self.complete.is_some() {
                    self.end_by(Instant::now() + GRACE);
                }
            }
            Message::Coordinator(Heard::Replaced) => self.replaced = true,
            Message::Stop => self.stop(),
            Message::Kill => self.kill(),
        }
    }

    fn show(&mut self, event: &Event) {
        self.view.show(event, Instant::now());
    }

    /// Keeps the first thing that could not be written; the run itself goes on.
    fn keep(&mut self, result: Result<(), RunError>) {
        if let Err(error) = result
            && self.trouble.is_none()
        {
            self.show(&Event::Warning(chain(&error)));
            self.trouble = Some(error);
        }
    }

    fn tell_coordinator(&mut self, message: ToCoordinator) {
        if let Some(coordinator) = &mut self.coordinator
            && coordinator.send(&Numbered::from(message)).is_err()
        {
            self.coordinator = None;
        }
    }

    fn exited(&mut self, replica: Replica, exit: Exit) {
        self.exits.insert(replica, exit);
        self.order_of_exit.push(replica);
        // What only follows from the cause, or from our own hand, would hide it.
        let echo = matches!(exit, Exit::Code(code) if ExitCode::from_code(code).is_some_and(ExitCode::is_echo));
        if !echo && !self.killed && !self.is_ours(replica, exit) {
            self.show(&Event::Exited { replica, exit });
        }
        if replica == self.topology.coordinator() {
            self.ended.store(true, Ordering::Release);
        }
        self.tell_coordinator(ToCoordinator::Ended(replica));
        if self.awaited.remove(&replica) {
            return self.restart(replica);
        }
        if self.complete.is_some() || self.killed || self.may_heal(replica) {
            return;
        }
        let now = Instant::now();
        self.end_by(now + GRACE);
        self.verdict.get_or_insert(now + HEARSAY);
    }

    /// A replica has ended, and the target itself starts another one.
    fn replaced(&mut self, replica: Replica, exit: Exit) {
        self.overdue.remove(&replica);
        self.joined.remove(&replica);
        if !self.killed && self.complete.is_none() && self.failure.is_none() {
            self.show(&Event::Warning(format!("{replica} {exit}; the cluster starts it again")));
        }
        self.tell_coordinator(ToCoordinator::Ended(replica));
    }

    /// A replica does not run and never will, so that the others wait for nothing.
    fn doomed(&mut self, replica: Replica, reason: String) {
        self.exits.insert(replica, Exit::Code(ExitCode::NeverLaunched.code().into()));
        if self.complete.is_none() && !self.killed {
            let failure = Failure { replica, kind: FailureKind::NeverStarted, message: reason, round: None };
            self.failure.get_or_insert(failure);
            self.end_by(Instant::now());
        }
    }

    /// The target has ended a replica and would again, so that nobody is to wait for its return.
    fn condemned(&mut self, replica: Replica, reason: String) {
        if self.complete.is_some() || self.killed {
            return;
        }
        // That somebody was lost by it is what the coordinator knows of it.
        if self.failure.as_ref().is_none_or(|failure| failure.kind == FailureKind::Lost) {
            self.failure = Some(Failure { replica, kind: FailureKind::Condemned, message: reason, round: None });
        }
        self.end_by(Instant::now() + GRACE);
    }

    /// The target ends the run, whatever its replicas are doing.
    fn out_of_time(&mut self, deadline: Duration) {
        // Who was lost just before was lost by it, and so is whoever does not start after it.
        let is_cause = self.failure.as_ref().is_none_or(|failure| failure.kind == FailureKind::Lost);
        if self.complete.is_none() && !self.killed && is_cause {
            self.out_of_time.get_or_insert(deadline);
            self.end_by(Instant::now());
        }
    }

    /// Whether the run may go on although this replica has ended: the coordinator decides.
    fn may_heal(&self, replica: Replica) -> bool {
        let placement = &self.plan.placements[0];
        replica.role == Role::Worker
            && !self.topology.is_serverless()
            && (!placement.mode.is_sync() || !placement.rejoin.is_zero())
            && self.failure.is_none()
            && self.coordinator.is_some()
            && (self.joined.contains(&replica)
                || self.lost.contains_key(&replica)
                // Sync workers wait for it, and need not wait until its time is over.
                || !placement.mode.is_sync() && self.restarted.contains(&replica))
    }

    /// Starts a lost worker again, which then takes its place in the run.
    fn restart(&mut self, replica: Replica) {
        if self.failure.is_some() || self.killed || self.complete.is_some() {
            return;
        }
        self.exits.remove(&replica);
        self.order_of_exit.retain(|other| *other != replica);
        self.ended_here.remove(&replica);
        self.joined.remove(&replica);
        // What its end seemed to mean before the coordinator spoke.
        (self.deadline, self.verdict) = (None, None);
        self.restarted.insert(replica);
        match self.launched.restart(&self.plan, replica, self.replica_events.clone()) {
            Ok(()) => self.show(&Event::Warning(format!("{replica} is started again"))),
            Err(error) => {
                // The run is held for it, and fails when the time is over.
                self.show(&Event::Warning(chain(&error)));
                self.exits.insert(replica, Exit::Code(ExitCode::NeverLaunched.code().into()));
            }
        }
    }

    /// The coordinator has lost a worker, and the run is held for it or goes on.
    fn lost(&mut self, replica: Replica, reason: String, rejoin: bool) {
        self.show(&Event::Lost { replica, reason: reason.clone(), rejoins: rejoin });
        if !rejoin {
            self.lost.insert(replica, reason);
        }
        if rejoin && self.launched.restarts_by_itself() {
            // Most often it has ended, and the target knows. If it has not heard of it soon, the replica is frozen or cut off.
            if self.joined.remove(&replica) {
                self.overdue.insert(replica, Instant::now() + HEARSAY * 3);
            }
            return;
        }
        if !self.exits.contains_key(&replica) {
            // Frozen, or cut off. Its place can be taken only once it is gone, and if nobody takes it, the end of the run
            // should not wait for it.
            self.ended_here.insert(replica);
            self.launched.kill(replica);
            if rejoin {
                self.awaited.insert(replica);
            }
        } else if rejoin {
            self.restart(replica);
        }
    }

    /// Whether a replica has ended without ever having met the coordinator, or the coordinator itself has: nobody will say
    /// more of it.
    fn is_unheard_of(&self, replica: &Replica) -> bool {
        match self.coordinator {
            Some(_) => !self.joined.contains(replica),
            None => self.exits.contains_key(&self.topology.coordinator()),
        }
    }

    fn end_by(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    fn hear(&mut self, message: FromCoordinator) {
        match message {
            FromCoordinator::Joined(replica) => {
                self.joined.insert(replica);
                self.overdue.remove(&replica);
                if self.joined.len() == self.plan.placements.len() {
                    // A worker that is started again joins a second time.
                    self.all_joined.get_or_insert_with(Instant::now);
                }
                self.show(&Event::Joined(replica));
            }
            FromCoordinator::Training => self.training = Some(Instant::now()),
            FromCoordinator::Progress(progress) => {
                self.trained = Some(Instant::now());
                self.progress.insert(progress.rank, progress);
                self.show(&Event::Progress(progress));
            }
            FromCoordinator::Metric(metric) => {
                let event = Event::Metric(metric);
                self.show(&event);
                let Event::Metric(metric) = event else { unreachable!("made just above") };
                if let Some(file) = &mut self.metrics_file {
                    let written = file.write(&metric, Instant::now());
                    self.keep(written.map_err(RunError::from));
                }
                let written = self.tensorboard.write(&metric, SystemTime::now(), Instant::now());
                self.keep(written.map_err(RunError::from));
                self.metrics.push(metric);
            }
            FromCoordinator::Lost { replica, reason, rejoin } => self.lost(replica, reason, rejoin),
            FromCoordinator::Slow { rank, step_seconds, others_seconds } => {
                let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
                self.show(&Event::Warning(format!(
                    "{} is slow: it computes {} per step, the others {}",
                    Replica::worker(rank.0),
                    milliseconds(step_seconds),
                    milliseconds(others_seconds),
                )));
            }
            FromCoordinator::Workers(workers) => self.workers = workers,
            FromCoordinator::RunFailed(failure) => {
                if failure.kind == FailureKind::Lost && !self.exits.contains_key(&failure.replica) {
                    // A frozen process would only use up the time that the others get to end.
                    self.ended_here.insert(failure.replica);
                    self.launched.kill(failure.replica);
                }
                self.failure.get_or_insert(failure);
                self.tell_coordinator(ToCoordinator::Acknowledged);
                self.end_by(Instant::now() + GRACE);
            }
            FromCoordinator::Complete { stopped, .. } => {
                self.complete = Some(stopped);
                if !self.killed {
                    // Replicas that have ended had done their part, and a large model may take its time.
                    self.deadline = None;
                }
            }
            // Meant for replicas.
            FromCoordinator::Welcome { .. }
            | FromCoordinator::Refused { .. }
            | FromCoordinator::Gathered { .. }
            | FromCoordinator::Heard { .. }
            | FromCoordinator::Roll(_)
            | FromCoordinator::Bring
            | FromCoordinator::Released
            // The caller's connection takes these apart.
            | FromCoordinator::Told { .. }
            | FromCoordinator::Replaced => {}
        }
    }

    fn stop(&mut self) {
        if self.stopping || self.complete.is_some() {
            return;
        }
        self.stopping = true;
        self.show(&Event::Stopping);
        if self.training.is_some() || self.coordinator.is_some() {
            self.tell_coordinator(ToCoordinator::Stop);
        }
    }

    /// Goes without touching the run.
    fn leave(&mut self) {
        (self.replaced, self.left) = (true, true);
    }

    fn kill(&mut self) {
        self.killed = true;
        self.end_by(Instant::now());
    }

    fn look_at_clocks(&mut self) {
        let now = Instant::now();
        let interrupts = self.interrupts.so_far();
        if interrupts > self.interrupts_seen {
            match (interrupts >= 2, self.training.is_none()) {
                // A run that somebody else launched is not ended by who has not even heard of it yet.
                (_, true) if self.attached => self.leave(),
                // Before training there is nothing to save, so the first already ends everything.
                (true, _) | (_, true) => self.kill(),
                (false, false) => self.stop(),
            }
            self.interrupts_seen = interrupts;
        }
        if let Some(file) = &mut self.metrics_file {
            let written = file.tick(now);
            self.keep(written.map_err(RunError::from));
        }
        let written = self.tensorboard.tick(now);
        self.keep(written.map_err(RunError::from));
        // Where a run goes on without its launcher, its coordinator alone says that nobody came.
        if !self.launched.restarts_by_itself()
            && self.joined.is_empty()
            && self.spawned.elapsed() > self.plan.placements[0].join + GRACE
        {
            self.end_by(now);
        }
        if self.verdict.take_if(|verdict| *verdict <= now).is_some()
            && self.complete.is_none()
            && self.failure.is_none()
            && self.exits.keys().any(|replica| self.is_unheard_of(replica))
        {
            self.end_by(now);
        }
        let overdue: Vec<Replica> =
            self.overdue.iter().filter(|(_, due)| **due <= now).map(|(replica, _)| *replica).collect();
        for replica in overdue {
            self.overdue.remove(&replica);
            self.launched.kill(replica);
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.deadline = None;
            for placement in &self.plan.placements {
                if !self.exits.contains_key(&placement.replica) {
                    self.ended_here.insert(placement.replica);
                    match self.launched.restarts_by_itself() {
                        // Killed one by one they would come again; the end of the run ends them all.
                        true => _ = self.exits.insert(placement.replica, Exit::Signal(SIGKILL)),
                        false => self.launched.kill(placement.replica),
                    }
                }
            }
        }
    }

    /// Whether a replica ended because it was killed from here.
    fn is_ours(&self, replica: Replica, exit: Exit) -> bool {
        matches!(exit, Exit::Signal(_)) && self.ended_here.contains(&replica)
    }

    /// Whose end was the cause, if the replica that is said to have failed was only told to end: some operators end everybody at
    /// once for a worker that they do not start again, also a coordinator that still waits for it.
    fn behind(&self, failure: &Failure) -> Option<Failure> {
        let was_told = failure.kind == FailureKind::Lost && failure.message == TOLD_TO_END;
        let is_own_end = |replica: &&Replica| match self.exits.get(*replica) {
            // Of a code below 0 nobody saw the end.
            None | Some(Exit::Signal(SIGTERM) | Exit::Code(..0)) => false,
            Some(exit @ Exit::Signal(_)) => !self.is_ours(**replica, *exit),
            Some(Exit::Code(code)) => ExitCode::from_code(*code)
                .is_none_or(|code| !code.is_echo() && !matches!(code, ExitCode::Success | ExitCode::Terminated)),
        };
        let replica = self.order_of_exit.iter().filter(|_| was_told).find(is_own_end).copied()?;
        Some(Failure { replica, kind: FailureKind::Lost, message: String::new(), round: failure.round })
    }

    /// The cause of a run that did not complete.
    fn cause(&self) -> Failure {
        if let Some(failure) = &self.failure {
            return self.behind(failure).unwrap_or_else(|| failure.clone());
        }
        let is_cause = |replica: &&Replica| match self.exits[*replica] {
            Exit::Code(code) => ExitCode::from_code(code).is_none_or(|code| !code.is_echo()),
            exit @ Exit::Signal(_) => !self.is_ours(**replica, exit),
        };
        let replica = self.order_of_exit.iter().find(is_cause).or(self.order_of_exit.first()).copied();
        let replica = replica.unwrap_or(self.topology.coordinator());
        let known = |code| match code {
            ExitCode::UserError => FailureKind::User,
            ExitCode::Layout => FailureKind::Layout,
            ExitCode::Configuration => FailureKind::Configuration,
            ExitCode::NeverLaunched => FailureKind::NeverLaunched,
            ExitCode::NotFinite => FailureKind::NotFinite,
            ExitCode::Protocol => FailureKind::Protocol,
            ExitCode::Timeout => FailureKind::Timeout,
            ExitCode::Panic => FailureKind::Panicked,
            ExitCode::Success | ExitCode::LostPeer | ExitCode::Stopped | ExitCode::Terminated => FailureKind::Lost,
        };
        let joined = self.joined.contains(&replica);
        let (kind, message) = match self.exits.get(&replica) {
            Some(Exit::Signal(_)) | None => (FailureKind::Lost, String::new()),
            Some(Exit::Code(code)) if joined => {
                (ExitCode::from_code(*code).map_or(FailureKind::Lost, known), String::new())
            }
            Some(Exit::Code(code)) => match ExitCode::from_code(*code) {
                // Codes that only fairing exits with, so this one did reach `launch()`.
                Some(code) if !matches!(code, ExitCode::Success | ExitCode::Panic | ExitCode::NeverLaunched) => {
                    (known(code), String::new())
                }
                _ => (
                    FailureKind::NeverLaunched,
                    "every replica runs `main` up to its first `launch()` (skip what only the caller needs where \
                     `fairing_core::in_replica()` is true)"
                        .to_owned(),
                ),
            },
        };
        Failure { replica, kind, message, round: None }
    }

    fn finish(mut self) -> Result<Outcome, RunError> {
        let now = Instant::now();
        if let Some(file) = self.metrics_file.take() {
            let written = file.finish();
            self.keep(written.map_err(RunError::from));
        }
        let written = self.tensorboard.flush();
        self.keep(written.map_err(RunError::from));
        self.view.finish(now);
        let complete = self.complete.filter(|_| self.model.is_some() && !self.killed);
        let error = match complete {
            Some(_) => self.trouble.take(),
            None if self.killed => Some(RunError::Killed),
            None if self.left => Some(RunError::Left { run: self.plan.run.clone() }),
            None if self.replaced => Some(RunError::Replaced),
            None if self.out_of_time.is_some() => self.out_of_time.map(|deadline| RunError::OutOfTime { deadline }),
            None => {
                let failure = self.cause();
                let exit = self.exits.get(&failure.replica).copied();
                Some(RunError::Failed {
                    exit: exit.filter(|exit| !self.is_ours(failure.replica, *exit)),
                    last_lines: self.launched.last_lines(failure.replica),
                    logs: self.folder.log(failure.replica),
                    failure,
                })
            }
        };
        let status = match (&error, complete) {
            (Some(error), _) => Status::Failed { cause: chain(error) },
            // Who stops a run knows that it is not complete.
            (None, Some(true)) => Status::Stopped,
            (None, _) if !self.lost.is_empty() => Status::Incomplete { lost: self.losses() },
            (None, _) => Status::Succeeded,
        };
        // It has its own deadline, long past by now.
        self.commit = self.asking_git.take().and_then(|asking| asking.join().ok().flatten());
        let patience = if self.killed || self.replaced { Duration::ZERO } else { HASHES_DEADLINE };
        self.hashes = self.hashing.take().map(|hashing| hashing.finish(patience)).unwrap_or_default();
        let mut summary = self.summary(status, now);
        let written = self.close(&mut summary);
        match error {
            Some(error) => {
                if matches!(error, RunError::Killed) {
                    let nothing = if self.is_gone { "; nothing is left running" } else { "" };
                    self.view.say(&format!("stopped before there was a result{nothing}"));
                }
                Err(error)
            }
            None => {
                written?;
                let current = std::env::current_dir().unwrap_or_default();
                self.view.say(&summary.text(self.folder.path(), &current));
                let outcome = Outcome::new(self.folder, &self.extension, self.metrics, summary);
                match &outcome.summary().status {
                    Status::Incomplete { lost } => {
                        let lost = lost.clone();
                        Err(RunError::Incomplete { lost, outcome: Box::new(outcome) })
                    }
                    _ => Ok(outcome),
                }
            }
        }
    }

    /// Whom the run went on without, and what that cost.
    fn losses(&self) -> String {
        let loss = |(replica, reason): (&Replica, &String)| {
            let examples = self.workers.get(replica.rank.index()).map_or(0, |worker| worker.dropped_examples);
            format!(
                "{replica} was lost ({reason}), and about {examples} examples that were its part were not trained on"
            )
        };
        self.lost.iter().map(loss).collect::<Vec<_>>().join("; ")
    }

    fn worker_facts(&self) -> Vec<WorkerFacts> {
        let facts = |(rank, worker): (u32, &WorkerEnd)| {
            let WorkerEnd { pace, dropped_examples, restarts } = *worker;
            WorkerFacts {
                rank: Rank(rank),
                steps: pace.steps,
                examples: pace.examples,
                dropped_examples,
                repeated_examples: pace.repeated_examples,
                step_seconds_median: pace.step_seconds_median,
                step_seconds_p95: pace.step_seconds_p95,
                wait_seconds: pace.wait_seconds,
                staleness_mean: pace.staleness_sum as f64 / pace.steps.max(1) as f64,
                staleness_max: pace.staleness_max,
                restarts,
            }
        };
        (0..).zip(&self.workers).map(facts).collect()
    }

    /// Writes what is written last, as much of it as can be.
    fn close(&mut self, summary: &mut Summary) -> Result<(), RunError> {
        let folder = self.folder.path();
        let page = self.folder.write_report(&html::page(summary, &self.metrics));
        summary.files = Files::list(folder);
        // Without the path to this run's folder, which may be moved.
        let text = summary.text(Path::new(&self.plan.run), Path::new(""));
        let board = self.tensorboard.text("summary", &text, SystemTime::now());
        self.folder.write_summary(summary)?;
        page?;
        Ok(board?)
    }

    fn summary(&self, status: Status, now: Instant) -> Summary {
        let examples: u64 = self.progress.values().map(|progress| progress.examples).sum();
        let phases = self.phases(now);
        let train = phases.iter().find(|phase| phase.name == "train").map(|phase| phase.seconds);
        Summary {
            run: self.plan.run.clone(),
            type_name: self.type_name.clone(),
            status,
            topology: self.topology,
            mode: Some(self.plan.placements[0].mode).filter(|mode| !mode.is_sync()).map(|mode| mode.to_string()),
            seed: self.seed,
            hyperparameters: self.hyperparameters.clone(),
            started: self.started.1,
            seconds: now.duration_since(self.started.0).as_secs_f64(),
            phases,
            examples,
            examples_per_second: train.filter(|seconds| *seconds > 0.0).map(|seconds| examples as f64 / seconds),
            metrics: self.metrics.last_values(),
            workers: self.worker_facts(),
            versions: Versions { rustc: crate::build::rustc(), burn: crate::build::burn(), ..Versions::default() },
            opt_level: Some(crate::build::OPT_LEVEL.to_owned()),
            git: self.commit.clone(),
            hashes: self.hashes.clone(),
            host: Host::current(),
            files: Files::list(self.folder.path()),
        }
    }

    /// The time from one point of the run to the next that was reached.
    fn phases(&self, now: Instant) -> Vec<Phase> {
        let points = [
            ("start", self.all_joined),
            ("join", self.training),
            ("train", self.trained),
            ("evaluate and save", Some(now)),
        ];
        let mut from = self.started.0;
        let mut phases = Vec::new();
        for (name, point) in points {
            let Some(point) = point else { continue };
            phases.push(Phase { name: name.to_owned(), seconds: point.duration_since(from).as_secs_f64() });
            from = point;
        }
        phases
    }
}

/// What a failed run says: the cause, how its replica ended, its last lines, where the rest is.
pub(super) fn describe_failure(failure: &Failure, exit: Option<&Exit>, last_lines: &[String], log: &Path) -> String {
    let mut text = failure.to_string().trim_end_matches([' ', ':']).to_owned();
    match exit {
        Some(exit @ Exit::Signal(_)) => write!(text, "; it {exit}").expect("a string can be written"),
        Some(exit @ Exit::Code(_))
            if failure.kind == FailureKind::Lost || failure.kind == FailureKind::NeverLaunched =>
        {
            write!(text, "; it {exit}").expect("a string can be written");
        }
        _ => {}
    }
    if !last_lines.is_empty() {
        write!(text, "\n\nlast lines of {}:", failure.replica).expect("a string can be written");
        for line in last_lines {
            write!(text, "\n  | {line}").expect("a string can be written");
        }
    }
    if log.exists() {
        write!(text, "\n\nits whole log: {}", log.display()).expect("a string can be written");
    }
    text
}

/// An error with everything behind it, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
