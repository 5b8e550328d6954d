//! What `train` is given: one worker's view of the run.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, open};
use super::data::{Batch, Cut, Dataset, permutation};
use super::layout::{Layout, LayoutError};
use super::model::{Gradient, Model, Scale};
use super::optimizer::Optimizer;
use super::parameter_server::{CHUNK, FromServer, Join};
use super::shard::{shard, split};
use super::status::RunStatus;
use crate::observe::events::Progress;
use crate::observe::metrics::MetricPoint;
use crate::protocol::connection::{Connection, ConnectionError};
use crate::protocol::deadline::{HEARTBEAT, JOIN, ROUND, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::{HEADER_BYTES, Header, Kind, PushHead, pack_bits};
use crate::protocol::message::{Hello, Position, Purpose, Speaker};
use crate::protocol::transport::Transport;
use crate::topology::{Placement, Rank};

/// Examples per call in [`Worker::evaluate`]: large enough to keep the processor busy, small enough for any memory.
/// The cut does not depend on the number of workers, so neither does the result.
const EVALUATION_BATCH: usize = 256;

/// One worker's place in a run: its share of the data, its exchange with the others.
///
/// Given to [`Train::train`](crate::Train::train). Once something has failed, every call returns that failure, and the
/// iterators of [`Worker::epochs`] end.
pub struct Worker {
    placement: Placement,
    transport: Arc<dyn Transport>,
    control: Arc<Control>,
    status: Arc<RunStatus>,
    start: Position,
    exchange: RefCell<Option<Exchange>>,
    failure: RefCell<Option<Failure>>,
    /// Steps made so far; the number of the round that the next step belongs to.
    round: Cell<u64>,
    place: Cell<Place>,
    examples: Cell<u64>,
    collectives: Cell<u64>,
    /// The run stops: set by the answer to the step that closed its last round.
    stopped: Cell<bool>,
    /// Called once this worker's model exists and before it waits for the others.
    before_join: RefCell<Option<Box<dyn FnOnce()>>>,
}

/// Where this worker is in its loops.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    epoch: u64,
    epochs: u64,
    batch: u64,
    batches: u64,
    /// Examples of the batch in hand; `None` outside of batches.
    examples: Option<usize>,
    /// The batch in hand has been stepped on.
    stepped: bool,
    /// Examples of this rank since state was averaged last.
    since_average: u64,
}

/// Failure of a call on [`Worker`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The model cannot be trained.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The run has failed, here or at another replica.
    #[error("{0}")]
    RunFailed(Failure),
    /// The gradient has a value that is NaN or infinite.
    #[error(
        "the gradient of `{path}` is not finite in round {round}; the loss has probably become NaN \
         (lower the learning rate, or look at the batch of epoch {epoch}, step {batch})"
    )]
    NotFinite {
        /// The first tensor that holds such a value.
        path: String,
        /// Round of the step.
        round: u64,
        /// Epoch, from 0.
        epoch: u64,
        /// Step of the epoch, from 0.
        batch: u64,
    },
    /// Some worker would never get an example.
    #[error("{examples} examples cannot be shared by {workers} workers; lower `workers` to at most {examples}")]
    TooFewExamples {
        /// Examples of the data set.
        examples: usize,
        /// Workers of the run.
        workers: usize,
    },
    /// A batch of no examples was asked for.
    #[error("a batch size of 0 makes no steps; pass at least 1")]
    EmptyBatch,
    /// `step` before `join`.
    #[error("`worker.step` needs a joined model; call `worker.join(model, optimizer)` first")]
    NotJoined,
    /// `join` after `join`.
    #[error("`worker.join` was called twice; a run trains one model")]
    JoinedTwice,
    /// The learning rate is not a finite number.
    #[error("the learning rate is {0}; it must be a finite number of at least 0")]
    LearningRate(String),
}

impl WorkerError {
    fn kind(&self) -> FailureKind {
        match self {
            WorkerError::Layout(_) => FailureKind::Layout,
            WorkerError::NotFinite { .. } => FailureKind::NotFinite,
            WorkerError::RunFailed(failure) => failure.kind,
            WorkerError::TooFewExamples { .. }
            | WorkerError::EmptyBatch
            | WorkerError::NotJoined
            | WorkerError::JoinedTwice
            | WorkerError::LearningRate(_) => FailureKind::Configuration,
        }
    }
}

/// What all workers do together; it stands before each rank's part, since parts are matched by their order alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Collective {
    State { len: u64 },
    Evaluate { examples: u64 },
    Sum { len: u64 },
}

