//! What happens to the replicas of a run, from what the cluster says of pods, Jobs and events.
//!
//! One task owns the state. It hears of pods and Jobs by watches that survive a restarted API server, of events by a watch
//! from the launch on, and of logs from the tasks that follow them.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Event as ClusterEvent, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::super::ReplicaEvent;
use super::super::events::{Events, LastLines, UNSEEN, exit};
use super::client::Cluster;
use super::create::{Named, api};
use super::manifest::{ROLE_LABEL, RUN_LABEL, rank_of};
use super::runs::{self, ClusterRunState};
use super::{Following, logs};
use crate::exit::ExitCode;
use crate::observe::events::{Exit, Stream};
use crate::topology::{Replica, Role, Topology};

/// How often waits are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// How long a pod that has a node may take to start: the pull of a large image over a slow line.
const START_TIMEOUT: Duration = Duration::from_secs(1800);

/// A watch that has not failed for so long works: longer than the pause before it is tried again.
const RECOVERED: Duration = Duration::from_secs(40);

/// A wait that is longer is spoken of.
const QUIET: Duration = Duration::from_secs(2);

/// How long what has been said of a wait holds, if nothing new comes.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// How long the Job controller may take to say that a pod's end is the Job's.
const VERDICT: Duration = Duration::from_secs(2);

/// A watch of events that was silent for so long is opened again.
const MOST_SILENT: Duration = Duration::from_secs(300);

/// What of a Job or TFJob that failed says that its deadline has passed: the same words of two controllers.
const OUT_OF_TIME: &str = "longer than specified deadline";

/// Notices that may wait for the task; those who bring more wait themselves.
const QUEUE: usize = 256;

/// What the task needs.
pub(super) struct Observed {
    pub(super) cluster: Cluster,
    pub(super) run: String,
    /// What owns everything else of the run.
    pub(super) owner: Named,
    pub(super) topology: Topology,
    /// Where new events begin.
    pub(super) events_since: String,
    pub(super) events: Events,
    pub(super) last_lines: BTreeMap<Replica, Arc<LastLines>>,
    /// The pod that runs the coordinator, once its container has started.
    pub(super) coordinator: watch::Sender<Option<String>>,
    pub(super) pods: watch::Sender<Pods>,
    pub(super) following: Following,
}

/// The replicas' pods, for those who end them.
#[derive(Default)]
pub(super) struct Pods {
    /// Names and ids of those that have not ended.
    pub(super) living: BTreeMap<Replica, (String, String)>,
    /// Every replica had a pod, and the containers of all have ended.
    pub(super) have_ended: bool,
}

/// One replica as the cluster has it.
#[derive(Default)]
struct Seat {
    pod: Option<Seen>,
    /// The pod before it, whose log may not have been told to its end.
    earlier: Option<Seen>,
    /// Since when it is waited for.
    waits: Option<Instant>,
    /// What was said of that last, and when.
    said: Option<(String, Instant)>,
    /// Why it does not run, by the words of its status or of an event.
    hindrance: Option<String>,
    /// What an event said last of a pod that runs.
    warned: Option<String>,
    /// It has ended, and another pod is to take its place.
    replaced: Option<Exit>,
    /// Its pod has a node.
    has_node: bool,
    /// Nothing more is expected.
    over: bool,
}

/// A pod.
struct Seen {
    uid: String,
    name: String,
    created: Option<Timestamp>,
    /// How its container ended, and when that was seen.
    ended: Option<(Exit, Instant)>,
    out_of_memory: bool,
    /// Follows the log since the container has started.
    log: Option<Log>,
    /// How it ended, if another pod has taken its place before that was told.
    untold: Option<Exit>,
}

struct Log {
    task: JoinHandle<()>,
    life: watch::Sender<Life>,
    done: bool,
}

/// What those who follow a log have to know of its pod: one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    Runs,
    /// The container has ended.
    HasEnded,
    /// The pod is gone, and what has its name is another one.
    IsGone,
}

