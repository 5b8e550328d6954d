//! Launches that break off: at each answer of the API server, and for reasons of the cluster's.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fairing_tests::law::Law;

use super::relay::{Moment, Proxy, Relay, Verdict};
use super::support::{Ended, PATIENCE, Program, Running, Signal};
use super::{LAUNCHERS, LAW, Namespace, wait_for};

/// Launchers at once. Each has a run of its own.
const AT_ONCE: usize = 3;

/// Answers beyond that to the release after which a launcher is killed, too.
const BEYOND: usize = 3;

/// Long enough for a launch on a busy machine, short enough to be waited for.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the cluster may take to remove what an interrupted launch leaves to its garbage collector.
const SOON: Duration = Duration::from_secs(10);

/// Trains a moment.
const SHORT: Law = Law { epochs: 1, pause_ms: 0, ..LAW };

impl Namespace {
    /// A program that trains for a moment with two replicas, through `relay`, and leaves nothing for long.
    fn through(&self, relay: &Relay, law: &Law, format: &str) -> Program {
        self.through_with(relay, law, format, 1)
    }

    /// The same with 1 or 0 parameter servers.
    fn through_with(&self, relay: &Relay, law: &Law, format: &str, ps: u32) -> Program {
        let seconds = format!("{}s", LAUNCH_TIMEOUT.as_secs());
        let variables = [
            ("KUBECONFIG", relay.kubeconfig().as_str()),
            ("FAIRING_LAUNCHER", format),
            ("FAIRING_LAUNCH_TIMEOUT", &seconds),
            ("FAIRING_KEEP_RESULT", "1s"),
            ("FAIRING_TTL", "1s"),
            ("FAIRING_ANOTHER", "1"),
            // Room for all at once.
            ("FAIRING_WORKER_MEMORY", "256Mi"),
            ("FAIRING_PS_MEMORY", "256Mi"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        variables.iter().fold(self.law(law, 2 - ps, ps), |program, (name, value)| program.env(name, value))
    }

    /// What there is of one run.
    #[track_caller]
    fn left_of(&self, run: &str) -> Vec<String> {
        self.objects(&format!("fairing.dev/run={run}"))
    }

    /// The runs whose workers have done all their work, as the events say that outlive all else.
    fn completed(&self) -> BTreeSet<String> {
        let path = "jsonpath={range .items[*]}{.reason} {.involvedObject.name}{\"\\n\"}{end}";
        let events = self.kubectl(&["get", "events", "--output", path]);
        let completed = events.lines().filter_map(|line| {
            let (reason, name) = line.split_once(' ')?;
            match reason {
                // A Job of a JobSet has a number.
                "Completed" => name.strip_suffix("-worker").or_else(|| name.strip_suffix("-worker-0")),
                "TFJobSucceeded" => Some(name),
                _ => None,
            }
        });
        completed.map(str::to_owned).collect()
    }
}

#[track_caller]
fn start(program: Program, relay: &Relay) -> Running {
    let running = program.start();
    relay.serves(running.pid());
    running
}

/// The name of a launcher's run, if it came so far that there was one.
fn run_of(ended: &Ended) -> Option<String> {
    let folder = std::fs::canonicalize(ended.run_folder()).ok()?;
    Some(folder.file_name()?.to_str()?.to_owned())
}

/// Does `work` for each of the `tasks`, several at once.
fn at_once<T: Sync>(tasks: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(task);
                }
            });
        }
    });
}

/// A judge that sends `signal` to the launcher when answer `number` is there, and then does what `verdict` says. The answer does
/// not arrive before the signal.
fn signals(signal: Signal, number: usize, verdict: Verdict) -> impl Fn(&Moment<'_>) -> Verdict {
    move |moment| {
        if moment.answer != Some(number) {
            return Verdict::Pass;
        }
        rustix::process::kill_process(moment.launcher, signal).unwrap();
        verdict
    }
}

/// Where in the sequence of its answers a launch creates something first, and where it releases the run, from 1.
#[track_caller]
fn landmarks(namespace: &Namespace, proxy: &Proxy, format: &str, ps: u32) -> (usize, usize) {
    let seen = Arc::new(Mutex::new((0, 0)));
    let noting = seen.clone();
    let relay = Relay::new(proxy, move |moment| {
        if let Some(number) = moment.answer.filter(|_| moment.request.creates()) {
            let mut seen = noting.lock().unwrap();
            if seen.0 == 0 {
                seen.0 = number;
            }
            if moment.request.releases() {
                seen.1 = number;
            }
        }
        Verdict::Pass
    });
    start(namespace.through_with(&relay, &SHORT, format, ps), &relay).end().code(0);
    namespace.is_empty();
    let (created, released) = *seen.lock().unwrap();
    assert!(0 < created && created < released, "{:?}", relay.answered());
    (created, released)
}

