//! Whole runs over a network that breaks, drawn by seed: what heals must end with the fault-free bits, what does not must end
//! with a named error in time.
//!
//! Each seed is one run in threads of this process, with [`Faulty`] between its replicas and the memory transport. The test
//! plays the caller and the launcher: it starts lost workers again, and may say that a process has ended.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::config::{Env as _, ProcessEnv};
use crate::protocol::connection::ConnectionError;
use crate::protocol::deadline::{GRACE, ROUND, TICK, WORST_LOSS};
use crate::protocol::faulty::{Fault, Faulty, Life, Moved, Way, What};
use crate::protocol::frame::Header;

/// Seeds that are tried: every kind of fault equally often.
const SEEDS: u64 = 40 * KINDS.len() as u64;

/// Runs at a time. Most wait most of the time.
const AT_A_TIME: usize = 48;

/// Longer than anything may take, so that a hang is told from a wait.
const HANG: Duration = ROUND.checked_add(WORST_LOSS).expect("short").checked_mul(3).expect("short");

/// Several chunks, tensors over the borders of chunks and shards.
const SIZES: [usize; 4] = [9_001, 3, 16_000, 1];

/// No hello is longer.
const HELLO_BYTES: u64 = 256;

/// The seed to run alone.
const ALONE: &str = "FAULT_SEED";

/// What goes wrong in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    // These heal.
    DataCut,
    ControlCut,
    SeveralCuts,
    DataStall,
    ControlStall,
    LateBytes,
    PushTwice,
    MessageTwice,
    Restart,
    RestartAndCuts,
    TwoRestarts,
    AsyncRestart,
    StrangerTalksNonsense,
    StrangerKnocks,
    StrangerIsSilent,
    SecondProcess,
    // These do not.
    WorkerDies,
    ServerDies,
    WorkerTalksNonsense,
    ServerTalksNonsense,
    WorkerFreezes,
    DataStallsForEver,
    AnotherLayout,
    AnotherVersion,
    AnotherRun,
    ServerRestarted,
    DiesTwice,
    NobodyTakesThePlace,
}

const KINDS: [Trouble; 28] = [
    Trouble::DataCut,
    Trouble::ControlCut,
    Trouble::SeveralCuts,
    Trouble::DataStall,
    Trouble::ControlStall,
    Trouble::LateBytes,
    Trouble::PushTwice,
    Trouble::MessageTwice,
    Trouble::Restart,
    Trouble::RestartAndCuts,
    Trouble::TwoRestarts,
    Trouble::AsyncRestart,
    Trouble::StrangerTalksNonsense,
    Trouble::StrangerKnocks,
    Trouble::StrangerIsSilent,
    Trouble::SecondProcess,
    Trouble::WorkerDies,
    Trouble::ServerDies,
    Trouble::WorkerTalksNonsense,
    Trouble::ServerTalksNonsense,
    Trouble::WorkerFreezes,
    Trouble::DataStallsForEver,
    Trouble::AnotherLayout,
    Trouble::AnotherVersion,
    Trouble::AnotherRun,
    Trouble::ServerRestarted,
    Trouble::DiesTwice,
    Trouble::NobodyTakesThePlace,
];

impl Trouble {
    fn of(seed: u64) -> Self {
        KINDS[(seed % KINDS.len() as u64) as usize]
    }

    fn heals(self) -> bool {
        self < Trouble::WorkerDies
    }

    fn restarts(self) -> bool {
        use Trouble::*;
        matches!(self, Restart | RestartAndCuts | TwoRestarts | AsyncRestart | DiesTwice | NobodyTakesThePlace)
    }
}

/// What the workers of a run do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    workers: u32,
    ps: u32,
    mode: ModeOf,
    collectives: bool,
    clips: bool,
    /// The model's state moves between its averages, and the learning rate depends on an evaluation: what a worker that is
    /// started again does not know.
    remembers: bool,
}

/// [`Mode`], as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ModeOf {
    Sync,
    Async,
    Bounded,
}

impl Shape {
    fn draw(draw: &mut ChaCha8Rng, kind: Trouble) -> Self {
        let mode = match draw.random_range(0..10) {
            _ if kind == Trouble::AsyncRestart => [ModeOf::Async, ModeOf::Bounded][draw.random_range(0..2)],
            _ if matches!(kind, Trouble::WorkerDies | Trouble::WorkerFreezes) => ModeOf::Sync,
            _ if kind.restarts() => ModeOf::Sync,
            0 => ModeOf::Async,
            1 => ModeOf::Bounded,
            _ => ModeOf::Sync,
        };
        let least_ps = match kind {
            Trouble::ServerRestarted => 2,
            _ if kind.restarts() => 1,
            _ => 0,
        };
        let is_sync = mode == ModeOf::Sync;
        Self {
            workers: draw.random_range(2..=4),
            ps: draw.random_range(least_ps..=3),
            mode,
            collectives: draw.random_range(0..3) == 0,
            clips: is_sync && draw.random_range(0..4) == 0,
            remembers: is_sync && !kind.restarts() && draw.random(),
        }
    }

    fn topology(self) -> Topology {
        Topology::new(self.workers, self.ps)
    }