impl Drop for Log {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What other tasks tell.
enum Notice {
    /// The log of this pod has been told to its end.
    Told {
        uid: String,
        /// Whether nothing is missing.
        whole: bool,
    },
    Event(Box<ClusterEvent>),
}

/// Watches until the task is aborted.
pub(super) async fn observe(observed: Observed) {
    let selector = format!("{RUN_LABEL}={}", observed.run);
    let config = || watcher::Config::default().labels(&selector);
    let pods: Api<Pod> = observed.cluster.api();
    let jobs: Api<Job> = observed.cluster.api();
    let mut pods = pin!(watcher(pods, config()).default_backoff());
    let mut jobs = pin!(watcher(jobs, config()).default_backoff());
    let mut owners = pin!(owners(&observed, config()));
    let (notices, mut noticed) = mpsc::channel(QUEUE);
    let telling = tokio::spawn(tell_events(
        observed.cluster.clone(),
        observed.run.clone(),
        observed.events_since.clone(),
        notices.clone(),
    ));
    let _telling = AbortOnDrop(telling);
    let now = Instant::now();
    let seat = || Seat { waits: Some(now), ..Seat::default() };
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let seats = observed.topology.replicas().map(|replica| (replica, seat())).collect();
    let mut state = State {
        seats,
        failed: BTreeMap::new(),
        used_up: BTreeSet::new(),
        notices,
        listed: None,
        has_looked: false,
        away: None,
        observed,
    };
    loop {
        tokio::select! {
            Some(event) = pods.next() => match event {
                Ok(event) => {
                    state.pod_event(event).await;
                    state.tell_replaced().await;
                    state.tell_names();
                }
                Err(error) => state.is_away(&error).await,
            },
            Some(event) = jobs.next() => match event {
                Ok(Event::Apply(job) | Event::InitApply(job)) => state.job(&job).await,
                Ok(_) => {}
                Err(error) => state.is_away(&error).await,
            },
            Some(event) = owners.next() => match event {
                Ok(Event::Apply(owner) | Event::InitApply(owner)) => state.owner(&owner).await,
                Ok(_) => {}
                Err(error) => state.is_away(&error).await,
            },
            Some(notice) = noticed.recv() => state.notice(notice).await,
            _ = look.tick() => {}
        }
        state.look(Instant::now()).await;
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct State {
    seats: BTreeMap<Replica, Seat>,
    /// Roles whose Job has failed, and why.
    failed: BTreeMap<Role, String>,
    /// Workers that are not started again, although their Job goes on.
    used_up: BTreeSet<Replica>,
    notices: mpsc::Sender<Notice>,
    /// The pods of a list that is being told; those that are not in it are gone.
    listed: Option<Vec<String>>,
    /// All pods that there were at first are known.
    has_looked: bool,
    /// The API server does not answer.
    away: Option<Away>,
    observed: Observed,
}

struct Away {
    since: Instant,
    /// When it failed to answer last.
    last: Instant,
    said: bool,
}

impl State {
    /// A watch failed, and goes on by itself.
    async fn is_away(&mut self, error: &watcher::Error) {
        let now = Instant::now();
        let away = self.away.get_or_insert(Away { since: now, last: now, said: false });
        away.last = now;
        if away.since.elapsed() > QUIET && !away.said {
            away.said = true;
            let reason = super::client::words(error);
            let server = self.observed.cluster.server();
            let text = format!("the run cannot be followed at {server} at the moment ({reason}); trying again");
            self.observed.events.send_async(ReplicaEvent::Note { text }).await;
        }
    }

    /// A watch that has recovered says nothing as long as nothing happens: after some time without an error it has.
    async fn is_back(&mut self, now: Instant) {
        if let Some(away) = self.away.take_if(|away| now.duration_since(away.last) > RECOVERED)
            && away.said
        {
            let text = "the run can be followed again".to_owned();
            self.observed.events.send_async(ReplicaEvent::Note { text }).await;
        }
    }

    async fn pod_event(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.listed = Some(Vec::new()),
            Event::InitApply(pod) => {
                if let (Some(listed), Some(uid)) = (&mut self.listed, pod.uid()) {
                    listed.push(uid);
                }
                self.pod(&pod);
            }
            Event::InitDone => {
                self.has_looked = true;
                let Some(listed) = self.listed.take() else { return };
                for seat in self.seats.values_mut() {
                    if let Some(seen) = seat.pod.as_mut().filter(|seen| !listed.contains(&seen.uid)) {
                        seen.is_gone();
                    }
                }
            }
            Event::Apply(pod) => self.pod(&pod),
            Event::Delete(pod) => {
                self.pod(&pod);
                let uid = pod.uid().unwrap_or_default();
                let seats = self.seats.values_mut();
                if let Some(seen) = seats.filter_map(|seat| seat.pod.as_mut()).find(|seen| seen.uid == uid) {
                    seen.is_gone();
                }
            }
        }
    }

    /// Says of pods that others have taken the place of, that they have.
    async fn tell_replaced(&mut self) {
        for (replica, seat) in &mut self.seats {
            let Some(exit) = seat.earlier.as_mut().and_then(|earlier| earlier.untold.take()) else { continue };
            self.observed.events.send_async(ReplicaEvent::Replaced { replica: *replica, exit }).await;
        }
    }

    /// Notes how a pod is.
    fn pod(&mut self, pod: &Pod) {
        let Some(replica) = replica_of(pod) else { return };
        let (Some(seat), Some(uid)) = (self.seats.get_mut(&replica), pod.uid()) else { return };
        if seat.over {
            return;
        }
        let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        if seat.pod.as_ref().is_none_or(|seen| seen.uid != uid) {
            // One that has ended, seen late or in a list, does not take the place of its successor.
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            let is_over = pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Failed" | "Succeeded"));
            if seat.pod.as_ref().is_some_and(|seen| created < seen.created || is_over && created == seen.created) {
                return;
            }
            let name = pod.name_any();
            let seen = Seen { uid, name, created, ended: None, out_of_memory: false, log: None, untold: None };
            seat.has_node = false;
            if let Some(mut earlier) = seat.pod.replace(seen) {
                earlier.is_gone();
                if seat.replaced.is_none() {
                    earlier.untold = earlier.ended.map(|(exit, _)| exit);
                }
                if earlier.name == seat.pod.as_ref().expect("set above").name {
                    earlier.has_lost_its_name();
                }
                seat.earlier = Some(earlier);
            }
            (seat.waits, seat.said, seat.hindrance, seat.replaced) = (Some(Instant::now()), None, None, None);
        }
        let status = pod.status.as_ref();
        let container = status.and_then(|status| status.container_statuses.as_ref()?.first());
        let seen = seat.pod.as_mut().expect("set above");
        let state = container.and_then(|container| container.state.as_ref());
        let terminated = state.and_then(|state| state.terminated.as_ref());
        let start_error = terminated.filter(|terminated| terminated.reason.as_deref() == Some("StartError"));
        let start_error =
            start_error.and_then(|terminated| Some(format!("StartError: {}", terminated.message.as_ref()?)));
        if let Some(start_error) = start_error.filter(|error| seen.ended.is_none() && cannot_heal(error)) {
            seat.hindrance = Some(start_error);
            return;
        }
        if let Some(terminated) = terminated.filter(|_| seen.ended.is_none()) {
            seen.out_of_memory = terminated.reason.as_deref() == Some("OOMKilled");
            let end = match terminated.exit_code {
                0 if seen.out_of_memory => Exit::Signal(9),
                code => exit(code.into()),
            };
            if terminated.reason.as_deref() == Some("StartError") {
                seat.hindrance = terminated.message.clone();
            }
            seen.end(end);
        }
        let phase = status.and_then(|status| status.phase.as_deref());
        if seen.ended.is_none() && matches!(phase, Some("Failed" | "Succeeded")) && container.is_none() {
            // Ended by the node before there was a container.
            seat.hindrance = status.and_then(|status| status.message.clone().or(status.reason.clone()));
            seen.end(Exit::Code(UNSEEN));
        }
        let has_started = state.is_some_and(|state| state.running.is_some() || state.terminated.is_some());
        if has_started && seen.log.is_none() {
            seat.waits = None;
            seen.log = Some(follow(&self.observed, &self.notices, replica, seen));
        }
        let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        if has_node && !std::mem::replace(&mut seat.has_node, true) && seat.waits.is_some() {
            // From here on it is the image that takes its time.
            seat.waits = Some(Instant::now());
        }
        if !has_started {
            seat.hindrance = hindrance(pod, container).or(seat.hindrance.take());
        }
    }

    /// Tells others which pods there are.
    fn tell_names(&self) {
        let living = |(replica, seat): (&Replica, &Seat)| {
            let seen = seat.pod.as_ref().filter(|seen| seen.ended.is_none())?;
            Some((*replica, (seen.name.clone(), seen.uid.clone())))
        };
        let living: BTreeMap<Replica, (String, String)> = self.seats.iter().filter_map(living).collect();
        let coordinator = self.observed.topology.coordinator();
        let seat = &self.seats[&coordinator];
        let runs = seat.pod.as_ref().is_some_and(|seen| seen.log.is_some() && seen.ended.is_none());
        let name = living.get(&coordinator).filter(|_| runs).map(|(name, _)| name.clone());
        self.observed.coordinator.send_if_modified(|known| std::mem::replace(known, name.clone()) != name);
        let have_ended = living.is_empty() && self.seats.values().all(|seat| seat.pod.is_some());
        self.observed.pods.send_replace(Pods { living, have_ended });
    }

    async fn job(&mut self, job: &Job) {
        let Some(role) = job.labels().get(ROLE_LABEL).and_then(|role| role_of(role)) else { return };
        let Some(status) = &job.status else { return };
        let indexes = status.failed_indexes.as_deref().unwrap_or_default();
        let of_role = self.seats.keys().filter(|replica| replica.role == role);
        self.used_up.extend(of_role.filter(|replica| is_among(replica.rank.0, indexes)));
        let failed = |kind: &str| {
            let conditions = status.conditions.as_ref()?;
            let condition =
                conditions.iter().find(|condition| condition.type_ == kind && condition.status == "True")?;
            let reason = condition.reason.as_deref().unwrap_or("failed");
            Some((reason, condition.message.as_deref().unwrap_or_default()))
        };
        // The first is said before the pods that still run are ended, the second after.
        if let Some((reason, message)) = failed("FailureTarget").or_else(|| failed("Failed"))
            && !self.failed.contains_key(&role)
        {
            let reason = format!("{reason}: {message}");
            self.failed.insert(role, reason.clone());
            // One that was never released has the deadline of its launch.
            let is_held = job.spec.as_ref().is_some_and(|spec| spec.parallelism == Some(0));
            let reason = if is_held { "its launch broke off".to_owned() } else { reason };
            self.ends(format!("the cluster ends the {role} Job: {reason}"), &reason).await;
        }
    }

    /// What an operator says of the object that it makes the pods from.
    async fn owner(&mut self, owner: &DynamicObject) {
        let ClusterRunState::Failed { reason } = runs::state(owner) else { return };
        // If one of its Jobs has failed before, that is why.
        let is_news = self.failed.is_empty();
        for role in [Role::Ps, Role::Worker] {
            self.failed.entry(role).or_insert_with(|| reason.clone());
        }
        if is_news {
            self.ends(format!("the cluster ends the {}: {reason}", self.observed.owner.resource.kind), &reason).await;
        }
    }

    /// Something of the run has failed, as `text` says.
    async fn ends(&self, text: String, reason: &str) {
        let events = &self.observed.events;
        events.send_async(ReplicaEvent::Note { text }).await;
        if reason.contains(OUT_OF_TIME) {
            events.send_async(ReplicaEvent::OutOfTime { deadline: self.observed.following.deadline }).await;
        }
    }

    async fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Told { uid, whole } => {
                let mut seats = self.seats.iter_mut();
                let it =
                    seats.find_map(|(replica, seat)| Some((replica, seat.pod.as_mut().filter(|it| it.uid == uid)?)));
                let Some((replica, seen)) = it else { return };
                seen.log.iter_mut().for_each(|log| log.done = true);
                if !whole {
                    let text = format!("the end of the log of {replica} could not be had: the cluster does not answer");
                    self.observed.events.send_async(ReplicaEvent::Note { text }).await;
                }
            }
            Notice::Event(event) => self.cluster_event(&event).await,
        }
    }

