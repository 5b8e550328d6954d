//! Replicas as containers of one engine.
//!
//! ```text
//! engine      finding the engine; calls with deadlines; what is wrong with it in words
//! container   what is created, as values
//! load        handing an image to the engine
//! build       having one built by the engine, from a context without what ignore says
//! pull        having the engine fetch one from a registry, or send one
//! stream      requests with a body and an answer of any length
//! way         to the coordinator, by a relay that the engine starts beside it
//! guardian    removes what a dead launcher leaves behind
//! tidy        removes images that nobody needs
//! sweep       finds what is left of earlier runs
//! ```
//!
//! Each run has a private network without a way out, and one container per replica. The launcher is attached to each
//! container: value and identity go in by its standard input, its output comes back, and the end of that stream ends the
//! replica, as on one machine. No address of a container is used from outside.

mod build;
mod container;
mod context;
mod engine;
mod guardian;
mod ignore;
mod load;
mod pull;
mod stream;
mod sweep;
mod tidy;
mod way;

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bollard::Docker;
use bollard::container::{AttachContainerResults, LogOutput};
use bollard::errors::Error;
use bollard::models::ContainerCreateBody;
use bollard::query_parameters as query;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::events::{Ending, Events, LastLines, UNSEEN, exit};
use super::lines::Lines;
use super::{LaunchError, LaunchPlan, Launched, Launcher, ReplicaEvent, Way};
use crate::observe::events::{Exit, Stream};
use crate::topology::{Address, Placement, Replica, Topology};

pub use build::{BuildError, Dockerfile, Logins, check_dockerfile};
pub use container::{Limits, RoleLimits, addresses, describe};
pub use engine::{Engine, EngineError};
pub use load::{LoadError, LoadProgress, Loaded, PROGRAM_LABEL, image_labels};
pub use pull::{TransferError, TransferProgress};
pub use sweep::{Swept, SweptRun, sweep};

use container::RUN_LABEL;
use engine::in_time;
use guardian::Guardian;
use way::Exec;

/// Time for everything of a run to be killed and removed, beyond which the guardian goes on without the launcher.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the engine may take to say how a container ended after its output has: longer only if it is gone.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(20);

/// Pause between two looks whether the engine is still there.
const PULSE: Duration = Duration::from_secs(5);

/// How long the engine may take to answer such a look, which costs it nothing; a busy one has taken a second.
const PULSE_TIMEOUT: Duration = Duration::from_secs(5);

/// So many looks in a row without an answer, and the engine is gone: together more than ten seconds, within which any part
/// of a run must show that it lives.
const MOST_MISSED: u32 = 2;

/// How long the engine may take to kill a container, beyond which the run goes on without knowing.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it takes at most until the engine has heard that a container which has ended ran out of memory.
const NOTED: Duration = Duration::from_secs(1);

/// Pause between two attempts to remove a network that its containers have just left.
const NAP: Duration = Duration::from_millis(50);

/// Starts replicas as containers of one engine, from an image that the engine has.
#[derive(Debug)]
pub struct DockerLauncher {
    engine: Engine,
    image: String,
    limits: RoleLimits,
    tidied: Option<(String, String)>,
}

impl DockerLauncher {
    /// A launcher that starts `image`, an id or a reference that `engine` knows.
    pub fn new(engine: Engine, image: String, limits: RoleLimits) -> Self {
        Self { engine, image, limits, tidied: None }
    }

    /// When the run is over, the images of a program that no container uses are removed, but for one: the program's name and
    /// the id of that one.
    #[must_use]
    pub fn tidying(self, program: Option<(String, String)>) -> Self {
        Self { tidied: program, ..self }
    }
}

impl Launcher for DockerLauncher {
    fn addresses(&self, _: &str, topology: &Topology) -> Vec<Address> {
        container::addresses(topology)
    }

