//! How a worker's steps go: how long it computes, how long it waits, how old its parameters were.

use std::time::{Duration, Instant};

use super::exchange::Stepped;
use crate::protocol::message::Pace;

/// Steps that count as recent.
const RECENT: usize = 32;

/// Steps before anything is said of the recent ones: the first are slow in every process, and no measure.
const ENOUGH: usize = 20;

/// Classes of durations, each a tenth longer than the one before it: from a microsecond to over half an hour.
const CLASSES: usize = 226;

/// A class is wider than the one before by this factor.
const RATIO: f64 = 1.1;

/// Measures the steps of one worker. Memory and time per step do not grow with their number.
pub(crate) struct Stopwatch {
    since: Instant,
    /// Steps per class of duration.
    classes: Vec<u32>,
    recent: Vec<f64>,
    pace: Pace,
    wait: Duration,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            classes: vec![0; CLASSES],
            recent: Vec::with_capacity(RECENT),
            pace: Pace::default(),
            wait: Duration::ZERO,
        }
    }
}

impl Stopwatch {
    /// The next step's own work begins now.
    pub(crate) fn start(&mut self) {
        self.since = Instant::now();
    }

    /// Goes on behind the steps of the process that this worker was before.
    pub(crate) fn go_on(&mut self, steps: u64, examples: u64) {
        (self.pace.steps, self.pace.examples) = (steps, examples);
    }

    /// A step has ended, whose exchange was asked for at `asked`.
    pub(crate) fn step(&mut self, asked: Instant, examples: u64, stepped: Stepped) {
        let now = Instant::now();
        let own = asked.saturating_duration_since(self.since).as_secs_f64();
        self.classes[class(own)] += 1;
        let at = self.pace.steps as usize % RECENT;
        if self.recent.len() < RECENT {
            self.recent.push(own);
        } else {
            self.recent[at] = own;
        }
        self.wait += now.saturating_duration_since(asked);
        self.pace.steps += 1;
        self.pace.examples += examples;
        self.pace.repeated_examples += if stepped.repeated { examples } else { 0 };
        self.pace.staleness_sum += u64::from(stepped.staleness);
        self.pace.staleness_max = self.pace.staleness_max.max(stepped.staleness.into());
        self.since = now;
    }

    /// Everything so far.
    pub(crate) fn pace(&self) -> Pace {
        let mut recent = self.recent.clone();
        recent.sort_by(f64::total_cmp);
        Pace {
            step_seconds_median: self.quantile(0.5),
            step_seconds_p95: self.quantile(0.95),
            recent_step_seconds: if recent.len() < ENOUGH { 0.0 } else { recent[recent.len() / 2] },
            wait_seconds: self.wait.as_secs_f64(),
            ..self.pace
        }
    }

    /// The duration that the share `quantile` of all steps does not exceed, to within five percent.
    fn quantile(&self, quantile: f64) -> f64 {
        let all: u64 = self.classes.iter().copied().map(u64::from).sum();
        let wanted = (all as f64 * quantile).ceil() as u64;
        let mut steps = 0;
        for (class, count) in self.classes.iter().enumerate() {
            steps += u64::from(*count);
            if steps >= wanted && steps > 0 {
                return 1e-6 * RATIO.powf(class as f64 - 0.5);
            }
        }
        0.0
    }
}

/// Class 0 is below a microsecond.
fn class(seconds: f64) -> usize {
    let class = (seconds / 1e-6).max(1.0).log(RATIO).ceil();
    (class as usize).min(CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_five_percent() {
        let mut watch = Stopwatch::default();
        for millis in 1..=1000 {
            watch.classes[class(f64::from(millis) * 1e-3)] += 1;
        }
        for (quantile, expected) in [(0.5, 0.5), (0.95, 0.95), (0.001, 0.001)] {
            let found = watch.quantile(quantile);
            assert!((found / expected - 1.0).abs() < 0.05, "{found} instead of {expected}");
        }
        assert_eq!(Stopwatch::default().pace(), Pace::default());
    }

    #[test]
    fn a_worker_that_was_started_again_goes_on_counting() {
        let mut before = Stopwatch::default();
        let stepped = Stepped { stop: false, staleness: 3, repeated: true };
        (0..50).for_each(|_| before.step(Instant::now(), 10, stepped));
        let before = before.pace();
        // The last reports of the old process were lost, and its last push is repeated.
        let mut now = Stopwatch::default();
        now.go_on(52, 520);
        now.step(Instant::now(), 10, Stepped { staleness: 5, ..stepped });
        let pace = now.pace().behind(before);
        assert_eq!((pace.steps, pace.examples, pace.repeated_examples), (53, 530, 510));
        assert_eq!((pace.staleness_sum, pace.staleness_max), (155, 5));
        assert!(pace.wait_seconds >= before.wait_seconds);
        assert!(before.recent_step_seconds > 0.0 && pace.recent_step_seconds == 0.0, "one step is no measure");
        assert!(pace.step_seconds_median > 0.0 && pace.step_seconds_p95 >= pace.step_seconds_median);
    }

    #[test]
    fn the_longest_step_has_a_class() {
        assert_eq!((class(0.0), class(1e-6)), (0, 0));
        assert!(class(1800.0) < CLASSES - 1);
        assert_eq!(class(f64::MAX), CLASSES - 1);
    }
}
