//! One replica from hello to goodbye: a server that accepts connections, or a worker that runs `train`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::control::Control;
use super::coordinator::{Coordinator, Event, Heard, Source, forward, queue};
use super::model::Model;
use super::parameter_server::ParameterServer;
use super::status::RunStatus;
use super::worker::Worker;
use crate::protocol::connection::{Connection, at_most};
use crate::protocol::deadline::{HELLO, TICK};
use crate::protocol::failure::{Failure, FailureKind};
use crate::protocol::frame::Kind;
use crate::protocol::message::{Finished, FromCoordinator, Hello, Position, Purpose, Speaker, ToCoordinator};
use crate::protocol::transport::{Listener, Transport};
use crate::topology::{Placement, Replica, Role};

/// What a replica needs besides its placement.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) placement: Placement,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) status: Arc<RunStatus>,
    /// Where the run starts; anywhere but at the beginning once a run can go on where another one ended.
    pub(crate) start: Position,
}

/// Runs a parameter server, and the coordinator if it is server 0, until the run is over.
///
/// # Errors
///
/// The failure of the run.
pub(crate) fn serve(context: &Context) -> Result<(), Failure> {
    let Context { placement, transport, status, start } = context;
    let replica = placement.replica;
    let index = replica.rank.index();
    let address = &placement.servers[index];
    let listener = transport.listen(address).map_err(|error| Failure {
        replica,
        kind: FailureKind::Configuration,
        message: format!("cannot listen at `{address}`: {error}"),
        round: None,
    })?;
    let server = ParameterServer::new(index, placement.topology, start.round, status.clone());
    let (events, received) = queue();
    let door = Arc::new(Door {
        placement: placement.clone(),
        server,
        coordinator: (index == 0).then_some(events),
        open: AtomicUsize::new(0),
        accepted: AtomicU64::new(0),
        closed: AtomicBool::new(false),
    });
    {
        let door = door.clone();
        // Not joined: it looks at the door once a tick, and the end of a run should not wait for that.
        std::thread::spawn(move || door.accept(listener.as_ref()));
    }
    let coordinating = (index == 0).then(|| {
        let coordinator = Coordinator::new(placement.topology, status.clone(), *start);
        std::thread::spawn(move || coordinator.run(&received))
    });
    let served =
        Control::connect(placement, transport.as_ref(), status).and_then(|(control, _)| control.serve_until_released());
    if let Err(failure) = &served {
        // The coordinator must end too, if it is here.
        status.fail(failure.clone());
    }
    let coordinated = match coordinating.map(std::thread::JoinHandle::join) {
        Some(Err(panic)) => Err(Failure {
            replica,
            kind: FailureKind::Panicked,
            message: format!("the coordinator: {}", panic_message(panic.as_ref())),
            round: None,
        }),
        Some(Ok(coordinated)) => coordinated,
        None => Ok(()),
    };
    door.closed.store(true, Ordering::Release);
    coordinated.and(served)
}

/// Where connections to a server come in.
struct Door {
    placement: Placement,
    server: Arc<ParameterServer>,
    coordinator: Option<SyncSender<Event>>,
    open: AtomicUsize,
    /// Numbers the control connections.
    accepted: AtomicU64,
    closed: AtomicBool,
}