impl Collective {
    fn encode(self) -> [u8; 9] {
        let (kind, count) = match self {
            Collective::State { len } => (0, len),
            Collective::Evaluate { examples } => (1, examples),
            Collective::Sum { len } => (2, len),
        };
        let mut bytes = [kind; 9];
        bytes[1..].copy_from_slice(&count.to_le_bytes());
        bytes
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Collective::State { len } => write!(f, "the step that averages a state of {len} numbers"),
            Collective::Evaluate { examples } => write!(f, "`evaluate` on {examples} examples"),
            Collective::Sum { len } => write!(f, "`sum` of {len} numbers"),
        }
    }
}

/// Connections to all servers, and the buffers that every step uses again.
struct Exchange {
    layout: Layout,
    servers: Vec<Connection>,
    gradient: Vec<f32>,
    parameters: Vec<f32>,
    present: Vec<bool>,
    presence: Vec<u8>,
}

impl Worker {
    pub(crate) fn new(
        placement: Placement,
        transport: Arc<dyn Transport>,
        control: Arc<Control>,
        status: Arc<RunStatus>,
        start: Position,
    ) -> Self {
        Self {
            placement,
            transport,
            control,
            status,
            start,
            exchange: RefCell::default(),
            failure: RefCell::default(),
            round: Cell::new(start.round),
            place: Cell::default(),
            examples: Cell::new(0),
            collectives: Cell::new(0),
            stopped: Cell::new(false),
            before_join: RefCell::default(),
        }
    }

    /// Sets what happens once this worker's model exists, before it waits for the others.
    pub(crate) fn before_join(&self, call: impl FnOnce() + 'static) {
        *self.before_join.borrow_mut() = Some(Box::new(call));
    }

    /// This worker's number, from 0.
    pub fn rank(&self) -> usize {
        self.placement.replica.rank.index()
    }

    /// Number of workers of the run.
    pub fn workers(&self) -> usize {
        self.placement.topology.worker_count()
    }

    /// Seed of the run.
    pub fn seed(&self) -> u64 {
        self.placement.seed
    }

    /// Compute threads that this worker may use.
    pub fn threads(&self) -> usize {
        self.placement.threads as usize
    }

    /// The folder that `data = "..."` names, absolute; without it, the folder that the process runs in.
    pub fn data_dir(&self) -> &Path {
        self.placement.data_dir.as_deref().unwrap_or(Path::new("."))
    }

    /// Whether the run was told to stop: the loops have ended early, evaluate and return the model.
    pub fn is_stopping(&self) -> bool {
        self.stopped.get()
    }

    /// Brings the model of all workers together: everyone goes on with rank 0's parameters and state.
    ///
    /// Blocks until all workers have joined. Afterwards the framework's generator is seeded with (seed, rank), so that
    /// random layers differ between workers and repeat between runs.
    ///
    /// # Errors
    ///
    /// - [`WorkerError::Layout`] if the model cannot be trained.
    /// - [`WorkerError::RunFailed`] if another worker's model or optimizer differs, or a replica is lost.
    /// - [`WorkerError::JoinedTwice`].
    pub fn join<M: Model>(&self, model: M, optimizer: impl Into<Optimizer>) -> Result<M, WorkerError> {
        self.check()?;
        let joined = self.try_join(model, optimizer.into());
        joined.map_err(|error| self.remember(error))
    }

    fn try_join<M: Model>(&self, model: M, optimizer: Optimizer) -> Result<M, WorkerError> {
        if self.exchange.borrow().is_some() {
            return Err(WorkerError::JoinedTwice);
        }
        let layout = model.layout()?;
        self.end_turn();
        let mut exchange = self.open_exchange(layout)?;
        let first = self.rank() == 0;
        if first {
            model.read_trained(&mut exchange.parameters);
        }
        let join = Join { layout: exchange.layout.clone(), optimizer };
        let state_bytes = exchange.layout.state_len() * size_of::<f32>();
        let unlearned = if first { read_unlearned(&model, state_bytes) } else { Vec::new() };
        for (index, server) in exchange.servers.iter_mut().enumerate() {
            let sent = server.send(&join).and_then(|()| {
                if !first {
                    return Ok(());
                }
                let range = shard(exchange.parameters.len(), index, self.placement.topology.server_count());
                server.send_frame(Kind::Parameters, bytemuck::cast_slice(&exchange.parameters[range]))?;
                if index == 0 { server.send_frame(Kind::Frozen, &unlearned) } else { Ok(()) }
            });
            sent.map_err(|error| self.lost_server(index, server_failure(error)))?;
        }
        let mut unlearned = Vec::new();
        for index in 0..exchange.servers.len() {
            let answer = exchange.receive_joined(index, &|waited| self.patience(waited, JOIN * 2));
            unlearned.extend(answer.map_err(|error| self.lost_server(index, error))?);
        }
        let model = if first { model } else { self.write_unlearned(model, &unlearned, state_bytes)? };
        // Rank 0 takes them too, although they are its own: so a lazily initialised tensor is the same object as
        // elsewhere, and runs of one and of several workers do the same.
        let model = model.write_trained(&exchange.parameters);
        M::seed(seed_of_rank(self.seed(), self.placement.replica.rank));
        *self.exchange.borrow_mut() = Some(exchange);
        Ok(model)
    }

