//! Where the run stands: what both views show, without how they show it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::super::events::{Event, Exit, Metric, Progress};
use super::super::words;
use super::{Note, Tone};
use crate::topology::{Replica, Topology};

/// Long enough to smooth over single batches, short enough to see a worker slow down.
const RATE_WINDOW: Duration = Duration::from_secs(3);

/// More often than this a worker's examples are not sampled, which bounds the samples kept.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// An epoch's last metrics may arrive after the progress that ends it; its line waits for them this long.
const EPOCH_GRACE: Duration = Duration::from_millis(500);

/// How many missing replicas are named before the rest is counted.
const NAMES_SHOWN: usize = 4;

/// The state of one run as far as it is shown.
pub(super) struct Board {
    topology: Topology,
    joined: BTreeSet<Replica>,
    workers: Vec<Worker>,
    epochs: Epochs,
    stopping: bool,
    begun: Option<Instant>,
    /// When training was first heard of, and how far it was then.
    trained_since: Option<(Instant, f64)>,
}

/// One worker.
#[derive(Default)]
pub(super) struct Worker {
    pub(super) progress: Option<Progress>,
    /// Last values in the order of first appearance.
    pub(super) metrics: Vec<(String, f64)>,
    pub(super) ended: bool,
    /// Examples trained on before it was last started again.
    before: u64,
    samples: VecDeque<(Instant, u64)>,
}

/// Finished epochs and what is needed to say something of them.
#[derive(Default)]
struct Epochs {
    /// The first epoch that not all workers that are there have finished.
    open: Option<u64>,
    /// When the open epoch began, and with how many examples.
    since: Option<(Instant, u64)>,
    means: BTreeMap<u64, Vec<(String, f64, u64)>>,
    /// Finished and not yet spoken of.
    finished: VecDeque<Finished>,
}

struct Finished {
    epoch: u64,
    epochs: u64,
    at: Instant,
    rate: Option<f64>,
}

impl Board {
    pub(super) fn new(topology: Topology) -> Self {
        Self {
            topology,
            joined: BTreeSet::new(),
            workers: (0..topology.worker_count()).map(|_| Worker::default()).collect(),
            epochs: Epochs::default(),
            stopping: false,
            begun: None,
            trained_since: None,
        }
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    pub(super) fn workers(&self) -> &[Worker] {
        &self.workers
    }

    pub(super) fn has_joined(&self, replica: Replica) -> bool {
        self.joined.contains(&replica)
    }

    /// Takes an event and returns what is to be said of it; a replica's line is the view's own business.
    pub(super) fn apply(&mut self, event: &Event, now: Instant) -> Vec<Note> {
        let mut notes = self.tick(now);
        match event {
            Event::Joined(replica) => {
                let fresh = self.joined.insert(*replica);
                if let Some(worker) = self.worker_of(*replica) {
                    worker.ended = false;
                }
                if fresh && self.missing().next().is_none() {
                    notes.push(info(format!("{} joined", self.topology)));
                }
            }
            Event::Progress(progress) => {
                notes.extend(self.speak(|finished| progress.epoch > finished.epoch));
                self.advance(*progress, now);
            }
            Event::Metric(metric) => {
                notes.extend(self.speak(|finished| metric.epoch > finished.epoch));
                self.record(metric);
            }
            Event::Exited { replica, exit } => {
                if let Some(worker) = self.worker_of(*replica) {
                    worker.ended = true;
                }
                if *exit != Exit::Code(0) {
                    notes.push(Note { tone: Tone::Bad, text: format!("{replica} {exit}") });
                }
            }
            Event::Lost { replica, reason, rejoins } => {
                // One that was frozen is ended by the launcher, which is no event of its own.
                if let Some(worker) = self.worker_of(*replica).filter(|_| !rejoins) {
                    worker.ended = true;
                }
                let text = format!("warning: {replica} was lost: {reason}");
                notes.push(Note { tone: Tone::Warning, text });
            }
            Event::Stopping => {
                self.stopping = true;
                let text = "stopping after this round, then evaluating and saving (Ctrl-C again kills)";
                notes.push(info(text.to_owned()));
            }
            Event::Warning(text) => notes.push(Note { tone: Tone::Warning, text: format!("warning: {text}") }),
            Event::Line { .. } => {}
        }
        notes
    }

    /// What is to be said because time has passed.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<Note> {
        self.begun.get_or_insert(now);
        self.speak(|finished| now.saturating_duration_since(finished.at) >= EPOCH_GRACE)
    }