impl Door {
    fn accept(self: &Arc<Self>, listener: &dyn Listener) {
        // Two connections per worker, one per server and the caller, and room for a few that will be refused.
        let topology = self.placement.topology;
        let most = topology.worker_count() * 2 + topology.server_count() + 8;
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
                door.receive(Connection::new(stream));
                door.open.fetch_sub(1, Ordering::AcqRel);
            });
        }
    }

    /// Takes the hello of a new connection and serves it to its end.
    fn receive(&self, mut connection: Connection) {
        let Ok(hello) = connection.receive::<Hello>(&at_most(HELLO)) else { return };
        if let Err(reason) = self.check(&hello) {
            // Whoever sent it may not listen either.
            let _ = connection.send(&FromCoordinator::Refused { reason });
            return;
        }
        match (hello.purpose, hello.speaker, &self.coordinator) {
            (Purpose::Data, Speaker::Replica(replica), _) => self.server.serve(replica.rank, connection),
            (Purpose::Control, speaker, Some(events)) => {
                let Ok(writer) = connection.try_clone() else { return };
                let source = Source { speaker, connection: self.accepted.fetch_add(1, Ordering::Relaxed) };
                let heard = Heard::now();
                if events.send(Event::Connected { source, connection: writer, heard: heard.clone() }).is_ok() {
                    forward(source, connection, &heard, events);
                }
            }
            (Purpose::Data, Speaker::Caller, _) | (Purpose::Control, _, None) => {
                let reason = format!("`{}` does not serve that", self.placement.replica);
                let _ = connection.send(&FromCoordinator::Refused { reason });
            }
        }
    }

    fn check(&self, hello: &Hello) -> Result<(), String> {
        if hello.run != self.placement.run {
            return Err(format!("this is run `{}`, not `{}`", self.placement.run, hello.run));
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

/// Runs `train` as a worker and brings its model to the coordinator.
///
/// # Errors
///
/// The failure of the run: this worker's own, or the one that ended it.
pub(crate) fn work<M: Model>(
    context: &Context,
    train: impl FnOnce(&Worker) -> anyhow::Result<M>,
) -> Result<M, Failure> {
    let Context { placement, transport, status, .. } = context;
    let (control, position) = Control::connect(placement, transport.as_ref(), status)?;
    let worker = Worker::new(placement.clone(), transport.clone(), control.clone(), status.clone(), position);
    let trained = catch(&worker, placement.replica, || {
        let model = run_train(&worker, placement.replica, train)?;
        worker.leave();
        // Of the model it runs code of the user's too.
        finish(&worker, &control, placement.replica, &model)?;
        Ok(model)
    });
    trained.inspect_err(|failure| {
        if status.failure().is_none_or(|known| known.replica == placement.replica) {
            // If the coordinator is gone, its own end is what the launcher sees.
            let _ = control.say(&ToCoordinator::Failed(failure.clone()));
        }
        status.fail(failure.clone());
    })
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

fn finish<M: Model>(worker: &Worker, control: &Control, replica: Replica, model: &M) -> Result<(), Failure> {
    let own = |kind, message| Failure { replica, kind, message, round: Some(worker.rounds()) };
    let digest = digest(model).map_err(|(kind, error)| own(kind, error))?;
    let finished = ToCoordinator::Finished(Finished { rounds: worker.rounds(), digest });
    control.rounds_done(worker.rounds());
    let said = if replica == Replica::worker(0) {
        let bytes =
            model.to_bytes().map_err(|error| own(FailureKind::User, format!("cannot save the model: {error}")))?;
        control.say_with(&finished, Kind::Model, &bytes)
    } else {
        control.say(&finished)
    };
    // A broken connection is noticed by the control's reader, which records the failure that ends this wait.
    drop(said);
    control.wait_until_released()
}

/// SHA-256 over everything in the model, hexadecimal. A model with a number that is not finite is none.
fn digest<M: Model>(model: &M) -> Result<String, (FailureKind, String)> {
    let layout = model.layout().map_err(|error| (FailureKind::Layout, error.to_string()))?;
    let mut values = vec![0f32; layout.trained_len()];
    model.read_trained(&mut values);
    let mut state = vec![0f32; layout.state_len()];
    model.read_state(&mut state);
    if !values.iter().chain(&state).all(|value| value.is_finite()) {
        let message = "the trained model has a parameter that is NaN or infinite (lower the learning rate)".to_owned();
        return Err((FailureKind::NotFinite, message));
    }
    let mut hash = Sha256::new();
    hash.update(bytemuck::cast_slice(&values));
    hash.update(bytemuck::cast_slice(&state));
    hash.update(model.read_frozen());
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