    fn mode(self) -> Mode {
        match self.mode {
            ModeOf::Sync => Mode::Sync,
            ModeOf::Async => Mode::Async,
            ModeOf::Bounded => Mode::Bounded { staleness: 1 },
        }
    }

    fn train(self, worker: &Worker, another_layout: bool) -> anyhow::Result<Flat> {
        let data: Vec<f32> = (0..30).map(|i| i as f32).collect();
        let mut start = Flat::new(&SIZES, worker.rank() as f32);
        if another_layout {
            start.trained[3].push(0.0);
        }
        let is_sync = self.mode == ModeOf::Sync;
        if !is_sync {
            start.state.clear();
        }
        let optimizer: Optimizer = match (is_sync, self.clips) {
            (false, _) => Sgd::new().into(),
            (true, false) => Adam::new().into(),
            (true, true) => Adam::new().clip_global_norm(0.5).into(),
        };
        let mut rate = 0.125;
        let mut model = worker.join(start, optimizer)?;
        for epoch in worker.epochs(2) {
            for batch in epoch.batches(&data, 12 / worker.workers()) {
                worker.metric("loss", f64::from(batch[0]));
                if self.remembers {
                    model.state[0] += batch[0];
                }
                let gradient = match is_sync {
                    true => model.gradient(&batch),
                    // Equal for all, so that the order of the updates does not show.
                    false => {
                        let every_other = |tensor: usize| tensor != 1 || worker.round().is_multiple_of(2);
                        let ones = SIZES.iter().enumerate();
                        ones.map(|(tensor, len)| every_other(tensor).then(|| vec![1.0; *len])).collect()
                    }
                };
                model = worker.step(model, Gradient::mean(gradient, batch.len()), rate)?;
            }
            if self.collectives {
                let (rank, workers) = (worker.rank() as f64, worker.workers() as f64);
                let sum = worker.sum(&[1.0, rank])?;
                anyhow::ensure!(sum == [workers, workers * (workers - 1.0) / 2.0], "sums to {sum:?}");
                let mean = worker
                    .evaluate(&data, |part| part.iter().map(|x| f64::from(*x)).sum::<f64>() / part.len() as f64)?;
                anyhow::ensure!(mean == 14.5, "measures {mean}");
                let of_model = worker.evaluate(&data, |_| f64::from(model.trained[2][17]))?;
                if self.remembers {
                    rate += of_model.abs() * 1e-3;
                }
            }
        }
        Ok(model)
    }
}

/// One run and what is done to it.
struct Case {
    kind: Trouble,
    shape: Shape,
    rejoin: Duration,
    /// By replica and life.
    faults: BTreeMap<(Replica, usize), Vec<Fault>>,
    /// The other process that the death of [`What::DieOther`] is of.
    dies: Option<Replica>,
    /// The one replica that is different from the start.
    odd: Option<Replica>,
    /// The launcher sees a process end and says so.
    launcher_sees: bool,
    /// Who else talks to the servers.
    stranger: Option<Stranger>,
    expected: Expected,
}

/// How a run must end.
#[derive(Debug, Clone)]
enum Expected {
    Right,
    Fails { kinds: Vec<FailureKind>, replicas: Vec<Replica>, wait: Duration },
}

/// A peer that is no part of the run.
#[derive(Debug, Clone)]
struct Stranger {
    server: usize,
    pause: Duration,
    hello: Option<Hello>,
    bytes: Vec<u8>,
    stays: bool,
    /// Not before all ranks are taken.
    waits_for_training: bool,
}

/// How a run went.
#[derive(Default)]
struct Observed {
    model: Option<Vec<u8>>,
    told: Option<Failure>,
    /// How the last life of each replica ended, unless it was killed.
    ends: BTreeMap<Replica, Result<(), Failure>>,
    /// How refused processes ended.
    refused: Vec<Result<(), Failure>>,
    restarts: usize,
    /// A worker had returned from `train` when the last fault happened.
    was_late: bool,
    /// Some replica had not been heard of yet by then.
    was_early: bool,
    fired: bool,
    coordinator_died: bool,
    /// From the last fault, or the start, until all had ended.
    took: Duration,
    hung: Vec<Replica>,
    moved: BTreeMap<Replica, BTreeMap<usize, Moved>>,
}

/// What happens in a run, as the test sees it.
enum Event {
    Told(FromCoordinator),
    Model(Vec<u8>),
    Caller(Connection),
    CallerEnded,
    Trained(Instant),
    Ended { index: usize, result: Result<(), Failure> },
}

/// One process of a run.
struct Process {
    replica: Replica,
    life: Arc<Life>,
    status: Arc<RunStatus>,
    ended: bool,
    /// It claims a rank that is taken.
    is_second: bool,
}

struct Running {
    case: Case,
    transport: Arc<dyn Transport>,
    servers: Vec<Address>,
    forgets: bool,
    events: Sender<Event>,
    processes: Vec<Process>,
}