/// Kills launchers and interrupts launchers, one at each answer. A killed one gets no answer any more, and asks for nothing.
fn broken_off_at_each_answer(format: &str, ps: u32) {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    let (created, released) = landmarks(&namespace, &proxy, format, ps);
    // Before it creates something, a launch is the same with servers and without.
    let first = if ps == 0 { created } else { 1 };
    let interrupted = (created..=released + BEYOND).map(|number| (Signal::INT, number));
    let tasks: Vec<(Signal, usize)> =
        (first..=released + BEYOND).map(|number| (Signal::KILL, number)).chain(interrupted).collect();
    let (to_the_end, slowest) = (Mutex::new(BTreeSet::new()), Mutex::new(Duration::ZERO));
    at_once(&tasks, |&(signal, number)| {
        let is_kill = signal == Signal::KILL;
        let verdict = if is_kill { Verdict::Cut } else { Verdict::Pass };
        let relay = Relay::new(&proxy, signals(signal, number, verdict));
        let ended = start(namespace.through_with(&relay, &SHORT, format, ps), &relay).end();
        let answered = relay.answered();
        let is_released = answered.iter().any(|answer| answer.starts_with("PATCH "));
        let run = run_of(&ended);
        if is_kill {
            ended.signalled(signal);
            assert_eq!(answered.len(), number);
            assert_eq!(is_released, number >= released, "{answered:?}");
            to_the_end.lock().unwrap().extend(run.filter(|_| is_released));
        } else {
            ended.code(130).says("stopped ");
            let (run, began) = (run.unwrap(), Instant::now());
            while !namespace.left_of(&run).is_empty() {
                assert!(began.elapsed() < SOON, "{format}, answer {number}: {:?}", namespace.left_of(&run));
                thread::sleep(Duration::from_millis(100));
            }
            let mut slowest = slowest.lock().unwrap();
            *slowest = began.elapsed().max(*slowest);
        }
    });
    let began = Instant::now();
    namespace.becomes_empty(PATIENCE);
    let to_the_end = to_the_end.into_inner().unwrap();
    assert_eq!(to_the_end.len(), BEYOND + 1);
    let completed = namespace.completed();
    assert!(to_the_end.is_subset(&completed), "{to_the_end:?}, completed: {completed:?}");
    println!(
        "{format}, {ps} servers: killed at each of {} answers (the run is released by number {released}), interrupted from number {created} \
         on and nothing left {:?} after that; all gone {:?} after the last",
        released + BEYOND + 1 - first,
        slowest.into_inner().unwrap(),
        began.elapsed()
    );
}

#[test]
fn a_launch_of_jobs_that_breaks_off_at_any_answer_leaves_nothing() {
    broken_off_at_each_answer("jobs", 1);
}

/// Its owner is the workers' Job.
#[test]
fn a_launch_of_jobs_without_servers_that_breaks_off_at_any_answer_leaves_nothing() {
    broken_off_at_each_answer("jobs", 0);
}

#[test]
fn a_launch_of_a_job_set_that_breaks_off_at_any_answer_leaves_nothing() {
    broken_off_at_each_answer("jobset", 1);
}

#[test]
fn a_launch_of_a_tf_job_that_breaks_off_at_any_answer_leaves_nothing() {
    broken_off_at_each_answer("tfjob", 1);
}

/// The API server answers no more, and the launcher is interrupted, once or twice.
#[test]
fn an_interrupted_launch_does_not_wait_for_ever_for_a_silent_cluster() {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    let (created, released) = landmarks(&namespace, &proxy, "jobs", 1);
    let tasks = [(created, 1), (released, 1), (released, 2)];
    at_once(&tasks, |&(number, interrupts)| {
        let relay = Relay::new(&proxy, signals(Signal::INT, number, Verdict::Hold));
        let mut running = start(namespace.through(&relay, &SHORT, "jobs"), &relay);
        running.wait_for("interrupted: waiting up to 1m for what was started of the replicas to be removed");
        let (began, mut within) = (Instant::now(), Duration::from_secs(35));
        if interrupts == 2 {
            running.signal(Signal::INT);
            within = Duration::from_secs(8);
        }
        let ended = running.end().code(130).says("stopped before the replicas were started");
        assert!(began.elapsed() < within, "{:?}", began.elapsed());
        match interrupts {
            1 => ended.says("warning: something of the run `"),
            _ => ended.says("by itself: within 11s, or when it has ended if it was started after all"),
        };
    });
    namespace.becomes_empty(PATIENCE);
}

