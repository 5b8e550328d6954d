//! A worker's side of the exchange: joins all servers, pushes gradients to them and pulls parameters.
//!
//! Everything goes chunk by chunk and to all servers in turn, so that they work at the same time and no two workers wait for
//! each other. A connection that breaks is opened again and the push repeated; the servers know what they have already.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::open;
use super::layout::{Layout, TensorSpec};
use super::model::Scale;
use super::optimizer::{Cells, Clipping, Optimizer};
use super::parameter_server::{CHUNK, Closed, Ended, FromServer, Join, Joined, ParameterServer, Session, ToServer};
use super::shard::shard;
use super::status::RunStatus;
use crate::protocol::connection::{Connection, ConnectionError};
use crate::protocol::deadline::{RECONNECT, ROUND, TICK};
use crate::protocol::failure::Failure;
use crate::protocol::frame::{HEADER_BYTES, Header, Kind, PushHead, pack_bits};
use crate::protocol::message::{Hello, Incarnation, Position, Purpose, Speaker};
use crate::protocol::transport::Transport;
use crate::topology::Placement;

/// Breaks within one step after which a connection is not worth being opened again.
const MOST_BREAKS: usize = 32;

/// What the exchange of one worker needs of its surroundings.
pub(crate) struct Surroundings {
    pub(crate) placement: Placement,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) status: Arc<RunStatus>,
    pub(crate) incarnation: Incarnation,
    /// The server that this worker hosts itself.
    pub(crate) own: Option<Arc<ParameterServer>>,
}

/// The way to all servers, and the buffers that every step uses again.
pub(crate) struct Exchange {
    surroundings: Arc<Surroundings>,
    pub(crate) layout: Layout,
    remotes: Vec<Remote>,
    own: Option<Own>,
    pub(crate) gradient: Vec<f32>,
    pub(crate) parameters: Vec<f32>,
    pub(crate) present: Vec<bool>,
    presence: Vec<u8>,
    start: Vec<u8>,
    /// In async mode the averaged gradient is this worker's, so it is clipped by norm here.
    clipping: Option<(Clipping, Cells)>,
}

/// A server in another process.
struct Remote {
    index: usize,
    range: Range<usize>,
    connection: Connection,
    /// Which life of the server was joined.
    server: Option<Incarnation>,
}

/// The server in this process.
struct Own {
    range: Range<usize>,
    session: Session,
}

/// Where a worker begins after it has joined.
pub(crate) struct Start {
    pub(crate) position: Position,
    /// The run stops, and makes no further step.
    pub(crate) stopped: bool,
    /// What is not trained, as rank 0 gave it.
    pub(crate) unlearned: Vec<u8>,
}

/// What a step brought besides parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stepped {
    /// The run stops with this step.
    pub(crate) stop: bool,
    /// Updates of others between the last pull and this push, the most of all servers.
    pub(crate) staleness: u32,
    /// The push was repeated, since a connection broke.
    pub(crate) repeated: bool,
}

/// Failure to exchange with server `server`.
pub(crate) struct ExchangeError {
    pub(crate) server: usize,
    pub(crate) why: Why,
}

/// Why a server did not answer.
pub(crate) enum Why {
    RunFailed(Failure),
    /// It does not know this worker, or is not the one that was joined.
    Refused(String),
    Connection(ConnectionError),
}

impl From<ConnectionError> for Why {
    fn from(error: ConnectionError) -> Self {
        Why::Connection(error)
    }
}

impl Why {
    /// Whether a new connection may help.
    fn is_broken(&self) -> bool {
        matches!(self, Why::Connection(ConnectionError::Broken(_)))
    }
}

impl Surroundings {
    /// Whether to go on waiting for a server: not once the run has failed, and not for ever.
    fn patience(&self, waited: Duration, limit: Duration) -> Result<(), String> {
        self.status.unless_failed()?;
        // The server names the late worker after a ROUND; here is only the outermost bound.
        if waited > limit { Err(format!("no answer within {} s", limit.as_secs())) } else { Ok(()) }
    }

    fn limit(&self) -> Duration {
        ROUND * 2 + self.placement.rejoin
    }