    fn write_unlearned<M: Model>(&self, model: M, bytes: &[u8], state_bytes: usize) -> Result<M, WorkerError> {
        let split = bytes.split_at_checked(state_bytes).ok_or_else(|| {
            let short = ConnectionError::Protocol(format!("{} bytes of state instead of {state_bytes}", bytes.len()));
            self.lost_server(0, server_failure(short))
        })?;
        let model = model.write_frozen(split.1);
        let state: Vec<f32> = bytemuck::pod_collect_to_vec(split.0);
        Ok(if state.is_empty() { model } else { model.write_state(&state) })
    }

    fn open_exchange(&self, layout: Layout) -> Result<Exchange, WorkerError> {
        let hello = Hello {
            run: self.placement.run.clone(),
            speaker: Speaker::Replica(self.placement.replica),
            purpose: Purpose::Data,
        };
        let waiting = || match self.status.failure() {
            None => Ok(()),
            Some(failure) => Err(std::io::Error::other(failure.to_string())),
        };
        let mut servers = Vec::new();
        for (index, address) in self.placement.servers.iter().enumerate() {
            let connection = open(self.transport.as_ref(), address, &hello, &waiting)
                .map_err(|error| self.lost_server(index, server_failure(error)))?;
            servers.push(connection);
        }
        Ok(Exchange {
            gradient: vec![0.0; layout.trained_len()],
            parameters: vec![0.0; layout.trained_len()],
            present: vec![false; layout.trained().count()],
            presence: Vec::new(),
            servers,
            layout,
        })
    }

