//! What a container wrote, from its first line to its last: without loss or repetition across broken connections.
//!
//! Every line comes with the time at which the node took it. A connection that broke is asked for again from the second of
//! the last line, and what was delivered before is skipped.

use std::time::Duration;

use futures_util::AsyncReadExt as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::LogParams;
use tokio::sync::watch;

use super::super::lines::Lines;
use super::client::Cluster;
use super::watch::Life;

/// Pause before a stream that broke is asked for again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long the API server may take to begin with the log.
const BEGIN: Duration = Duration::from_secs(20);
/// How long the cluster may take to say that a container has ended whose stream has; longer, and the stream was cut off.
const VERDICT: Duration = Duration::from_secs(2);
/// A stream that was silent for so long is opened again.
const MOST_SILENT: Duration = Duration::from_secs(300);
/// The same of one that began when the container had ended, in which everything is there already.
const MOST_SILENT_AT_THE_END: Duration = Duration::from_secs(10);
/// How long a stream may be silent, once its container has ended, before it is not waited for any more.
const REST: Duration = Duration::from_millis(50);
/// The first word of "unable to retrieve container logs for ...", which has no time, as lines of the program have.
const NO_LOG: &[u8] = b"unable";
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 32 << 10;
/// Longest text of a time, with the space behind it; what is longer is none.
const MOST_TIME_BYTES: usize = 48;