    /// Opens a connection to server `index` and says hello.
    fn open(&self, index: usize, deadline: Instant) -> Result<Connection, ConnectionError> {
        let hello = Hello {
            run: self.placement.run.clone(),
            speaker: Speaker::Replica(self.placement.replica),
            incarnation: self.incarnation,
            purpose: Purpose::Data,
        };
        let waiting = || self.status.unless_failed().map_err(std::io::Error::other);
        open(self.transport.as_ref(), &self.placement.servers[index], &hello, deadline, &waiting)
    }

    /// Calls `attempt` until it succeeds or fails for good: at most until `deadline`, and once somebody was there, at most as
    /// long as a connection may take to come back.
    fn persist<T>(&self, mut attempt: impl FnMut(Instant) -> Result<T, Why>, mut deadline: Instant) -> Result<T, Why> {
        loop {
            match attempt(deadline) {
                Err(why) if why.is_broken() && Instant::now() < deadline && self.status.failure().is_none() => {
                    deadline = deadline.min(Instant::now() + RECONNECT);
                    std::thread::sleep(TICK / 50);
                }
                other => return other,
            }
        }
    }

    /// A connection in the place of a broken one.
    fn reconnect(&self, index: usize, server: Incarnation) -> Result<Connection, Why> {
        let attempt = |deadline: Instant| {
            let mut connection = self.open(index, deadline)?;
            connection.send(&ToServer::Resume { server })?;
            match receive(&mut connection, &|waited| self.patience(waited, RECONNECT))? {
                FromServer::Resumed => Ok(connection),
                other => Err(unexpected(&other)),
            }
        };
        self.persist(attempt, Instant::now() + RECONNECT)
    }
}

/// The next message of a server that is no refusal.
fn receive(
    connection: &mut Connection,
    patience: crate::protocol::connection::Patience<'_>,
) -> Result<FromServer, Why> {
    match connection.receive(patience)? {
        FromServer::RunFailed(failure) => Err(Why::RunFailed(failure)),
        FromServer::Refused { reason } => Err(Why::Refused(reason)),
        message => Ok(message),
    }
}

fn unexpected(message: &FromServer) -> Why {
    Why::Connection(ConnectionError::Protocol(format!("an unexpected {message:?}")))
}

impl Exchange {
    /// Connects to all servers and joins the model at each; `initial` gives rank 0's parameters and what is not trained.
    ///
    /// Waits until all workers have joined. Afterwards `parameters` holds those that training begins with, or goes on with.
    pub(crate) fn join(
        surroundings: Arc<Surroundings>,
        layout: Layout,
        optimizer: Optimizer,
        initial: impl FnOnce(&mut [f32]) -> Vec<u8>,
    ) -> Result<(Self, Start), ExchangeError> {
        let mut parameters = vec![0.0; layout.trained_len()];
        let is_first = surroundings.placement.replica.rank.0 == 0;
        let unlearned = if is_first { initial(&mut parameters) } else { Vec::new() };
        let count = surroundings.placement.topology.server_count();
        let own_index = surroundings.own.as_ref().map(|_| surroundings.placement.replica.rank.index());
        let join = Join { layout: layout.clone(), optimizer };
        let clipping = join.optimizer.clipping().filter(|_| join.optimizer.needs_norms());
        let clipping = clipping.filter(|_| !surroundings.placement.mode.is_sync()).map(|clipping| {
            let tensors: Vec<usize> = layout.trained().map(TensorSpec::len).collect();
            (clipping, Cells::new(&tensors, 0..layout.trained_len()))
        });
        let (mut remotes, mut own, mut joined) = (Vec::new(), None, Vec::new());
        for index in 0..count {
            let range = shard(parameters.len(), index, count);
            let failed = |why| ExchangeError { server: index, why };
            if own_index == Some(index) {
                let server = surroundings.own.as_ref().expect("it has an index");
                let session = server
                    .admit(surroundings.placement.replica.rank, surroundings.incarnation, None)
                    .map_err(|reason| failed(Why::Refused(reason)))?;
                let values = |range: Range<usize>| (parameters[range].to_vec(), unlearned.clone());
                let answer = session.join_here(join.clone(), values);
                joined.push(answer.map_err(|ended| failed(surroundings.ended(ended)))?);
                own = Some(Own { range, session });
            } else {
                let attempt = |deadline| {
                    let mut connection = surroundings.open(index, deadline)?;
                    let initial = (&parameters[range.clone()], (index == 0).then_some(&unlearned[..]));
                    let joined = join_over(&mut connection, &join, initial, &surroundings)?;
                    Ok((connection, joined))
                };
                let answer =
                    surroundings.persist(attempt, Instant::now() + surroundings.placement.join).map_err(failed)?;
                let (connection, answer) = answer;
                remotes.push(Remote { index, range, connection, server: Some(answer.server) });
                joined.push(answer);
            }
        }
        // Servers are at most one round apart; the one that is behind still needs this worker's push.
        let round = joined.iter().map(|joined| joined.round).min().expect("at least one server");
        let position = joined.iter().flat_map(|joined| &joined.positions).find(|position| position.round == round);
        let position = position.copied().unwrap_or(Position { round, ..Position::default() });
        let stopped = joined.iter().any(|joined| joined.stopped);
        let mut exchange = Self {
            gradient: vec![0.0; layout.trained_len()],
            present: vec![false; layout.trained().count()],
            presence: Vec::new(),
            start: Vec::new(),
            clipping,
            surroundings,
            layout,
            remotes,
            own,
            parameters,
        };
        let unlearned = exchange.fetch(round)?;
        Ok((exchange, Start { position, stopped, unlearned }))
    }