    /// What is to be said before the end.
    pub(super) fn finish(&mut self) -> Vec<Note> {
        self.speak(|_| true)
    }

    /// The line below the workers: who is missing, or the times.
    pub(super) fn footer(&self, now: Instant) -> String {
        let elapsed = words::clock(self.begun.map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun)));
        if self.stopping {
            return format!("{elapsed} elapsed, stopping");
        }
        let missing: Vec<String> = self.missing().map(|replica| replica.to_string()).collect();
        if !missing.is_empty() && self.trained_since.is_none() {
            let more = missing.len().saturating_sub(NAMES_SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let named = missing.iter().take(NAMES_SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
            return format!("{elapsed} elapsed, waiting for {named}{more}");
        }
        match self.left(now) {
            Some(left) => format!("{elapsed} elapsed, about {} left", words::clock(left)),
            None => format!("{elapsed} elapsed"),
        }
    }

    fn missing(&self) -> impl Iterator<Item = Replica> {
        self.topology.replicas().filter(|replica| !self.joined.contains(replica))
    }

    fn worker_of(&mut self, replica: Replica) -> Option<&mut Worker> {
        let index = replica.rank.index();
        self.workers.get_mut(index).filter(|_| replica == Replica::worker(replica.rank.0))
    }

    /// Training time left, by the slowest worker's speed so far.
    fn left(&self, now: Instant) -> Option<Duration> {
        let (since, from) = self.trained_since?;
        let done = self.slowest()?;
        let elapsed = now.saturating_duration_since(since).as_secs_f64();
        let left = elapsed * (1.0 - done) / (done - from);
        // Nothing sensible can be said before the second progress, nor once all is trained.
        (done > from && done < 1.0).then(|| Duration::try_from_secs_f64(left).ok()).flatten()
    }

    /// Share of the training that the slowest worker that is there has done, from 0 to 1.
    fn slowest(&self) -> Option<f64> {
        let there = self.workers.iter().filter(|worker| !worker.ended);
        there.filter_map(|worker| worker.progress.map(overall)).reduce(f64::min)
    }

    fn total(&self) -> u64 {
        self.workers.iter().map(Worker::total).sum()
    }

    fn advance(&mut self, progress: Progress, now: Instant) {
        let Some(worker) = self.workers.get_mut(progress.rank.index()) else { return };
        let first = worker.progress.is_none();
        worker.advance(progress, now);
        if first {
            // What it did before anybody looked has no time that it could be divided by.
            let (since, examples) = self.epochs.since.unwrap_or((now, 0));
            self.epochs.since = Some((since, examples + progress.examples));
        }
        if self.trained_since.is_none() {
            self.trained_since = self.slowest().map(|done| (now, done));
        }
        // Of what was trained before anybody looked there are metrics.
        let seen = self.epochs.means.keys().next().map_or(progress.epoch, |seen| progress.epoch.min(*seen));
        let mut open = self.epochs.open.unwrap_or(seen);
        // Nobody waits for one that is lost.
        while open < progress.epochs && self.workers.iter().all(|worker| worker.ended || worker.has_finished(open)) {
            let total = self.total();
            let (since, examples) = self.epochs.since.unwrap_or((now, total));
            let seconds = now.saturating_duration_since(since).as_secs_f64();
            let rate = (seconds > 0.0).then(|| total.saturating_sub(examples) as f64 / seconds);
            self.epochs.finished.push_back(Finished { epoch: open, epochs: progress.epochs, at: now, rate });
            self.epochs.since = Some((now, total));
            open += 1;
        }
        self.epochs.open = Some(open);
    }

    fn record(&mut self, metric: &Metric) {
        for (rank, worker) in self.workers.iter_mut().enumerate() {
            if let Some(value) = metric.ranks.get(rank).copied().flatten() {
                match worker.metrics.iter_mut().find(|(name, _)| *name == metric.name) {
                    Some((_, last)) => *last = value,
                    None => worker.metrics.push((metric.name.clone(), value)),
                }
            }
        }
        let spoken = self.epochs.finished.front().map(|finished| finished.epoch).or(self.epochs.open);
        if spoken.is_some_and(|first| metric.epoch < first) {
            return;
        }
        let means = self.epochs.means.entry(metric.epoch).or_default();
        match means.iter_mut().find(|(name, ..)| *name == metric.name) {
            Some((_, sum, count)) => (*sum, *count) = (*sum + metric.value, *count + 1),
            None => means.push((metric.name.clone(), metric.value, 1)),
        }
    }

    /// Lines of the finished epochs for which `due` holds.
    fn speak(&mut self, due: impl Fn(&Finished) -> bool) -> Vec<Note> {
        let mut notes = Vec::new();
        while let Some(finished) = self.epochs.finished.pop_front_if(|finished| due(finished)) {
            let mut text = format!("epoch {}/{}", finished.epoch + 1, finished.epochs);
            for (name, sum, count) in self.epochs.means.remove(&finished.epoch).unwrap_or_default() {
                text.push_str(&format!("  {name} {}", words::number(sum / count as f64)));
            }
            if let Some(rate) = finished.rate {
                text.push_str(&format!("  {} examples/s", words::thousands(rate.round() as u64)));
            }
            notes.push(info(text));
        }
        notes
    }
}