impl Running {
    fn start(&mut self, replica: Replica, is_second: bool) {
        let number = self.processes.iter().filter(|process| process.replica == replica && !process.is_second).count();
        let faults = self.case.faults.get(&(replica, number)).cloned().unwrap_or_default();
        let faults = if is_second { Vec::new() } else { faults };
        let (life, status) = (Life::new(faults), Arc::new(RunStatus::default()));
        status.forgets.store(self.forgets, Ordering::Relaxed);
        let dying = status.clone();
        life.on_death(move || {
            // Of nobody in the run, so that it leaves without a word.
            let replica = Replica::worker(99);
            dying.fail(Failure { replica, kind: FailureKind::Lost, message: "killed".into(), round: None });
        });
        let is_odd = self.case.odd == Some(replica);
        let (kind, shape) = (self.case.kind, self.case.shape);
        let context = Context {
            placement: Placement {
                run: if is_odd && kind == Trouble::AnotherRun { "another" } else { "test" }.into(),
                replica,
                topology: shape.topology(),
                seed: 3,
                threads: 1,
                servers: self.servers.clone(),
                data_dir: None,
                mode: shape.mode(),
                rejoin: self.case.rejoin,
                join: JOIN,
                keep_result: KEEP_RESULT,
                first_stays: false,
            },
            transport: Arc::new(Faulty::new(self.transport.clone(), life.clone())),
            status: status.clone(),
            start: Position::default(),
        };
        let (index, events) = (self.processes.len(), self.events.clone());
        self.processes.push(Process { replica, life, status, ended: false, is_second });
        std::thread::spawn(move || {
            let result = match replica.role {
                Role::Ps => serve(&context),
                Role::Worker => work(&context, |worker| {
                    let model = shape.train(worker, is_odd && kind == Trouble::AnotherLayout);
                    if model.is_ok() {
                        let _ = events.send(Event::Trained(Instant::now()));
                    }
                    model
                })
                .map(drop),
            };
            let _ = events.send(Event::Ended { index, result });
        });
    }

    fn call(&self) {
        let (transport, address, events) = (self.transport.clone(), self.servers[0].clone(), self.events.clone());
        std::thread::spawn(move || {
            let _ = watch(transport.as_ref(), &address, &events);
            let _ = events.send(Event::CallerEnded);
        });
    }

    fn let_in(&self, stranger: Stranger) {
        let (transport, address) = (self.transport.clone(), self.servers[stranger.server].clone());
        std::thread::spawn(move || {
            std::thread::sleep(stranger.pause);
            let Ok(stream) = transport.connect(&address) else { return };
            let mut connection = Connection::new(stream);
            // Whatever becomes of it.
            let _ = stranger.hello.map(|hello| connection.send(&hello));
            let _ = connection.write_all(&stranger.bytes, &at_most(TICK));
            if stranger.stays {
                let _ = connection.receive::<FromCoordinator>(&at_most(HANG));
            }
        });
    }
}

/// The caller: hears what there is, takes the model.
fn watch(transport: &dyn Transport, address: &Address, events: &Sender<Event>) -> Result<(), ConnectionError> {
    let deadline = Instant::now() + HELLO;
    let stream = crate::protocol::transport::connect_patiently(transport, address, deadline, &|| Ok(()));
    let mut connection = Connection::new(stream.map_err(ConnectionError::Broken)?);
    let incarnation = Incarnation::fresh();
    let hello =
        Hello { run: "test".into(), speaker: Speaker::Caller, incarnation, purpose: Purpose::Follow { heard: 0 } };
    connection.send(&hello)?;
    let _ = events.send(Event::Caller(connection.try_clone().map_err(ConnectionError::Broken)?));
    loop {
        let message = connection.receive::<FromCoordinator>(&at_most(HANG))?.untold();
        let is_end = matches!(message, FromCoordinator::Complete { .. } | FromCoordinator::RunFailed(_));
        if matches!(message, FromCoordinator::Complete { .. }) {
            let model = connection.receive_frame(Kind::Model, &at_most(HELLO))?;
            connection.receive_frame(Kind::Tensors, &at_most(HELLO))?;
            let _ = events.send(Event::Model(model));
        }
        let _ = events.send(Event::Told(message));
        if is_end {
            return connection.send(&Numbered::from(ToCoordinator::Acknowledged));
        }
    }
}

/// Runs a case to its end.
fn run(case: Case, forgets: bool) -> (Case, Observed) {
    let topology = case.shape.topology();
    let (events, happening) = channel();
    let mut running = Running {
        transport: Arc::new(Memory::default()),
        servers: topology.servers().map(|server| Address::Memory(server.file_name())).collect(),
        forgets,
        events,
        processes: Vec::new(),
        case,
    };
    let started = Instant::now();
    for replica in topology.replicas() {
        running.start(replica, false);
    }
    if let Some(dies) = running.case.dies {
        let found = |replica| running.processes.iter().find(|process| process.replica == replica).expect("started");
        let died = found(dies).life.clone();
        running.processes.iter().for_each(|process| process.life.takes_along(&died));
    }
    running.call();
    let mut observed = Observed::default();
    observe(&mut running, &happening, started, &mut observed);
    for process in &running.processes {
        observed.moved.insert(process.replica, process.life.moved());
    }
    (running.case, observed)
}

