//! The numbers of a run: merged over the ranks, written as JSON lines, read back.
//!
//! Workers send [`MetricPoint`]s, the coordinator's [`Merger`] makes one [`Metric`] of each name and round, the caller
//! keeps them with a [`MetricsWriter`] and answers questions from [`Metrics`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::events::Metric;
use crate::topology::Rank;

/// One call of `worker.metric`, as a worker sends it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricPoint {
    /// Who recorded it.
    pub rank: Rank,
    /// As given to `worker.metric`.
    pub name: String,
    /// Epoch in which it was recorded, from 0.
    pub epoch: u64,
    /// Round in which it was recorded, from 0.
    pub round: u64,
    /// The number. In JSON a value that is no number is the string `"NaN"`, `"inf"` or `"-inf"`.
    #[serde(with = "super::float")]
    pub value: f64,
    /// Examples that it stands for.
    pub weight: u64,
}

/// Makes one number per name and round out of the ranks' numbers.
///
/// A merged value is the example-weighted mean over the ranks, added in rank order, so that it does not depend on the
/// order of arrival. If all ranks gave the same bits, the mean has those bits. A rank that gave one name several times
/// in a round counts with the weighted mean of these, and with the sum of their weights. What has weight 0 does not
/// count, unless all of it has: then the plain mean is taken.
///
/// Rounds are yielded in ascending order, as soon as all ranks have finished them; within a round names follow the
/// order in which the lowest rank gave them. What is kept is one sum per rank and name of each open round, of a few thousand
/// rounds at most: older ones are yielded without the ranks that are so far behind.
///
/// ```
/// use fairing_core::observe::metrics::{MetricPoint, Merger};
/// use fairing_core::topology::Rank;
///
/// let mut merger = Merger::new(2);
/// for (rank, value, weight) in [(1, 4.0, 1), (0, 1.0, 2)] {
///     merger.push(MetricPoint { rank: Rank(rank), name: "loss".into(), epoch: 0, round: 0, value, weight });
/// }
/// assert!(merger.round_done(Rank(1), 0).is_empty());
/// let merged = merger.round_done(Rank(0), 0);
/// assert_eq!((merged[0].value, merged[0].ranks.as_slice()), (2.0, [Some(1.0), Some(4.0)].as_slice()));
/// ```
#[derive(Debug)]
pub struct Merger {
    /// Open rounds; per rank, the names in the order given.
    rounds: BTreeMap<u64, Vec<Vec<Series>>>,
    /// Number of rounds that each rank has finished.
    finished: Vec<u64>,
}

/// Rounds that wait for their last rank; beyond them the oldest are yielded without it.
const MOST_OPEN_ROUNDS: usize = 4096;

/// What one rank gave for one name in one round.
#[derive(Debug)]
struct Series {
    name: String,
    epoch: u64,
    mean: Mean,
}

impl Merger {
    /// A merger for this many workers.
    pub fn new(workers: usize) -> Self {
        Self { rounds: BTreeMap::new(), finished: vec![0; workers] }
    }

    /// Takes one point.
    ///
    /// A point of a round that has already been yielded is not lost: it is merged without the ranks that were in
    /// time, and yielded with the next round.
    ///
    /// # Panics
    ///
    /// If the rank is not one of the workers.
    pub fn push(&mut self, point: MetricPoint) {
        let workers = self.finished.len();
        let ranks = self.rounds.entry(point.round).or_insert_with(|| (0..workers).map(|_| Vec::new()).collect());
        let series = &mut ranks[point.rank.index()];
        match series.iter_mut().find(|series| series.name == point.name) {
            Some(series) => series.mean.add(point.value, point.weight),
            None => {
                let mut mean = Mean::default();
                mean.add(point.value, point.weight);
                series.push(Series { name: point.name, epoch: point.epoch, mean });
            }
        }
    }

    /// Notes that a rank has finished `round` and all before it; yields what is complete now.
    ///
    /// # Panics
    ///
    /// If the rank is not one of the workers.
    pub fn round_done(&mut self, rank: Rank, round: u64) -> Vec<Metric> {
        let finished = &mut self.finished[rank.index()];
        *finished = (*finished).max(round.saturating_add(1));
        self.complete()
    }