    /// Gets the parameters at the beginning of `round` from all servers, and what is not trained from the first.
    pub(crate) fn fetch(&mut self, round: u64) -> Result<Vec<u8>, ExchangeError> {
        let mut unlearned = Vec::new();
        for at in 0..self.remotes.len() {
            let mut breaks = 0;
            loop {
                match self.fetch_over(at, round) {
                    Ok(Some(bytes)) => unlearned = bytes,
                    Ok(None) => {}
                    Err(why) => {
                        self.recover(at, why, &mut breaks)?;
                        continue;
                    }
                }
                break;
            }
        }
        if let Some(own) = &self.own {
            let server = self.surroundings.placement.replica.rank.index();
            let copied = own.session.copy_start(round, &mut self.parameters[own.range.clone()]);
            copied.map_err(|ended| ExchangeError { server, why: self.surroundings.ended(ended) })?;
            if server == 0 {
                unlearned = own.session.unlearned().to_vec();
            }
        }
        Ok(unlearned)
    }

    fn fetch_over(&mut self, at: usize, round: u64) -> Result<Option<Vec<u8>>, Why> {
        let Self { remotes, parameters, surroundings, .. } = self;
        let Remote { connection, range, index, .. } = &mut remotes[at];
        let patience = |waited| surroundings.patience(waited, surroundings.limit());
        connection.send(&ToServer::Fetch { round })?;
        read_parameters_header(connection, range.len(), &patience)?;
        connection.read_exact(bytemuck::cast_slice_mut(&mut parameters[range.clone()]), &patience)?;
        Ok(match *index {
            0 => Some(connection.receive_frame(Kind::Frozen, &patience)?),
            _ => None,
        })
    }

    /// Opens a connection that broke again.
    fn recover(&mut self, at: usize, why: Why, breaks: &mut usize) -> Result<(), ExchangeError> {
        let remote = &mut self.remotes[at];
        let index = remote.index;
        let failed = |why| ExchangeError { server: index, why };
        *breaks += 1;
        match remote.server {
            Some(server) if why.is_broken() && *breaks <= MOST_BREAKS => {
                remote.connection = self.surroundings.reconnect(index, server).map_err(failed)?;
                Ok(())
            }
            _ => Err(failed(why)),
        }
    }

    /// Makes the gradient that of the mean loss, and checks it. The path of the first tensor with a value that is not finite
    /// is an error, unless the gradient stands for no example.
    ///
    /// Not generic, so that it is compiled with this crate and its optimisation, not with the user's.
    pub(crate) fn check_gradient(&mut self, examples: usize, scale: Scale) -> Result<(), String> {
        if examples == 0 {
            self.gradient.fill(0.0);
            self.present.fill(false);
            return Ok(());
        }
        if scale == Scale::Sum {
            let scale = 1.0 / examples as f32;
            self.gradient.iter_mut().for_each(|value| *value *= scale);
        }
        if is_finite(&self.gradient) {
            return Ok(());
        }
        let mut start = 0;
        for tensor in self.layout.trained() {
            if !is_finite(&self.gradient[start..start + tensor.len()]) {
                return Err(tensor.path.clone());
            }
            start += tensor.len();
        }
        unreachable!("the tensors tile the gradient")
    }