    /// The epochs that are still to be trained, `epochs` in all.
    ///
    /// Starts where the run stands, and ends early, in the same round on every worker, when the run is told to stop.
    pub fn epochs(&self, epochs: usize) -> Epochs<'_> {
        let first = if self.round.get() == self.start.round { self.start.epoch } else { 0 };
        Epochs { worker: self, next: first, epochs: epochs as u64 }
    }

    /// One step of all workers together: pushes `gradient`, waits for the others, returns the model with the updated
    /// parameters.
    ///
    /// The gradients are averaged over all workers' examples and the optimizer given to [`Worker::join`] is applied
    /// once. The step that closes an epoch also averages the model's state (for example running means) by examples.
    ///
    /// # Units
    ///
    /// `learning_rate` is per step; all workers must pass the same bits.
    ///
    /// # Errors
    ///
    /// - [`WorkerError::NotFinite`] if this worker's gradient is; the whole run fails.
    /// - [`WorkerError::RunFailed`] if a replica fails, is lost, or keeps the round waiting too long.
    /// - [`WorkerError::NotJoined`], [`WorkerError::LearningRate`].
    ///
    /// # Source
    ///
    /// Synchronous SGD with a server: Li et al., OSDI 2014.
    pub fn step<M: Model>(
        &self,
        model: M,
        gradient: Gradient<M::Gradients>,
        learning_rate: f64,
    ) -> Result<M, WorkerError> {
        self.check()?;
        let stepped = self.try_step(model, gradient, learning_rate);
        stepped.map_err(|error| self.remember(error))
    }

    fn try_step<M: Model>(
        &self,
        model: M,
        gradient: Gradient<M::Gradients>,
        learning_rate: f64,
    ) -> Result<M, WorkerError> {
        if !(learning_rate.is_finite() && learning_rate >= 0.0) {
            return Err(WorkerError::LearningRate(learning_rate.to_string()));
        }
        let mut exchange = self.exchange.borrow_mut();
        let exchange = exchange.as_mut().ok_or(WorkerError::NotJoined)?;
        let mut place = self.place.get();
        let examples = gradient.examples;
        exchange.take_gradient(&model, gradient).map_err(|path| WorkerError::NotFinite {
            path,
            round: self.round.get(),
            epoch: place.epoch,
            batch: place.batch,
        })?;
        if place.examples.is_none() {
            // A loop of the user's own, without `batches`: the previous round gets no more metrics.
            self.control.rounds_done(self.round.get());
        }
        let head = PushHead { round: self.round.get(), examples: examples as u64, learning_rate };
        let stop = self.exchange_round(exchange, head)?;
        let model = model.write_trained(&exchange.parameters);
        self.round.set(head.round + 1);
        self.examples.set(self.examples.get() + examples as u64);
        place.since_average += examples as u64;
        place.stepped = true;
        self.stopped.set(stop);
        let closes = stop || (place.examples.is_some() && place.batch + 1 == place.batches);
        let model = if closes { self.average_state(&exchange.layout, model, place.since_average)? } else { model };
        if closes {
            place.since_average = 0;
        }
        self.place.set(place);
        let progress = Progress {
            rank: self.placement.replica.rank,
            epoch: place.epoch,
            epochs: place.epochs,
            batch: place.batch + 1,
            batches: place.batches,
            examples: self.examples.get(),
        };
        let (epoch, batch) = match progress.batch < progress.batches {
            true => (progress.epoch, progress.batch),
            false => (progress.epoch + 1, 0),
        };
        self.control.progress(progress, Position { epoch, batch, round: self.round.get() });
        Ok(model)
    }

    /// Push and pull with all servers, chunk by chunk in turn so that they work at the same time. All workers go in the
    /// same order, so that no two wait for each other. Returns whether the run stops with this round.
    fn exchange_round(&self, exchange: &mut Exchange, head: PushHead) -> Result<bool, WorkerError> {
        let push = |waited| self.patience(waited, ROUND * 2);
        let sent = exchange.push(head, &push);
        sent.map_err(|(server, error)| self.lost_server(server, server_failure(error)))?;
        exchange.pull(&push).map_err(|(server, error)| self.lost_server(server, error))
    }

    /// Whether to go on waiting for a server: not once the run has failed, and not for ever.
    fn patience(&self, waited: Duration, limit: Duration) -> Result<(), String> {
        match self.status.failure() {
            Some(failure) => Err(failure.to_string()),
            // The server names the late worker after a ROUND; here is only the outermost bound.
            None if waited > limit => Err(format!("no answer within {} s", limit.as_secs())),
            None => Ok(()),
        }
    }

    /// Averages the state over the workers, weighted by examples, in rank order; equal bits are kept as they are.
    fn average_state<M: Model>(&self, layout: &Layout, model: M, examples: u64) -> Result<M, WorkerError> {
        let len = layout.state_len();
        if len == 0 || self.workers() == 1 {
            return Ok(model);
        }
        let mut state = vec![0f32; len];
        model.read_state(&mut state);
        let mut part = examples.to_le_bytes().to_vec();
        part.extend_from_slice(bytemuck::cast_slice(&state));
        let collective = Collective::State { len: len as u64 };
        let parts = self.gather(collective, &part)?;
        let mut ranks = Vec::with_capacity(parts.len());
        for (rank, part) in parts.iter().enumerate() {
            let (examples, values) = part.split_at_checked(8).ok_or_else(|| self.odd_part(rank, collective))?;
            let examples = u64::from_le_bytes(examples.try_into().expect("split at eight"));
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(values);
            if values.len() != len {
                return Err(self.odd_part(rank, collective));
            }
            ranks.push((examples, values));
        }
        Ok(model.write_state(&weighted_mean(&ranks, len)))
    }

    fn odd_part(&self, rank: usize, collective: Collective) -> WorkerError {
        WorkerError::RunFailed(Failure {
            replica: crate::topology::Replica::worker(rank as u32),
            kind: FailureKind::Configuration,
            message: format!(
                "it called something else while {} called {collective}; all workers must call `evaluate` and `sum` together, \
                 in the same order and with as many examples or numbers",
                self.placement.replica
            ),
            round: Some(self.round.get()),
        })
    }

    /// Records a number of the step in hand, for example the loss.
    ///
    /// In the metrics of the run it is the example-weighted mean over the workers, with each worker's own beside it.
    /// Does not fail. It is sent a few times a second; only a program that records thousands meanwhile waits for that.
    pub fn metric(&self, name: &str, value: f64) {
        let place = self.place.get();
        // After the step of a batch and before the next one, the step in hand is still that one.
        let stepped = place.examples.is_some() && place.stepped;
        let round = if stepped { self.round.get() - 1 } else { self.round.get() };
        self.control.metric(MetricPoint {
            rank: self.placement.replica.rank,
            name: name.to_owned(),
            epoch: place.epoch,
            round,
            value,
            weight: place.examples.unwrap_or(1) as u64,
        });
    }

    /// The mean of `measure` over all examples of `data`, each worker measuring its share.
    ///
    /// Layers that behave otherwise in training, such as batch norm and dropout, do so here too unless the model is
    /// evaluated as burn wants it: `model.valid()`, on data that lies on the device without gradients.
    ///
    /// `measure` gets a few hundred examples at a time and returns their mean; all workers must call this together, and
    /// get the same bits, whatever their number.
    ///
    /// # Errors
    ///
    /// [`WorkerError::RunFailed`] if a replica fails or is lost meanwhile. NaN if `data` is empty.
    pub fn evaluate<D: Dataset + ?Sized>(
        &self,
        data: &D,
        mut measure: impl FnMut(&D::Batch) -> f64,
    ) -> Result<f64, WorkerError> {
        self.check()?;
        let chunks = data.len().div_ceil(EVALUATION_BATCH);
        let mut sums = Vec::new();
        for chunk in split(chunks, self.rank(), self.workers()) {
            let start = chunk * EVALUATION_BATCH;
            let indices: Vec<usize> = (start..data.len().min(start + EVALUATION_BATCH)).collect();
            sums.push(measure(&data.batch(&indices)) * indices.len() as f64);
        }
        let collective = Collective::Evaluate { examples: data.len() as u64 };
        let parts = self.gather(collective, bytemuck::cast_slice(&sums)).map_err(|error| self.remember(error))?;
        // One sum over all chunks in their order, so that the bits do not depend on who measured which.
        let total: f64 = parts.iter().flat_map(|part| bytemuck::pod_collect_to_vec::<u8, f64>(part)).sum();
        Ok(total / data.len() as f64)
    }

    /// The element-wise sum of `values` over all workers, added in rank order. All workers must call this together.
    ///
    /// # Shapes
    ///
    /// - `values`: `[n]`, the same `n` on all workers; returns `[n]`.
    ///
    /// # Errors
    ///
    /// [`WorkerError::RunFailed`] if the lengths differ, or a replica fails or is lost meanwhile.
    pub fn sum(&self, values: &[f64]) -> Result<Vec<f64>, WorkerError> {
        self.check()?;
        let collective = Collective::Sum { len: values.len() as u64 };
        let parts = self.gather(collective, bytemuck::cast_slice(values)).map_err(|error| self.remember(error))?;
        let mut total = vec![0.0; values.len()];
        for (rank, part) in parts.iter().enumerate() {
            let part: Vec<f64> = bytemuck::pod_collect_to_vec(part.as_slice());
            if part.len() != total.len() {
                return Err(self.remember(self.odd_part(rank, collective)));
            }
            total.iter_mut().zip(part).for_each(|(total, value)| *total += value);
        }
        Ok(total)
    }

    /// One collective of all workers: every rank's bytes, in rank order. All ranks must mean the same `collective`.
    fn gather(&self, collective: Collective, body: &[u8]) -> Result<Vec<Vec<u8>>, WorkerError> {
        // The others may be waiting for their turn to come here.
        self.end_turn();
        let sequence = self.collectives.get();
        self.collectives.set(sequence + 1);
        let head = collective.encode();
        let parts = self.control.gather(sequence, [&head[..], body].concat()).map_err(WorkerError::RunFailed)?;
        let mut bodies = Vec::with_capacity(parts.len());
        for (rank, part) in parts.iter().enumerate() {
            let theirs = part.split_at_checked(head.len());
            let body = theirs.filter(|(theirs, _)| *theirs == head).map(|(_, body)| body.to_vec());
            bodies.push(body.ok_or_else(|| self.odd_part(rank, collective))?);
        }
        Ok(bodies)
    }

    /// This worker's model exists, or it needs the others before: the next one may begin.
    fn end_turn(&self) {
        if let Some(call) = self.before_join.take() {
            call();
        }
    }

    /// The failure that ended this worker's part, if any.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure.borrow().clone().or_else(|| self.status.failure())
    }

    /// Rounds that this worker took part in.
    pub(crate) fn rounds(&self) -> u64 {
        self.round.get()
    }

    /// Breaks all connections, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn break_connections(&self) {
        self.control.break_connection();
        self.exchange.borrow().iter().flat_map(|exchange| &exchange.servers).for_each(Connection::shutdown);
    }

    /// The round that a failure now belongs to: none before the first step.
    pub(crate) fn round_in_hand(&self) -> Option<u64> {
        Some(self.round.get()).filter(|round| *round > 0)
    }

    /// Says goodbye to the servers.
    pub(crate) fn leave(&self) {
        if let Some(exchange) = self.exchange.borrow_mut().as_mut() {
            for server in &mut exchange.servers {
                // A server that is gone needs no goodbye.
                let _ = server.send_frame(Kind::Leave, &[]);
            }
        }
    }

    fn check(&self) -> Result<(), WorkerError> {
        match self.failure() {
            None => Ok(()),
            Some(failure) => Err(WorkerError::RunFailed(failure)),
        }
    }

    /// Keeps the first error, so that the replica fails with it even if `train` swallows it.
    fn remember(&self, error: WorkerError) -> WorkerError {
        let failure = match &error {
            WorkerError::RunFailed(failure) => failure.clone(),
            other => Failure {
                replica: self.placement.replica,
                kind: other.kind(),
                message: other.to_string(),
                round: self.exchange.borrow().is_some().then(|| self.round.get()),
            },
        };
        self.failure.borrow_mut().get_or_insert(failure);
        error
    }

    /// What to make of a broken exchange with a server: the run's failure if one is known, else the server's loss.
    fn lost_server(&self, server: usize, failure: ServerFailure) -> WorkerError {
        let error = match failure {
            ServerFailure::RunFailed(failure) => return WorkerError::RunFailed(failure),
            ServerFailure::Connection(error) => error,
        };
        // The cause travels by the control connection and may be a moment behind the broken one.
        let patience = Instant::now() + HEARTBEAT;
        while self.status.failure().is_none() && Instant::now() < patience {
            std::thread::sleep(TICK / 50);
        }
        WorkerError::RunFailed(self.status.failure().unwrap_or_else(|| Failure {
            replica: crate::topology::Replica::ps(server as u32),
            kind: match error {
                ConnectionError::Protocol(_) => FailureKind::Protocol,
                ConnectionError::GivenUp(_) => FailureKind::Timeout,
                ConnectionError::Broken(_) => FailureKind::Lost,
            },
            message: format!("{error}, as {} saw it", self.placement.replica),
            round: Some(self.round.get()),
        }))
    }
}