    /// Notes that a rank will finish no further round, so that nothing waits for it; yields what is complete now.
    ///
    /// # Panics
    ///
    /// If the rank is not one of the workers.
    pub fn gone(&mut self, rank: Rank) -> Vec<Metric> {
        self.finished[rank.index()] = u64::MAX;
        self.complete()
    }

    /// Yields what is left, complete or not.
    pub fn finish(&mut self) -> Vec<Metric> {
        std::mem::take(&mut self.rounds).into_iter().flat_map(|(round, ranks)| merge(round, ranks)).collect()
    }

    fn complete(&mut self) -> Vec<Metric> {
        let mut bound = self.finished.iter().copied().min().unwrap_or(0);
        if self.rounds.len() > MOST_OPEN_ROUNDS {
            // Without rounds that all make together, one rank can be far behind; it must not cost the memory.
            let beyond = self.rounds.len() - MOST_OPEN_ROUNDS;
            bound = bound.max(self.rounds.keys().nth(beyond).copied().unwrap_or(0));
        }
        let open = self.rounds.split_off(&bound);
        let complete = std::mem::replace(&mut self.rounds, open);
        complete.into_iter().flat_map(|(round, ranks)| merge(round, ranks)).collect()
    }
}

fn merge(round: u64, ranks: Vec<Vec<Series>>) -> Vec<Metric> {
    let workers = ranks.len();
    let mut merged: Vec<(Metric, Mean)> = Vec::new();
    for (rank, series) in ranks.into_iter().enumerate() {
        for Series { name, epoch, mean } in series {
            let at = merged.iter().position(|(metric, _)| metric.name == name).unwrap_or_else(|| {
                let metric = Metric { name, epoch, round, value: 0.0, ranks: vec![None; workers] };
                merged.push((metric, Mean::default()));
                merged.len() - 1
            });
            let (metric, over_ranks) = &mut merged[at];
            metric.ranks[rank] = Some(mean.value());
            over_ranks.add(mean.value(), mean.weight());
        }
    }
    merged.into_iter().map(|(metric, mean)| Metric { value: mean.value(), ..metric }).collect()
}

/// A weighted mean beside the plain one, which stands in when no weight was given.
#[derive(Debug, Default)]
struct Mean {
    weighted: Sum,
    plain: Sum,
}

#[derive(Debug, Default)]
struct Sum {
    sum: f64,
    weight: u64,
    /// The value, while all values added have the same bits.
    same: Option<f64>,
}

impl Mean {
    fn add(&mut self, value: f64, weight: u64) {
        // Skipped and not multiplied by 0: an infinite or missing value of no weight would still make NaN.
        if weight > 0 {
            self.weighted.add(value, weight);
        }
        self.plain.add(value, 1);
    }

    fn value(&self) -> f64 {
        if self.weighted.weight > 0 { self.weighted.mean() } else { self.plain.mean() }
    }

    fn weight(&self) -> u64 {
        self.weighted.weight
    }
}

impl Sum {
    fn add(&mut self, value: f64, weight: u64) {
        let first = self.weight == 0;
        self.same = if first { Some(value) } else { self.same.filter(|same| same.to_bits() == value.to_bits()) };
        self.sum += value * weight as f64;
        self.weight = self.weight.saturating_add(weight);
    }

    fn mean(&self) -> f64 {
        self.same.unwrap_or(self.sum / self.weight as f64)
    }
}

/// Failure to keep or read metrics. Returned by [`MetricsWriter`] and [`Metrics::read`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The file cannot be created or written, for example because the disk is full.
    #[error("cannot write metrics to `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read metrics from `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A whole line is not a metric.
    #[error("`{}` line {line} is not a metric", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The reason.
        source: serde_json::Error,
    },
}

/// How long a written metric may stay in memory.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// Writes metrics as JSON lines, one object per line.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: BufWriter<File>,
    /// Since when something has been waiting in the buffer.
    waiting_since: Option<Instant>,
}