/// Its caller has not been told what the run is called.
#[test]
fn an_interrupted_launch_that_was_to_detach_leaves_nothing() {
    let proxy = Proxy::start();
    at_once(&LAUNCHERS, |format| {
        let namespace = Namespace::new();
        let relay = Relay::new(&proxy, |moment| {
            if moment.answer.is_some() && moment.request.releases() {
                rustix::process::kill_process(moment.launcher, Signal::INT).unwrap();
                // The signal is heard by another thread than the answer.
                thread::sleep(Duration::from_millis(200));
            }
            Verdict::Pass
        });
        let program = namespace.through(&relay, &SHORT, format).env("FAIRING_DETACH", "1");
        let ended = start(program, &relay).end().code(130).says("stopped ");
        assert_eq!(ended.own_lines(), Vec::<&str>::new());
        let began = Instant::now();
        wait_for(|| namespace.left(), Vec::is_empty);
        assert!(began.elapsed() < SOON, "{format}: {:?}", began.elapsed());
    });
}

/// The line breaks while an answer is on its way: the same is asked for again, and what the first request has made is found.
#[test]
fn a_lost_answer_does_not_disturb_a_launch() {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    at_once(&LAUNCHERS, |format| {
        let lost = Mutex::new(BTreeSet::new());
        let relay = Relay::new(&proxy, move |moment| {
            let request = moment.request;
            let is_first = || lost.lock().unwrap().insert((request.method.clone(), request.body.clone()));
            if moment.answer.is_some() && request.creates() && is_first() { Verdict::Lose } else { Verdict::Pass }
        });
        let law = Law { learning_rate: 0.02, ..SHORT };
        start(namespace.through(&relay, &law, format), &relay).end().code(0);
        let twice = relay.answered().iter().filter(|answer| answer.starts_with("PATCH ")).count();
        assert_eq!(twice, 2, "{:?}", relay.answered());
    });
    namespace.is_empty();
}

/// The owner has failed, or is gone with all that it owned.
#[test]
fn a_launch_that_takes_too_long_is_given_up_and_says_so() {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    at_once(&[("jobs", "1s"), ("jobs", "1m"), ("jobset", "1s"), ("tfjob", "1s")], |&(format, ttl)| {
        // What is to release the run waits until it is too late.
        let ((calls, called), (goes_on, go_on)) = (sync_channel(1), sync_channel(1));
        let (go_on, is_known) = (Mutex::new(go_on), AtomicBool::new(false));
        let relay = Relay::new(&proxy, move |moment| {
            if moment.answer.is_none() && moment.request.releases() && !is_known.swap(true, Ordering::Relaxed) {
                calls.send(moment.request.path.clone()).unwrap();
                go_on.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            }
            Verdict::Pass
        });
        let law = Law { learning_rate: 0.04, ..SHORT };
        let running = start(namespace.through(&relay, &law, format).env("FAIRING_TTL", ttl), &relay);
        let path = called.recv_timeout(PATIENCE).unwrap();
        let owner = path.split('?').next().unwrap().rsplit('/').next().unwrap();
        let run = owner.strip_suffix("-ps").unwrap_or(owner);
        let failed = "jsonpath={.items[*].status.conditions[?(@.type==\"Failed\")].reason}";
        match ttl {
            "1s" => wait_for(|| namespace.left_of(run), Vec::is_empty),
            _ => wait_for(
                || namespace.kubectl(&["get", "jobs", "--output", failed]),
                |reasons| reasons.contains("DeadlineExceeded"),
            ),
        }
        goes_on.send(()).unwrap();
        running
            .end()
            .code(1)
            .says("waiting for the cluster to create the objects of the run")
            .says("it took too long to create its objects, and the cluster has given it up (is it overloaded?");
    });
    namespace.is_empty();
}