    /// One step with all servers: pushes the gradient and pulls the parameters.
    pub(crate) fn step(&mut self, head: PushHead) -> Result<Stepped, ExchangeError> {
        pack_bits(&self.present, &mut self.presence);
        self.clip();
        let own_index = self.surroundings.placement.replica.rank.index();
        // Taken out, so that its push can be kept beside what the remote ones need.
        let own = self.own.take();
        let stepped = self.step_with(head, own.as_ref(), own_index);
        self.own = own;
        stepped
    }

    fn clip(&mut self) {
        let Some((clipping, cells)) = &self.clipping else { return };
        let mut squares = vec![0.0; cells.len()];
        cells.squares(0..self.gradient.len(), &self.gradient, &mut squares);
        let scales = clipping.scales(cells, &squares, &self.present);
        let mut rest = &mut self.gradient[..];
        for (tensor, scale) in self.layout.trained().zip(scales) {
            let (values, behind) = rest.split_at_mut(tensor.len());
            values.iter_mut().for_each(|value| *value *= scale);
            rest = behind;
        }
    }

    fn step_with(&mut self, head: PushHead, own: Option<&Own>, own_index: usize) -> Result<Stepped, ExchangeError> {
        let chunks = shard(self.gradient.len(), 0, self.surroundings.placement.topology.server_count());
        let chunks = chunks.len().div_ceil(CHUNK).max(1);
        let surroundings = self.surroundings.clone();
        let own_failed = |ended| ExchangeError { server: own_index, why: surroundings.ended(ended) };
        let own_push = own.map(|own| own.session.begin_here(head, &self.presence).map(|push| (own, push)));
        let own_push = own_push.transpose().map_err(own_failed)?;
        let mut breaks = 0;
        for chunk in 0..chunks {
            for at in 0..self.remotes.len() {
                if let Err(why) = self.push_chunk(at, chunk, head) {
                    self.push_again(at, chunk + 1, head, why, &mut breaks)?;
                }
            }
            if let Some((own, push)) = &own_push {
                let values = part(&self.gradient[own.range.clone()], chunk);
                push.chunk(chunk, values).map_err(own_failed)?;
            }
        }
        let mut stepped = Stepped { stop: false, staleness: 0, repeated: false };
        for chunk in 0..chunks {
            for at in 0..self.remotes.len() {
                let mut pulled = self.pull_chunk(at, chunk, &mut stepped);
                while let Err(why) = pulled {
                    self.push_again(at, chunks, head, why, &mut breaks)?;
                    pulled = (0..=chunk).try_for_each(|chunk| self.pull_chunk(at, chunk, &mut stepped));
                }
            }
        }
        if let Some((own, push)) = own_push {
            let Closed { stop, .. } = push.close(&mut self.parameters[own.range.clone()]).map_err(own_failed)?;
            stepped.stop |= stop;
        }
        stepped.repeated = breaks > 0;
        Ok(stepped)
    }

    /// Reconnects and brings the first `chunks` chunks again, until that works.
    fn push_again(
        &mut self,
        at: usize,
        chunks: usize,
        head: PushHead,
        why: Why,
        breaks: &mut usize,
    ) -> Result<(), ExchangeError> {
        let mut pushed = Err(why);
        while let Err(why) = pushed {
            self.recover(at, why, breaks)?;
            pushed = (0..chunks).try_for_each(|chunk| self.push_chunk(at, chunk, head));
        }
        Ok(())
    }

    fn push_chunk(&mut self, at: usize, chunk: usize, head: PushHead) -> Result<(), Why> {
        let Self { remotes, gradient, presence, start, surroundings, .. } = self;
        let Remote { connection, range, .. } = &mut remotes[at];
        let patience = |waited| surroundings.patience(waited, surroundings.limit());
        let values = &gradient[range.clone()];
        let bytes = bytemuck::cast_slice(part(values, chunk));
        if chunk > 0 {
            return Ok(connection.write_all(bytes, &patience)?);
        }
        start.clear();
        start.reserve(HEADER_BYTES + PushHead::BYTES + presence.len());
        start.extend(Header::of(Kind::Push, PushHead::BYTES + presence.len() + values.len() * 4).encode());
        start.extend(head.encode());
        start.extend_from_slice(presence);
        Ok(connection.write_both_patiently(start, bytes, &patience)?)
    }