impl Worker {
    /// Examples per second over the last few seconds.
    pub(super) fn rate(&self, now: Instant) -> Option<f64> {
        let first = self.samples.iter().find(|(at, _)| now.saturating_duration_since(*at) <= RATE_WINDOW)?;
        let last = self.samples.back()?;
        let seconds = last.0.saturating_duration_since(first.0).as_secs_f64();
        (seconds > 0.0).then(|| last.1.saturating_sub(first.1) as f64 / seconds)
    }

    /// Share of the current epoch, from 0 to 1.
    pub(super) fn share(&self) -> f64 {
        self.progress.map_or(0.0, share)
    }

    fn total(&self) -> u64 {
        self.before + self.progress.map_or(0, |progress| progress.examples)
    }

    fn has_finished(&self, epoch: u64) -> bool {
        self.progress.is_some_and(|progress| {
            progress.epoch > epoch || progress.epoch == epoch && progress.batch >= progress.batches
        })
    }

    fn advance(&mut self, progress: Progress, now: Instant) {
        let known = self.progress.map_or(0, |progress| progress.examples);
        if progress.examples < known {
            // Started again, and counting from 0 again.
            self.before += known;
            self.samples.clear();
        }
        self.progress = Some(progress);
        let sample = (now, self.total());
        let fits = |(at, _): &(Instant, u64)| now.saturating_duration_since(*at) < SAMPLE_INTERVAL;
        // The last sample is always the newest; it moves until the one before it is old enough.
        if self.samples.len() >= 2 && self.samples.iter().rev().nth(1).is_some_and(fits) {
            self.samples.pop_back();
        }
        self.samples.push_back(sample);
        while self.samples.len() > 2 && now.saturating_duration_since(self.samples[0].0) > RATE_WINDOW {
            self.samples.pop_front();
        }
    }
}

fn share(progress: Progress) -> f64 {
    if progress.batches == 0 { 1.0 } else { (progress.batch as f64 / progress.batches as f64).min(1.0) }
}

fn overall(progress: Progress) -> f64 {
    if progress.epochs == 0 {
        return 1.0;
    }
    ((progress.epoch as f64 + share(progress)) / progress.epochs as f64).min(1.0)
}

fn info(text: String) -> Note {
    Note { tone: Tone::Info, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Rank;

    #[test]
    fn whoever_comes_late_hears_of_the_epochs_before() {
        let mut board = Board::new(Topology::new(1, 1));
        let now = Instant::now();
        let metric = |epoch, value| {
            Event::Metric(Metric { name: "loss".to_owned(), epoch, round: epoch, value, ranks: vec![Some(value)] })
        };
        let mut notes = Vec::new();
        for event in [metric(0, 4.0), metric(1, 2.0)] {
            notes.extend(board.apply(&event, now));
        }
        let progress = Progress { rank: Rank(0), epoch: 2, epochs: 3, batch: 1, batches: 10, examples: 30 };
        notes.extend(board.apply(&Event::Progress(progress), now));
        notes.extend(board.finish());
        let texts: Vec<String> = notes.into_iter().map(|note| note.text).collect();
        assert_eq!(texts, ["epoch 1/3  loss 4.0000", "epoch 2/3  loss 2.0000"]);
    }
}