fn observe(running: &mut Running, happening: &Receiver<Event>, started: Instant, observed: &mut Observed) {
    let coordinator = running.case.shape.topology().coordinator();
    let (mut caller, mut caller_ended) = (None::<Connection>, false);
    let mut trained_at = Vec::new();
    let mut server_restarted = false;
    let mut joined: BTreeMap<Replica, Instant> = BTreeMap::new();
    let mut over: Option<Instant> = None;
    loop {
        match happening.recv_timeout(TICK) {
            Ok(Event::Caller(connection)) => {
                caller = Some(connection);
                if let Some(stranger) = running.case.stranger.take_if(|stranger| !stranger.waits_for_training) {
                    running.let_in(stranger);
                }
            }
            Ok(Event::Told(message)) => match message {
                FromCoordinator::Lost { replica, rejoin: true, .. }
                    if running.case.kind != Trouble::NobodyTakesThePlace =>
                {
                    observed.restarts += 1;
                    running.start(replica, false);
                }
                FromCoordinator::Training => {
                    if let Some(stranger) = running.case.stranger.take() {
                        running.let_in(stranger);
                    }
                }
                FromCoordinator::Joined(replica) => {
                    joined.insert(replica, Instant::now());
                    if running.case.kind == Trouble::SecondProcess && running.case.odd == Some(replica) {
                        running.start(replica, true);
                    }
                }
                FromCoordinator::RunFailed(failure) => {
                    over.get_or_insert_with(Instant::now);
                    observed.told = Some(failure);
                }
                _ => {}
            },
            Ok(Event::Model(model)) => observed.model = Some(model),
            Ok(Event::CallerEnded) => caller_ended = true,
            Ok(Event::Trained(at)) => trained_at.push(at),
            Ok(Event::Ended { index, result }) => {
                let process = &mut running.processes[index];
                process.ended = true;
                let (replica, died) = (process.replica, process.life.is_dead());
                if process.is_second {
                    observed.refused.push(result);
                } else if !died && !process.life.is_frozen() {
                    observed.ends.insert(replica, result);
                } else if let Some(caller) = caller.as_mut().filter(|_| running.case.launcher_sees) {
                    let _ = caller.send(&Numbered::from(ToCoordinator::Ended(replica)));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("this thread holds a sender"),
        }
        if running.case.kind == Trouble::ServerRestarted && !server_restarted {
            let died = running.processes.iter().find(|process| process.life.is_dead()).map(|process| process.replica);
            if let Some(replica) = died {
                server_restarted = true;
                running.start(replica, true);
            }
        }
        // As the launcher does with one that came too late to hear of the end.
        if over.is_some_and(|since| since.elapsed() > GRACE) {
            let unheard = |process: &&Process| !process.ended && !joined.contains_key(&process.replica);
            running.processes.iter().filter(unheard).for_each(|process| process.life.die());
        }
        let is_second = running.case.kind == Trouble::SecondProcess;
        let alive = |process: &&Process| {
            let is_awaited = is_second || !process.is_second;
            !process.ended && !process.life.is_dead() && !process.life.is_frozen() && is_awaited
        };
        let coordinates = |process: &Process| process.replica == coordinator && !process.is_second;
        let is_out = |process: &Process| process.life.is_dead() || process.life.is_frozen();
        observed.coordinator_died = running.processes.iter().any(|process| coordinates(process) && is_out(process));
        if (caller_ended || observed.coordinator_died) && running.processes.iter().filter(alive).count() == 0 {
            break;
        }
        if started.elapsed() > HANG {
            observed.hung = running.processes.iter().filter(alive).map(|process| process.replica).collect();
            break;
        }
    }
    let fired = running.processes.iter().filter_map(|process| process.life.fired()).max();
    observed.fired = fired.is_some();
    observed.took = fired.unwrap_or(started).elapsed();
    observed.was_late = fired.is_some_and(|fired| trained_at.iter().any(|at| *at <= fired));
    let unheard = |fired: Instant| {
        let mut heard_at = running.processes.iter().map(|process| joined.get(&process.replica));
        heard_at.any(|at| at.is_none_or(|at| *at > fired))
    };
    observed.was_early = fired.is_some_and(unheard);
    // What is left of a run that is over, or hangs, must not stay.
    for process in &running.processes {
        process.life.die();
        process.status.fail(Failure {
            replica: process.replica,
            kind: FailureKind::Timeout,
            message: "the test is over".into(),
            round: None,
        });
    }
}

/// The run without faults.
struct Baseline {
    model: Vec<u8>,
    moved: BTreeMap<Replica, BTreeMap<usize, Moved>>,
}

fn baseline(shape: Shape) -> Arc<Baseline> {
    type Known = Mutex<HashMap<Shape, Arc<OnceLock<Arc<Baseline>>>>>;
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let cell = KNOWN.get_or_init(Known::default).lock().unwrap().entry(shape).or_default().clone();
    cell.get_or_init(|| {
        let (_, observed) = run(Case::healthy(Trouble::DataCut, shape), false);
        let model = observed.model.unwrap_or_else(|| panic!("{shape:?} fails without faults: {:?}", observed.told));
        Arc::new(Baseline { model, moved: observed.moved })
    })
    .clone()
}

impl Case {
    fn healthy(kind: Trouble, shape: Shape) -> Self {
        Self {
            kind,
            shape,
            rejoin: Duration::ZERO,
            faults: BTreeMap::new(),
            dies: None,
            odd: None,
            launcher_sees: false,
            stranger: None,
            expected: Expected::Right,
        }
    }

    fn draw(seed: u64) -> Self {
        let kind = Trouble::of(seed);
        let mut draw = ChaCha8Rng::seed_from_u64(seed);
        let shape = Shape::draw(&mut draw, kind);
        let baseline = baseline(shape);
        let case = Self { launcher_sees: draw.random_range(0..4) > 0, ..Self::healthy(kind, shape) };
        let mut drawing = Drawing { draw, baseline, case };
        drawing.fill();
        drawing.case
    }
}

/// A case in the making.
struct Drawing {
    draw: ChaCha8Rng,
    baseline: Arc<Baseline>,
    case: Case,
}

impl Drawing {
    fn fill(&mut self) {
        use Trouble::*;
        let topology = self.case.shape.topology();
        let worker = self.worker();
        let another = Replica::worker((worker.rank.0 + 1) % self.case.shape.workers);
        match self.case.kind {
            DataCut => {
                let connection = self.data(worker);
                self.cut(worker, connection);
            }
            ControlCut => {
                let replica = self.anyone();
                self.cut(replica, 0);
            }
            SeveralCuts => self.cuts(6),
            DataStall => {
                let connection = self.data(worker);
                let pause = self.millis(20..(LEASE.as_millis() as u64 * 3 / 2));
                self.add(worker, connection, |byte| What::Stall { byte, pause });
            }
            ControlStall => {
                let replica = self.anyone();
                // Shorter than a lease by what the machine may add.
                let pause = self.millis(20..LEASE.as_millis() as u64 / 2);
                self.add(replica, 0, |byte| What::Stall { byte, pause });
            }
            LateBytes => {
                let connection = self.anything(worker);
                let pause = self.millis(1..4);
                self.add(worker, connection, |byte| What::Trickle { byte, pause });
            }
            PushTwice => {
                let connection = self.data(worker);
                let frames = self.baseline.moved[&worker][&connection].frames[0];
                // The last frames are the pushes.
                let frame = self.draw.random_range(frames.saturating_sub(5)..frames);
                self.add_exactly(worker, 0, connection, Way::Out, What::Repeat { frame });
            }
            MessageTwice => {
                let replica = self.anyone();
                let frames = self.baseline.moved[&replica][&0].frames[0];
                let frame = self.draw.random_range(1..frames.max(2));
                self.add_exactly(replica, 0, 0, Way::Out, What::Repeat { frame });
            }
            Restart | AsyncRestart => {
                self.case.rejoin = LEASE * 10;
                self.dies(worker, 0);
            }
            RestartAndCuts => {
                self.case.rejoin = LEASE * 10;
                self.dies(worker, 0);
                self.cuts(3);
            }
            TwoRestarts => {
                self.case.rejoin = LEASE * 10;
                self.dies(worker, 0);
                self.dies(another, 0);
            }
            StrangerTalksNonsense | StrangerKnocks | StrangerIsSilent => self.stranger(worker),
            SecondProcess => self.case.odd = Some(worker),
            WorkerDies => {
                self.dies(worker, 0);
                self.fails(&[FailureKind::Lost], &[worker], Duration::ZERO);
            }
            ServerDies => {
                let server = topology.server(self.draw.random_range(0..topology.server_count() as u32));
                self.other_dies(server);
                self.fails(&[FailureKind::Lost], &[server], Duration::ZERO);
            }
            WorkerTalksNonsense => {
                let connection = self.anything(worker);
                let frames = self.baseline.moved[&worker][&connection].frames[0];
                let frame = self.draw.random_range(1..frames);
                let what = if self.draw.random() { What::Garble { frame } } else { What::GarblePayload { frame } };
                self.add_exactly(worker, 0, connection, Way::Out, what);
                self.fails(&[FailureKind::Protocol], &[worker], Duration::ZERO);
            }
            ServerTalksNonsense => {
                let connection = self.anything(worker);
                let frames = self.baseline.moved[&worker][&connection].frames[1];
                let frame = self.draw.random_range(0..frames);
                self.add_exactly(worker, 0, connection, Way::In, What::Garble { frame });
                match connection {
                    // Without a welcome the worker cannot say to the others why it ends.
                    0 if frame == 0 => {
                        let both = [topology.coordinator(), worker];
                        self.fails(&[FailureKind::Protocol, FailureKind::Lost], &both, Duration::ZERO);
                    }
                    0 => self.fails(&[FailureKind::Protocol], &[topology.coordinator()], Duration::ZERO),
                    _ => {
                        let server = self.behind(worker, connection);
                        self.fails(&[FailureKind::Protocol], &[server], Duration::ZERO);
                    }
                }
            }
            WorkerFreezes => {
                let connection = self.anything(worker);
                self.add(worker, connection, |byte| What::Freeze { byte });
                self.fails(&[FailureKind::Lost], &[worker], Duration::ZERO);
            }
            DataStallsForEver => {
                let connection = self.data(worker);
                self.add(worker, connection, |byte| What::Stall { byte, pause: HANG * 2 });
                // Each end may be the first to lose patience with the other.
                let server = self.behind(worker, connection);
                self.fails(&[FailureKind::Timeout], &[worker, server], ROUND);
            }
            AnotherLayout => {
                self.case.odd = Some(worker);
                let all: Vec<Replica> = (0..self.case.shape.workers).map(Replica::worker).collect();
                self.fails(&[FailureKind::Layout], &all, Duration::ZERO);
            }
            AnotherVersion | AnotherRun => {
                // If it is the coordinator, all others are of another version.
                let others: Vec<Replica> =
                    topology.replicas().filter(|other| *other != topology.coordinator()).collect();
                let replica = others[self.draw.random_range(0..others.len())];
                self.case.odd = Some(replica);
                if self.case.kind == AnotherVersion {
                    self.add_exactly(replica, 0, 0, Way::Out, What::Version);
                }
                self.fails(&[FailureKind::Timeout, FailureKind::Protocol, FailureKind::Lost], &[replica], JOIN);
            }
            ServerRestarted => {
                let server = topology.server(self.draw.random_range(1..topology.server_count() as u32));
                self.other_dies(server);
                self.fails(&[FailureKind::Lost], &[server], Duration::ZERO);
            }
            DiesTwice => {
                self.case.rejoin = LEASE * 4;
                self.dies(worker, 0);
                self.dies(worker, 1);
                self.fails(&[FailureKind::Lost], &[worker], Duration::ZERO);
            }
            NobodyTakesThePlace => {
                self.case.rejoin = LEASE / 2;
                self.dies(worker, 0);
                self.fails(&[FailureKind::Lost], &[worker], LEASE / 2);
            }
        }
    }

    fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.draw.random_range(range))
    }

    fn worker(&mut self) -> Replica {
        Replica::worker(self.draw.random_range(0..self.case.shape.workers))
    }

    fn anyone(&mut self) -> Replica {
        let all: Vec<Replica> = self.case.shape.topology().replicas().collect();
        all[self.draw.random_range(0..all.len())]
    }

    /// A connection of a worker to a server; number 0 is the one to the coordinator.
    fn data(&mut self, worker: Replica) -> usize {
        let remote = self.case.shape.topology().servers().filter(|server| *server != worker).count();
        self.draw.random_range(1..=remote)
    }

    fn anything(&mut self, worker: Replica) -> usize {
        if self.draw.random_range(0..3) == 0 { 0 } else { self.data(worker) }
    }

    /// The server at the other end of a worker's connection.
    fn behind(&self, worker: Replica, connection: usize) -> Replica {
        let mut remote = self.case.shape.topology().servers().filter(|server| *server != worker);
        remote.nth(connection - 1).expect("drawn below their number")
    }

    /// Some byte of a connection, among the first ones more often.
    fn byte(&mut self, replica: Replica, connection: usize, way: Way) -> u64 {
        let moved = self.baseline.moved.get(&replica).and_then(|all| all.get(&connection)).copied();
        // A connection that replaces another one has a hello and an answer at least.
        let bytes = moved.map_or(2000, |moved| moved.bytes[way as usize]).max(1);
        let most = if self.draw.random_range(0..4) == 0 { bytes.min(400) } else { bytes };
        self.draw.random_range(0..most)
    }

    fn add(&mut self, replica: Replica, connection: usize, what: impl Fn(u64) -> What) {
        let way = if self.draw.random() { Way::Out } else { Way::In };
        let byte = self.byte(replica, connection, way);
        self.add_exactly(replica, 0, connection, way, what(byte));
    }

    fn add_exactly(&mut self, replica: Replica, life: usize, connection: usize, way: Way, what: What) {
        self.case.faults.entry((replica, life)).or_default().push(Fault { connection, way, what });
    }

    fn cut(&mut self, replica: Replica, connection: usize) {
        self.add(replica, connection, |byte| What::Cut { byte });
    }

    /// Cuts of any connections, also of those that replace others.
    fn cuts(&mut self, most: usize) {
        for _ in 0..self.draw.random_range(2..=most) {
            let replica = self.anyone();
            let connections = self.baseline.moved[&replica].len();
            let connection = self.draw.random_range(0..connections + 2);
            self.cut(replica, connection);
        }
    }

    fn dies(&mut self, worker: Replica, life: usize) {
        let connection = self.anything(worker);
        let way = if self.draw.random() { Way::Out } else { Way::In };
        // Not before its hello is out: of a process that nobody has met the launcher speaks.
        let byte = self.byte(worker, connection, way).max(if connection == 0 { HELLO_BYTES } else { 0 });
        self.add_exactly(worker, life, connection, way, What::Die { byte });
    }

    /// A server dies when a worker's connection is at some byte.
    fn other_dies(&mut self, server: Replica) {
        let worker = match self.worker() {
            // A dead process notices nothing.
            worker if worker == server => Replica::worker((worker.rank.0 + 1) % self.case.shape.workers),
            worker => worker,
        };
        let connection = self.anything(worker);
        self.case.dies = Some(server);
        self.add(worker, connection, |byte| What::DieOther { byte });
    }

    fn stranger(&mut self, worker: Replica) {
        let kind = self.case.kind;
        let topology = self.case.shape.topology();
        let hello = |run: &str, speaker, purpose| {
            Some(Hello { run: run.into(), speaker, incarnation: Incarnation::fresh(), purpose })
        };
        let rank = Speaker::Replica(worker);
        let (hello, waits_for_training) = match self.draw.random_range(0..7) {
            _ if kind != Trouble::StrangerKnocks => (None, false),
            0 => (hello("another", rank, Purpose::Control), false),
            1 => (hello("another", rank, Purpose::Data), false),
            2 => (hello("test", Speaker::Replica(Replica::worker(50)), Purpose::Control), false),
            3 => (hello("test", rank, Purpose::Data), false),
            4 => (hello("test", rank, Purpose::Control), true),
            5 => (hello("test", Speaker::Caller, Purpose::Control), true),
            _ => (hello("test", Speaker::Caller, Purpose::Data), false),
        };
        let mut bytes: Vec<u8> = (0..self.draw.random_range(1..3000)).map(|_| self.draw.random()).collect();
        if kind == Trouble::StrangerIsSilent {
            // The beginning of something that goes on.
            let head = Header::of(Kind::Message, 1000).encode();
            bytes = head[..self.draw.random_range(0..=head.len())].to_vec();
        }
        self.case.stranger = Some(Stranger {
            server: self.draw.random_range(0..topology.server_count()),
            pause: self.millis(0..20),
            hello,
            bytes,
            stays: kind == Trouble::StrangerIsSilent || self.draw.random(),
            waits_for_training,
        });
    }

    fn fails(&mut self, kinds: &[FailureKind], replicas: &[Replica], wait: Duration) {
        self.case.expected = Expected::Fails { kinds: kinds.to_vec(), replicas: replicas.to_vec(), wait };
    }
}