impl MetricsWriter {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    ///
    /// [`MetricsError::Write`] if the file cannot be created.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, MetricsError> {
        let path = path.into();
        match File::create(&path) {
            Ok(file) => Ok(Self { path, file: BufWriter::new(file), waiting_since: None }),
            Err(source) => Err(MetricsError::Write { path, source }),
        }
    }

    /// Adds a line. It is on disk at the latest with the first [`write`](Self::write) or [`tick`](Self::tick) a second
    /// later.
    ///
    /// # Errors
    ///
    /// [`MetricsError::Write`].
    pub fn write(&mut self, metric: &Metric, now: Instant) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(metric).expect("a metric has string keys only");
        line.push(b'\n');
        self.file.write_all(&line).map_err(|source| self.failure(source))?;
        self.waiting_since.get_or_insert(now);
        self.tick(now)
    }

    /// Flushes what has waited for a second.
    ///
    /// # Errors
    ///
    /// [`MetricsError::Write`].
    pub fn tick(&mut self, now: Instant) -> Result<(), MetricsError> {
        match self.waiting_since {
            Some(since) if now.saturating_duration_since(since) >= FLUSH_INTERVAL => self.flush(),
            _ => Ok(()),
        }
    }

    /// Flushes everything and closes the file.
    ///
    /// # Errors
    ///
    /// [`MetricsError::Write`].
    pub fn finish(mut self) -> Result<(), MetricsError> {
        self.flush()
    }

    fn flush(&mut self) -> Result<(), MetricsError> {
        self.waiting_since = None;
        self.file.flush().map_err(|source| self.failure(source))
    }

    fn failure(&self, source: io::Error) -> MetricsError {
        MetricsError::Write { path: self.path.clone(), source }
    }
}

/// All merged metrics of a run, in the order in which they were merged. About 150 bytes each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    all: Vec<Metric>,
}

impl Metrics {
    /// Reads what a [`MetricsWriter`] wrote.
    ///
    /// A last line that was cut, because its writer was killed or the disk was full, is left out.
    ///
    /// # Errors
    ///
    /// - [`MetricsError::Read`] if the file cannot be read.
    /// - [`MetricsError::Line`] for a whole line that is not a metric.
    pub fn read(path: &Path) -> Result<Self, MetricsError> {
        let bytes = std::fs::read(path).map_err(|source| MetricsError::Read { path: path.to_owned(), source })?;
        let mut all = Vec::new();
        for (i, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            match serde_json::from_slice(line) {
                Ok(metric) => all.push(metric),
                Err(_) if !line.ends_with(b"\n") => {}
                Err(source) => return Err(MetricsError::Line { path: path.to_owned(), line: i + 1, source }),
            }
        }
        Ok(Self { all })
    }

    /// Adds one.
    pub fn push(&mut self, metric: Metric) {
        self.all.push(metric);
    }

    /// All of them.
    pub fn all(&self) -> &[Metric] {
        &self.all
    }

    /// The last value of this name.
    pub fn last(&self, name: &str) -> Option<f64> {
        self.all.iter().rev().find(|metric| metric.name == name).map(|metric| metric.value)
    }

    /// All metrics of this name.
    pub fn series(&self, name: &str) -> impl Iterator<Item = &Metric> {
        self.all.iter().filter(move |metric| metric.name == name)
    }

