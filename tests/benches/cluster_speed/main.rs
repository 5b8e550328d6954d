//! tests/cluster/run --with kwok cargo run -p fairing-tests --bin cluster_speed -- REPETITIONS GROUPS
//!
//! What a run on Kubernetes takes on the test cluster: time, requests and memory, beside what Kubernetes takes for a bare Job
//! of the same image. See `README.md` in the folder above.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints tables, and how far it is")]

mod audit;
mod bare;
mod fake;
mod place;
#[expect(dead_code, reason = "another benchmark uses more of it")]
#[path = "../training_speed/processes.rs"]
mod processes;
mod replica;
mod run;
mod table;
mod timeline;
mod witness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Parser, ValueEnum};

use place::Place;
use table::Table;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures what a run on Kubernetes takes.
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured; the fake nodes a third as often.
    #[arg(default_value = "5", value_parser = clap::value_parser!(u8).range(1..=99))]
    repetitions: u8,
    /// What is measured; everything if none is named.
    groups: Vec<Group>,
    /// Prints what happened when in each run of 3 replicas.
    #[arg(long)]
    timeline: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Times and requests of a run of 3 replicas.
    Run,
    /// Ways to delete the pods of a bare Job.
    Delete,
    /// Memory of a launcher that watches 100 replicas on fake nodes.
    Fake,
}

/// Milliseconds since 1970: the one clock of everything on this machine, pods included.
fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1_000.0
}

fn main() -> anyhow::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    match given.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [replica::ARGUMENT, milliseconds] => return replica::launch(milliseconds),
        [bare::ARGUMENT, milliseconds] => return bare::program(milliseconds),
        _ => {}
    }

    let Arguments { repetitions, groups, timeline } = Arguments::parse();
    let groups = if groups.is_empty() { Group::value_variants().to_vec() } else { groups };
    println!("load of the machine before the start: {}", processes::load());
    let place = Place::make()?;
    // Packs and pushes the image, and the node pulls it.
    eprintln!("a run that warms up");
    let warm = run::measure(&place, 0)?;
    let mut tables: Vec<Table> = Vec::new();
    for group in groups {
        tables.push(match group {
            Group::Run => run::table(&place, repetitions.into(), &warm, timeline)?,
            Group::Delete => bare::table(&place, repetitions.into(), &warm.image)?,
            Group::Fake => fake::table(&place, usize::from(repetitions).div_ceil(3))?,
        });
    }
    tables.iter().for_each(Table::print);
    Ok(())
}