/// How a run that went as it must ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Right,
    Named,
    /// The place of the fault lies behind the end of the run.
    NotReached,
}

/// What is wrong with how a run went.
#[derive(Debug, PartialEq)]
enum Wrong {
    Bits,
    Hangs(Vec<Replica>),
    Fails(String),
    Succeeds,
    Blames(String),
    Late(Duration),
}

fn judge(case: &Case, observed: &Observed, baseline: &Baseline) -> Result<Verdict, Wrong> {
    if !observed.hung.is_empty() {
        return Err(Wrong::Hangs(observed.hung.clone()));
    }
    if observed.model.as_ref().is_some_and(|model| *model != baseline.model) {
        return Err(Wrong::Bits);
    }
    let odd_from_the_start =
        matches!(case.kind, Trouble::AnotherLayout | Trouble::AnotherRun | Trouble::AnotherVersion);
    let went_right = || -> Result<(), Wrong> {
        if let Some(failure) = &observed.told {
            return Err(Wrong::Fails(failure.to_string()));
        }
        if let Some((replica, Err(failure))) = observed.ends.iter().find(|(_, end)| end.is_err()) {
            return Err(Wrong::Fails(format!("{replica} ended with: {failure}")));
        }
        if observed.model.is_none() {
            return Err(Wrong::Fails("no model came".into()));
        }
        // A server that dies before anyone has met it has nothing to lose.
        let may_begin_anew = case.kind == Trouble::ServerRestarted && observed.was_early;
        if observed.refused.iter().any(Result::is_ok) && !may_begin_anew {
            return Err(Wrong::Succeeds);
        }
        Ok(())
    };
    let (mut kinds, replicas, mut wait) = match &case.expected {
        Expected::Right => return went_right().map(|()| Verdict::Right),
        Expected::Fails { .. } if !observed.fired && !odd_from_the_start => {
            return went_right().map(|()| Verdict::NotReached);
        }
        // One that dies after its last word is not missed.
        Expected::Fails { .. } if observed.model.is_some() && observed.was_late => return Ok(Verdict::NotReached),
        // One that was to die again ended before; all that was needed of a server had left it.
        Expected::Fails { .. }
            if matches!(case.kind, Trouble::DiesTwice | Trouble::ServerDies | Trouble::ServerRestarted)
                && observed.model.is_some() =>
        {
            return went_right().map(|()| Verdict::NotReached);
        }
        Expected::Fails { kinds, replicas, wait } => (kinds.clone(), replicas, *wait),
    };
    if observed.model.is_some() {
        return Err(Wrong::Succeeds);
    }
    if observed.was_early {
        kinds.push(FailureKind::Timeout);
        wait = wait.max(JOIN);
    }
    let fits = |failure: &Failure| kinds.contains(&failure.kind) && replicas.contains(&failure.replica);
    match &observed.told {
        Some(failure) if fits(failure) => {}
        Some(failure) => return Err(Wrong::Blames(failure.to_string())),
        None if observed.coordinator_died => {
            let survivors = observed.ends.values().filter_map(|end| end.as_ref().err());
            if let Some(failure) = survivors.clone().find(|failure| !fits(failure)) {
                return Err(Wrong::Blames(failure.to_string()));
            }
        }
        None => return Err(Wrong::Fails("the caller is told nothing".into())),
    }
    if observed.ends.values().any(Result::is_ok) {
        return Err(Wrong::Succeeds);
    }
    let limit = WORST_LOSS + wait;
    if observed.took > limit { Err(Wrong::Late(observed.took)) } else { Ok(Verdict::Named) }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, shape, faults, stranger, expected, .. } = self;
        writeln!(f, "{kind:?} in {shape:?}\n  faults {faults:?}")?;
        writeln!(f, "  dies {:?}, odd {:?}, launcher sees {}", self.dies, self.odd, self.launcher_sees)?;
        write!(f, "  stranger {stranger:?}\n  expected {expected:?}")
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.told.as_ref().map(ToString::to_string);
        writeln!(f, "  told {told:?}, model {}, took {:?}", self.model.is_some(), self.took)?;
        write!(f, "  fired {}, late {}, restarts {}", self.fired, self.was_late, self.restarts)?;
        for (replica, end) in &self.ends {
            match end {
                Ok(()) => write!(f, "\n  {replica}: ok")?,
                Err(failure) => write!(f, "\n  {replica}: {failure}")?,
            }
        }
        Ok(())
    }
}

