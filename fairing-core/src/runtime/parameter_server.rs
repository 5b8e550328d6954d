//! One parameter server: owns a range of the flat vector, averages what the workers push, applies the optimizer.
//!
//! Each worker has a connection and a thread of its own here. Gradients arrive in chunks; whoever completes a chunk adds
//! it up **in rank order** and applies the optimizer to it, while the next chunk is on its way. So the answer does not
//! depend on the order of arrival, and a server holds a few chunks per worker, never whole gradients. When the last
//! chunk is applied, the round is committed and every thread sends its worker the new parameters.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::layout::{Layout, TensorSpec};
use super::optimizer::{Optimizer, Round, ShardOptimizer, mean};
use super::shard::shard;
use super::status::RunStatus;
use crate::protocol::connection::{Connection, ConnectionError};
use crate::protocol::deadline::{HEARTBEAT, JOIN, ROUND, STALL, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::{Header, Kind, PushHead, bit};
use crate::topology::{Rank, Replica, Role, Topology};

/// Values per chunk: 256 KiB stay in the second-level cache while they are added and applied.
pub(crate) const CHUNK: usize = 64 << 10;

/// More than any model that runs on processors has; a larger number is a fault of the peer, not a model.
const MOST_PARAMETERS: usize = 1 << 36;

/// Chunks that a worker may be ahead of the slowest one within a round; bounds the memory of a server.
const CHUNKS_AHEAD: usize = 4;

/// What a worker tells a server when it joins the model. Rank 0's parameters follow, and at server 0 its frozen ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Join {
    pub(crate) layout: Layout,
    pub(crate) optimizer: Optimizer,
}

/// What a server says to a worker, apart from parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromServer {
    /// Everyone has joined; parameters (and at server 0, frozen ones) follow.
    Joined,
    /// The run has failed.
    RunFailed(Failure),
}

/// State of one server, shared by the threads that serve its workers.
pub(crate) struct ParameterServer {
    index: usize,
    topology: Topology,
    /// The round that training starts with.
    first_round: u64,
    status: Arc<RunStatus>,
    joining: Mutex<Joining>,
    joined: Condvar,
}

/// What has arrived before training starts.
#[derive(Default)]
struct Joining {
    /// The first rank's join, which the others must equal.
    reference: Option<(Rank, Join)>,
    present: Vec<bool>,
    initial: Option<Vec<f32>>,
    frozen: Arc<Vec<u8>>,
    shard: Option<Arc<Shard>>,
}

impl ParameterServer {
    pub(crate) fn new(index: usize, topology: Topology, first_round: u64, status: Arc<RunStatus>) -> Arc<Self> {
        let joining = Joining { present: vec![false; topology.worker_count()], ..Joining::default() };
        let server =
            Self { index, topology, first_round, status, joining: Mutex::new(joining), joined: Condvar::new() };
        let server = Arc::new(server);
        let waiting = Arc::downgrade(&server);
        server.status.on_failure(move || {
            if let Some(server) = waiting.upgrade() {
                // Taking the lock first: a thread that has looked at the status but does not wait yet is woken too.
                let shard = server.lock().shard.clone();
                server.joined.notify_all();
                if let Some(shard) = shard {
                    drop(shard.lock());
                    shard.changed.notify_all();
                }
            }
        });
        server
    }

