//! Lists the runs on a cluster, attaches to one, stops it, shows its logs, or removes what is left.
//!
//!     cargo run -p fairing-examples --example fairing_runs -- list
//!     cargo run -p fairing-examples --example fairing_runs -- attach RUN
//!
//! The cluster is that of the kubeconfig; `FAIRING_CONTEXT` and `FAIRING_NAMESPACE` name others. What could not be done ends
//! it with 1, a command line that cannot be meant with 2, and Ctrl-C, or a run that was stopped from elsewhere, with 130.

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use fairing_core::topology::Replica;
use fairing_core::{Outcome, RunError};

/// The runs in a namespace of a cluster.
///
/// The cluster is that of the kubeconfig; FAIRING_CONTEXT names another context of it, and FAIRING_NAMESPACE another namespace.
#[derive(Parser)]
#[command(name = "fairing_runs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the runs, the newest first
    List,
    /// Shows a run from its beginning, waits for its end and brings its result home
    ///
    /// Ctrl-C before training began leaves the run alone; after that it stops it, as the command `stop` does.
    Attach {
        /// Its name, as `list` shows it
        run: String,
    },
    /// Lets a run finish the round in progress and evaluate, and brings its result home
    Stop {
        /// Its name, as `list` shows it
        run: String,
    },
    /// Ends a run at once and removes all of it; its result is lost
    Delete {
        /// Its name, as `list` shows it
        run: String,
    },
    /// Prints what a replica has written so far
    Logs {
        /// The run's name, as `list` shows it
        run: String,
        /// The replica's role
        role: Role,
        /// Its rank in that role, from 0
        rank: u32,
    },
    /// Removes what is left of runs that have ended, which the cluster would do later
    Sweep,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Worker,
    Ps,
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Command::List => list()?,
        Command::Attach { run } => return show(fairing_core::attach(&run)?.wait(), false),
        Command::Stop { run } => return show(fairing_core::stop(&run), true),
        Command::Delete { run } => {
            fairing_core::delete(&run)?;
            println!("removed the run `{run}`");
        }
        Command::Logs { run, role, rank } => logs(&run, role, rank)?,
        Command::Sweep => fairing_core::sweep_cluster()?.iter().for_each(|line| println!("{line}")),
    }
    Ok(ExitCode::SUCCESS)
}

fn list() -> anyhow::Result<()> {
    let runs = fairing_core::runs()?;
    if runs.is_empty() {
        println!("no runs");
        return Ok(());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() as i64;
    println!("{:<52} {:<20} {:<12} {:>8}  STATE", "RUN", "TYPE", "USER", "AGE");
    for run in runs {
        let age = (now - run.created).max(0);
        let age = match age {
            0..120 => format!("{age} s"),
            120..7200 => format!("{} min", age / 60),
            _ => format!("{} h", age / 3600),
        };
        let user = run.user.as_deref().unwrap_or("-");
        println!("{:<52} {:<20} {user:<12} {age:>8}  {}", run.name, run.type_name, run.state);
    }
    Ok(())
}

/// Prints what a run came to. That it was stopped is a success only for who wanted that.
fn show(result: Result<Outcome, RunError>, is_stop_wanted: bool) -> anyhow::Result<ExitCode> {
    /// What shells report for Ctrl-C.
    const INTERRUPTED: u8 = 130;
    let outcome = match result {
        Err(error @ (RunError::Killed | RunError::Left { .. })) => {
            eprintln!("{error}");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        result => result?,
    };
    for name in outcome.metrics().names() {
        println!("{name} {:.4}", outcome.metric(name)?);
    }
    println!("model {}", outcome.model().display());
    Ok(if outcome.is_stopped() && !is_stop_wanted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

fn logs(run: &str, role: Role, rank: u32) -> anyhow::Result<()> {
    let replica = match role {
        Role::Worker => Replica::worker(rank),
        Role::Ps => Replica::ps(rank),
    };
    let text = fairing_core::logs(run, replica)?;
    let text = text.with_context(|| {
        format!(
            "{replica} of the run `{run}` has no pod (it has none yet or none any more, or the run has no such replica)"
        )
    })?;
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