/// Seed, what it drew, how long it took until the end, and how that was.
type Tried = (u64, Trouble, Duration, Result<Verdict, String>);

/// Runs seeds, many at a time.
fn try_seeds(seeds: &[u64], forgets: bool) -> Vec<Tried> {
    let (next, all) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let tried = try_seed(*seed, forgets);
                    all.lock().unwrap().push(tried);
                }
            });
        }
    });
    let mut all = all.into_inner().unwrap();
    all.sort_by_key(|(seed, ..)| *seed);
    all
}

/// Runs one seed.
fn try_seed(seed: u64, forgets: bool) -> Tried {
    let case = Case::draw(seed);
    let baseline = baseline(case.shape);
    let drawn = case.to_string();
    let (case, observed) = run(case, forgets);
    let verdict = judge(&case, &observed, &baseline);
    let verdict = verdict.map_err(|wrong| format!("seed {seed}: {wrong:?}: {drawn}\n{observed}"));
    (seed, case.kind, observed.took, verdict)
}

#[test]
fn a_server_that_applies_a_chunk_twice_is_found() {
    let breaks = [Trouble::SeveralCuts, Trouble::AsyncRestart];
    let seeds: Vec<u64> = (0..SEEDS).filter(|seed| breaks.contains(&Trouble::of(*seed))).collect();
    let wrong: Vec<String> = try_seeds(&seeds, true).into_iter().filter_map(|(.., found)| found.err()).collect();
    // Chunks of an async push are applied as they come; those of a sync push would be counted for another worker's.
    for mode in ["Sync", "Async"] {
        let found = |wrong: &&String| wrong.contains(&format!("mode: {mode}")) && wrong.contains(": Bits:");
        assert!(wrong.iter().any(|wrong| found(&wrong)), "no wrong bits in {mode} mode: {wrong:#?}");
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the figures of this test are kept")]
fn what_heals_ends_with_the_same_bits_and_the_rest_with_a_named_error_in_time() {
    let started = Instant::now();
    if let Some(seed) = ProcessEnv.get(ALONE) {
        let (_, _, took, verdict) = try_seed(seed.parse().expect("a number"), false);
        println!("{:?} after {took:?}", verdict.unwrap_or_else(|wrong| panic!("{wrong}")));
        return;
    }
    let all = try_seeds(&(0..SEEDS).collect::<Vec<_>>(), false);
    println!("{:<24} {:>6} {:>6} {:>6} {:>6}  longest", "fault", "right", "named", "unmet", "wrong");
    for kind in KINDS {
        let of_kind = all.iter().filter(|(_, other, ..)| *other == kind);
        let count = |verdict| of_kind.clone().filter(|(.., found)| *found == Ok(verdict)).count();
        let wrong = of_kind.clone().filter(|(.., found)| found.is_err()).count();
        let longest = of_kind.clone().map(|(_, _, took, _)| *took).max().unwrap_or_default();
        let [right, named, unmet] = [Verdict::Right, Verdict::Named, Verdict::NotReached].map(count);
        println!("{:<24} {right:>6} {named:>6} {unmet:>6} {wrong:>6}  {longest:.1?}", format!("{kind:?}"));
    }
    let heals = all.iter().filter(|(_, kind, ..)| kind.heals()).count();
    let took = started.elapsed().as_secs();
    println!("faults: {SEEDS} seeds, {heals} heal, {} do not, {took} s", all.len() - heals);
    let wrong: Vec<&String> = all.iter().filter_map(|(.., found)| found.as_ref().err()).collect();
    for wrong in &wrong {
        println!("{wrong}\n");
    }
    assert!(wrong.is_empty(), "{} seeds went wrong; {ALONE}=N runs seed N alone", wrong.len());
    assert!(heals as u64 * 2 >= SEEDS);
}