    /// What an event says: why a replica has not started, or what has come over one that has.
    async fn cluster_event(&mut self, event: &ClusterEvent) {
        if event.type_.as_deref() == Some("Normal") {
            return;
        }
        let name = event.involved_object.name.as_deref().unwrap_or_default();
        let uid = event.involved_object.uid.as_ref();
        let Some(message) = event.message.clone() else { return };
        let words = match event.reason.as_deref() {
            // The scheduler's own words need no more.
            Some("FailedScheduling") | None => message,
            Some(reason) => format!("{reason}: {message}"),
        };
        match event.involved_object.kind.as_deref() {
            Some("Pod") => {
                let mut seats = self.seats.iter_mut();
                let is_it = |seat: &Seat| seat.pod.as_ref().is_some_and(|seen| uid == Some(&seen.uid));
                let Some((replica, seat)) = seats.find(|(_, seat)| is_it(seat)) else { return };
                if seat.waits.is_some() {
                    seat.hindrance = Some(words);
                } else if seat.warned.as_ref() != Some(&words) {
                    let text = format!("{replica}: {words}");
                    seat.warned = Some(words);
                    self.observed.events.send_async(ReplicaEvent::Note { text }).await;
                }
            }
            // That no pod can be made concerns all of its replicas that have none.
            _ => {
                let role = self.role_of_object(name);
                for (_, seat) in
                    self.seats.iter_mut().filter(|(replica, _)| role.is_none_or(|role| role == replica.role))
                {
                    if seat.pod.is_none() {
                        seat.hindrance = Some(words.clone());
                    }
                }
            }
        }
    }

