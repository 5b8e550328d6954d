//! One replica from hello to goodbye: a server that accepts connections, or a worker that runs `train`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use super::control::Control;
use super::coordinator::{Coordinator, Event, Heard, Source, forward, queue};
use super::exchange::{Surroundings, is_finite};
use super::model::Model;
use super::parameter_server::ParameterServer;
use super::status::RunStatus;
use super::worker::Worker;
use crate::protocol::connection::{Connection, ConnectionError, at_most};
use crate::protocol::deadline::{HELLO, PARTING, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::Kind;
use crate::protocol::message::{
    CollectiveKey, Finished, FromCoordinator, Group, Hello, Position, Purpose, Speaker, ToCoordinator,
};
use crate::protocol::transport::{Listener, Transport};
use crate::topology::{Member, Placement, Replica, Role};

/// What a replica needs besides its placement.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) placement: Placement,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) status: Arc<RunStatus>,
    /// Where the run starts; anywhere but at the beginning once a run can go on where another one ended.
    pub(crate) start: Position,
}

impl Context {
    /// Tells this replica to end, see [`RunStatus::leave`]. It is called by whoever hears the signal; `parted` is called after
    /// the longest time that this may take.
    pub(crate) fn leave(&self, parted: impl FnOnce()) {
        self.status.leave(&self.placement);
        std::thread::sleep(PARTING);
        self.status.part();
        parted();
    }
}

/// The part of a replica that owns a share of the parameters, and the coordinator beside the first share.
struct Host {
    server: Arc<ParameterServer>,
    door: Arc<Door>,
    coordinating: Option<JoinHandle<Result<(), Failure>>>,
}

impl Host {
    /// Listens at the address of share `index`.
    fn open(context: &Context, index: usize) -> Result<Self, Failure> {
        let Context { placement, transport, status, start } = context;
        let address = &placement.servers[index];
        let listener = transport.listen(address).map_err(|error| Failure {
            replica: placement.replica,
            kind: FailureKind::Configuration,
            message: format!("cannot listen at `{address}`: {error}"),
            round: None,
        })?;
        let server = ParameterServer::new(index, placement, *start, status.clone());
        let (events, received) = queue();
        let door = Arc::new(Door::new(placement, server.clone(), (index == 0).then_some(events)));
        {
            let door = door.clone();
            // Not joined: it looks at the door once a tick, and the end of a run should not wait for that.
            std::thread::spawn(move || door.accept(listener.as_ref()));
        }
        let coordinating = (index == 0).then(|| {
            let coordinator = Coordinator::new(placement, status.clone(), *start);
            std::thread::spawn(move || coordinator.run(&received))
        });
        Ok(Self { server, door, coordinating })
    }

    /// Sums of squares are added up over this replica's control connection.
    fn attach(&self, control: &Arc<Control>) {
        let control = control.clone();
        self.server.share_squares(Box::new(move |round, squares| {
            let key = CollectiveKey { round, group: Group::Servers, index: 0 };
            let gathered = control.gather(key, bytemuck::cast_slice(&squares).to_vec())?;
            Ok(gathered.parts.iter().flatten().flat_map(|part| bytemuck::pod_collect_to_vec::<u8, f64>(part)).collect())
        }));
    }

    /// Waits for the coordinator, if it is here, and closes the door.
    fn close(self, replica: Replica) -> Result<(), Failure> {
        let coordinated = match self.coordinating.map(JoinHandle::join) {
            Some(Err(panic)) => Err(Failure {
                replica,
                kind: FailureKind::Panicked,
                message: format!("the coordinator: {}", panic_message(panic.as_ref())),
                round: None,
            }),
            Some(Ok(coordinated)) => coordinated,
            None => Ok(()),
        };
        self.door.closed.store(true, Ordering::Release);
        coordinated
    }
}

/// Runs a parameter server, and the coordinator if it is server 0, until the run is over.
///
/// # Errors
///
/// The failure of the run.
pub(crate) fn serve(context: &Context) -> Result<(), Failure> {
    let Context { placement, transport, status, .. } = context;
    let host = Host::open(context, placement.replica.rank.index())?;
    let served = Control::connect(placement, transport, status).and_then(|(control, _)| {
        host.attach(&control);
        // Without this word the others would only see it go.
        control.serve_until_released().inspect_err(|failure| control.report_failure(failure))
    });
    if let Err(failure) = &served {
        // The coordinator must end too, if it is here.
        status.fail(failure.clone());
    }
    host.close(placement.replica).and(served)
}

/// Where connections to a server come in.
pub(crate) struct Door {
    placement: Placement,
    server: Arc<ParameterServer>,
    coordinator: Option<SyncSender<Event>>,
    open: AtomicUsize,
    /// Numbers the control connections.
    accepted: AtomicU64,
    closed: AtomicBool,
}

