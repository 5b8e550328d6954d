//! Settings that mean something only beside others: which entry won for each key, and what does not go together.

use super::keys::KEYS;
use super::kubernetes::REJOIN;
use super::raw::Entry;
use super::{Builder, Config, Link, OnDisconnect, Origin, Problem, Target, cluster, grammar};
use crate::topology::Mode;

/// The settings that say what the image is made of: a layer has one of them at most.
const SOURCES: [&str; 3] = ["image", "base", "dockerfile"];

/// Each key that others replace: an entry of theirs in a later layer undoes one of its own.
const REPLACED: [(&str, &[&str]); 9] = [
    ("staleness", &["mode"]),
    ("image", &["base", "dockerfile"]),
    ("base", &["image", "dockerfile"]),
    ("dockerfile", &["image", "base"]),
    ("builder", &["image"]),
    ("link", &["image"]),
    ("architectures", &["image"]),
    ("files", &["image"]),
    ("root_certificates", &["image"]),
];

/// Why several architectures cannot stand without a repository. Only the program's start knows it: any layer may name one.
const ARCHITECTURES_WITHOUT_REPOSITORY: &str =
    "several `architectures` need a `repository`, since an engine takes the image of one from its launcher";

/// Why a cluster cannot do without a repository. Only the program's start knows it: any layer may name one.
const NEEDS_REPOSITORY: &str = "`target = \"kubernetes\"` needs a `repository` that the cluster pulls from, such as \
                                \"registry.example/team/name\" (set FAIRING_REPOSITORY), or a finished `image`";

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
        let own = self.place(key);
        let place = match key {
            "mode" => own.or(self.place("staleness")),
            "builder" => self.standing(key).or(self.standing("dockerfile")).or(self.replaced(key)),
            _ => self.replaced(key).or(own),
        };
        place.map_or(Origin::Default, |place| self.entries[place].origin.clone())
    }

    /// Sets what follows from what the user wrote: a Dockerfile is for the engine, and a run on a cluster goes on without its
    /// launcher and without a pod that is taken away.
    pub(super) fn imply(&self, config: &mut Config) {
        if config.target == Target::Kubernetes {
            if self.place("on_disconnect").is_none() {
                config.on_disconnect = OnDisconnect::Continue;
            }
            if self.place("rejoin").is_none() && !config.topology.is_serverless() {
                config.rejoin = REJOIN;
            }
        }
        if config.image.dockerfile.is_some() && self.standing("builder").is_none() {
            config.image.builder = Builder::Docker;
        }
    }

    fn place(&self, key: &str) -> Option<usize> {
        self.places[index(key)]
    }

    /// The entry that replaced what was written of `key`.
    fn replaced(&self, key: &str) -> Option<usize> {
        let own = self.place(key)?;
        let by = REPLACED.iter().filter(|(replaced, _)| *replaced == key).flat_map(|(_, by)| *by);
        by.filter_map(|by| self.place(by)).max().filter(|by| *by > own)
    }

    /// The entry of `key` if none replaced it.
    fn standing(&self, key: &str) -> Option<usize> {
        self.place(key).filter(|_| self.replaced(key).is_none())
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
        self.image_problems(config, &mut clash);
        match (config.target, config.on_disconnect) {
            (Target::Kubernetes, OnDisconnect::Stop) => {
                clash("on_disconnect", "target", cluster::STOP_ON_CLUSTER.to_owned());
            }
            (Target::Local | Target::Docker, OnDisconnect::Continue) => {
                clash("on_disconnect", "target", grammar::continue_needs_kubernetes(&config.target.to_string()));
            }
            _ => {}
        }
        if config.target != Target::Kubernetes {
            let on_clusters = [
                ("detach", config.kubernetes.detach),
                ("resources.worker.gpu", config.worker.gpu.is_some()),
                ("resources.ps.gpu", config.ps.gpu.is_some()),
            ];
            for (key, _) in on_clusters.into_iter().filter(|(_, is_set)| *is_set) {
                clash(
                    key,
                    "target",
                    format!(
                        "`{key}` needs `target = \"kubernetes\"`; it has no meaning with `target = \"{}\"`",
                        config.target
                    ),
                );
            }
        } else if !["repository", "image"].into_iter().any(&is_broken)
            && config.image.repository.is_none()
            && config.image.finished.is_none()
        {
            clash("target", "target", NEEDS_REPOSITORY.to_owned());
        }
        problems
    }

    /// What of the image does not go together. What can never be meant is refused for all targets, so that a run on this
    /// machine finds it; what is only missing is asked for by those that make an image.
    fn image_problems(&self, config: &Config, clash: &mut impl FnMut(&'static str, &'static str, String)) {
        let image = &config.image;
        let is_clash = |key: &str, other: &str| {
            let layer = |key: &str| self.place(key).map(|place| self.entries[place].layer());
            let top = SOURCES.iter().filter_map(|key| layer(key)).max();
            top.is_some() && layer(key) == top && layer(other) == top
        };
        if is_clash("base", "image") {
            clash("base", "image", grammar::no_meaning_with_image("base"));
        }
        if is_clash("dockerfile", "image") {
            clash("dockerfile", "image", grammar::no_meaning_with_image("dockerfile"));
        } else if is_clash("base", "dockerfile") {
            clash("base", "dockerfile", grammar::BASE_WITH_DOCKERFILE.to_owned());
        }
        let has_several = image.architectures.len() > 1;
        if image.finished.is_some() {
            let building = [
                ("builder", image.builder != Builder::default()),
                ("link", image.link != Link::default()),
                ("architectures", !image.architectures.is_empty()),
                ("files", !image.files.is_empty()),
                ("root_certificates", image.root_certificates),
            ];
            for (key, _) in building.into_iter().filter(|(_, is_set)| *is_set) {
                clash(key, "image", grammar::no_meaning_with_image(key));
            }
        } else if image.dockerfile.is_some() && image.builder == Builder::Append {
            clash("builder", "dockerfile", grammar::APPEND_WITH_DOCKERFILE.to_owned());
        } else if has_several && image.builder == Builder::Docker {
            let cause = if self.standing("builder").is_some() { "builder" } else { "dockerfile" };
            clash("architectures", cause, grammar::ARCHITECTURES_WITH_DOCKER.to_owned());
        } else if has_several && image.repository.is_none() && config.target == Target::Docker {
            clash("architectures", "target", ARCHITECTURES_WITHOUT_REPOSITORY.to_owned());
        }
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
