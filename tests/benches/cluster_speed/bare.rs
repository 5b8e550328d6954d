//! The floor: what Kubernetes takes for a Job of three pods of the same image, which only print a line and end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use serde_json::json;

use crate::now_ms;
use crate::place::Place;
use crate::table::{Table, fact};
use crate::witness::{State, pods};

/// Makes this program what the Job runs; behind it stand the milliseconds until it ends.
pub(crate) const ARGUMENT: &str = "bare";

/// As many as a run of 2 workers and a server has.
const PODS: usize = 3;

/// How the pods are deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// Once the API server says that they have ended, with a second to end in.
    Reported,
    /// As soon as their programs have ended, with a second to end in.
    AtOnce,
    /// Once the API server says that they have ended, without asking the node.
    ReportedByForce,
    /// As soon as their programs have ended, without asking the node.
    AtOnceByForce,
}

impl Deletion {
    fn waits(self) -> bool {
        matches!(self, Deletion::Reported | Deletion::ReportedByForce)
    }

    fn grace_seconds(self) -> u32 {
        u32::from(matches!(self, Deletion::Reported | Deletion::AtOnce))
    }
}

/// Times in ms from one point to the next.
pub(crate) struct Bare {
    /// Created to the last program's first instruction.
    pub(crate) started: f64,
    /// Created to the API server saying that the last one runs; before that its pod has no address.
    pub(crate) running: f64,
    /// Created to the first line that a client has read.
    pub(crate) line: f64,
    /// The last program's end to the API server saying so, or to its pod being gone.
    pub(crate) reported: f64,
    /// The deletion to everything being gone.
    pub(crate) deleted: f64,
    /// The last program's end to everything being deleted.
    pub(crate) gone: f64,
}

/// What the Job's pods do.
pub(crate) fn program(milliseconds: &str) -> anyhow::Result<()> {
    println!("{:.3}", now_ms());
    thread::sleep(Duration::from_millis(milliseconds.parse()?));
    println!("{:.3}", now_ms());
    Ok(())
}

/// Ways to delete the pods of a bare Job, in turn, at all phases of kubelet's look at its containers.
pub(crate) fn table(place: &Place, repetitions: usize, image: &str) -> anyhow::Result<Table> {
    let mut table = Table::new("Last program's end of a bare Job of 3 pods to all deleted");
    let ways = [
        (Deletion::Reported, fact("a second to end in, once they are said to have ended, ms")),
        (Deletion::AtOnce, fact("a second to end in, without waiting for that, ms")),
        (Deletion::ReportedByForce, fact("by force, once they are said to have ended, ms")),
        (Deletion::AtOnceByForce, fact("by force, without waiting for that, ms")),
    ];
    for number in 1..=repetitions {
        eprintln!("delete: repetition {number} of {repetitions}");
        for (deletion, figure) in ways {
            let phase = 1_000 * number as u64 / repetitions as u64;
            thread::sleep(Duration::from_millis(phase));
            table.record(figure, measure(place, image, 1_000 + phase, deletion)?.gone);
        }
    }
    Ok(table)
}

/// Runs the Job once; its programs end after `milliseconds`.
pub(crate) fn measure(place: &Place, image: &str, milliseconds: u64, deletion: Deletion) -> anyhow::Result<Bare> {
    static NUMBER: AtomicUsize = AtomicUsize::new(1);
    let name = format!("bare-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let job: Job = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "completions": PODS,
            "parallelism": PODS,
            "completionMode": "Indexed",
            "template": {"spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "containers": [{"name": "bare", "image": image, "args": [ARGUMENT, milliseconds.to_string()]}],
            }},
        },
    }))?;
    let jobs = place.api::<Job>();
    let created = now_ms();
    place.runtime.block_on(jobs.create(&PostParams::default(), &job))?;
    let prefix = format!("{name}-");
    let mut reading = Vec::new();
    while reading.len() < PODS {
        let count = reading.len() + 1;
        place.witness.wait(&prefix, count, State::Running, created)?;
        let seen = place.witness.since(created);
        for pod in pods(&seen, &prefix, State::Running).skip(reading.len()) {
            reading.push(place.runtime.spawn(read(place.api::<Pod>(), pod.name.clone())));
        }
    }
    let mut read = Vec::new();
    for reading in reading {
        read.push(place.runtime.block_on(reading)??);
    }
    let latest = |times: &mut dyn Iterator<Item = f64>| times.fold(f64::MIN, f64::max);
    let started = latest(&mut read.iter().map(|log| log.began));
    let line = read.iter().map(|log| log.readable).fold(f64::MAX, f64::min);
    let ended = latest(&mut read.iter().map(|log| log.ended));
    if deletion.waits() {
        place.witness.wait(&prefix, PODS, State::Ended, created)?;
    }
    let deleting = now_ms();
    place.runtime.block_on(async {
        let (of_jobs, of_pods) =
            (DeleteParams::background(), DeleteParams::background().grace_period(deletion.grace_seconds()));
        let its_pods = ListParams::default().labels(&format!("job-name={name}"));
        let all = place.api::<Pod>();
        tokio::try_join!(jobs.delete(&name, &of_jobs), all.delete_collection(&of_pods, &its_pods))
    })?;
    place.witness.wait(&prefix, PODS, State::Deleted, created)?;
    let seen = place.witness.since(created);
    let running = latest(&mut pods(&seen, &prefix, State::Running).map(|pod| pod.at));
    let reported = latest(&mut pods(&seen, &prefix, State::Ended).map(|pod| pod.at));
    let gone = latest(&mut pods(&seen, &prefix, State::Deleted).map(|pod| pod.at));
    anyhow::ensure!(place.left()?.is_empty(), "something is left: {:?}", place.left()?);
    Ok(Bare {
        started: started - created,
        running: running - created,
        line: line - created,
        reported: reported - ended,
        deleted: gone - deleting,
        gone: gone - ended,
    })
}

/// What a pod wrote.
struct Log {
    /// When it began and ended, as it says.
    began: f64,
    ended: f64,
    /// When its first line had come here.
    readable: f64,
}

async fn read(pods: kube::Api<Pod>, name: String) -> anyhow::Result<Log> {
    let parameters = LogParams { follow: true, ..LogParams::default() };
    let mut lines = Box::pin(pods.log_stream(&name, &parameters).await?).lines();
    let mut next = async || -> anyhow::Result<f64> {
        let line = lines.try_next().await?.with_context(|| format!("{name} has no such line"))?;
        line.parse().with_context(|| line)
    };
    let began = next().await?;
    let readable = now_ms();
    let ended = next().await?;
    Ok(Log { began, ended, readable })
}