    /// The role whose Job is called `name`, if it is that of one.
    fn role_of_object(&self, name: &str) -> Option<Role> {
        let rest = name.strip_prefix(self.observed.run.as_str())?.strip_prefix('-')?;
        role_of(rest.split('-').next()?)
    }

    /// Comes to what follows from the state and from time.
    async fn look(&mut self, now: Instant) {
        self.is_back(now).await;
        let replicas: Vec<Replica> = self.seats.keys().copied().collect();
        for replica in replicas {
            self.conclude(replica, now).await;
            self.speak_of_waits(replica, now).await;
        }
    }

    /// Whether some replica has failed by itself, for which a Job ends and removes the others.
    fn cause(&self) -> Cause {
        let failed = |seat: &&Seat| {
            let ended = seat.pod.as_ref().and_then(|seen| seen.ended);
            seat.replaced.is_none() && ended.is_some_and(|(exit, _)| !matches!(exit, Exit::Code(0 | UNSEEN)))
        };
        let mut failed = self.seats.values().filter(failed).peekable();
        match (failed.peek().is_some(), failed.any(|seat| seat.over)) {
            (false, _) => Cause::Unknown,
            (true, false) => Cause::Untold,
            (true, true) => Cause::Told,
        }
    }

    /// A replica whose container has ended and whose log has been told has ended, or is to be replaced.
    async fn conclude(&mut self, replica: Replica, now: Instant) {
        let used_up = || "it has been started again as often as it may be".to_owned();
        let has_failed = self.failed.get(&replica.role).cloned();
        let has_failed = has_failed.or_else(|| self.used_up.contains(&replica).then(used_up));
        let cause = if has_failed.is_some() { self.cause() } else { Cause::Unknown };
        let Some(seat) = self.seats.get_mut(&replica) else { return };
        if seat.over {
            return;
        }
        if let (Some(exit), Some(reason)) = (seat.replaced, &has_failed) {
            seat.over = true;
            let text = format!("{replica} is not started again: {reason}");
            self.observed.events.send_async(ReplicaEvent::Note { text }).await;
            self.observed.events.send_async(ReplicaEvent::Exited { replica, exit }).await;
            return;
        }
        if seat.replaced.is_some() {
            return;
        }
        let Some(seen) = &seat.pod else {
            let Some(reason) = has_failed.filter(|_| self.has_looked) else { return };
            let event = match cause {
                // The Job failed before it made this pod.
                Cause::Unknown => ReplicaEvent::Doomed { replica, reason },
                // It is to be told first.
                Cause::Untold => return,
                // The Job has removed this pod for it.
                Cause::Told => {
                    let exit = Exit::Code(ExitCode::LostPeer.code().into());
                    ReplicaEvent::Exited { replica, exit }
                }
            };
            seat.over = true;
            self.observed.events.send_async(event).await;
            return;
        };
        let Some((exit, since)) = seen.ended else { return };
        if seen.log.as_ref().is_some_and(|log| !log.done) {
            return;
        }
        let never_started = seen.log.is_none();
        // With as little memory it would end so again.
        let is_condemned = seen.out_of_memory && self.observed.following.is_sync;
        let heals = self.observed.following.starts_again(replica, exit) && !is_condemned;
        if heals && has_failed.is_none() && now.duration_since(since) < VERDICT {
            return;
        }
        let out_of_memory = seen.out_of_memory;
        let last_lines = self.observed.last_lines[&replica].clone();
        let say =
            async |text: String| last_lines.deliver_async(&self.observed.events, replica, Stream::Stderr, text).await;
        if out_of_memory {
            let mebibytes = self.observed.following.memory_of(replica.role) >> 20;
            let reason = format!("out of memory (limit {mebibytes} MiB; raise `memory` of this role)");
            say(format!("fairing: ended by the kernel: {reason}")).await;
            if is_condemned {
                self.observed.events.send_async(ReplicaEvent::Condemned { replica, reason }).await;
            }
        }
        if never_started && let Some(reason) = &seat.hindrance {
            say(format!("fairing: it never started: {reason}")).await;
        }
        if heals && has_failed.is_none() {
            seat.replaced = Some(exit);
            (seat.waits, seat.said) = (Some(now), None);
            self.observed.events.send_async(ReplicaEvent::Replaced { replica, exit }).await;
        } else {
            seat.over = true;
            self.observed.events.send_async(ReplicaEvent::Exited { replica, exit }).await;
        }
    }