    fn lock(&self) -> MutexGuard<'_, Joining> {
        self.joining.lock().expect("no holder panics")
    }

    /// Serves one worker until it leaves, is lost, or the run fails. What goes wrong is recorded in the run's status.
    pub(crate) fn serve(&self, rank: Rank, mut connection: Connection) {
        if let Err(failure) = self.converse(rank, &mut connection) {
            if failure.kind == FailureKind::Lost {
                self.wait_for_the_cause();
            }
            self.status.fail(failure);
        }
        if let Some(failure) = self.status.failure() {
            // The worker learns the cause here and by its control connection, whichever is faster.
            let _ = connection.send(&FromServer::RunFailed(failure));
        }
    }

    /// A worker that fails says why on its control connection and then breaks this one: its word goes first.
    fn wait_for_the_cause(&self) {
        let started = Instant::now();
        let mut joining = self.lock();
        while self.status.failure().is_none() && started.elapsed() < HEARTBEAT {
            joining = self.joined.wait_timeout(joining, TICK).expect("no holder panics").0;
        }
    }

    fn converse(&self, rank: Rank, connection: &mut Connection) -> Result<(), Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let shard = match self.join(rank, connection)? {
            Some(shard) => shard,
            None => return Ok(()),
        };
        loop {
            let header = match connection.read_header(&|_| self.unless_failed()) {
                Ok(header) => header,
                Err(ConnectionError::GivenUp(_)) => return Ok(()),
                Err(error) => return Err(lost(worker, Some(shard.round()), &error)),
            };
            match header.kind {
                Kind::Leave => {
                    shard.leave(rank);
                    return Ok(());
                }
                Kind::Push => {
                    if !self.round(&shard, rank, header, connection)? {
                        return Ok(());
                    }
                }
                kind => return Err(protocol(worker, format!("a {kind:?} frame where a push belongs"))),
            }
        }
    }

    fn unless_failed(&self) -> Result<(), String> {
        match self.status.failure() {
            None => Ok(()),
            Some(failure) => Err(failure.to_string()),
        }
    }

    /// Waits for everyone's join and sends the initial parameters. `None` if the run has failed meanwhile.
    fn join(&self, rank: Rank, connection: &mut Connection) -> Result<Option<Arc<Shard>>, Failure> {
        let worker = Replica { role: Role::Worker, rank };
        // A worker connects when it joins, so its join is on the way.
        let patience = |waited: Duration| match self.unless_failed() {
            Ok(()) if waited > STALL => Err(format!("its join stood still for {}", seconds(STALL))),
            other => other,
        };
        let join: Join = match connection.receive(&patience) {
            Ok(join) => join,
            Err(_) if self.status.failure().is_some() => return Ok(None),
            Err(error) => return Err(lost(worker, None, &error)),
        };
        if join.layout.trained_len() > MOST_PARAMETERS {
            let message = format!("a layout of more than {MOST_PARAMETERS} parameters");
            return Err(protocol(worker, message));
        }
        let range = shard(join.layout.trained_len(), self.index, self.topology.ps_count());
        let mut initial = None;
        let mut frozen = Vec::new();
        if rank.0 == 0 {
            let mut parameters = vec![0f32; range.len()];
            read_values(connection, Kind::Parameters, &mut parameters).map_err(|error| lost(worker, None, &error))?;
            initial = Some(parameters);
            if self.index == 0 {
                let wait = crate::protocol::connection::at_most(STALL);
                frozen = connection.receive_frame(Kind::Frozen, &wait).map_err(|error| lost(worker, None, &error))?;
            }
        }
        self.register(rank, join, initial, frozen)?;
        let Some((shard, frozen)) = self.wait_for_all()? else { return Ok(None) };
        let sent = connection.send(&FromServer::Joined).and_then(|()| {
            shard.send(connection, Kind::Parameters)?;
            if self.index == 0 { connection.send_frame(Kind::Frozen, &frozen) } else { Ok(()) }
        });
        sent.map_err(|error| lost(worker, None, &error))?;
        Ok(Some(shard))
    }

    fn register(&self, rank: Rank, join: Join, initial: Option<Vec<f32>>, frozen: Vec<u8>) -> Result<(), Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let layout = |message| Failure { replica: worker, kind: FailureKind::Layout, message, round: None };
        let mut joining = self.lock();
        if std::mem::replace(&mut joining.present[rank.index()], true) {
            return Err(protocol(worker, "joined a model twice; `worker.join` may be called once".into()));
        }
        if let Some((first, reference)) = &joining.reference {
            if let Some(difference) = reference.layout.difference(&join.layout) {
                let message = format!("its model differs from that of worker {first}: {difference}");
                return Err(layout(message));
            }
            if reference.optimizer != join.optimizer {
                let (theirs, mine) = (&reference.optimizer, &join.optimizer);
                return Err(layout(format!("it joined with {mine:?}, worker {first} with {theirs:?}")));
            }
        } else {
            join.optimizer.validate().map_err(|error| Failure {
                replica: worker,
                kind: FailureKind::Configuration,
                message: error.to_string(),
                round: None,
            })?;
            joining.reference = Some((rank, join));
        }
        if let Some(initial) = initial {
            joining.initial = Some(initial);
            joining.frozen = Arc::new(frozen);
        }
        let joining = &mut *joining;
        if joining.present.iter().all(|present| *present)
            && let (Some((_, reference)), Some(initial)) = (&joining.reference, joining.initial.take())
        {
            let range = shard(reference.layout.trained_len(), self.index, self.topology.ps_count());
            let shard =
                Shard::new(&reference.layout, range, &reference.optimizer, initial, self.topology, self.first_round);
            joining.shard = Some(Arc::new(shard));
            self.joined.notify_all();
        }
        Ok(())
    }

    #[expect(clippy::type_complexity, reason = "a pair that one caller takes apart at once")]
    fn wait_for_all(&self) -> Result<Option<(Arc<Shard>, Arc<Vec<u8>>)>, Failure> {
        let started = Instant::now();
        let mut joining = self.lock();
        loop {
            if let Some(shard) = &joining.shard {
                return Ok(Some((shard.clone(), joining.frozen.clone())));
            }
            if self.status.failure().is_some() {
                return Ok(None);
            }
            if started.elapsed() > JOIN {
                let missing = joining.present.iter().position(|present| !present).unwrap_or(0);
                return Err(timeout(missing, None, format!("it did not call `worker.join` within {}", seconds(JOIN))));
            }
            joining = self.joined.wait_timeout(joining, TICK).expect("no holder panics").0;
        }
    }

    /// One worker's part of one round. `false` if the run has failed meanwhile.
    fn round(&self, shard: &Shard, rank: Rank, header: Header, connection: &mut Connection) -> Result<bool, Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let presence_bytes = shard.tensors.div_ceil(8);
        let expected = PushHead::BYTES + presence_bytes + shard.range.len() * 4;
        if header.length_bytes != expected as u64 {
            let message = format!("a push of {} bytes instead of {expected}", header.length_bytes);
            return Err(protocol(worker, message));
        }
        let wait = |waited: Duration| match self.unless_failed() {
            Ok(()) if waited > STALL => Err(format!("its push stood still for {}", seconds(STALL))),
            other => other,
        };
        let mut head = vec![0; PushHead::BYTES + presence_bytes];
        let mut read = |buffer: &mut [u8]| match connection.read_exact(buffer, &wait) {
            Ok(()) => Ok(true),
            Err(_) if self.status.failure().is_some() => Ok(false),
            Err(error) => Err(lost(worker, Some(shard.round()), &error)),
        };
        if !read(&mut head)? {
            return Ok(false);
        }
        let (fixed, presence) = head.split_at(PushHead::BYTES);
        let head = PushHead::decode(fixed.try_into().expect("split at its size"));
        shard.begin(rank, head, presence)?;
        for chunk in 0..shard.chunks() {
            if !self.wait_in_round(shard, head.round, |progress| chunk - progress.reduced < CHUNKS_AHEAD)? {
                return Ok(false);
            }
            {
                let mut slot = shard.slot(rank.index(), chunk).lock().expect("no holder panics");
                let values = shard.chunk(chunk).len();
                if !read(bytemuck::cast_slice_mut(&mut slot[..values]))? {
                    return Ok(false);
                }
            }
            shard.arrived(chunk, || self.status.is_stopping());
        }
        if !self.wait_in_round(shard, head.round, |progress| progress.round > head.round)? {
            return Ok(false);
        }
        let kind = if shard.lock().stop && self.index == 0 { Kind::LastParameters } else { Kind::Parameters };
        shard.send(connection, kind).map_err(|error| lost(worker, Some(head.round), &error))?;
        Ok(true)
    }

    /// Waits until `ready`, or until the round is over. `false` if the run has failed meanwhile.
    fn wait_in_round(&self, shard: &Shard, round: u64, ready: impl Fn(&Progress) -> bool) -> Result<bool, Failure> {
        let mut progress = shard.lock();
        let mut started = None;
        loop {
            if progress.round > round || ready(&progress) {
                return Ok(true);
            }
            if self.status.failure().is_some() {
                return Ok(false);
            }
            let missing = || progress.heads.iter().position(Option::is_none).unwrap_or(0);
            if progress.left.iter().zip(&progress.heads).any(|(left, head)| *left && head.is_none()) {
                let rank = missing();
                return Err(Failure {
                    replica: Replica::worker(rank as u32),
                    kind: FailureKind::Configuration,
                    message: format!(
                        "it finished training after {round} rounds while other workers go on; all workers must call \
                         `worker.step` equally often (loop over `worker.epochs` and `batches`)"
                    ),
                    round: Some(round),
                });
            }
            if started.get_or_insert_with(Instant::now).elapsed() > ROUND {
                let message = format!("it did not push its gradient within {}", seconds(ROUND));
                return Err(timeout(missing(), Some(round), message));
            }
            progress = shard.changed.wait_timeout(progress, TICK).expect("no holder panics").0;
        }
    }
}

