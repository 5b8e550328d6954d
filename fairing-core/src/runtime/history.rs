//! What the coordinator has to tell its callers: everything from the beginning of the run, within a bound.
//!
//! Every message has a number. A caller says up to which it has heard, so that after a broken connection nothing is lost or
//! repeated, and that another process that attaches hears all of it.

use std::collections::BTreeMap;

use crate::protocol::message::FromCoordinator;
use crate::topology::Rank;

/// Bytes of history that are kept: some twenty thousand metrics of a small run. A server of a small model takes a few times
/// that for itself, and who attaches late looks at a curve, which has fewer points than this on any screen.
pub(crate) const HISTORY_BYTES: usize = 4 << 20;

/// Bytes of an entry besides the message: its number and its part of the tree.
const ENTRY_BYTES: usize = 32;

/// The messages by number, from 1.
pub(crate) struct History {
    messages: BTreeMap<u64, FromCoordinator>,
    last: u64,
    /// Numbers of the latest progress of each rank, which is all that is kept of it.
    progress: BTreeMap<Rank, u64>,
    bytes: usize,
    most_bytes: usize,
}

impl History {
    /// An empty one that takes about `most_bytes` at most.
    pub(crate) fn new(most_bytes: usize) -> Self {
        Self { messages: BTreeMap::new(), last: 0, progress: BTreeMap::new(), bytes: 0, most_bytes }
    }

    /// Adds a message; if there is no room for it, old metrics are thinned.
    pub(crate) fn push(&mut self, message: FromCoordinator) {
        self.last += 1;
        if let FromCoordinator::Progress(progress) = &message
            && let Some(older) = self.progress.insert(progress.rank, self.last)
        {
            self.remove(older);
        }
        self.bytes += bytes(&message);
        self.messages.insert(self.last, message);
        if self.bytes > self.most_bytes {
            // By more than is needed now, so that the search for what can go is rare.
            while self.bytes > self.most_bytes / 4 * 3 && self.messages.len() > 1 {
                self.thin();
            }
        }
    }

    /// Number of the latest message; 0 if there is none.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// The first message behind `number`, with its own number.
    pub(crate) fn after(&self, number: u64) -> Option<(u64, &FromCoordinator)> {
        self.messages.range(number.checked_add(1)?..).next().map(|(number, message)| (*number, message))
    }

    fn remove(&mut self, number: u64) {
        if let Some(message) = self.messages.remove(&number) {
            self.bytes -= bytes(&message);
        }
    }

    /// Of the metric that has the most values every second one of its older half goes: rare ones, such as an accuracy per
    /// epoch, stay whole beside a loss per round. Of what is no series, the oldest.
    fn thin(&mut self) {
        let mut series: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for (number, message) in &self.messages {
            if let FromCoordinator::Metric(metric) = message {
                series.entry(&metric.name).or_default().push(*number);
            }
        }
        let longest = series.into_values().max_by_key(Vec::len).unwrap_or_default();
        let older = &longest[..longest.len() / 2];
        let thinned: Vec<u64> = older.iter().skip(1).step_by(2).copied().collect();
        if !thinned.is_empty() {
            return thinned.into_iter().for_each(|number| self.remove(number));
        }
        let is_small_talk =
            |message: &FromCoordinator| matches!(message, FromCoordinator::Metric(_) | FromCoordinator::Slow { .. });
        let small_talk = self.messages.iter().find(|(_, message)| is_small_talk(message));
        let oldest = small_talk.or_else(|| self.messages.iter().next()).map(|(number, _)| *number);
        oldest.into_iter().for_each(|number| self.remove(number));
    }
}