    /// Says what a replica waits for, and gives up what cannot come to anything.
    async fn speak_of_waits(&mut self, replica: Replica, now: Instant) {
        let schedule_timeout = self.observed.following.schedule_timeout;
        let Some(seat) = self.seats.get_mut(&replica) else { return };
        let Some(since) = seat.waits.filter(|_| !seat.over) else { return };
        let timeout = if seat.has_node { START_TIMEOUT } else { schedule_timeout };
        let waited = now.duration_since(since);
        let reason = match (&seat.hindrance, &seat.pod) {
            (Some(reason), _) => reason.clone(),
            (None, None) => "no pod has been made for it yet".to_owned(),
            (None, Some(_)) => "its pod has not started yet".to_owned(),
        };
        let cannot_heal = seat.hindrance.as_deref().is_some_and(cannot_heal);
        if cannot_heal || waited > timeout {
            seat.over = true;
            let reason = match cannot_heal {
                true => reason,
                false => format!("it did not start within {}: {reason}", humantime::format_duration(timeout)),
            };
            let before = seat.earlier.as_ref().and_then(|earlier| earlier.ended).map(|(exit, _)| exit);
            if let Some(exit) = seat.replaced.or(before) {
                // It was there once, so that the coordinator knows best what its loss means.
                let text = format!("{replica} does not come back: {reason}");
                self.observed.events.send_async(ReplicaEvent::Note { text }).await;
                self.observed.events.send_async(ReplicaEvent::Exited { replica, exit }).await;
                return;
            }
            self.observed.events.send_async(ReplicaEvent::Doomed { replica, reason }).await;
            return;
        }
        let is_news = match &seat.said {
            None => waited > QUIET,
            Some((said, when)) => *said != reason || when.elapsed() > SAY_AGAIN,
        };
        if is_news {
            seat.said = Some((reason.clone(), now));
            let text = format!("waiting for {replica} since {} s: {reason}", waited.as_secs());
            self.observed.events.send_async(ReplicaEvent::Note { text }).await;
        }
    }
}

