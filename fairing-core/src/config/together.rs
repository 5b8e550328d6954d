//! Settings that mean something only beside others: which entry won for each key, and what does not go together.

use super::keys::KEYS;
use super::raw::Entry;
use super::{Config, Origin, Problem, grammar};
use crate::topology::Mode;

/// The entry that won for each key, among those of all layers in their order.
#[derive(Debug)]
pub(super) struct Winners<'a> {
    entries: &'a [Entry],
    /// Place of the winner among the entries.
    places: [Option<usize>; KEYS.len()],
}

impl<'a> Winners<'a> {
    /// Nobody has won yet.
    pub(super) fn new(entries: &'a [Entry]) -> Self {
        Self { entries, places: [None; KEYS.len()] }
    }

    /// The entry at `place` can be meant: it wins over the ones before.
    pub(super) fn win(&mut self, place: usize) {
        self.places[index(self.entries[place].key.name)] = Some(place);
    }

    /// Who made the value of `key` what it is.
    pub(super) fn origin(&self, key: &str) -> Origin {
        let own = self.places[index(key)];
        let [mode, staleness] = ["mode", "staleness"].map(|key| self.places[index(key)]);
        let place = match key {
            "mode" => own.or(staleness),
            // A mode that came later has replaced it.
            "staleness" => own.max(mode.filter(|_| own.is_some())),
            _ => own,
        };
        place.map_or(Origin::Default, |place| self.entries[place].origin.clone())
    }

    /// What `config`, made of the winners, asks for that does not go together. A key of which `is_broken` is left out: its
    /// value is not the one that was asked for.
    pub(super) fn problems(&self, config: &Config, is_broken: impl Fn(&str) -> bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut clash = |key: &'static str, other_key: &'static str, reason: String| {
            if !is_broken(key) && !is_broken(other_key) {
                let (origin, other) = (self.origin(key), self.origin(other_key));
                problems.push(Problem::Together { origin, other_key, other, reason });
            }
        };
        let serverless = config.topology.is_serverless();
        if self.is_staleness_over_sync() {
            clash("staleness", "mode", grammar::STALENESS_IN_SYNC.to_owned());
        } else if serverless && !is_broken("mode") {
            match config.mode {
                Mode::Sync => {}
                Mode::Async => clash("mode", "ps", grammar::needs_server("mode = \"async\"")),
                Mode::Bounded { .. } => clash("staleness", "ps", grammar::needs_server("staleness")),
            }
        }
        if serverless && !config.rejoin.is_zero() {
            clash("rejoin", "ps", grammar::REJOIN_WITHOUT_SERVER.to_owned());
        }
        problems
    }

    /// Whether a `mode = "sync"` that somebody wrote stands below or beside the staleness that won.
    fn is_staleness_over_sync(&self) -> bool {
        let [mode, staleness] = ["mode", "staleness"].map(|key| self.places[index(key)]);
        let is_sync = mode.is_some_and(|place| self.entries[place].written.text() == Some("sync"));
        is_sync && staleness > mode
    }
}

fn index(key: &str) -> usize {
    KEYS.iter().position(|other| other.name == key).expect("the key is in the table")
}