/// About what a message takes in memory.
fn bytes(message: &FromCoordinator) -> usize {
    let beside = match message {
        FromCoordinator::Metric(metric) => metric.name.len() + size_of_val(metric.ranks.as_slice()),
        FromCoordinator::Lost { reason, .. } => reason.len(),
        FromCoordinator::Workers(workers) => size_of_val(workers.as_slice()),
        _ => 0,
    };
    size_of::<FromCoordinator>() + ENTRY_BYTES + beside
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::events::{Metric, Progress};
    use crate::topology::Replica;

    fn metric(name: &str, round: u64) -> FromCoordinator {
        let ranks = vec![Some(1.0), None];
        FromCoordinator::Metric(Metric { name: name.into(), epoch: 0, round, value: 1.0, ranks })
    }

    fn progress(rank: u32, examples: u64) -> FromCoordinator {
        FromCoordinator::Progress(Progress { rank: Rank(rank), epoch: 0, epochs: 1, batch: 0, batches: 1, examples })
    }

    /// Everything behind `number`.
    fn heard(history: &History, number: u64) -> Vec<FromCoordinator> {
        let next = |(number, _): &(u64, FromCoordinator)| history.after(*number).map(|(n, m)| (n, m.clone()));
        let first = history.after(number).map(|(n, m)| (n, m.clone()));
        std::iter::successors(first, next).map(|(_, message)| message).collect()
    }

    fn rounds(history: &History, name: &str) -> Vec<u64> {
        let round = |message| match message {
            FromCoordinator::Metric(metric) if metric.name == name => Some(metric.round),
            _ => None,
        };
        heard(history, 0).into_iter().filter_map(round).collect()
    }

    #[test]
    fn whoever_has_heard_a_part_hears_the_rest_once() {
        let mut history = History::new(HISTORY_BYTES);
        assert_eq!((history.last(), history.after(0)), (0, None));
        let all: Vec<_> = (0..50).map(|round| metric("loss", round)).collect();
        all.iter().for_each(|message| history.push(message.clone()));
        for parted in 0..=50 {
            assert_eq!(heard(&history, parted), all[parted as usize..]);
        }
        assert_eq!(history.after(u64::MAX), None);
    }

    #[test]
    fn of_progress_the_latest_of_each_rank_stays() {
        let mut history = History::new(HISTORY_BYTES);
        for examples in 0..100 {
            history.push(progress(0, examples));
            history.push(progress(1, 2 * examples));
        }
        assert_eq!(heard(&history, 0), [progress(0, 99), progress(1, 198)]);
        assert_eq!(heard(&history, 199), [progress(1, 198)], "the numbers go on");
    }

    #[test]
    fn a_long_run_keeps_its_beginning_its_end_and_what_is_rare() {
        let most_bytes = 100_000;
        let mut history = History::new(most_bytes);
        history.push(FromCoordinator::Joined(Replica::ps(0)));
        for round in 0..100_000 {
            history.push(metric("loss", round));
            if round % 10_000 == 0 {
                history.push(metric("accuracy", round));
            }
            assert!(history.bytes <= most_bytes);
        }
        assert_eq!(heard(&history, 0)[0], FromCoordinator::Joined(Replica::ps(0)));
        assert_eq!(rounds(&history, "accuracy"), (0..10).map(|epoch| epoch * 10_000).collect::<Vec<_>>());
        let rounds = rounds(&history, "loss");
        assert!(rounds.len() > 200, "{}", rounds.len());
        assert!(rounds.is_sorted_by(|a, b| a < b));
        assert_eq!((rounds[0], rounds[rounds.len() - 1]), (0, 99_999));
        assert_eq!(rounds[rounds.len() - 50..], (99_950..100_000).collect::<Vec<_>>(), "what is new is whole");
    }

    #[test]
    fn what_is_no_series_is_bounded_too() {
        let mut history = History::new(10_000);
        for number in 0..10_000 {
            history.push(metric(&format!("metric {number}"), 0));
            history.push(FromCoordinator::Joined(Replica::worker(number)));
            assert!(history.bytes <= 10_000);
        }
        assert_eq!(heard(&history, history.last() - 1), [FromCoordinator::Joined(Replica::worker(9_999))]);
    }
}