/// What is known of a replica that has failed by itself.
enum Cause {
    Unknown,
    Untold,
    Told,
}

impl Seen {
    fn end(&mut self, exit: Exit) {
        self.ended.get_or_insert((exit, Instant::now()));
        self.comes_to(Life::HasEnded);
    }

    /// The pod is gone, and how its container ended may not have been seen.
    fn is_gone(&mut self) {
        self.end(Exit::Code(UNSEEN));
    }

    /// Who asks for its log by name would be given another one's.
    fn has_lost_its_name(&mut self) {
        self.comes_to(Life::IsGone);
    }

    fn comes_to(&self, life: Life) {
        if let Some(log) = &self.log {
            log.life.send_if_modified(|known| std::mem::replace(known, life.max(*known)) < life);
        }
    }
}

/// Follows the log of a pod whose container has started.
fn follow(observed: &Observed, notices: &mpsc::Sender<Notice>, replica: Replica, seen: &Seen) -> Log {
    let (life, known) = watch::channel(if seen.ended.is_some() { Life::HasEnded } else { Life::Runs });
    let (cluster, events, notices) = (observed.cluster.clone(), observed.events.clone(), notices.clone());
    let (name, uid) = (seen.name.clone(), seen.uid.clone());
    let last_lines = observed.last_lines[&replica].clone();
    let task = tokio::spawn(async move {
        let deliver = |text| {
            let (last_lines, events) = (last_lines.clone(), events.clone());
            // A cluster does not tell the two streams apart.
            async move { last_lines.deliver_async(&events, replica, Stream::Stdout, text).await }
        };
        let whole = logs::follow(&cluster, &name, deliver, known).await;
        let _ = notices.send(Notice::Told { uid, whole }).await;
    });
    Log { task, life, done: false }
}

