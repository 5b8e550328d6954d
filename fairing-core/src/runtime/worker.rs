//! What `train` is given: one worker's view of the run.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_bytes::ByteBuf;

use super::control::{Control, Gathered};
use super::data::{Batch, Cut, Dataset, permutation};
use super::exchange::{Exchange, ExchangeError, Surroundings, Why};
use super::layout::{Class, Layout, LayoutError};
use super::model::{Gradient, Model};
use super::optimizer::Optimizer;
use super::pace::Stopwatch;
use super::shard::split;
use super::status::RunStatus;
use crate::observe::events::Progress;
use crate::observe::metrics::MetricPoint;
use crate::protocol::connection::ConnectionError;
use crate::protocol::deadline::{HEARTBEAT, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::PushHead;
use crate::protocol::message::{CollectiveKey, Group, Position, ToCoordinator};
use crate::topology::{Mode, Placement, Rank};

/// Examples per call in [`Worker::evaluate`]: large enough to keep the processor busy, small enough for any memory.
/// The cut does not depend on the number of workers, so neither does the result.
const EVALUATION_BATCH: usize = 256;

/// One worker's place in a run: its share of the data, its exchange with the others.
///
/// Given to [`Train::train`](crate::Train::train). Once something has failed, every call returns that failure, and the
/// iterators of [`Worker::epochs`] end.
pub struct Worker {
    surroundings: Arc<Surroundings>,
    control: Arc<Control>,
    status: Arc<RunStatus>,
    /// Where training starts, or goes on in a worker that was started again; known for sure after the join.
    start: Cell<Position>,
    exchange: RefCell<Option<Exchange>>,
    failure: RefCell<Option<Failure>>,
    /// Steps made so far; the number of the round that the next step belongs to.
    round: Cell<u64>,
    place: Cell<Place>,
    /// Examples of this rank so far, also of a process that it was before.
    examples: Cell<u64>,
    /// Collectives since the last step; in async mode, since the phase began.
    collectives: Cell<u64>,
    /// What collectives are told apart by where steps are not made together: 0 before the epochs, `e + 1` in epoch `e`,
    /// the highest number behind them.
    phase: Cell<u64>,
    /// The next step is the first of a life that goes on where another ended, which may have begun it.
    goes_on: Cell<bool>,
    /// The run stops: set by the answer to the step that closed its last round.
    stopped: Cell<bool>,
    stopwatch: RefCell<Stopwatch>,
    /// Gradients that the next step includes.
    accumulated: RefCell<Accumulated>,
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

/// The sum of some gradients, each times its examples.
#[derive(Default)]
struct Accumulated {
    sum: Vec<f32>,
    present: Vec<bool>,
    examples: usize,
}

impl Accumulated {
    fn add(&mut self, exchange: &Exchange, examples: usize) {
        self.sum.resize(exchange.gradient.len(), 0.0);
        self.present.resize(exchange.present.len(), false);
        let weight = examples as f32;
        self.sum.iter_mut().zip(&exchange.gradient).for_each(|(sum, value)| *sum += weight * value);
        self.present.iter_mut().zip(&exchange.present).for_each(|(known, present)| *known |= present);
        self.examples += examples;
    }

    /// Replaces a gradient by the mean of all with it; returns the examples of all.
    fn take(&mut self, exchange: &mut Exchange, examples: usize) -> usize {
        if self.examples == 0 {
            return examples;
        }
        self.add(exchange, examples);
        let scale = 1.0 / self.examples as f32;
        exchange.gradient.iter_mut().zip(&self.sum).for_each(|(value, sum)| *value = scale * sum);
        exchange.present.copy_from_slice(&self.present);
        self.sum.fill(0.0);
        self.present.fill(false);
        std::mem::take(&mut self.examples)
    }
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
    /// The model keeps numbers that only a sync round averages.
    #[error(
        "`{path}` changes without a gradient (as the running means of batch norm do) and is averaged in sync rounds only; \
         this run is {mode}: take the layer out, for example use layer or group norm, or set `mode = \"sync\"`"
    )]
    StateWithoutRounds {
        /// The first such tensor.
        path: String,
        /// The mode of the run.
        mode: Mode,
    },
    /// A collective between two batches of a run without rounds.
    #[error(
        "`evaluate` and `sum` need all workers, who do not make their steps together in this run ({mode}); call them outside \
         of the loop over `batches`"
    )]
    CollectiveInBatches {
        /// The mode of the run.
        mode: Mode,
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
            | WorkerError::StateWithoutRounds { .. }
            | WorkerError::CollectiveInBatches { .. }
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

impl Worker {
    pub(crate) fn new(surroundings: Surroundings, control: Arc<Control>, start: Position) -> Self {
        Self {
            control,
            status: surroundings.status.clone(),
            surroundings: Arc::new(surroundings),
            start: Cell::new(start),
            exchange: RefCell::default(),
            failure: RefCell::default(),
            round: Cell::new(0),
            place: Cell::default(),
            examples: Cell::new(0),
            collectives: Cell::new(0),
            phase: Cell::new(0),
            goes_on: Cell::new(false),
            stopped: Cell::new(false),
            stopwatch: RefCell::default(),
            accumulated: RefCell::default(),
            before_join: RefCell::default(),
        }
    }

    fn placement(&self) -> &Placement {
        &self.surroundings.placement
    }

    /// Sets what happens once this worker's model exists, before it waits for the others.
    pub(crate) fn before_join(&self, call: impl FnOnce() + 'static) {
        *self.before_join.borrow_mut() = Some(Box::new(call));
    }

    /// This worker's number, from 0.
    pub fn rank(&self) -> usize {
        self.placement().replica.rank.index()
    }

    /// Number of workers of the run.
    pub fn workers(&self) -> usize {
        self.placement().topology.worker_count()
    }

    /// Steps that this worker has made, also before it was started again: the number of the round that its next step is of.
    ///
    /// A loop of the user's own, without [`Worker::epochs`], goes on from here.
    pub fn round(&self) -> u64 {
        self.round.get()
    }

    /// Seed of the run.
    pub fn seed(&self) -> u64 {
        self.placement().seed
    }

    /// Compute threads that this worker may use.
    pub fn threads(&self) -> usize {
        self.placement().threads as usize
    }

    /// The folder that `data = "..."` names, absolute; without it, the folder that the process runs in.
    pub fn data_dir(&self) -> &Path {
        self.placement().data_dir.as_deref().unwrap_or(Path::new("."))
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
        self.leave_if_told()?;
        let joined = self.try_join(model, optimizer.into());
        joined.map_err(|error| self.remember(error))
    }

    fn try_join<M: Model>(&self, model: M, optimizer: Optimizer) -> Result<M, WorkerError> {
        if self.exchange.borrow().is_some() {
            return Err(WorkerError::JoinedTwice);
        }
        let layout = model.layout()?;
        let mode = self.placement().mode;
        if !mode.is_sync()
            && let Some(tensor) = layout.of(Class::State).find(|tensor| !tensor.is_empty())
        {
            return Err(WorkerError::StateWithoutRounds { path: tensor.path.clone(), mode });
        }
        self.end_turn();
        let state_len = layout.state_len();
        let state_bytes = state_len * size_of::<f32>();
        let initial = |parameters: &mut [f32]| {
            model.read_trained(parameters);
            read_unlearned(&model, state_bytes)
        };
        let (exchange, start) = Exchange::join(self.surroundings.clone(), layout, optimizer, initial)
            .map_err(|error| self.lost_server(error))?;
        // Rank 0 takes them too, although they are its own: so a lazily initialised tensor is the same object as
        // elsewhere, and runs of one and of several workers do the same.
        let mut model = model.write_trained(&exchange.parameters);
        if self.rank() != 0 || start.position.round > 0 {
            model = self.write_unlearned(model, &start.unlearned, state_bytes)?;
        }
        if let Some(parts) = self.control.last_state()
            && let Some(ranks) = self.states(&parts, state_len).filter(|ranks| !ranks.is_empty())
        {
            model = model.write_state(&weighted_mean(&ranks, state_len));
        }
        M::seed(seed_of_rank(self.seed(), self.placement().replica.rank));
        self.start.set(start.position);
        self.round.set(start.position.round);
        self.collectives.set(if start.position.round > 0 { 0 } else { self.collectives.get() });
        self.stopped.set(start.stopped);
        self.goes_on.set(start.position.round > 0);
        self.stopwatch.borrow_mut().start();
        let began = ToCoordinator::Began { round: start.position.round };
        self.control.say(began).map_err(WorkerError::RunFailed)?;
        *self.exchange.borrow_mut() = Some(exchange);
        Ok(model)
    }

    fn write_unlearned<M: Model>(&self, model: M, bytes: &[u8], state_bytes: usize) -> Result<M, WorkerError> {
        let split = bytes.split_at_checked(state_bytes).ok_or_else(|| {
            let short = ConnectionError::Protocol(format!("{} bytes of state instead of {state_bytes}", bytes.len()));
            self.lost_server(ExchangeError { server: 0, why: Why::Connection(short) })
        })?;
        let model = model.write_frozen(split.1);
        let state: Vec<f32> = bytemuck::pod_collect_to_vec(split.0);
        Ok(if state.is_empty() { model } else { model.write_state(&state) })
    }

    /// The epochs that are still to be trained, `epochs` in all.
    ///
    /// Starts where the run stands, and ends early, in the same round on every worker, when the run is told to stop.
    pub fn epochs(&self, epochs: usize) -> Epochs<'_> {
        let start = self.start.get();
        let first = if self.round.get() == start.round { start.epoch } else { 0 };
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
        let stepped = stepped.map_err(|error| self.remember(error))?;
        // The round is finished here and at the servers.
        self.leave_if_told()?;
        Ok(stepped)
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
        take_gradient(exchange, &model, gradient).map_err(|path| self.not_finite(path))?;
        let examples = self.accumulated.borrow_mut().take(exchange, examples);
        if place.examples.is_none() {
            // A loop of the user's own, without `batches`: the previous round gets no more metrics.
            self.control.rounds_done(self.round.get());
        }
        let in_batch = place.examples.is_some();
        let batches_done = if in_batch { place.batch + 1 } else { 0 };
        let head = PushHead {
            round: self.round.get(),
            examples: examples as u64,
            learning_rate,
            epoch: place.epoch,
            batches_done,
        };
        let asked = Instant::now();
        let mut stepped = exchange.step(head).map_err(|error| self.lost_server(error))?;
        stepped.repeated |= self.goes_on.take();
        let model = model.write_trained(&exchange.parameters);
        self.stopwatch.borrow_mut().step(asked, examples as u64, stepped);
        self.round.set(head.round + 1);
        if self.placement().mode.is_sync() {
            self.collectives.set(0);
        }
        self.examples.set(self.examples.get() + examples as u64);
        place.since_average += examples as u64;
        place.stepped = true;
        self.stopped.set(stepped.stop);
        let closes = stepped.stop || (in_batch && place.batch + 1 == place.batches);
        let model = if closes { self.average_state(&exchange.layout, model, place.since_average)? } else { model };
        if closes {
            place.since_average = 0;
        }
        self.place.set(place);
        let progress = Progress {
            rank: self.placement().replica.rank,
            epoch: place.epoch,
            epochs: place.epochs,
            batch: place.batch + 1,
            batches: place.batches,
            examples: self.examples.get(),
        };
        let position = Position { epoch: place.epoch, batch: batches_done, round: self.round.get() };
        self.control.progress(progress, position, || self.stopwatch.borrow().pace());
        Ok(model)
    }

    /// Keeps `gradient` for the next [`step`](Worker::step), which then takes the mean over the examples of all: a large batch
    /// in small pieces.
    ///
    /// Does not wait for the others, who may accumulate as often as they like. Of an epoch's batches the last one must be
    /// stepped on.
    ///
    /// # Errors
    ///
    /// [`WorkerError::NotFinite`], [`WorkerError::NotJoined`], and the run's failure if there is one.
    pub fn accumulate<M: Model>(&self, model: &M, gradient: Gradient<M::Gradients>) -> Result<(), WorkerError> {
        self.check()?;
        let accumulate = || {
            let mut exchange = self.exchange.borrow_mut();
            let exchange = exchange.as_mut().ok_or(WorkerError::NotJoined)?;
            let examples = gradient.examples;
            take_gradient(exchange, model, gradient).map_err(|path| self.not_finite(path))?;
            self.accumulated.borrow_mut().add(exchange, examples);
            Ok(())
        };
        accumulate().map_err(|error| self.remember(error))
    }

    fn not_finite(&self, path: String) -> WorkerError {
        let place = self.place.get();
        WorkerError::NotFinite { path, round: self.round.get(), epoch: place.epoch, batch: place.batch }
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
        let key = CollectiveKey { round: self.round.get(), group: Group::State, index: 0 };
        let parts = self.control.gather(key, [&collective.encode()[..], &part].concat());
        let Gathered { parts, .. } = parts.map_err(WorkerError::RunFailed)?;
        self.bodies(&parts, collective)?;
        let ranks = self.states(&parts, len).ok_or_else(|| self.odd_part(0, collective))?;
        Ok(model.write_state(&weighted_mean(&ranks, len)))
    }

    /// Examples and state of each rank that gave them; `None` if some part is of another length.
    fn states(&self, parts: &[Option<ByteBuf>], len: usize) -> Option<Vec<(u64, Vec<f32>)>> {
        let head = Collective::State { len: len as u64 }.encode();
        let state = |part: &ByteBuf| {
            let (examples, values) = part.strip_prefix(&head[..])?.split_at_checked(8)?;
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(values);
            (values.len() == len).then(|| (u64::from_le_bytes(examples.try_into().expect("split at eight")), values))
        };
        parts.iter().flatten().map(state).collect()
    }

    fn odd_part(&self, rank: usize, collective: Collective) -> WorkerError {
        WorkerError::RunFailed(Failure {
            replica: crate::topology::Replica::worker(rank as u32),
            kind: FailureKind::Configuration,
            message: format!(
                "it called something else while {} called {collective}; all workers must call `evaluate` and `sum` together, \
                 in the same order and with as many examples or numbers",
                self.placement().replica
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
            rank: self.placement().replica.rank,
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
    /// Without rounds (`mode = "async"`) each worker measures its share with the parameters that it pulled last, which differ a
    /// little from those of the others and from those that are brought home; and it is called between epochs, not between batches.
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
        self.leave_if_told()?;
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
        let (mut total, mut examples) = (0.0, 0);
        for (rank, part) in parts.iter().enumerate() {
            let sums: Vec<f64> = part.as_deref().map(bytemuck::pod_collect_to_vec).unwrap_or_default();
            total = sums.iter().fold(total, |total, sum| total + sum);
            // A rank that is lost measures nothing, and the mean is that of the others' examples.
            let measured = split(chunks, rank, self.workers());
            if part.is_some() {
                // With more workers than chunks, those without one begin behind the end.
                let place = |chunk: usize| data.len().min(chunk * EVALUATION_BATCH);
                examples += place(measured.end) - place(measured.start);
            }
        }
        Ok(total / examples as f64)
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
        self.leave_if_told()?;
        let collective = Collective::Sum { len: values.len() as u64 };
        let parts = self.gather(collective, bytemuck::cast_slice(values)).map_err(|error| self.remember(error))?;
        let mut total = vec![0.0; values.len()];
        for (rank, part) in parts.iter().enumerate() {
            let Some(part) = part else { continue };
            let part: Vec<f64> = bytemuck::pod_collect_to_vec(part);
            if part.len() != total.len() {
                return Err(self.remember(self.odd_part(rank, collective)));
            }
            total.iter_mut().zip(part).for_each(|(total, value)| *total += value);
        }
        Ok(total)
    }

    /// One collective of all workers: every rank's bytes, in rank order; none of a rank that is lost. All ranks must mean the
    /// same `collective`.
    fn gather(&self, collective: Collective, body: &[u8]) -> Result<Vec<Option<Vec<u8>>>, WorkerError> {
        // The others may be waiting for their turn to come here.
        self.end_turn();
        let mode = self.placement().mode;
        if !mode.is_sync() && self.place.get().examples.is_some() {
            return Err(WorkerError::CollectiveInBatches { mode });
        }
        let index = self.collectives.get();
        self.collectives.set(index + 1);
        let is_sync = self.placement().mode.is_sync();
        let round = if is_sync { self.round.get() } else { self.phase.get() };
        let key = CollectiveKey { round, group: Group::User, index };
        let gathered = self.control.gather(key, [&collective.encode()[..], body].concat());
        let Gathered { parts, stopping } = gathered.map_err(WorkerError::RunFailed)?;
        self.stopwatch.borrow_mut().start();
        if stopping && !is_sync {
            // Some worker has made its last step, and would not meet this one in what it does behind another.
            self.stopped.set(true);
        }
        self.bodies(&parts, collective)
    }

    /// Another phase begins.
    fn enter(&self, phase: u64) {
        self.phase.set(phase);
        if !self.placement().mode.is_sync() {
            self.collectives.set(0);
        }
    }

    /// What the parts of a collective hold; all must begin with the same `collective`.
    fn bodies(&self, parts: &[Option<ByteBuf>], collective: Collective) -> Result<Vec<Option<Vec<u8>>>, WorkerError> {
        let head = collective.encode();
        let body = |(rank, part): (usize, &Option<ByteBuf>)| match part {
            None => Ok(None),
            Some(part) => match part.strip_prefix(&head[..]) {
                Some(body) => Ok(Some(body.to_vec())),
                None => Err(self.odd_part(rank, collective)),
            },
        };
        parts.iter().enumerate().map(body).collect()
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

    /// Breaks all connections, as a network would; they come back.
    #[cfg(test)]
    pub(crate) fn break_connections(&self) {
        self.control.break_connection();
        self.exchange.borrow().iter().for_each(Exchange::break_connections);
    }

    /// The round that a failure now belongs to: none before the first step.
    pub(crate) fn round_in_hand(&self) -> Option<u64> {
        Some(self.round.get()).filter(|round| *round > 0)
    }

    /// The model with the parameters that the servers hold, which in async mode differ from this worker's last ones.
    pub(crate) fn with_final_parameters<M: Model>(&self, model: M) -> Result<M, Failure> {
        let mut exchange = self.exchange.borrow_mut();
        match exchange.as_mut() {
            Some(exchange) if !self.placement().mode.is_sync() => {
                let fetched = exchange.fetch(self.round.get());
                fetched.map_err(|error| match self.lost_server(error) {
                    WorkerError::RunFailed(failure) => failure,
                    other => unreachable!("{other} is not a lost server"),
                })?;
                Ok(model.write_trained(&exchange.parameters))
            }
            _ => Ok(model),
        }
    }

    /// Gives the way to the servers up where it is not needed any more, and the memory with it.
    pub(crate) fn leave(&self) {
        if self.placement().mode.is_sync() {
            self.exchange.borrow_mut().take();
        }
    }

    /// Reports how the steps went, for the last time.
    pub(crate) fn report_pace(&self) {
        self.control.pace(self.stopwatch.borrow().pace());
    }

    fn check(&self) -> Result<(), WorkerError> {
        match self.failure() {
            None => Ok(()),
            Some(failure) => Err(WorkerError::RunFailed(failure)),
        }
    }

    /// Ends this worker's part if its process was told to end: called where another life can go on.
    fn leave_if_told(&self) -> Result<(), WorkerError> {
        if !self.status.is_leaving() {
            return Ok(());
        }
        self.control.leave();
        let failure = Failure::told_to_end(self.placement().replica, self.round_in_hand());
        self.status.fail(failure.clone());
        Err(self.remember(WorkerError::RunFailed(failure)))
    }

    /// Keeps the first error, so that the replica fails with it even if `train` swallows it.
    fn remember(&self, error: WorkerError) -> WorkerError {
        let failure = match &error {
            WorkerError::RunFailed(failure) => failure.clone(),
            other => Failure {
                replica: self.placement().replica,
                kind: other.kind(),
                message: other.to_string(),
                round: self.exchange.borrow().is_some().then(|| self.round.get()),
            },
        };
        self.failure.borrow_mut().get_or_insert(failure);
        error
    }

    /// What to make of a broken exchange with a server: the run's failure if one is known, else the server's loss.
    fn lost_server(&self, ExchangeError { server, why }: ExchangeError) -> WorkerError {
        let (kind, error) = match why {
            Why::RunFailed(failure) => return WorkerError::RunFailed(failure),
            Why::Refused(reason) => (FailureKind::Lost, reason),
            Why::Connection(error) => {
                let kind = match error {
                    ConnectionError::Protocol(_) => FailureKind::Protocol,
                    ConnectionError::GivenUp(_) => FailureKind::Timeout,
                    ConnectionError::Broken(_) => FailureKind::Lost,
                };
                (kind, error.to_string())
            }
        };
        // The cause travels by the control connection and may be a moment behind the broken one.
        let patience = Instant::now() + HEARTBEAT;
        while self.status.failure().is_none() && Instant::now() < patience {
            std::thread::sleep(TICK / 50);
        }
        WorkerError::RunFailed(self.status.failure().unwrap_or_else(|| Failure {
            replica: self.placement().topology.server(server as u32),
            kind,
            message: format!("{error}, as {} saw it", self.placement().replica),
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

/// Flattens the gradient of the mean loss. The path of the first tensor with a value that is not finite is an error, unless
/// the gradient stands for no example.
fn take_gradient<M: Model>(exchange: &mut Exchange, model: &M, gradient: Gradient<M::Gradients>) -> Result<(), String> {
    let Gradient { inner, examples, scale } = gradient;
    model.read_gradients(inner, &mut exchange.gradient, &mut exchange.present);
    exchange.check_gradient(examples, scale)
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
            worker.enter(u64::MAX);
            return None;
        }
        let index = self.next;
        self.next += 1;
        worker.enter(index + 1);
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
        let start = worker.start.get();
        let resumes = worker.round.get() == start.round && self.index == start.epoch;
        let next = if resumes { start.batch as usize } else { 0 };
        let order = permutation(worker.seed(), self.index, examples);
        let cut = Cut::new(examples, batch_size.max(1), workers);
        if resumes && start.round > 0 && worker.examples.get() == 0 {
            // It was started again. Epochs before this one were cut as this one is, or this is the best guess that there is.
            let own =
                |batches: Range<usize>| batches.map(|batch| cut.part(batch, worker.rank()).len() as u64).sum::<u64>();
            worker.examples.set(self.index * own(0..cut.batches()) + own(0..next.min(cut.batches())));
            worker.stopwatch.borrow_mut().go_on(start.round, worker.examples.get());
        }
        Batches { worker, data, order, cut, next }
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
            worker.control.rounds_done(worker.round.get());
            // What shows the epoch waits for its last metrics, and what comes next may take long. A failure ends the worker's
            // next call.
            let _ = worker.control.flush();
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