    /// Every name once, in the order of first appearance.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for metric in &self.all {
            if !names.contains(&metric.name.as_str()) {
                names.push(&metric.name);
            }
        }
        names
    }

    /// The last value of every name.
    pub fn last_values(&self) -> BTreeMap<String, f64> {
        self.all.iter().map(|metric| (metric.name.clone(), metric.value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn point(rank: u32, name: &str, round: u64, value: f64, weight: u64) -> MetricPoint {
        MetricPoint { rank: Rank(rank), name: name.into(), epoch: round / 2, round, value, weight }
    }

    fn merged(workers: usize, points: &[MetricPoint]) -> Vec<Metric> {
        let mut merger = Merger::new(workers);
        points.iter().cloned().for_each(|point| merger.push(point));
        merger.finish()
    }

    /// The merged value of one name, given by one rank after the other.
    #[track_caller]
    fn check(values: &[(f64, u64)], expected: f64) {
        let points = (0..).zip(values).map(|(rank, (value, weight))| point(rank, "m", 0, *value, *weight));
        let found = merged(values.len(), &points.collect::<Vec<_>>());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].value.to_bits(), expected.to_bits(), "{} instead of {expected}", found[0].value);
    }

    #[test]
    fn value_is_the_mean_by_examples() {
        check(&[(1.0, 3), (5.0, 1)], 2.0);
        check(&[(1.0, 0), (5.0, 1)], 5.0);
        check(&[(f64::NAN, 0), (5.0, 1)], 5.0);
        check(&[(1.0, 0), (5.0, 0)], 3.0);
        check(&[(f64::NAN, 1), (5.0, 1)], f64::NAN);
        check(&[(f64::INFINITY, 1), (5.0, 1)], f64::INFINITY);
    }

    #[test]
    fn equal_bits_stay_equal() {
        // (0.1 * 3 + 0.1 * 7) / 10 is 0.1 plus one unit in the last place.
        check(&[(0.1, 3), (0.1, 7), (0.1, 32)], 0.1);
        check(&[(-0.0, 3), (-0.0, 7)], -0.0);
    }

    #[test]
    fn several_points_of_one_rank_are_one() {
        let points = [point(0, "m", 0, 1.0, 1), point(0, "m", 0, 4.0, 2), point(1, "m", 0, 7.0, 3)];
        let found = merged(2, &points);
        assert_eq!(found[0].ranks, [Some(3.0), Some(7.0)]);
        assert_eq!(found[0].value, 5.0);
    }

    #[test]
    fn round_is_yielded_when_all_have_finished_it() {
        let mut merger = Merger::new(2);
        merger.push(point(1, "loss", 0, 1.0, 1));
        merger.push(point(1, "loss", 1, 2.0, 1));
        assert_eq!(merger.round_done(Rank(1), 1), []);
        merger.push(point(0, "loss", 0, 3.0, 1));
        let first = merger.round_done(Rank(0), 0);
        assert_eq!(first.iter().map(|metric| (metric.round, metric.value)).collect::<Vec<_>>(), [(0, 2.0)]);
        assert_eq!(merger.round_done(Rank(0), 0), []);
        let second = merger.gone(Rank(0));
        assert_eq!(second[0].ranks, [None, Some(2.0)]);
        assert_eq!(second[0].value, 2.0);
        assert_eq!(merger.finish(), []);
    }

    #[test]
    fn point_after_the_last_round_waits_for_the_end() {
        let mut merger = Merger::new(1);
        merger.push(point(0, "accuracy", 5, 0.5, 1));
        assert_eq!(merger.round_done(Rank(0), 4), []);
        assert_eq!(merger.finish().len(), 1);
    }

    #[test]
    fn late_point_is_not_lost() {
        let mut merger = Merger::new(1);
        assert_eq!(merger.round_done(Rank(0), 4), []);
        merger.push(point(0, "late", 3, 0.5, 1));
        assert_eq!(merger.round_done(Rank(0), 5)[0].round, 3);
    }

    proptest! {
        #[test]
        fn arrival_order_changes_nothing(
            given in prop::collection::vec((0u32..3, 0u64..3, 0usize..3, -9.0f64..9.0, 0u64..9), 0..40),
            picks in prop::collection::vec(0usize..3, 40),
        ) {
            let names = ["a", "b", "c"];
            let points: Vec<_> =
                given.iter().map(|(rank, round, name, value, weight)| point(*rank, names[*name], *round, *value, *weight)).collect();
            // The ranks' streams, each in its own order, woven in another way.
            let mut streams: Vec<Vec<_>> =
                (0..3).map(|rank| points.iter().filter(|point| point.rank == Rank(rank)).rev().cloned().collect()).collect();
            let mut woven = Vec::new();
            for pick in picks {
                woven.extend(streams[pick].pop());
            }
            for mut stream in streams {
                stream.reverse();
                woven.extend(stream);
            }
            prop_assert_eq!(merged(3, &points), merged(3, &woven));
        }
    }

    fn metric(name: &str, round: u64, value: f64) -> Metric {
        Metric { name: name.into(), epoch: 0, round, value, ranks: vec![Some(value), None] }
    }

    #[test]
    fn every_float_survives_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let values = [0.1, -0.0, 1.0, 1e300, 5e-324, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let mut writer = MetricsWriter::create(&path).unwrap();
        for (round, value) in (0..).zip(values) {
            writer.write(&metric("m", round, value), Instant::now()).unwrap();
        }
        writer.finish().unwrap();
        let read = Metrics::read(&path).unwrap();
        let bits = |values: &mut dyn Iterator<Item = f64>| values.map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&mut read.series("m").map(|metric| metric.value)), bits(&mut values.into_iter()));
        assert_eq!(bits(&mut read.series("m").map(|metric| metric.ranks[0].unwrap())), bits(&mut values.into_iter()));
        assert!(read.all().iter().all(|metric| metric.ranks[1].is_none()));
    }

    #[test]
    fn lines_are_what_other_programs_expect() {
        let line = serde_json::to_string(&metric("loss", 3, f64::NAN)).unwrap();
        assert_eq!(line, r#"{"name":"loss","epoch":0,"round":3,"value":"NaN","ranks":["NaN",null]}"#);
    }

    #[test]
    fn points_survive_text_and_bytes() {
        for value in [0.5, f64::NAN, f64::NEG_INFINITY] {
            let sent = point(1, "m", 2, value, 3);
            let text: MetricPoint = serde_json::from_str(&serde_json::to_string(&sent).unwrap()).unwrap();
            assert_eq!(text.value.to_bits(), value.to_bits());
            let mut bytes = Vec::new();
            ciborium::into_writer(&sent, &mut bytes).unwrap();
            let back: MetricPoint = ciborium::from_reader(bytes.as_slice()).unwrap();
            assert_eq!(back.value.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn waiting_lines_are_flushed_after_a_second() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let begin = Instant::now();
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.write(&metric("m", 0, 1.0), begin).unwrap();
        writer.tick(begin + FLUSH_INTERVAL / 2).unwrap();
        assert_eq!(Metrics::read(&path).unwrap().all().len(), 0);
        writer.tick(begin + FLUSH_INTERVAL).unwrap();
        assert_eq!(Metrics::read(&path).unwrap().all().len(), 1);
    }

    #[test]
    fn cut_file_gives_its_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines: Vec<u8> = (0..3)
            .flat_map(|round| {
                let mut line = serde_json::to_vec(&metric("größe", round, 0.5)).unwrap();
                line.push(b'\n');
                line
            })
            .collect();
        let whole = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
        for end in 0..=lines.len() {
            std::fs::write(&path, &lines[..end]).unwrap();
            let found = Metrics::read(&path).unwrap().all().len();
            // Only the line's end may be missing from a last line that still counts.
            let complete = lines.get(end) == Some(&b'\n');
            assert_eq!(found, whole(&lines[..end]) + usize::from(complete));
        }
    }

    #[test]
    fn broken_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let good = serde_json::to_string(&metric("m", 0, 1.0)).unwrap();
        std::fs::write(&path, format!("{good}\nnonsense\n{good}\n")).unwrap();
        assert!(matches!(Metrics::read(&path), Err(MetricsError::Line { line: 2, .. })));
        assert!(matches!(Metrics::read(&folder.path().join("absent")), Err(MetricsError::Read { .. })));
    }

    #[test]
    fn names_and_last_values() {
        let mut metrics = Metrics::default();
        for (name, value) in [("loss", 2.0), ("accuracy", 0.5), ("loss", 1.0)] {
            metrics.push(metric(name, 0, value));
        }
        assert_eq!(metrics.names(), ["loss", "accuracy"]);
        assert_eq!(metrics.last("loss"), Some(1.0));
        assert_eq!(metrics.last("other"), None);
        assert_eq!(
            metrics.last_values().into_iter().collect::<Vec<_>>(),
            [("accuracy".into(), 0.5), ("loss".into(), 1.0)]
        );
    }
}
