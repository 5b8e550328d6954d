//! The way to the coordinator: a port-forward through the API server to its pod.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;

use super::super::Way;
use super::super::events::lock;
use super::client::{Cluster, words};

/// How long the API server may take to open a way.
const OPEN: Duration = Duration::from_secs(20);

/// How long one attempt waits for the coordinator's pod: whoever makes it wants to look up now and then.
const NEWS: Duration = Duration::from_secs(1);

/// Pause before the second attempt; it doubles. The program takes a moment to listen, and each attempt costs the API
/// server and the node a connection.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A way that held for so long was a good one: what follows it is a new beginning.
const GOOD: Duration = Duration::from_secs(5);

/// Bytes passed on at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Port-forwards to the coordinator's pod, whichever that is.
pub(super) struct Forward {
    cluster: Cluster,
    port: u16,
    /// The pod that runs the coordinator, once its container has started.
    pod: watch::Receiver<Option<String>>,
    pace: Mutex<Pace>,
}

struct Pace {
    pause: Duration,
    last: Option<Instant>,
}

impl Forward {
    pub(super) fn new(cluster: Cluster, port: u16, pod: watch::Receiver<Option<String>>) -> Self {
        Self { cluster, port, pod, pace: Mutex::new(Pace { pause: FIRST_PAUSE, last: None }) }
    }

    /// Waits until the next attempt may be made.
    fn wait(&self) {
        let pause = {
            let mut pace = lock(&self.pace);
            let since = pace.last.map(|last| last.elapsed());
            let pause = match since {
                None => Duration::ZERO,
                Some(since) if since > GOOD => {
                    pace.pause = FIRST_PAUSE;
                    Duration::ZERO
                }
                Some(since) => {
                    let pause = pace.pause.saturating_sub(since);
                    pace.pause = (pace.pause * 2).min(LONGEST_PAUSE);
                    pause
                }
            };
            pace.last = Some(Instant::now() + pause);
            pause
        };
        thread::sleep(pause);
    }
}

impl Way for Forward {
    fn connect(&self) -> io::Result<UnixStream> {
        let mut pod = self.pod.clone();
        let known = async {
            let pod = tokio::time::timeout(NEWS, pod.wait_for(Option::is_some)).await.ok()?.ok()?;
            pod.clone()
        };
        let Some(pod) = self.cluster.reactor().wait(known) else {
            return Err(refused("the coordinator's pod does not run yet".to_owned()));
        };
        self.wait();
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        let cluster = self.cluster.clone();
        let opened = async move { tokio::time::timeout(OPEN, open(cluster, pod, self.port, far)).await };
        match self.cluster.reactor().wait(opened) {
            Ok(opened) => opened?,
            Err(_) => return Err(refused(format!("the API server opened no way within {} s", OPEN.as_secs()))),
        }
        Ok(near)
    }
}

async fn open(cluster: Cluster, pod: String, port: u16, far: UnixStream) -> io::Result<()> {
    let pods: Api<Pod> = cluster.api();
    let mut forwarder = pods
        .portforward(&pod, &[port])
        .await
        .map_err(|error| refused(format!("no way to `{pod}`: {}", words(&error))))?;
    let stream = forwarder.take_stream(port).ok_or_else(|| io::Error::other("a port-forward without its port"))?;
    let failed = forwarder.take_error(port);
    let (mut from_pod, mut to_pod) = tokio::io::split(stream);
    let (mut from_near, mut to_near) = tokio::net::UnixStream::from_std(far)?.into_split();
    tokio::spawn(async move {
        let failure = async {
            // The node could not reach the port, or not any more.
            let has_failed = if let Some(failed) = failed { failed.await.is_some() } else { false };
            if !has_failed {
                std::future::pending::<()>().await;
            }
        };
        let both = async {
            // Either end is the end of both: the run's protocol never closes one direction alone.
            tokio::select! {
                () = pass(&mut from_near, &mut to_pod) => {}
                () = pass(&mut from_pod, &mut to_near) => {}
            }
        };
        tokio::select! {
            () = failure => {}
            () = both => {}
        }
        let _ = to_near.shutdown().await;
        // What has been written is sent before the connection is closed.
        let _ = to_pod.shutdown().await;
        tokio::time::sleep(FIRST_PAUSE).await;
        forwarder.abort();
    });
    Ok(())
}

async fn pass(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(size @ 1..) = from.read(&mut chunk).await {
        if to.write_all(&chunk[..size]).await.and(to.flush().await).is_err() {
            break;
        }
    }
}

/// Of the kind that is tried again: the pod may not run yet, or its program may not listen yet.
fn refused(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, reason)
}
