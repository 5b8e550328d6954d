//! The same runtime between threads of one process: no process, no socket, no file.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Scope;
use std::time::Duration;

use super::caller::{self, Heard};
use super::outcome::{OutcomeError, last};
use crate::config::{Config, LaunchOptions, ProcessEnv, Surroundings};
use crate::observe::metrics::Metrics;
use crate::protocol::connection::Connection;
use crate::protocol::failure::Failure;
use crate::protocol::message::{FromCoordinator, Numbered, Position, ToCoordinator};
use crate::protocol::transport::{Memory, Transport};
use crate::runtime::Model;
use crate::runtime::replica::{Context, serve, work};
use crate::runtime::status::RunStatus;
use crate::topology::{Address, JOIN, KEEP_RESULT, Placement, Replica, Role, Topology};
use crate::training::DistributedTraining;

/// What `train_in_memory` and `train_here` give.
#[derive(Debug, Clone)]
pub struct Trained<M> {
    /// The model that worker 0 returned.
    pub model: M,
    /// All metrics of all rounds.
    pub metrics: Metrics,
}

impl<M> Trained<M> {
    /// The last value of a metric.
    ///
    /// # Errors
    ///
    /// [`OutcomeError::NoMetric`] with the names that there are.
    pub fn metric(&self, name: &str) -> Result<f64, OutcomeError> {
        last(&self.metrics, name)
    }
}

/// Failure to train within this process. Returned by `train_in_memory` and `train_here`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A replica failed.
    #[error("{0}")]
    Failed(Failure),
    /// The configuration cannot be meant.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The value cannot be given to several workers.
    #[error("the value cannot travel to its replicas ({reason})")]
    Value {
        /// serde's own words.
        reason: String,
    },
}

/// Lets the workers run the part of `train` before `worker.join` one after the other: they share one generator, so that
/// the initial parameters of rank 0 would otherwise depend on the others' timing.
struct Turnstile {
    turn: Mutex<u32>,
    changed: Condvar,
}

/// Trains with the replicas of `topology` as threads of this process; the calling thread is worker 0.
pub(crate) fn train_in_memory<T: DistributedTraining>(
    value: &T,
    topology: Topology,
) -> Result<Trained<T::Model>, TrainError> {
    let surroundings = Surroundings::read(&ProcessEnv)?;
    let config = Config::resolve(&T::ATTRIBUTE, &surroundings, &ProcessEnv, &LaunchOptions::new())?.config;
    let bytes = value.to_bytes().map_err(|reason| TrainError::Value { reason })?;
    // A value that cannot be read back is better known here than from a replica.
    T::from_bytes(&bytes).map_err(|reason| TrainError::Value { reason })?;
    let servers: Vec<_> = topology.servers().map(|server| Address::Memory(server.file_name())).collect();
    let transport: Arc<dyn Transport> = Arc::new(Memory::default());
    let context = |replica| Context {
        placement: Placement {
            run: "in-memory".into(),
            replica,
            topology,
            seed: config.seed,
            threads: 1,
            servers: servers.clone(),
            data_dir: config.data_dir.clone(),
            mode: config.mode,
            rejoin: Duration::ZERO,
            join: JOIN,
            keep_result: KEEP_RESULT,
            first_stays: false,
        },
        transport: transport.clone(),
        status: Arc::new(RunStatus::default()),
        start: Position::default(),
    };
    let turnstile = Arc::new(Turnstile { turn: Mutex::new(0), changed: Condvar::new() });
    std::thread::scope(|scope| {
        let (heard, hear) = channel();
        let calling = transport.clone();
        let coordinator = servers[0].clone();
        let ended = AtomicBool::new(false);
        scope.spawn(move || {
            caller::listen(calling.as_ref(), &coordinator, "in-memory", JOIN, &ended, |message| {
                heard.send(message).is_ok()
            });
        });
        let metrics = scope.spawn(move || collect(&hear));
        let mut others = Vec::new();
        for replica in topology.replicas().filter(|replica| *replica != Replica::worker(0)) {
            let context = context(replica);
            others.push(match replica.role {
                Role::Ps => scope.spawn(move || serve(&context)),
                Role::Worker => spawn_worker::<T>(scope, context, bytes.clone(), turnstile.clone()),
            });
        }
        let trained = train_one(&context(Replica::worker(0)), value, &turnstile);
        let failures = others.into_iter().filter_map(|other| other.join().expect("replicas catch panics").err());
        let failures: Vec<_> = failures.collect();
        let metrics = metrics.join().expect("collecting does not panic");
        match (trained, failures.into_iter().next()) {
            (Ok(model), None) => Ok(Trained { model, metrics }),
            (Err(failure), _) | (Ok(_), Some(failure)) => Err(TrainError::Failed(failure)),
        }
    })
}

fn spawn_worker<'scope, T: DistributedTraining>(
    scope: &'scope Scope<'scope, '_>,
    context: Context,
    bytes: Vec<u8>,
    turnstile: Arc<Turnstile>,
) -> std::thread::ScopedJoinHandle<'scope, Result<(), Failure>> {
    scope.spawn(move || {
        let value = T::from_bytes(&bytes).expect("it was decoded once before");
        train_one(&context, &value, &turnstile).map(drop)
    })
}

fn train_one<T: DistributedTraining>(
    context: &Context,
    value: &T,
    turnstile: &Arc<Turnstile>,
) -> Result<T::Model, Failure> {
    let rank = context.placement.replica.rank.0;
    let turn = Turn { rank, turnstile: turnstile.clone() };
    turn.wait(&context.status);
    T::Model::seed(context.placement.seed);
    work(context, |worker| {
        worker.before_join(move || drop(turn));
        value.train(worker)
    })
}

/// A worker's turn; dropping it, also because `train` ended without joining, lets the next one in.
struct Turn {
    rank: u32,
    turnstile: Arc<Turnstile>,
}

impl Turn {
    fn wait(&self, status: &RunStatus) {
        let mut turn = self.turnstile.turn.lock().expect("no holder panics");
        while *turn < self.rank && status.failure().is_none() {
            turn = self.turnstile.changed.wait(turn).expect("no holder panics");
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turn = self.turnstile.turn.lock().expect("no holder panics");
        *turn = (*turn).max(self.rank + 1);
        self.turnstile.changed.notify_all();
    }
}

/// Takes what the coordinator tells its caller, until the end of the run.
fn collect(hear: &Receiver<Heard>) -> Metrics {
    let mut metrics = Metrics::default();
    let mut coordinator: Option<Connection> = None;
    for heard in hear {
        match heard {
            Heard::Attached(connection) => coordinator = Some(connection),
            Heard::Said(FromCoordinator::Metric(metric)) => metrics.push(metric),
            Heard::Said(FromCoordinator::RunFailed(_)) | Heard::Model { .. } => {
                if let Some(coordinator) = &mut coordinator {
                    // If it is gone, it waits for nothing.
                    let _ = coordinator.send(&Numbered::from(ToCoordinator::Acknowledged));
                }
                break;
            }
            Heard::Said(_) => {}
            Heard::Gone | Heard::Replaced => break,
        }
    }
    if let Some(coordinator) = coordinator {
        // The listening thread and the one that the coordinator reads with would otherwise wait for each other.
        coordinator.shutdown();
    }
    metrics
}
