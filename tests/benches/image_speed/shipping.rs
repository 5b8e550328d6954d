//! Time and memory of building and pushing. The group `push`.
//!
//! fairing packs and pushes in a process of its own for each repetition, as with each `cargo run`: nothing is warm in it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use fairing_core::image::append::{self, Settings};
use fairing_core::image::cache::{Cache, Packed};
use fairing_core::image::executable::Program;
use fairing_core::image::layer::Layer;
use fairing_core::image::libraries::Libraries;
use fairing_core::image::{Digest, Source};
use fairing_core::registry::{Base, Client, Keychain, Push, Reference};
use serde::{Deserialize, Serialize};

use crate::Place;
use crate::peers::Peers;
use crate::processes::{self, status_kib};
use crate::table::{Figure, Measured, Table, fact, goal, measure};

/// First argument of a process that ships; the program, the cache, the repository and perhaps the base image follow.
pub(crate) const ARGUMENT: &str = "ship";

/// As a commit is: the same until something is committed.
const TAG: &str = "0123456789ab";

/// Threads of the connection to a registry, as many as fairing has in a run.
const THREADS: usize = 2;

/// What a process that ships tells about it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shipped {
    /// Asking for the base image, if there is one.
    base_ms: f64,
    /// Reading the program and its libraries, and compressing what is not in the cache.
    pack_ms: f64,
    push_ms: f64,
    /// Everything, from opening the program on.
    all_ms: f64,
    /// Peak of the memory above what the process had before.
    peak_mib: f64,
    /// The compressed layer with the program.
    layer: PathBuf,
}

/// Packs and pushes as a run does, and prints what it took.
pub(crate) fn ship(arguments: &[String]) -> anyhow::Result<()> {
    let [program, cache, repository, base @ ..] = arguments else { anyhow::bail!("{ARGUMENT} takes three arguments") };
    // The peak counts from here on.
    fs::write("/proc/self/clear_refs", "5")?;
    let before = status_kib("self", "VmRSS").context("/proc/self/status has no VmRSS")?;
    let began = Instant::now();

    let client = Client::new(fairing_core::registry::Settings::default(), Keychain::empty())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let program = Program::open(Path::new(program))?;
    let base = match base.first() {
        Some(base) => Some(runtime.block_on(client.base(&base.parse::<Reference>()?, program.architecture()))?),
        None => None,
    };
    let base_ms = ms(began);

    let packing = Instant::now();
    let packed = pack(&Cache::open(Path::new(cache))?, &program, base.is_some())?;
    let settings = Settings::of_program(program.name());
    let below = base.as_ref().map(to_append);
    let image = append::assemble(below.as_ref(), &packed, program.architecture(), &settings)?;
    let pack_ms = ms(packing);

    let pushing = Instant::now();
    let repository = repository.parse()?;
    let mut push = Push::image(&image, &repository).tagged(TAG.parse()?);
    if let Some(base) = &base {
        push = push.on_base(base.reference.repository());
    }
    runtime.block_on(client.push(&push))?;
    let (push_ms, all_ms) = (ms(pushing), ms(began));

    let peak = status_kib("self", "VmHWM").context("/proc/self/status has no VmHWM")?;
    let Some(Source::File(layer)) = packed.last().map(|packed| packed.blob.source.clone()) else {
        anyhow::bail!("a compressed layer is in a file")
    };
    let shipped = Shipped { base_ms, pack_ms, push_ms, all_ms, peak_mib: (peak - before) / 1_024.0, layer };
    println!("{}", serde_json::to_string(&shipped)?);
    Ok(())
}

fn pack(cache: &Cache, program: &Program, is_on_base: bool) -> anyhow::Result<Vec<Packed>> {
    let mut libraries = Libraries::of(program, None)?;
    if is_on_base {
        libraries = libraries.beside_base();
    } else {
        program.loads_at_run_time()?;
    }
    let layers = [Layer::libraries(&libraries, !is_on_base)?, Layer::program(program)];
    Ok(cache.pack_all(&layers)?)
}

fn to_append(base: &Base) -> append::Base {
    append::Base {
        reference: base.reference.to_string(),
        digest: base.descriptor.digest.clone(),
        layers: base.layers.clone(),
        config: base.config.clone(),
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1_000.0
}

/// Arguments with which this program ships.
pub(crate) fn arguments(place: &Place, cache: &Path, repository: &str, base: Option<&str>) -> Vec<OsString> {
    let program = place.program.path();
    let mut arguments: Vec<OsString> = vec![ARGUMENT.into(), program.into(), cache.into(), repository.into()];
    arguments.extend(base.map(Into::into));
    arguments
}

/// fairing with a cache and a repository of its own.
struct Fairing<'a> {
    place: &'a Place,
    cache: PathBuf,
    repository: String,
    base: Option<String>,
}

impl<'a> Fairing<'a> {
    fn new(place: &'a Place, name: &str, is_on_base: bool) -> Self {
        let cache = place.folder.path().join(format!("cache-{name}"));
        let base = is_on_base.then(|| place.registry.base());
        Self { place, cache, repository: place.registry.repository(name), base }
    }

