//! Bytes on the wire when nothing has changed. The group `bytes`.
//!
//! They are counted by the kernel in the engine's network, where nothing else runs: all that goes to the registry's port,
//! with the headers of HTTP, TCP and IP and with the acknowledgements of what the registry answers.

use anyhow::Context as _;

use crate::Place;
use crate::engine::Engine;
use crate::peers::{Peers, crane};
use crate::processes;
use crate::shipping;
use crate::table::{Figure, Table, fact, goal};

/// The count differs by acknowledgements only, so few are enough.
const REPETITIONS: usize = 3;

pub(crate) fn bytes(place: &Place) -> anyhow::Result<Table> {
    let mut table = Table::new("bytes to the registry, nothing changed");
    let Some(engine) = &place.engine else {
        table.fail(FAIRING, &anyhow::anyhow!("it is counted in the engine's network, and there is no engine"));
        return Ok(table);
    };
    let counter = Counter::start(engine, place)?;
    let peers = Peers::new(place);
    let fairing = |name: &str, base: Option<&str>| -> anyhow::Result<()> {
        let cache = place.folder.path().join(format!("cache-{name}"));
        let arguments = shipping::arguments(place, &cache, &place.registry.repository(name), base);
        processes::run(engine.inside(std::env::current_exe()?).args(arguments)).map(drop)
    };
    let by_crane = |has_zstd: bool| -> anyhow::Result<()> {
        let to = place.registry.repository(if has_zstd { "bytes-crane-zstd:v1" } else { "bytes-crane:v1" });
        let arguments = crane(&place.registry.base(), &peers.archive(has_zstd)?, &to);
        processes::run(engine.inside("crane").args(arguments)).map(drop)
    };
    counter.count(&mut table, FAIRING, || fairing("bytes", None));
    counter.count(&mut table, FAIRING_ON_BASE, || fairing("bytes-on-base", Some(&place.registry.base())));
    if peers.has_crane() {
        counter.count(&mut table, fact("crane append, bytes"), || by_crane(false));
    }
    if peers.has_zstd() {
        counter.count(&mut table, fact("crane append of a zstd layer, bytes"), || by_crane(true));
    }
    let docker = place.registry.repository("bytes-docker:v1");
    counter.count(&mut table, fact("docker build and docker push, bytes"), || peers.docker(engine, &docker));
    Ok(table)
}

const FAIRING: Figure = goal("fairing, bytes", "2000 / 1000");
const FAIRING_ON_BASE: Figure = goal("fairing on the base, bytes", "2000 / 1000");

/// A rule of the kernel's packet filter that counts.
struct Counter<'a> {
    engine: &'a Engine,
    port: String,
}

impl<'a> Counter<'a> {
    fn start(engine: &'a Engine, place: &Place) -> anyhow::Result<Self> {
        let address = place.registry.repository("");
        let port = address.trim_end_matches('/').rsplit(':').next().unwrap_or_default().to_owned();
        processes::run(engine.inside("iptables").args(["-A", "OUTPUT", "-p", "tcp", "--dport", &port]))?;
        Ok(Self { engine, port })
    }

    /// Bytes of all packets to the registry so far.
    fn read(&self) -> anyhow::Result<f64> {
        let list = processes::run(self.engine.inside("iptables").args(["-nvxL", "OUTPUT"]))?;
        let list = String::from_utf8(list)?;
        let rule =
            list.lines().find(|line| line.contains(&format!("dpt:{}", self.port))).context("the rule is gone")?;
        Ok(rule.split_whitespace().nth(1).context("the rule has no count")?.parse()?)
    }

    /// What `work` sends when it has been done before.
    fn count(&self, table: &mut Table, figure: Figure, work: impl Fn() -> anyhow::Result<()>) {
        eprintln!("bytes: {}", figure.name);
        let mut counted = || -> anyhow::Result<()> {
            work()?;
            for _ in 0..REPETITIONS {
                let before = self.read()?;
                work()?;
                table.record(figure, self.read()? - before, 0.0);
            }
            Ok(())
        };
        if let Err(error) = counted() {
            table.fail(figure, &error);
        }
    }
}