/// What rank 0 gives to all without training it: the state, then the frozen parameters.
fn read_unlearned<M: Model>(model: &M, state_bytes: usize) -> Vec<u8> {
    let mut state = vec![0f32; state_bytes / size_of::<f32>()];
    model.read_state(&mut state);
    [bytemuck::cast_slice(&state), &model.read_frozen()].concat()
}

/// Why a server did not answer.
enum ServerFailure {
    RunFailed(Failure),
    Connection(ConnectionError),
}

fn server_failure(error: ConnectionError) -> ServerFailure {
    ServerFailure::Connection(error)
}

/// The seed of a rank's generator after joining: distinct for every (seed, rank), spread over all bits.
///
/// # Source
///
/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn seed_of_rank(seed: u64, rank: Rank) -> u64 {
    let mut mixed = seed.wrapping_add((u64::from(rank.0) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn weighted_mean(ranks: &[(u64, Vec<f32>)], len: usize) -> Vec<f32> {
    let total: u64 = ranks.iter().map(|(examples, _)| examples).sum();
    let mean = |index: usize| {
        let mut values = ranks.iter().map(|(examples, values)| (*examples, values[index]));
        let (_, first) = values.clone().next().expect("at least one worker");
        if total == 0 || values.clone().all(|(_, value)| value.to_bits() == first.to_bits()) {
            return first;
        }
        let sum = values.try_fold(0f64, |sum, (examples, value)| Some(sum + examples as f64 * f64::from(value)));
        (sum.unwrap_or_default() / total as f64) as f32
    };
    (0..len).map(mean).collect()
}

impl Exchange {
    /// Flattens the gradient of the mean loss. The path of the first tensor with a value that is not finite is an error,
    /// unless the gradient stands for no example.
    fn take_gradient<M: Model>(&mut self, model: &M, gradient: Gradient<M::Gradients>) -> Result<(), String> {
        model.read_gradients(gradient.inner, &mut self.gradient, &mut self.present);
        if gradient.examples == 0 {
            self.gradient.fill(0.0);
            self.present.fill(false);
            return Ok(());
        }
        if gradient.scale == Scale::Sum {
            let scale = 1.0 / gradient.examples as f32;
            self.gradient.iter_mut().for_each(|value| *value *= scale);
        }
        // `&` instead of `&&` keeps the loop free of branches, so that it runs at the speed of memory.
        if self.gradient.iter().fold(true, |finite, value| finite & value.is_finite()) {
            return Ok(());
        }
        let mut start = 0;
        for tensor in self.layout.trained() {
            if self.gradient[start..start + tensor.len()].iter().any(|value| !value.is_finite()) {
                return Err(tensor.path.clone());
            }
            start += tensor.len();
        }
        unreachable!("the tensors tile the gradient")
    }

    fn push(
        &mut self,
        head: PushHead,
        patience: crate::protocol::connection::Patience<'_>,
    ) -> Result<(), (usize, ConnectionError)> {
        let Self { servers, gradient, present, presence, .. } = self;
        pack_bits(present, presence);
        let count = servers.len();
        let shards = |index| shard(gradient.len(), index, count);
        let chunks = shards(0).len().div_ceil(CHUNK).max(1);
        let mut start = Vec::with_capacity(HEADER_BYTES + PushHead::BYTES + presence.len());
        for chunk in 0..chunks {
            for (index, server) in servers.iter_mut().enumerate() {
                let range = shards(index);
                let values = &gradient[range.clone()];
                let part = &values[(chunk * CHUNK).min(values.len())..((chunk + 1) * CHUNK).min(values.len())];
                let part: &[u8] = bytemuck::cast_slice(part);
                let sent = if chunk == 0 {
                    let length = PushHead::BYTES + presence.len() + values.len() * 4;
                    start.clear();
                    start.extend(Header { kind: Kind::Push, length_bytes: length as u64 }.encode());
                    start.extend(head.encode());
                    start.extend_from_slice(presence);
                    server.write_both_patiently(&start, part, patience)
                } else {
                    server.write_all(part, patience)
                };
                sent.map_err(|error| (index, error))?;
            }
        }
        Ok(())
    }

    /// Reads the new parameters of all servers. Returns whether the run stops with this round.
    fn pull(&mut self, patience: crate::protocol::connection::Patience<'_>) -> Result<bool, (usize, ServerFailure)> {
        let Self { servers, parameters, .. } = self;
        let (count, len) = (servers.len(), parameters.len());
        let mut stop = false;
        let chunks = shard(len, 0, count).len().div_ceil(CHUNK).max(1);
        for chunk in 0..chunks {
            for (index, server) in servers.iter_mut().enumerate() {
                let range = shard(len, index, count);
                let lost = |error| (index, error);
                if chunk == 0 {
                    stop |= read_parameters_header(server, range.len(), patience).map_err(lost)?;
                }
                let (from, to) = ((chunk * CHUNK).min(range.len()), ((chunk + 1) * CHUNK).min(range.len()));
                let part = &mut parameters[range.start + from..range.start + to];
                let read = server.read_exact(bytemuck::cast_slice_mut(part), patience);
                read.map_err(|error| (index, server_failure(error)))?;
            }
        }
        Ok(stop)
    }

    /// Server `index`'s answer to the join: its initial parameters, and the frozen ones if it is server 0.
    fn receive_joined(
        &mut self,
        index: usize,
        patience: crate::protocol::connection::Patience<'_>,
    ) -> Result<Vec<u8>, ServerFailure> {
        let (len, count) = (self.parameters.len(), self.servers.len());
        let server = &mut self.servers[index];
        match server.receive(patience).map_err(server_failure)? {
            FromServer::Joined => {}
            FromServer::RunFailed(failure) => return Err(ServerFailure::RunFailed(failure)),
        }
        let range = shard(len, index, count);
        read_parameters_header(server, range.len(), patience)?;
        let values = bytemuck::cast_slice_mut(&mut self.parameters[range]);
        server.read_exact(values, patience).map_err(server_failure)?;
        match index {
            0 => server.receive_frame(Kind::Frozen, patience).map_err(server_failure),
            _ => Ok(Vec::new()),
        }
    }
}

/// Reads the header before `values` parameters. Returns whether the run stops with the round that they close.
fn read_parameters_header(
    server: &mut Connection,
    values: usize,
    patience: crate::protocol::connection::Patience<'_>,
) -> Result<bool, ServerFailure> {
    let header = server.read_header(patience).map_err(server_failure)?;
    match header.kind {
        Kind::Parameters | Kind::LastParameters if header.length_bytes == values as u64 * 4 => {
            Ok(header.kind == Kind::LastParameters)
        }
        Kind::Message => match server.read_message(header).map_err(server_failure)? {
            FromServer::RunFailed(failure) => Err(ServerFailure::RunFailed(failure)),
            FromServer::Joined => Err(server_failure(ConnectionError::Protocol("a second `joined`".into()))),
        },
        _ => Err(server_failure(ConnectionError::Protocol(format!("{header:?} instead of {values} parameters")))),
    }
}

/// Iterator over the epochs of a run. Made by [`Worker::epochs`].
pub struct Epochs<'w> {
    worker: &'w Worker,
    next: u64,
    epochs: u64,
}

impl<'w> Iterator for Epochs<'w> {
    type Item = Epoch<'w>;

    fn next(&mut self) -> Option<Epoch<'w>> {
        let worker = self.worker;
        if self.next >= self.epochs || worker.stopped.get() || worker.failure().is_some() {
            return None;
        }
        let index = self.next;
        self.next += 1;
        let mut place = worker.place.get();
        (place.epoch, place.epochs, place.examples) = (index, self.epochs, None);
        worker.place.set(place);
        Some(Epoch { worker, index })
    }
}

/// One pass over the data.
pub struct Epoch<'w> {
    worker: &'w Worker,
    index: u64,
}