    fn ship(&self) -> anyhow::Result<Measured<Shipped>> {
        measure(|| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(arguments(self.place, &self.cache, &self.repository, self.base.as_deref()));
            Ok(serde_json::from_slice(&processes::run(&mut command)?)?)
        })
    }
}

/// The rows of one way to ship.
struct Rows {
    all: Figure,
    pack: Figure,
    push: Figure,
    process: Figure,
    peak: Figure,
}

const CHANGED: Rows = Rows {
    all: goal("changed: fairing, ms", "350 / 260"),
    pack: fact("changed: fairing, of it packing, ms"),
    push: fact("changed: fairing, of it pushing, ms"),
    process: fact("changed: fairing, with start and end of the process, ms"),
    peak: goal("changed: fairing, peak memory above its own, MiB", "17 / 12"),
};

const CHANGED_ON_BASE: Rows = Rows {
    all: goal("changed: fairing on the base, ms", "350 / 260"),
    pack: fact("changed: fairing on the base, of it packing, ms"),
    push: fact("changed: fairing on the base, of it pushing, ms"),
    process: fact("changed: fairing on the base, with start and end of the process, ms"),
    peak: goal("changed: fairing on the base, peak memory above its own, MiB", "17 / 12"),
};

const SAME: Rows = Rows {
    all: goal("same: fairing, ms", "40 / packing + 10"),
    pack: fact("same: fairing, of it packing (hashing), ms"),
    push: fact("same: fairing, of it pushing, ms"),
    process: fact("same: fairing, with start and end of the process, ms"),
    peak: goal("same: fairing, peak memory above its own, MiB", "17 / 12"),
};

const SAME_ON_BASE: Rows = Rows {
    all: goal("same: fairing on the base, ms", "40 / packing + 10"),
    pack: fact("same: fairing on the base, of it packing (hashing), ms"),
    push: fact("same: fairing on the base, of it pushing, ms"),
    process: fact("same: fairing on the base, with start and end of the process, ms"),
    peak: goal("same: fairing on the base, peak memory above its own, MiB", "17 / 12"),
};

const COLD: Rows = Rows {
    all: goal("cold: fairing on the base, empty cache, ms", "400 / 300"),
    pack: fact("cold: fairing on the base, of it packing, ms"),
    push: fact("cold: fairing on the base, of it pushing, ms"),
    process: fact("cold: fairing on the base, with start and end of the process, ms"),
    peak: goal("cold: fairing on the base, peak memory above its own, MiB", "17 / 12"),
};

impl Rows {
    fn record(&self, table: &mut Table, shipped: anyhow::Result<Measured<Shipped>>) -> Option<PathBuf> {
        match shipped {
            Err(error) => {
                table.fail(self.all, &error);
                None
            }
            Ok(Measured { value, ms, others }) => {
                table.record(self.all, value.all_ms, others);
                table.record(self.pack, value.pack_ms, others);
                table.record(self.push, value.push_ms, others);
                table.record(self.process, ms, others);
                table.record(self.peak, value.peak_mib, others);
                Some(value.layer)
            }
        }
    }
}

/// Everything changed, the same again, and cold, of everyone in turn.
pub(crate) fn push(place: &Place) -> anyhow::Result<Table> {
    // The first repetition of each is what fills caches and registry, and counts for nobody.
    let mut warm_up = Table::new("");
    let bare = Fairing::new(place, "fairing", false);
    let on_base = Fairing::new(place, "fairing-on-base", true);
    let peers = Peers::new(place);
    repetition(place, &mut warm_up, 0, &bare, &on_base, &peers)?;

    let mut table = Table::new("build + push of the program, ms");
    for number in 1..=place.repetitions {
        eprintln!("push: repetition {number} of {}", place.repetitions);
        repetition(place, &mut table, number, &bare, &on_base, &peers)?;
    }
    Ok(table)
}

fn repetition(
    place: &Place,
    table: &mut Table,
    number: usize,
    bare: &Fairing<'_>,
    on_base: &Fairing<'_>,
    peers: &Peers<'_>,
) -> anyhow::Result<()> {
    // What takes seconds runs in every third repetition only.
    let slow = number.is_multiple_of(3);

    place.program.change()?;
    let layer = CHANGED.record(table, bare.ship());
    if let Some(layer) = layer {
        raw(place, table, &layer)?;
    }
    CHANGED_ON_BASE.record(table, on_base.ship());
    peers.record(table, "changed", None, slow);

    SAME.record(table, bare.ship());
    SAME_ON_BASE.record(table, on_base.ship());
    peers.record(table, "same", None, slow);

    place.program.change()?;
    let name = format!("cold-{number}");
    let cold = Fairing::new(place, &name, true);
    COLD.record(table, cold.ship());
    fs::remove_dir_all(&cold.cache)?;
    peers.record(table, "cold", Some(&name), slow);
    Ok(())
}

/// Sends as many bytes as fairing's layer has, and such that the registry does not have them.
fn raw(place: &Place, table: &mut Table, layer: &Path) -> anyhow::Result<()> {
    let mut bytes = fs::read(layer)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    let digest = Digest::of(&bytes);
    table.time(fact("changed: raw upload of fairing's layer, hashed before, ms"), || {
        place.registry.raw_upload(&bytes, &digest)
    });
    Ok(())
}
