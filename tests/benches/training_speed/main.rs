//! cargo run -p fairing-tests --bin training_speed -- REPETITIONS GROUPS
//!
//! What training with fairing costs: speed, CPU time, exchange and memory, each beside its floor from the same run. See
//! `README.md` in the folder above.

#![expect(clippy::print_stdout, reason = "a program that prints tables")]

mod exchange;
mod floor;
mod memory;
mod processes;
mod table;
mod training;

use clap::{Parser, ValueEnum};
use fairing_core::prelude::*;
use tempfile::TempDir;

/// Parameters of the small CNN.
const SMALL: usize = 13_610;
/// Parameters of the MLP.
const LARGE: usize = 20_037_642;

/// Measures what training with fairing costs.
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured.
    #[arg(default_value = "3", value_parser = clap::value_parser!(u8).range(1..))]
    repetitions: u8,
    /// What is measured; everything if none is named.
    groups: Vec<Group>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Group {
    /// Images per second and CPU time of the small CNN.
    Cnn,
    /// Push and pull of 54 KB and of 80 MB.
    Exchange,
    /// Steps per second of an MLP with 20 M parameters.
    Mlp,
    /// Peak resident memory.
    Memory,
}

fn main() -> anyhow::Result<()> {
    if fairing_core::in_replica() {
        // Whatever was launched, this takes the replica's part and does not return.
        training::CnnTraining(training::Load::CNN).launch()?;
    }
    let given: Vec<String> = std::env::args().skip(1).collect();
    if let [argument, floor, core @ ..] = given.as_slice()
        && argument == floor::ARGUMENT
    {
        return floor::run(floor, core.first().map(String::as_str));
    }

    let Arguments { repetitions, groups } = Arguments::parse();
    let groups = if groups.is_empty() { Group::value_variants().to_vec() } else { groups };
    println!("load of the machine before the start: {}", processes::load());
    let mut tables = Vec::new();
    for group in groups {
        let measure = match group {
            Group::Cnn => training::cnn,
            Group::Exchange => exchange::exchange,
            Group::Mlp => training::mlp,
            Group::Memory => memory::memory,
        };
        tables.push(measure(repetitions.into())?);
    }
    // Last, since the runs print as any training does.
    tables.iter().for_each(table::Table::print);
    Ok(())
}

/// A run whose folder goes away with `runs`.
fn options(workers: u32, ps: u32, runs: &TempDir) -> LaunchOptions {
    LaunchOptions::new().workers(workers).ps(ps).seed(training::SEED).runs(runs.path())
}

/// Cores of this machine.
fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64)
}