impl<'w> Epoch<'w> {
    /// The epoch's number, from 0.
    pub fn index(&self) -> usize {
        self.index as usize
    }

    /// This worker's parts of the epoch's batches: `batch_size` examples per worker and step, drawn by
    /// [`permutation`].
    ///
    /// All workers get the same number of batches; the last global batch is split as evenly as possible. With more
    /// workers than examples, or `batch_size` 0, there is no batch and the next call on the worker says why.
    pub fn batches<'d, D: Dataset + ?Sized>(&self, data: &'d D, batch_size: usize) -> Batches<'w, 'd, D> {
        let worker = self.worker;
        let (examples, workers) = (data.len(), worker.workers());
        if batch_size == 0 {
            worker.remember(WorkerError::EmptyBatch);
        } else if examples < workers {
            worker.remember(WorkerError::TooFewExamples { examples, workers });
        }
        let resumes = worker.round.get() == worker.start.round && self.index == worker.start.epoch;
        let next = if resumes { worker.start.batch as usize } else { 0 };
        let order = permutation(worker.seed(), self.index, examples);
        Batches { worker, data, order, cut: Cut::new(examples, batch_size.max(1), workers), next }
    }
}

/// Iterator over one worker's batches of an epoch. Made by [`Epoch::batches`].
pub struct Batches<'w, 'd, D: ?Sized> {
    worker: &'w Worker,
    data: &'d D,
    order: Vec<usize>,
    cut: Cut,
    next: usize,
}