impl Door {
    pub(crate) fn new(
        placement: &Placement,
        server: Arc<ParameterServer>,
        coordinator: Option<SyncSender<Event>>,
    ) -> Self {
        Self {
            placement: placement.clone(),
            server,
            coordinator,
            open: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    fn accept(self: &Arc<Self>, listener: &dyn Listener) {
        // Two connections per worker, one per server and the caller, as many that are about to end because they broke, and
        // room for a few that will be refused.
        let topology = self.placement.topology;
        let most = topology.worker_count() * 4 + topology.server_count() * 2 + 8;
        while !self.closed.load(Ordering::Acquire) {
            let stream = match listener.accept(TICK) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                // Out of descriptors, for example: it may pass, and a lost worker is noticed elsewhere.
                Err(_) => {
                    std::thread::sleep(TICK);
                    continue;
                }
            };
            if self.open.fetch_add(1, Ordering::AcqRel) >= most {
                self.open.fetch_sub(1, Ordering::AcqRel);
                stream.shutdown();
                continue;
            }
            let door = self.clone();
            std::thread::spawn(move || {
                let received = catch_unwind(AssertUnwindSafe(|| door.receive(Connection::new(stream))));
                door.open.fetch_sub(1, Ordering::AcqRel);
                if let Err(panic) = received {
                    // Nobody else would notice, and its worker would wait.
                    door.server.panicked(panic_message(panic.as_ref()));
                }
            });
        }
    }

    /// Takes the hello of a new connection and serves it to its end.
    pub(crate) fn receive(&self, mut connection: Connection) {
        let hello = match connection.receive::<Hello>(&at_most(HELLO)) {
            Ok(hello) => hello,
            Err(error) => {
                if let ConnectionError::Protocol(reason) = error {
                    // Of another version, perhaps: its own end can then say which.
                    let _ = connection.send(&FromCoordinator::Refused { reason });
                }
                return;
            }
        };
        if let Err(reason) = self.check(&hello, &connection) {
            // Whoever sent it may not listen either.
            let _ = connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        match (hello.purpose, hello.speaker, &self.coordinator) {
            (Purpose::Data, Speaker::Replica(replica), _) => {
                self.server.serve(replica.rank, hello.incarnation, connection);
            }
            (Purpose::Control, speaker @ Speaker::Replica(_), Some(events))
            | (Purpose::Follow { .. }, speaker @ Speaker::Caller, Some(events)) => {
                let Ok(writer) = connection.try_clone() else { return };
                let source = Source { speaker, connection: self.accepted.fetch_add(1, Ordering::Relaxed) };
                let heard = Heard::now();
                let Hello { incarnation, purpose, .. } = hello;
                let connected = match (speaker, purpose) {
                    (Speaker::Caller, Purpose::Follow { heard: told }) => {
                        Event::Called { source, incarnation, connection: writer, told }
                    }
                    _ => Event::Connected { source, incarnation, connection: writer, heard: heard.clone() },
                };
                if events.send(connected).is_ok() {
                    forward(source, connection, &heard, events);
                }
            }
            _ => {
                let reason = format!("`{}` does not serve that", self.placement.replica);
                let _ = connection.send(&FromCoordinator::Refused { reason });
            }
        }
    }

    fn check(&self, hello: &Hello, connection: &Connection) -> Result<(), String> {
        if hello.run != self.placement.run {
            return Err(format!("this is run `{}`, not `{}`", self.placement.run, hello.run));
        }
        let claimed = match hello.speaker {
            Speaker::Replica(replica) => Member::Replica(replica),
            Speaker::Caller => Member::Caller,
        };
        if !connection.is(claimed) {
            let members = self.placement.topology.replicas().map(Member::Replica).chain([Member::Caller]);
            let proved = members.into_iter().find(|member| connection.is(*member));
            let proved = proved.map_or_else(|| "nobody in this run".to_owned(), |member| member.to_string());
            return Err(format!("a hello of {claimed} came with the certificate of {proved}"));
        }
        let Speaker::Replica(replica) = hello.speaker else { return Ok(()) };
        if !self.placement.topology.replicas().any(|known| known == replica) {
            return Err(format!("this run has no {replica}"));
        }
        if hello.purpose == Purpose::Data && replica.role != Role::Worker {
            return Err(format!("{replica} has no gradients to push"));
        }
        Ok(())
    }
}

/// Runs `train` as a worker and brings its model to the coordinator if it is wanted; without servers of their own, the
/// workers are the servers too.
///
/// # Errors
///
/// The failure of the run: this worker's own, or the one that ended it.
pub(crate) fn work<M: Model>(
    context: &Context,
    train: impl FnOnce(&Worker) -> anyhow::Result<M>,
) -> Result<M, Failure> {
    let Context { placement, transport, status, .. } = context;
    let replica = placement.replica;
    let host = placement.topology.is_serverless().then(|| Host::open(context, replica.rank.index())).transpose()?;
    let worked = Control::connect(placement, transport, status).and_then(|(control, position)| {
        host.iter().for_each(|host| host.attach(&control));
        let leaving = Arc::downgrade(&control);
        status.at_parting(move || leaving.upgrade().iter().for_each(|control| control.leave()));
        let surroundings = Surroundings {
            placement: placement.clone(),
            transport: transport.clone(),
            status: status.clone(),
            incarnation: control.incarnation(),
            own: host.as_ref().map(|host| host.server.clone()),
        };
        let worker = Worker::new(surroundings, control.clone(), position);
        let trained = catch(&worker, replica, || {
            let model = run_train(&worker, replica, train)?;
            // Of the model it runs code of the user's too.
            finish(&worker, &control, replica, model)
        });
        trained.inspect_err(|failure| control.report_failure(failure))
    });
    if let Err(failure) = &worked {
        status.fail(failure.clone());
    }
    match host.map(|host| host.close(replica)) {
        None | Some(Ok(())) => worked,
        Some(Err(failure)) => worked.and(Err(failure)),
    }
}

/// Runs a worker's part; a panic in it is this worker's failure.
fn catch<T>(worker: &Worker, replica: Replica, part: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // Nothing takes part in anything after a panic: the worker is dropped and the run fails.
    catch_unwind(AssertUnwindSafe(part)).unwrap_or_else(|panic| {
        Err(Failure {
            replica,
            kind: FailureKind::Panicked,
            message: panic_message(panic.as_ref()),
            round: worker.round_in_hand(),
        })
    })
}

fn run_train<M: Model>(
    worker: &Worker,
    replica: Replica,
    train: impl FnOnce(&Worker) -> anyhow::Result<M>,
) -> Result<M, Failure> {
    let trained = train(worker);
    match (trained, worker.failure()) {
        (Ok(model), None) => Ok(model),
        (_, Some(failure)) => Err(failure),
        (Err(error), None) => Err(Failure {
            replica,
            kind: FailureKind::User,
            message: format!("{error:#}"),
            round: worker.round_in_hand(),
        }),
    }
}

/// What a panic said, and where.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("a panic without a message");
    match PANIC_PLACE.lock().expect("no holder panics").take() {
        Some(place) => format!("{text} ({place})"),
        None => text.to_owned(),
    }
}

static PANIC_PLACE: Mutex<Option<String>> = Mutex::new(None);

/// Makes panics leave their place for the failure's message; the hook that was there before runs too.
pub(crate) fn remember_panics() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        *PANIC_PLACE.lock().expect("no holder panics") = info.location().map(ToString::to_string);
        previous(info);
    }));
}