/// The object that an operator makes the pods from, if that is what owns the run; a Job is among the others.
fn owners(
    observed: &Observed,
    config: watcher::Config,
) -> impl stream::Stream<Item = watcher::Result<Event<DynamicObject>>> + use<> {
    match observed.owner.resource.kind.as_str() {
        "Job" => stream::pending().left_stream(),
        _ => watcher(api(&observed.cluster, &observed.owner.resource), config).default_backoff().right_stream(),
    }
}

/// Which replica a pod is.
fn replica_of(pod: &Pod) -> Option<Replica> {
    let role = role_of(pod.labels().get(ROLE_LABEL)?)?;
    let rank = rank_of(pod)?;
    Some(match role {
        Role::Worker => Replica::worker(rank),
        Role::Ps => Replica::ps(rank),
    })
}

fn role_of(name: &str) -> Option<Role> {
    [Role::Worker, Role::Ps].into_iter().find(|role| role.to_string() == name)
}

/// Whether `rank` is among the indexes of a Job, which are written as in `1,3-5,7`.
fn is_among(rank: u32, indexes: &str) -> bool {
    indexes.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.trim().parse::<u32>().ok();
        number(first).zip(number(last)).is_some_and(|(first, last)| (first..=last).contains(&rank))
    })
}

/// Why a pod has not started, in the cluster's words.
fn hindrance(pod: &Pod, container: Option<&ContainerStatus>) -> Option<String> {
    let waiting = container.and_then(|container| container.state.as_ref()?.waiting.as_ref());
    if let Some(waiting) = waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        return match &waiting.message {
            Some(message) => Some(format!("{reason}: {message}")),
            // Says nothing that an event does not say better.
            None if reason == "ContainerCreating" || reason == "PodInitializing" => None,
            None => Some(reason.to_owned()),
        };
    }
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let scheduled =
        conditions.iter().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
    Some(scheduled.message.clone().unwrap_or_else(|| "it has not been given a node".to_owned()))
}