/// At the end of the run the API server cannot be reached.
#[test]
fn a_result_comes_home_although_the_cluster_cannot_be_reached_for_cleaning_up() {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    at_once(&LAUNCHERS, |format| {
        let relay = Relay::new(&proxy, |moment| {
            let is_anchor = moment.request.path.contains("-launch");
            if moment.request.method == "DELETE" && !is_anchor { Verdict::Cut } else { Verdict::Pass }
        });
        let began = Instant::now();
        let ended = start(namespace.through(&relay, &SHORT, format), &relay).end().code(0);
        assert!(ended.has_model());
        assert_eq!(ended.summary()["status"], "succeeded");
        let run = run_of(&ended).unwrap();
        let ended =
            ended.says(&format!("warning: something of the run `{run}` is left in the namespace `{}`", namespace.name));
        ended.says(&format!("`fairing_core::delete(\"{run}\")` removes it now"));
        // The run, and the time that the cluster may be away; what is meant is that it does not wait for ever.
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    });
    namespace.becomes_empty(PATIENCE);
}

/// Somebody has an object of the name that one of the launch's was to have.
#[test]
fn a_name_that_is_taken_is_refused_and_its_object_is_left_as_it_was() {
    let namespace = Namespace::new();
    let proxy = Proxy::start();
    let job = "spec: {suspend: true, template: {spec: {restartPolicy: Never, containers: [{name: a, image: a}]}}}";
    let job = format!("apiVersion: batch/v1\nkind: Job\n{job}");
    let secret = "apiVersion: v1\nkind: Secret\nstringData: {a: b}".to_owned();
    let service = "apiVersion: v1\nkind: Service\nspec: {clusterIP: None, selector: {a: b}}".to_owned();
    let suspended = "replicatedJobs: [{name: a, template: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: \
                     a, image: a}]}}}}}]";
    let job_set = format!("apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nspec: {{suspend: true, {suspended}}}");
    let replicas = "runPolicy: {suspend: true}, tfReplicaSpecs: {Worker: {template: {spec: {containers: [{name: tensorflow, \
                    image: a}]}}}}";
    let tf_job = format!("apiVersion: kubeflow.org/v1\nkind: TFJob\nspec: {{{replicas}}}");
    let tasks = [
        ("jobs", "Job", "-ps", &job),
        ("jobs", "Job", "-worker", &job),
        ("jobs", "Service", "", &service),
        ("jobs", "Secret", "", &secret),
        ("jobs", "Secret", "-caller", &secret),
        ("jobset", "Job", "-launch", &job),
        ("jobset", "JobSet", "", &job_set),
        ("jobset", "Secret", "-caller", &secret),
        ("tfjob", "Job", "-launch", &job),
        ("tfjob", "TFJob", "", &tf_job),
        ("tfjob", "Secret", "", &secret),
    ];
    let look = |kind: &str, name: &str| namespace.kubectl(&["get", kind, name, "--output", "json"]);
    at_once(&tasks, |&(format, kind, suffix, yaml)| {
        // The first object that a launch creates says what its run is called, and waits until its name is taken.
        let ((calls, called), (goes_on, go_on)) = (sync_channel(1), sync_channel(1));
        let (go_on, is_known) = (Mutex::new(go_on), AtomicBool::new(false));
        let relay = Relay::new(&proxy, move |moment| {
            if moment.answer.is_none() && moment.request.creates() && !is_known.swap(true, Ordering::Relaxed) {
                let object: serde_json::Value = serde_json::from_slice(&moment.request.body).unwrap();
                calls.send(object["metadata"]["labels"]["fairing.dev/run"].as_str().unwrap().to_owned()).unwrap();
                go_on.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            }
            Verdict::Pass
        });
        let law = Law { learning_rate: 0.03, ..SHORT };
        let running = start(namespace.through(&relay, &law, format), &relay);
        let run = called.recv_timeout(PATIENCE).unwrap();
        let name = format!("{run}{suffix}");
        namespace.apply(&format!("{yaml}\nmetadata: {{name: {name}, labels: {{owner: somebody}}}}"));
        // Its controller has seen it.
        thread::sleep(Duration::from_secs(1));
        let before = look(kind, &name);
        goes_on.send(()).unwrap();
        let ended = running.end().code(1);
        ended
            .says(&format!("there is a {kind} `{name}` in the namespace `{}` already", namespace.name))
            .says("which is not of this launch and was left as it is (launch again")
            .never_says("may be left");
        assert_eq!(look(kind, &name), before);
        assert_eq!(namespace.left_of(&run), Vec::<String>::new());
        namespace.kubectl(&["delete", kind, &name]);
    });
    namespace.is_empty();
}