    fn launch(
        self: Box<Self>,
        plan: &LaunchPlan,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<Box<dyn Launched>, LaunchError> {
        plan.check_payloads()?;
        plan.program.check_arguments()?;
        let ending = Arc::<Ending>::default();
        let events = Events::new(events, ending.clone());
        // Fails before there is a guardian, which would go on removing what a second attempt makes.
        let (command, is_entrypoint) = self.entrypoint()?;
        // Before anything is made, so that there is no moment at which something is left to nobody.
        let guardian = Guardian::start(&plan.run, &self.engine).map_err(|source| LaunchError::Guardian { source })?;
        let coordinator = plan.placements[0].topology.coordinator();
        let way = Arc::new(Exec::new(self.engine.clone(), container::name(&plan.run, coordinator), command.clone()));
        let (gone, goes) = watch::channel(false);
        let mut run = DockerRun {
            engine: self.engine.clone(),
            image: self.image,
            limits: self.limits,
            tidied: self.tidied,
            entrypoint: (!is_entrypoint).then_some(command),
            run: plan.run.clone(),
            members: Vec::new(),
            ending,
            guardian: Some(guardian),
            unsettled: false,
            pulse: self.engine.reactor().spawn(pulse(self.engine.docker().clone(), gone)),
            goes,
            way,
        };
        // From here on a failure ends `run`, which removes what there is.
        let network = container::network(&plan.run, now());
        let created = self.engine.docker().create_network(network);
        let created = self.engine.call(&format!("create the network `{}`", plan.run), created);
        if let Err(error) = created {
            let error = run.settle(error.into());
            return Err(error.leaving(run.end()));
        }
        let members = thread::scope(|scope| {
            let start = |(placement, payload)| {
                let (run, events) = (&run, events.clone());
                scope.spawn(move || run.start(plan, placement, payload, events))
            };
            let starting: Vec<_> = plan.replicas().map(start).collect();
            let started = starting.into_iter().map(|thread| thread.join().expect("starting does not panic"));
            started.collect::<Vec<_>>()
        });
        let mut failure = None;
        for member in members {
            match member {
                Ok(member) => run.members.push(member),
                Err(error) => {
                    let error = run.settle(error);
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            None => Ok(Box::new(run)),
            Some(error) => Err(error.leaving(run.end())),
        }
    }
}

impl DockerLauncher {
    /// What the image runs, and whether that is its entry point: arguments would take the place of a mere command.
    fn entrypoint(&self) -> Result<(Vec<String>, bool), LaunchError> {
        let inspected = self.engine.docker().inspect_image(&self.image);
        let image = self.engine.call(&format!("look at the image `{}`", self.image), inspected);
        let image = image.map_err(without_image(self.image.clone()))?;
        // Another run may end before this one has a container.
        self.engine.reactor().wait(tidy::renew(self.engine.docker(), &image));
        let config = image.config.unwrap_or_default();
        let named = |command: Option<Vec<String>>| command.filter(|command| !command.is_empty());
        match (named(config.entrypoint), named(config.cmd)) {
            (Some(entrypoint), _) => Ok((entrypoint, true)),
            (None, Some(command)) => Ok((command, false)),
            (None, None) => Err(LaunchError::NoEntrypoint { image: self.image.clone() }),
        }
    }
}

/// Tells an image that is absent, of which engines speak in words only, from another thing that is.
fn without_image(image: String) -> impl FnOnce(EngineError) -> EngineError {
    |error| match &error {
        EngineError::Refused { reason, .. } if error.is_absence() && reason.to_lowercase().contains("image") => {
            EngineError::NoImage { image }
        }
        _ => error,
    }
}

/// The time since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

struct DockerRun {
    engine: Engine,
    image: String,
    limits: RoleLimits,
    /// The program of which older images are removed in the end, and the id of the one that stays.
    tidied: Option<(String, String)>,
    /// What the image runs, where that is not its entry point.
    entrypoint: Option<Vec<String>>,
    run: String,
    members: Vec<Member>,
    ending: Arc<Ending>,
    /// Given up when nothing is left.
    guardian: Option<Guardian>,
    /// Whether the engine may still be making something that it was asked for, without having said so in time.
    unsettled: bool,
    /// Looks whether the engine is still there.
    pulse: JoinHandle<()>,
    /// True once it is not.
    goes: watch::Receiver<bool>,
    way: Arc<Exec>,
}

/// Asks the engine again and again whether it is there, and says in `gone` that it is not. An engine that is frozen, or whose
/// machine has lost its power, ends no connection: without this, whoever reads from one would wait for ever.
async fn pulse(docker: Docker, gone: watch::Sender<bool>) {
    let mut missed = 0;
    while missed < MOST_MISSED {
        tokio::time::sleep(PULSE).await;
        match tokio::time::timeout(PULSE_TIMEOUT, docker.ping()).await {
            // Even a refusal is an answer.
            Ok(Ok(_) | Err(Error::DockerResponseServerError { .. })) => missed = 0,
            _ => missed += 1,
        }
    }
    gone.send_replace(true);
}

/// One replica's container and what is attached to it. Dropping it closes the replica's standard input, which ends it.
struct Member {
    replica: Replica,
    id: String,
    last_lines: Arc<LastLines>,
    /// Its end closes the replica's standard input, which is its lifeline.
    _lifeline: oneshot::Sender<Infallible>,
    doomed: watch::Sender<bool>,
}

impl DockerRun {
    fn member(&self, replica: Replica) -> Option<&Member> {
        self.members.iter().find(|member| member.replica == replica)
    }

    /// Notes whether the engine may still do what it was asked to do and did not do in time.
    fn settle(&mut self, error: LaunchError) -> LaunchError {
        self.unsettled |= matches!(&error, LaunchError::Engine(error) if error.is_silence());
        error
    }

    /// Creates the container of a replica, attaches to it, starts it and gives it its payload.
    fn start(
        &self,
        plan: &LaunchPlan,
        placement: &Placement,
        payload: Vec<u8>,
        events: Events,
    ) -> Result<Member, LaunchError> {
        let replica = placement.replica;
        let name = container::name(&plan.run, replica);
        let mut body = container::container(plan, placement, &self.image, &self.limits, now());
        body.entrypoint = self.entrypoint.clone();
        let (id, attached) = self.engine.reactor().wait(create(self.engine.docker(), &name, body))?;
        let AttachContainerResults { output, input } = attached;
        let last_lines = Arc::<LastLines>::default();
        let (doomed, doom) = watch::channel(false);
        let (lifeline, cut) = oneshot::channel();
        self.engine.reactor().spawn(feed(input, payload, cut));
        let is_coordinator = replica == placement.topology.coordinator();
        let watcher = Watcher {
            engine: self.engine.clone(),
            replica,
            id: id.clone(),
            last_lines: last_lines.clone(),
            events,
            doom,
            goes: self.goes.clone(),
            trouble: is_coordinator.then(|| self.way.trouble()),
            memory_bytes: self.limits.of(replica.role).memory_bytes,
        };
        // Made first, so that a failure to start the thread ends the replica.
        let member = Member { replica, id, last_lines, _lifeline: lifeline, doomed };
        let thread = thread::Builder::new().name(format!("{}-io", replica.file_name()));
        thread.spawn(move || watcher.run(output)).map_err(|source| LaunchError::Watch { replica, source })?;
        Ok(member)
    }
}

async fn create(
    docker: &Docker,
    name: &str,
    body: ContainerCreateBody,
) -> Result<(String, AttachContainerResults), EngineError> {
    let options = query::CreateContainerOptionsBuilder::default().name(name).build();
    let image = body.image.clone().unwrap_or_default();
    let created = docker.create_container(Some(options), body);
    let id = in_time(&format!("create the container `{name}`"), created).await.map_err(without_image(image))?.id;
    let options =
        query::AttachContainerOptionsBuilder::default().stdin(true).stdout(true).stderr(true).stream(true).build();
    let attached = docker.attach_container(&id, Some(options));
    let attached = in_time(&format!("attach to the container `{name}`"), attached).await?;
    let started = docker.start_container(&id, None::<query::StartContainerOptions>);
    in_time(&format!("start the container `{name}`"), started).await?;
    Ok((id, attached))
}

/// Gives a replica its payload and then holds its standard input open until `cut`.
async fn feed(mut input: Pin<Box<dyn AsyncWrite + Send>>, payload: Vec<u8>, mut cut: oneshot::Receiver<Infallible>) {
    let give = async {
        // A replica that ends before it has taken its payload says by its end what there is to say.
        let _ = input.write_all(&payload).await;
        let _ = input.flush().await;
        drop(payload);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = give => {}
        _ = &mut cut => {}
    }
    // Dropping it would do nothing: what reads the replica's output holds the same connection. A frozen engine takes no end.
    let _ = tokio::time::timeout(KILL_TIMEOUT, input.shutdown()).await;
}

impl Launched for DockerRun {
    fn way(&self) -> Arc<dyn Way> {
        self.way.clone()
    }

    fn end(&mut self) -> Vec<String> {
        let Some(guardian) = self.guardian.take() else { return Vec::new() };
        self.ending.begin();
        for member in &self.members {
            member.doomed.send_replace(true);
        }
        // One that has not answered for long is not waited for long again; the guardian has more patience.
        let timeout = if *self.goes.borrow() { PULSE_TIMEOUT } else { END_TIMEOUT };
        let removing = async { tokio::time::timeout(timeout, remove(self.engine.docker(), &self.run)).await };
        let removed = self.engine.reactor().wait(removing);
        let reason = match removed {
            // What the engine makes late could not be found; without a goodbye the guardian looks for it a while longer.
            Ok(Ok(_)) if self.unsettled => return Vec::new(),
            Ok(Ok(_)) => {
                guardian.dismiss();
                if let Some((program, kept)) = &self.tidied {
                    // At worst an image is left that the next run removes.
                    let _ = self.engine.tidy(program, kept);
                }
                return Vec::new();
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the engine did not remove it within {} s", timeout.as_secs()),
        };
        // Without a goodbye the guardian tries on, also after this process has ended.
        drop(guardian);
        vec![format!("something of the run `{}` may be left at `{}`: {reason}", self.run, self.engine.address())]
    }

    fn kill(&self, replica: Replica) {
        let Some(member) = self.member(replica) else { return };
        // First, since from now on the watcher of the container does not wait for ever.
        member.doomed.send_replace(true);
        let (docker, id) = (self.engine.docker().clone(), member.id.clone());
        self.engine.reactor().spawn(async move {
            let options = query::KillContainerOptionsBuilder::default().signal("SIGKILL").build();
            // Fails if it has ended, or if the engine is gone; the watcher waits for either.
            let _ = tokio::time::timeout(KILL_TIMEOUT, docker.kill_container(&id, Some(options))).await;
        });
    }

    fn restart(
        &mut self,
        plan: &LaunchPlan,
        replica: Replica,
        events: SyncSender<ReplicaEvent>,
    ) -> Result<(), LaunchError> {
        let (placement, payload) = plan.of(replica);
        self.members.retain(|member| member.replica != replica);
        let name = container::name(&self.run, replica);
        let options = query::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removed = self.engine.docker().remove_container(&name, Some(options));
        match self.engine.call(&format!("remove the container `{name}`"), removed) {
            Err(error) if !error.is_absence() => return Err(error.into()),
            _ => {}
        }
        let events = Events::new(events, self.ending.clone());
        let member = self.start(plan, placement, payload, events);
        let member = member.map_err(|error| self.settle(error))?;
        self.members.push(member);
        Ok(())
    }

    fn process_id(&self, _: Replica) -> Option<u32> {
        None
    }

    fn last_lines(&self, replica: Replica) -> Vec<String> {
        self.member(replica).map(|member| member.last_lines.get()).unwrap_or_default()
    }
}

impl Drop for DockerRun {
    fn drop(&mut self) {
        self.end();
        self.pulse.abort();
    }
}

/// Reads what a container writes and reports its end.
struct Watcher {
    engine: Engine,
    replica: Replica,
    id: String,
    last_lines: Arc<LastLines>,
    events: Events,
    /// Set when the container is about to be killed from here.
    doom: watch::Receiver<bool>,
    /// Set when the engine does not answer any more.
    goes: watch::Receiver<bool>,
    /// Of the coordinator's container: why it cannot be reached.
    trouble: Option<watch::Receiver<Option<String>>>,
    memory_bytes: Option<u64>,
}

impl Watcher {
    fn run(mut self, mut output: Pin<Box<dyn futures_util::Stream<Item = Result<LogOutput, Error>> + Send>>) {
        let mut given_up = Box::pin(given_up(self.doom.clone(), self.goes.clone()));
        let mut trouble = self.trouble.take();
        let engine = self.engine.clone();
        let mut lines = [Lines::default(), Lines::default()];
        let mut unseen = None;
        loop {
            let next = engine.reactor().here(async {
                tokio::select! {
                    next = output.next() => Next::Output(next),
                    reason = &mut given_up => Next::GivenUp(reason),
                    text = next_trouble(&mut trouble) => Next::Trouble(text),
                }
            });
            let next = match next {
                Next::Output(next) => next,
                Next::GivenUp(reason) => {
                    unseen = Some(reason);
                    break;
                }
                Next::Trouble(text) => {
                    self.say(&text);
                    continue;
                }
            };
            let (stream, bytes) = match next {
                Some(Ok(LogOutput::StdOut { message } | LogOutput::Console { message })) => (Stream::Stdout, message),
                Some(Ok(LogOutput::StdErr { message })) => (Stream::Stderr, message),
                Some(Ok(LogOutput::StdIn { .. })) => continue,
                // The engine is gone, or the container; the wait below tells which.
                Some(Err(_)) | None => break,
            };
            lines[stream as usize].push(&bytes, |text| self.deliver(stream, text));
        }
        for (stream, lines) in [Stream::Stdout, Stream::Stderr].into_iter().zip(&mut lines) {
            if let Some(text) = lines.finish() {
                self.deliver(stream, text);
            }
        }
        let end = match unseen {
            Some(reason) => Err(reason),
            None => engine.reactor().here(async {
                tokio::select! {
                    end = self.verdict() => end,
                    reason = &mut given_up => Err(reason),
                }
            }),
        };
        let exit = match end {
            Ok(Verdict { exit, memory }) => {
                if let Some(text) = self.words_of(memory) {
                    self.say(&text);
                }
                exit
            }
            Err(reason) => {
                self.say(&format!(
                    "fairing: how its container ended was not seen: {reason} (is the engine still there?)"
                ));
                Exit::Code(UNSEEN)
            }
        };
        self.events.send(ReplicaEvent::Exited { replica: self.replica, exit });
    }

    fn deliver(&self, stream: Stream, text: String) {
        self.last_lines.deliver(&self.events, self.replica, stream, text);
    }

    fn say(&self, text: &str) {
        self.deliver(Stream::Stderr, text.to_owned());
    }

    fn words_of(&self, memory: Memory) -> Option<String> {
        let limit = self.memory_bytes.map_or("all of the machine's".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        let remedy = format!("(limit {limit}; raise `memory` of this role)");
        match memory {
            Memory::Enough => None,
            Memory::UsedUp => Some(format!("fairing: ended by the kernel: out of memory {remedy}")),
            Memory::Unknown => Some(format!("fairing: killed by hand, or by the kernel for want of memory {remedy}")),
        }
    }

    /// How the container ended, once it has.
    async fn verdict(&self) -> Result<Verdict, String> {
        let docker = self.engine.docker();
        let options = query::WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut waited = Box::pin(docker.wait_container(&self.id, Some(options)));
        let code = match waited.next().await {
            Some(Ok(waited)) => waited.status_code,
            Some(Err(Error::DockerContainerWaitError { code, .. })) => code,
            Some(Err(error)) => return Err(engine::words(&error)),
            None => return Err("the engine went away".to_owned()),
        };
        let inspected = tokio::time::timeout(VERDICT_TIMEOUT, docker.inspect_container(&self.id, None));
        let state = inspected.await.ok().and_then(Result::ok).and_then(|container| container.state);
        let exit = exit(code);
        let was_killed = self.memory_bytes.is_some() && exit == Exit::Signal(9) && !*self.doom.borrow();
        let memory = match state.and_then(|state| state.oom_killed).unwrap_or(false) {
            true => Memory::UsedUp,
            // The kernel tells the engine of it by another way than of the end, and the engine may have heard of the end first.
            false if was_killed && self.ran_out_of_memory().await => Memory::UsedUp,
            // Or it has never heard of it: of a container that ends within moments the message gets lost.
            false if was_killed => Memory::Unknown,
            false => Memory::Enough,
        };
        Ok(Verdict { exit, memory })
    }

    /// Whether the engine has noted, or notes soon, that the container ran out of memory.
    async fn ran_out_of_memory(&self) -> bool {
        let filters = [("container", self.id.as_str()), ("event", "oom")];
        let filters = filters.map(|(name, value)| (name.to_owned(), vec![value.to_owned()])).into();
        // From the beginning: clocks differ, and engines keep only the last events.
        let options = query::EventsOptionsBuilder::default().since("1").filters(&filters).build();
        let mut events = Box::pin(self.engine.docker().events(Some(options)));
        matches!(tokio::time::timeout(NOTED, events.next()).await, Ok(Some(Ok(_))))
    }
}

/// What a watcher hears of.
enum Next {
    /// A piece of output; `None` at its end.
    Output(Option<Result<LogOutput, Error>>),
    /// The way to the coordinator fails, in words.
    Trouble(String),
    /// Nothing more can be expected, for this reason.
    GivenUp(String),
}

/// Returns why there is no use in waiting for the engine any longer, once that is so.
async fn given_up(mut doom: watch::Receiver<bool>, mut goes: watch::Receiver<bool>) -> String {
    let ended = async {
        // An error means that the launcher has dropped the container, which is as much as its end.
        let _ = doom.wait_for(|doomed| *doomed).await;
        tokio::time::sleep(VERDICT_TIMEOUT).await;
    };
    let gone = async {
        if goes.wait_for(|gone| *gone).await.is_err() {
            // Nobody looks any more: the run is over, and the container with it.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = ended => "the engine did not say how it ended".to_owned(),
        () = gone => format!("the engine does not answer, {MOST_MISSED} times within {} s", PULSE_TIMEOUT.as_secs()),
    }
}

/// The next thing to be said of the way to the coordinator.
async fn next_trouble(trouble: &mut Option<watch::Receiver<Option<String>>>) -> String {
    if let Some(trouble) = trouble {
        while trouble.changed().await.is_ok() {
            if let Some(text) = trouble.borrow_and_update().clone() {
                return text;
            }
        }
    }
    std::future::pending().await
}

struct Verdict {
    exit: Exit,
    memory: Memory,
}

/// Whether a container had the memory that it asked for.
enum Memory {
    Enough,
    UsedUp,
    /// It was killed, and nobody knows by whom.
    Unknown,
}

/// What was removed of a run, or of several.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Removed {
    pub(crate) containers: Vec<String>,
    pub(crate) networks: Vec<String>,
}

impl Removed {
    fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.networks.is_empty()
    }
}

/// Ends and removes the containers and the network of `run`, whoever made them.
async fn remove(docker: &Docker, run: &str) -> Result<Removed, EngineError> {
    let filters = HashMap::from([("label".to_owned(), vec![format!("{RUN_LABEL}={run}")])]);
    let mut removed = Removed::default();
    let options = query::ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let listed = in_time("list the containers of a run", docker.list_containers(Some(options))).await?;
    let containers: Vec<String> = listed.into_iter().filter_map(|container| container.id).collect();
    let removing = containers.iter().map(|id| {
        let options = query::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        in_time("remove a container", docker.remove_container(id, Some(options)))
    });
    for (id, result) in containers.iter().zip(join_all(removing).await) {
        match result {
            // Somebody else removed it, or is at it.
            Err(EngineError::Refused { status: Some(404 | 409), .. }) => {}
            Err(error) => return Err(error),
            Ok(()) => removed.containers.push(id.clone()),
        }
    }
    let options = query::ListNetworksOptionsBuilder::default().filters(&filters).build();
    let networks = in_time("list the networks of a run", docker.list_networks(Some(options))).await?;
    for id in networks.into_iter().filter_map(|network| network.id) {
        let deadline = Instant::now() + VERDICT_TIMEOUT;
        loop {
            match in_time("remove a network", docker.remove_network(&id)).await {
                Ok(()) => {
                    removed.networks.push(id);
                    break;
                }
                Err(error) if error.is_absence() => break,
                // A container that has just been removed may still count as connected.
                Err(error) if error.is_silence() || Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(NAP).await,
            }
        }
    }
    Ok(removed)
}