    fn pull_chunk(&mut self, at: usize, chunk: usize, stepped: &mut Stepped) -> Result<(), Why> {
        let Self { remotes, parameters, surroundings, .. } = self;
        let Remote { connection, range, .. } = &mut remotes[at];
        let patience = |waited| surroundings.patience(waited, surroundings.limit());
        if chunk == 0 {
            let header = read_parameters_header(connection, range.len(), &patience)?;
            stepped.stop |= header.kind == Kind::LastParameters;
            stepped.staleness = stepped.staleness.max(header.detail);
        }
        let len = range.len();
        let (from, to) = ((chunk * CHUNK).min(len), ((chunk + 1) * CHUNK).min(len));
        let values = &mut parameters[range.start + from..range.start + to];
        Ok(connection.read_exact(bytemuck::cast_slice_mut(values), &patience)?)
    }

    /// Breaks all connections, as a network would.
    #[cfg(test)]
    pub(crate) fn break_connections(&self) {
        self.remotes.iter().for_each(|remote| remote.connection.shutdown());
    }
}

impl Surroundings {
    /// Why the own server has no answer.
    fn ended(&self, ended: Ended) -> Why {
        match ended {
            Ended::Failed(failure) => {
                self.status.fail(failure.clone());
                Why::RunFailed(self.status.failure().unwrap_or(failure))
            }
            Ended::Over => match self.status.failure() {
                Some(failure) => Why::RunFailed(failure),
                None => Why::Refused("it counts as lost".to_owned()),
            },
        }
    }
}

/// Joins over a connection: says what is trained, gives rank 0's parameters if they are wanted, waits for everyone.
fn join_over(
    connection: &mut Connection,
    join: &Join,
    (parameters, unlearned): (&[f32], Option<&[u8]>),
    surroundings: &Surroundings,
) -> Result<Joined, Why> {
    let patience =
        |waited| surroundings.patience(waited, surroundings.placement.join * 2 + surroundings.placement.rejoin);
    connection.send(&ToServer::Join(join.clone()))?;
    match receive(connection, &patience)? {
        FromServer::Seated { initial: false } => {}
        FromServer::Seated { initial: true } => {
            connection.send_frame(Kind::Parameters, bytemuck::cast_slice(parameters))?;
            if let Some(unlearned) = unlearned {
                connection.send_frame(Kind::Frozen, unlearned)?;
            }
        }
        other => return Err(unexpected(&other)),
    }
    match receive(connection, &patience)? {
        FromServer::Joined(joined) => Ok(joined),
        other => Err(unexpected(&other)),
    }
}

/// Whether no value is NaN or infinite.
///
/// `&` instead of `&&`, and integers instead of floats, keep the loop free of branches and of the order of comparisons, so
/// that it runs at the speed of memory.
pub(crate) fn is_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let finite =
        |values: &[f32]| values.iter().fold(true, |finite, value| finite & (value.to_bits() & EXPONENT != EXPONENT));
    // In parts, so that a bad gradient is not read to its end.
    values.chunks(4096).all(finite)
}

/// Part `chunk` of a server's values; empty behind their end.
fn part(values: &[f32], chunk: usize) -> &[f32] {
    &values[(chunk * CHUNK).min(values.len())..((chunk + 1) * CHUNK).min(values.len())]
}

/// Reads the header before `values` parameters.
fn read_parameters_header(
    connection: &mut Connection,
    values: usize,
    patience: crate::protocol::connection::Patience<'_>,
) -> Result<Header, Why> {
    let header = connection.read_header(patience)?;
    match header.kind {
        Kind::Parameters | Kind::LastParameters if header.length_bytes == values as u64 * 4 => Ok(header),
        Kind::Message => match connection.read_message(header)? {
            FromServer::RunFailed(failure) => Err(Why::RunFailed(failure)),
            FromServer::Refused { reason } => Err(Why::Refused(reason)),
            other => Err(unexpected(&other)),
        },
        _ => Err(Why::Connection(ConnectionError::Protocol(format!("{header:?} instead of {values} parameters")))),
    }
}