/// Says that this worker is done, waits for the others, and brings the model if it is wanted; returns the model as the run
/// has it in the end.
fn finish<M: Model>(worker: &Worker, control: &Control, replica: Replica, mut model: M) -> Result<M, Failure> {
    let own = |kind, message| Failure { replica, kind, message, round: Some(worker.round()) };
    worker.leave();
    let digest = digest(&model).map_err(|(kind, error)| own(kind, error))?;
    control.rounds_done(worker.round());
    worker.report_pace();
    control.say(ToCoordinator::Finished(Finished { rounds: worker.round(), digest }))?;
    while control.wait_for_the_end()? {
        model = worker.with_final_parameters(model)?;
        // Without it the model is still there in the framework's own format.
        let tensors = super::safetensors::to_bytes(&model).unwrap_or_default();
        let unsaved = |error| own(FailureKind::User, format!("cannot save the model: {error}"));
        let files = vec![(Kind::Model, model.to_bytes().map_err(unsaved)?), (Kind::Tensors, tensors)];
        control.say_with(ToCoordinator::Model, files)?;
    }
    Ok(model)
}

/// SHA-256 over everything in the model, hexadecimal. A model with a number that is not finite is none.
fn digest<M: Model>(model: &M) -> Result<String, (FailureKind, String)> {
    let layout = model.layout().map_err(|error| (FailureKind::Layout, error.to_string()))?;
    let mut values = vec![0f32; layout.trained_len()];
    model.read_trained(&mut values);
    let mut state = vec![0f32; layout.state_len()];
    model.read_state(&mut state);
    if !(is_finite(&values) && is_finite(&state)) {
        let message = "the trained model has a parameter that is NaN or infinite (lower the learning rate)".to_owned();
        return Err((FailureKind::NotFinite, message));
    }
    Ok(hash([bytemuck::cast_slice(&values), bytemuck::cast_slice(&state), &model.read_frozen()]))
}

/// Not generic, so that it is compiled with this crate and its optimisation, not with the user's.
fn hash(parts: [&[u8]; 3]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