/// Follows the log of the only container of the pod `name` to its end. Returns whether all of it could be had.
///
/// `deliver` gets each line. `life` says whether the container has ended, so that a stream that begins then tells everything,
/// and whether its pod is gone.
pub(super) async fn follow<F>(
    cluster: &Cluster,
    name: &str,
    mut deliver: impl FnMut(String) -> F,
    mut life: watch::Receiver<Life>,
) -> bool
where
    F: Future<Output = ()>,
{
    let pods: Api<Pod> = cluster.api();
    let mut place = Place::default();
    let mut pause = FIRST_PAUSE;
    loop {
        // Looked at before: what is written before the end is in the stream that begins after it.
        let before = *life.borrow();
        if before == Life::IsGone {
            return true;
        }
        let had_ended = before == Life::HasEnded;
        match stream(&pods, name, &mut place, &mut deliver, &mut life, had_ended).await {
            Heard::All | Heard::Absent if had_ended => return true,
            Heard::Cut => continue,
            // The node closes a stream when the container has ended, before the cluster says so.
            Heard::All => {
                if tokio::time::timeout(VERDICT, end(&mut life)).await.is_ok() {
                    pause = FIRST_PAUSE;
                    continue;
                }
            }
            // The pod may be gone with its log, and nobody says so.
            Heard::Broken if had_ended && pause == LONGEST_PAUSE => return false,
            Heard::Absent | Heard::Broken => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The second in which `time` is. The client would round to the nearest one, and what was written in between would be lost.
fn whole_second(time: Timestamp) -> Timestamp {
    let floor = time.as_second() - i64::from(time.subsec_nanosecond() < 0);
    Timestamp::from_second(floor).unwrap_or(time)
}

/// Waits for the end of the container.
async fn end(life: &mut watch::Receiver<Life>) {
    // With nobody left who would say so, it is over too.
    let _ = life.wait_for(|life| *life >= Life::HasEnded).await;
}

/// How one stream ended.
enum Heard {
    /// At its end.
    All,
    /// There is no such container, or not any more.
    Absent,
    /// The connection broke, or did not come about.
    Broken,
    /// Not at all: the container has ended meanwhile. The node notices with up to a second's delay that a silent container
    /// writes no more, and who asks again hears the rest at once.
    Cut,
}

async fn stream<F>(
    pods: &Api<Pod>,
    name: &str,
    place: &mut Place,
    deliver: &mut impl FnMut(String) -> F,
    life: &mut watch::Receiver<Life>,
    had_ended: bool,
) -> Heard
where
    F: Future<Output = ()>,
{
    let since_time = place.time.map(whole_second);
    let parameters = LogParams { follow: true, timestamps: true, since_time, ..LogParams::default() };
    let beginning = tokio::time::timeout(BEGIN, pods.log_stream(name, &parameters));
    let mut log = match beginning.await {
        Ok(Ok(log)) => Box::pin(log),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 || status.code == 400 => return Heard::Absent,
        Ok(Err(_)) | Err(_) => return Heard::Broken,
    };
    let mut cutter = Cutter::new(place);
    let mut chunk = vec![0; CHUNK_BYTES];
    // A connection that was cut off says nothing for ever, as a program may for long.
    let most_silent = if had_ended { MOST_SILENT_AT_THE_END } else { MOST_SILENT };
    let mut cut = false;
    loop {
        let most_silent = if cut { REST } else { most_silent };
        let read = tokio::select! {
            read = tokio::time::timeout(most_silent, log.read(&mut chunk)) => read,
            // What is on its way is read: the pod, and its log with it, may be gone before it can be asked for again.
            () = end(life), if !had_ended && !cut => {
                cut = true;
                continue;
            }
        };
        let size = match read {
            Ok(Ok(0)) => break,
            Ok(Ok(size)) => size,
            Err(_) if cut => return Heard::Cut,
            // A line that did not come whole comes again.
            Ok(Err(_)) | Err(_) => return Heard::Broken,
        };
        let mut lines = Vec::new();
        cutter.push(&chunk[..size], |line| lines.push(line));
        for line in lines {
            deliver(line).await;
        }
    }
    if let Some(line) = cutter.finish() {
        deliver(line).await;
    }
    Heard::All
}

/// How far a log has been delivered.
#[derive(Debug, Default)]
struct Place {
    /// The time of the last line.
    time: Option<Timestamp>,
    /// Lines of that very time.
    count: usize,
}

/// Cuts a stream of lines with times into lines, and leaves out those that were delivered.
struct Cutter<'a> {
    place: &'a mut Place,
    /// What was delivered when the stream began.
    before: Option<Timestamp>,
    /// Lines of that time that are to be left out still.
    skipped: usize,
    /// The time at the beginning of the line, as far as it has come.
    head: Vec<u8>,
    /// What is known of the line in hand.
    line: Line,
    /// The time of the line in hand, if it has one and is new.
    time: Option<Timestamp>,
    lines: Lines,
}

/// The line in hand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Its time has not come whole.
    Head,
    New,
    Old,
}

impl<'a> Cutter<'a> {
    fn new(place: &'a mut Place) -> Self {
        let (before, skipped) = (place.time, place.count);
        Self { place, before, skipped, head: Vec::new(), line: Line::Head, time: None, lines: Lines::default() }
    }

    fn push(&mut self, mut bytes: &[u8], mut emit: impl FnMut(String)) {
        while !bytes.is_empty() {
            if self.line == Line::Head {
                let end = bytes.iter().position(|byte| matches!(byte, b' ' | b'\n'));
                let (head, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
                self.head.extend_from_slice(head);
                if end.is_none() && self.head.len() < MOST_TIME_BYTES {
                    return;
                }
                let time = std::str::from_utf8(&self.head).ok().and_then(|text| text.parse::<Timestamp>().ok());
                match time {
                    Some(time) => {
                        self.line = self.place_of(time);
                        // The space; at the end of an empty line there may be none.
                        bytes = rest.strip_prefix(b" ").unwrap_or(rest);
                    }
                    None if self.head == NO_LOG => {
                        // The node's word for a container that is gone, and none of the program's.
                        self.line = Line::Old;
                        bytes = rest;
                    }
                    None => {
                        // The node's own, of a file that it cannot follow for example.
                        self.line = Line::New;
                        let head = std::mem::take(&mut self.head);
                        self.lines.push(&head, &mut emit);
                        bytes = rest;
                    }
                }
                self.head.clear();
                continue;
            }
            let end = bytes.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
            let (text, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            if self.line == Line::New {
                self.lines.push(text, &mut emit);
            }
            if end.is_some() {
                self.end_line();
            }
            bytes = rest;
        }
    }

    /// Whether a line of this time is new.
    fn place_of(&mut self, time: Timestamp) -> Line {
        match self.before {
            Some(before) if time < before => return Line::Old,
            Some(before) if time == before && self.skipped > 0 => {
                self.skipped -= 1;
                return Line::Old;
            }
            _ => {}
        }
        self.time = Some(time);
        Line::New
    }

    /// Notes that the line in hand has been delivered: not before it is whole.
    fn end_line(&mut self) {
        self.line = Line::Head;
        match self.time.take() {
            Some(time) if self.place.time == Some(time) => self.place.count += 1,
            Some(time) => *self.place = Place { time: Some(time), count: 1 },
            None => {}
        }
    }

    fn finish(mut self) -> Option<String> {
        self.end_line();
        self.lines.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "2026-01-02T03:04:05.000000001Z first\n\
                       2026-01-02T03:04:05.000000002Z second, same time\n\
                       2026-01-02T03:04:05.000000002Z third, same time\n\
                       2026-01-02T03:04:05.000000003Z \n\
                       2026-01-02T03:04:06Z last";

    fn cut(place: &mut Place, pieces: &[&str], ends: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let mut cutter = Cutter::new(place);
        for piece in pieces {
            cutter.push(piece.as_bytes(), |line| lines.push(line));
        }
        if ends {
            lines.extend(cutter.finish());
        }
        lines
    }

    #[test]
    fn a_log_is_cut_into_the_same_lines_however_it_comes() {
        let whole = ["first", "second, same time", "third, same time", "", "last"];
        for first in 0..=LOG.len() {
            for second in [first, (first + 7).min(LOG.len())] {
                let pieces = [&LOG[..first], &LOG[first..second], &LOG[second..]];
                assert_eq!(cut(&mut Place::default(), &pieces, true), whole, "{first} {second}");
            }
        }
    }

    #[test]
    fn a_log_is_asked_for_again_from_before_its_last_line() {
        for (text, expected) in [
            ("2026-01-02T03:04:05.7Z", "2026-01-02T03:04:05Z"),
            ("2026-01-02T03:04:05.000000001Z", "2026-01-02T03:04:05Z"),
            ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
            ("1969-12-31T23:59:58.5Z", "1969-12-31T23:59:58Z"),
        ] {
            let (time, expected) = (text.parse().unwrap(), expected.parse::<Timestamp>().unwrap());
            let parameters = LogParams { since_time: Some(whole_second(time)), ..LogParams::default() };
            let asked = kube::core::Request::new("").logs("pod", &parameters).unwrap();
            assert!(asked.uri().to_string().contains("sinceTime"), "{}", asked.uri());
            assert_eq!(whole_second(time), expected, "{text}");
            // The client itself rounds, which must not change it.
            assert!(
                asked.uri().to_string().replace("%3A", ":").ends_with(&format!("sinceTime={expected}")),
                "{}",
                asked.uri()
            );
        }
    }

    #[test]
    fn a_stream_that_broke_anywhere_loses_and_repeats_nothing() {
        let whole = ["first", "second, same time", "third, same time", "", "last"];
        for broken in 0..=LOG.len() {
            let mut place = Place::default();
            let mut lines = cut(&mut place, &[&LOG[..broken]], false);
            lines.extend(cut(&mut place, &[LOG], true));
            assert_eq!(lines, whole, "broken at {broken}");
        }
    }

    #[test]
    fn what_the_node_says_itself_has_no_time_and_that_there_is_no_log_is_no_line() {
        let told = "failed to watch the log\n";
        assert_eq!(cut(&mut Place::default(), &[told], true), ["failed to watch the log"]);
        let gone = "unable to retrieve container logs for containerd://abc";
        for pieces in [&[gone] as &[&str], &["una", "ble to retrieve"], &[gone, "\n"]] {
            assert_eq!(cut(&mut Place::default(), pieces, true), [] as [&str; 0], "{pieces:?}");
        }
        let programs = "2026-01-02T03:04:05Z unable to open the file\n";
        assert_eq!(cut(&mut Place::default(), &[gone, "\n", programs], true), ["unable to open the file"]);
    }
}