fn read_values(connection: &mut Connection, kind: Kind, values: &mut [f32]) -> Result<(), ConnectionError> {
    let patience = crate::protocol::connection::at_most(STALL);
    let header = connection.read_header(&patience)?;
    let expected = Header { kind, length_bytes: values.len() as u64 * 4 };
    if header != expected {
        return Err(ConnectionError::Protocol(format!("{header:?} instead of {expected:?}")));
    }
    connection.read_exact(bytemuck::cast_slice_mut(values), &patience)
}

fn lost(replica: Replica, round: Option<u64>, error: &ConnectionError) -> Failure {
    let kind = match error {
        ConnectionError::Protocol(_) => FailureKind::Protocol,
        ConnectionError::Broken(_) | ConnectionError::GivenUp(_) => FailureKind::Lost,
    };
    Failure { replica, kind, message: error.to_string(), round }
}

fn protocol(replica: Replica, message: String) -> Failure {
    Failure { replica, kind: FailureKind::Protocol, message, round: None }
}

fn timeout(rank: usize, round: Option<u64>, message: String) -> Failure {
    Failure { replica: Replica::worker(rank as u32), kind: FailureKind::Timeout, message, round }
}

pub(crate) fn seconds(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// The parameters of one server while it trains.
struct Shard {
    range: Range<usize>,
    /// Number of trained tensors of the whole model: one presence bit each.
    tensors: usize,
    /// Which trained tensor each piece of this shard belongs to.
    pieces: Vec<usize>,
    workers: usize,
    /// `CHUNKS_AHEAD` buffers per worker.
    slots: Vec<Mutex<Vec<f32>>>,
    values: RwLock<Values>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

struct Values {
    parameters: Vec<f32>,
    optimizer: ShardOptimizer,
    /// The numbers of the round in progress, from its last push on.
    round: Option<Round>,
    /// The mean gradient of the chunk in hand.
    mean: Vec<f32>,
}

/// Where the round in progress stands.
struct Progress {
    round: u64,
    heads: Vec<Option<PushHead>>,
    /// Per piece: whether some worker has a gradient for it in this round.
    present: Vec<bool>,
    /// Per rank: its share of the mean.
    weights: Vec<f32>,
    /// Workers whose buffer holds the chunk, by chunk modulo `CHUNKS_AHEAD`.
    arrived: [usize; CHUNKS_AHEAD],
    /// Chunks that have been applied.
    reduced: usize,
    /// Whether the run stops with the round that was committed last.
    stop: bool,
    left: Vec<bool>,
}

impl Shard {
    fn new(
        layout: &Layout,
        range: Range<usize>,
        optimizer: &Optimizer,
        parameters: Vec<f32>,
        topology: Topology,
        first_round: u64,
    ) -> Self {
        let (pieces, ranges) = pieces(layout.trained(), &range);
        let workers = topology.worker_count();
        let slot_len = CHUNK.min(range.len());
        let optimizer = ShardOptimizer::new(*optimizer, ranges);
        let values = Values { parameters, optimizer, round: None, mean: vec![0.0; slot_len] };
        let progress = Progress {
            round: first_round,
            heads: vec![None; workers],
            present: vec![false; pieces.len()],
            weights: vec![0.0; workers],
            arrived: [0; CHUNKS_AHEAD],
            reduced: 0,
            stop: false,
            left: vec![false; workers],
        };
        Self {
            tensors: layout.trained().count(),
            pieces,
            workers,
            slots: (0..workers * CHUNKS_AHEAD).map(|_| Mutex::new(vec![0.0; slot_len])).collect(),
            values: RwLock::new(values),
            progress: Mutex::new(progress),
            changed: Condvar::new(),
            range,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("no holder panics")
    }

    fn round(&self) -> u64 {
        self.lock().round
    }

    /// Chunks of a round; an empty shard has one empty chunk, so that its rounds are committed like all others.
    fn chunks(&self) -> usize {
        self.range.len().div_ceil(CHUNK).max(1)
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK;
        start..(start + CHUNK).min(self.range.len())
    }

    fn slot(&self, rank: usize, chunk: usize) -> &Mutex<Vec<f32>> {
        &self.slots[rank * CHUNKS_AHEAD + chunk % CHUNKS_AHEAD]
    }

    /// Takes note of a push that begins; the last one of a round fixes the weights.
    fn begin(&self, rank: Rank, head: PushHead, presence: &[u8]) -> Result<(), Failure> {
        let worker = Replica { role: Role::Worker, rank };
        let mut progress = self.lock();
        let progress = &mut *progress;
        if head.round != progress.round || progress.heads[rank.index()].is_some() {
            let message = format!("a push for round {} while round {} is open", head.round, progress.round);
            return Err(protocol(worker, message));
        }
        let first = progress.heads.iter().enumerate().find_map(|(rank, head)| Some((rank, (*head)?)));
        if let Some((first, other)) = first
            && other.learning_rate.to_bits() != head.learning_rate.to_bits()
        {
            return Err(Failure {
                replica: worker,
                kind: FailureKind::Configuration,
                message: format!(
                    "it stepped with learning rate {}, worker {first} with {}; in a sync round all workers need the same",
                    head.learning_rate, other.learning_rate
                ),
                round: Some(head.round),
            });
        }
        progress.heads[rank.index()] = Some(head);
        for (present, tensor) in progress.present.iter_mut().zip(&self.pieces) {
            *present |= bit(presence, *tensor);
        }
        if progress.heads.iter().all(Option::is_some) {
            let examples = |head: &Option<PushHead>| head.map_or(0, |head| head.examples);
            let total: u64 = progress.heads.iter().map(examples).sum();
            for (weight, head) in progress.weights.iter_mut().zip(&progress.heads) {
                // An integer below 2^53 is exact in f64; the quotient is rounded once.
                *weight = (examples(head) as f64 / total.max(1) as f64) as f32;
            }
            let mut values = self.values.write().expect("no holder panics");
            let round = values.optimizer.begin_round(&progress.present, head.learning_rate);
            values.round = Some(round);
        }
        Ok(())
    }

    /// Takes note of a chunk; the last worker to bring it adds it up and applies it.
    fn arrived(&self, chunk: usize, stopping: impl Fn() -> bool) {
        let weights = {
            let mut progress = self.lock();
            let arrived = &mut progress.arrived[chunk % CHUNKS_AHEAD];
            *arrived += 1;
            if *arrived < self.workers {
                return;
            }
            *arrived = 0;
            // Nobody else touches the weights before this chunk is applied, so they may leave for the time being.
            std::mem::take(&mut progress.weights)
        };
        self.apply(chunk, &weights);
        let mut progress = self.lock();
        progress.weights = weights;
        progress.reduced = chunk + 1;
        if progress.reduced == self.chunks() {
            progress.round += 1;
            progress.reduced = 0;
            progress.heads.fill(None);
            progress.present.fill(false);
            progress.stop = stopping();
        }
        drop(progress);
        self.changed.notify_all();
    }

    /// The mean gradient of one chunk, added in rank order, then the optimizer.
    fn apply(&self, chunk: usize, weights: &[f32]) {
        let range = self.chunk(chunk);
        let mut values = self.values.write().expect("no holder panics");
        let Values { parameters, optimizer, round, mean: out } = &mut *values;
        let round = round.as_ref().expect("a chunk is complete only if every worker has begun its push");
        let out = &mut out[..range.len()];
        let slots: Vec<_> =
            (0..weights.len()).map(|rank| self.slot(rank, chunk).lock().expect("no holder panics")).collect();
        mean(out, weights.iter().zip(&slots).map(|(weight, slot)| (*weight, &slot[..range.len()])));
        optimizer.apply(round, range.clone(), &mut parameters[range], out);
    }

    fn send(&self, connection: &mut Connection, kind: Kind) -> Result<(), ConnectionError> {
        let values = self.values.read().expect("no holder panics");
        connection.send_frame(kind, bytemuck::cast_slice(&values.parameters))
    }

    fn leave(&self, rank: Rank) {
        self.lock().left[rank.index()] = true;
        self.changed.notify_all();
    }
}

/// The parts of tensors that lie in `range`: tensor number and shard-local range of each, in order.
fn pieces<'a>(tensors: impl Iterator<Item = &'a TensorSpec>, range: &Range<usize>) -> (Vec<usize>, Vec<Range<usize>>) {
    let mut start = 0;
    let mut pieces = (Vec::new(), Vec::new());
    for (index, tensor) in tensors.enumerate() {
        let (from, to) = (start.max(range.start), (start + tensor.len()).min(range.end));
        if from < to {
            pieces.0.push(index);
            pieces.1.push(from - range.start..to - range.start);
        }
        start += tensor.len();
    }
    pieces
}