impl<D: Dataset + ?Sized> Iterator for Batches<'_, '_, D> {
    type Item = Batch<D::Batch>;

    fn next(&mut self) -> Option<Batch<D::Batch>> {
        let worker = self.worker;
        let mut place = worker.place.get();
        if self.next >= self.cut.batches() || worker.stopped.get() || worker.failure().is_some() {
            place.examples = None;
            worker.place.set(place);
            return None;
        }
        let part = self.cut.part(self.next, worker.rank());
        (place.batch, place.batches) = (self.next as u64, self.cut.batches() as u64);
        (place.examples, place.stepped) = (Some(part.len()), false);
        worker.place.set(place);
        worker.control.rounds_done(worker.round.get());
        self.next += 1;
        let items = if part.is_empty() {
            // Something to compute with; the batch's first example is there on every rank.
            let first = self.cut.part(self.next - 1, 0).start;
            self.data.batch(&self.order[first..=first])
        } else {
            self.data.batch(&self.order[part.clone()])
        };
        Some(Batch::new(items, part.len()))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.cut.batches() - self.next.min(self.cut.batches())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_averaged_by_examples_and_equal_bits_stay() {
        let third = 1.0f32 / 3.0;
        let ranks = [(30, vec![1.0, third]), (10, vec![5.0, third])];
        assert_eq!(weighted_mean(&ranks, 2), [2.0, third]);
        let nobody = [(0, vec![1.0]), (0, vec![5.0])];
        assert_eq!(weighted_mean(&nobody, 1), [1.0]);
    }

    #[test]
    fn every_rank_and_seed_has_a_generator_of_its_own() {
        let mut seeds: Vec<u64> =
            (0..20).flat_map(|seed| (0..20).map(move |rank| seed_of_rank(seed, Rank(rank)))).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 400);
    }
}
