//! cargo run -p fairing-tests --bin image_speed -- REPETITIONS GROUPS
//!
//! What it costs to pack a program, to push it and to have it run in containers: time, bytes and memory, each beside what
//! others need for the same in the same run. See `README.md` in the folder above.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints tables, and how far it is")]

mod containers;
mod engine;
mod peers;
mod processes;
mod program;
mod registry;
mod shipping;
mod table;
mod wire;

use clap::{Parser, ValueEnum};
use tempfile::TempDir;

use engine::Engine;
use program::Program;
use registry::Registry;
use table::Table;

/// Measures what images cost.
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured; a third as often what takes seconds.
    #[arg(default_value = "9", value_parser = clap::value_parser!(u8).range(1..=99))]
    repetitions: u8,
    /// What is measured; everything if none is named.
    groups: Vec<Group>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Time and memory of building and pushing.
    Push,
    /// Bytes on the wire when nothing has changed.
    Bytes,
    /// From `cargo run` to the first step in containers.
    Run,
}

/// What all groups use; it ends with this value.
struct Place {
    registry: Registry,
    program: Program,
    engine: Option<Engine>,
    folder: TempDir,
    repetitions: usize,
}

impl Place {
    /// How often something is measured that takes seconds.
    fn few(&self) -> usize {
        self.repetitions.div_ceil(3)
    }
}

fn main() -> anyhow::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    if let Some((argument, part)) = given.split_first()
        && argument == shipping::ARGUMENT
    {
        return shipping::ship(part);
    }

    let Arguments { repetitions, groups } = Arguments::parse();
    let groups = if groups.is_empty() { Group::value_variants().to_vec() } else { groups };
    println!("load of the machine before the start: {}", processes::load());
    let folder = tempfile::Builder::new().prefix("image-speed-").tempdir()?;
    let registry = Registry::start(folder.path())?;
    let missing = engine::missing();
    for absent in peers::absent().into_iter().chain(missing.clone()) {
        println!("skipped: {absent}");
    }
    let engine = match missing {
        None => Some(Engine::start(&folder.path().join("engine"), registry.configuration())?),
        Some(_) => None,
    };
    let program = Program::create(folder.path())?;
    println!("the program: {} bytes", program.size_bytes());
    registry.push_base()?;

    let place = Place { registry, program, engine, folder, repetitions: repetitions.into() };
    let mut tables = Vec::new();
    for group in groups {
        let measure: fn(&Place) -> anyhow::Result<Table> = match group {
            Group::Push => shipping::push,
            Group::Bytes => wire::bytes,
            Group::Run => containers::run,
        };
        tables.push(measure(&place)?);
    }
    tables.iter().for_each(Table::print);
    Ok(())
}