/// Whether waiting longer would change nothing.
fn cannot_heal(hindrance: &str) -> bool {
    let reason = hindrance.split(':').next().unwrap_or_default();
    // What a node that has much to do says.
    let passing = ["context deadline exceeded", "timed out", "is reserved for", "failed to sync", "connection refused"];
    if passing.into_iter().any(|words| hindrance.contains(words)) {
        return false;
    }
    match reason {
        "CreateContainerConfigError"
        | "CreateContainerError"
        | "InvalidImageName"
        | "ImageInspectError"
        | "ErrImageNeverPull"
        | "RunContainerError" => true,
        // Others may be the node's, and another one may do better.
        "StartError" => ["no such file or directory", "executable file not found", "permission denied"]
            .into_iter()
            .any(|words| hindrance.contains(words)),
        "ErrImagePull" | "ImagePullBackOff" => {
            let words = hindrance.to_lowercase();
            // A registry that is only away answers nothing of the kind.
            let refusals =
                ["not found", "unauthorized", "authorization failed", "denied", "forbidden", "manifest unknown"];
            let refusals = refusals.into_iter().chain(["no match for platform", "server gave http response to https"]);
            refusals.into_iter().any(|refusal| words.contains(refusal))
        }
        _ => false,
    }
}

/// Passes on the events of the run's objects that come after `since`. What happens while the API server is away is lost:
/// events explain, they decide nothing.
async fn tell_events(cluster: Cluster, run: String, since: String, notices: mpsc::Sender<Notice>) {
    let events: Api<ClusterEvent> = cluster.api();
    let mut version = since;
    loop {
        let parameters = WatchParams::default();
        if let Ok(stream) = events.watch(&parameters, &version).await {
            let mut stream = pin!(stream);
            // The API server ends a watch within that time; a connection that was cut off says nothing for ever.
            while let Ok(Some(Ok(event))) = tokio::time::timeout(MOST_SILENT, stream.next()).await {
                match event {
                    WatchEvent::Added(event) | WatchEvent::Modified(event) => {
                        version = event.resource_version().unwrap_or(version);
                        let name = event.involved_object.name.as_deref().unwrap_or_default();
                        if name.starts_with(&run) && notices.send(Notice::Event(Box::new(event))).await.is_err() {
                            return;
                        }
                    }
                    WatchEvent::Bookmark(bookmark) => version = bookmark.metadata.resource_version,
                    // Too old a version, mostly: what came in between is gone.
                    WatchEvent::Error(_) => version.clear(),
                    WatchEvent::Deleted(_) => {}
                }
            }
        }
        tokio::time::sleep(QUIET).await;
        if version.is_empty() {
            let newest = events.list_metadata(&ListParams::default().limit(1)).await;
            version = newest.ok().and_then(|list| list.metadata.resource_version).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_indexes_of_a_job_are_numbers_and_ranges() {
        let among = |indexes: &str| (0..8).filter(|rank| is_among(*rank, indexes)).collect::<Vec<_>>();
        assert_eq!(among("1,3-5,7"), [1, 3, 4, 5, 7]);
        assert_eq!(among("0"), [0]);
        assert_eq!(among(""), [] as [u32; 0]);
    }
}
