//! Lists the runs on a cluster, attaches to one, stops it, shows its logs, or removes what is left.
//!
//!     cargo run -p fairing-examples --example fairing_runs -- list
//!     cargo run -p fairing-examples --example fairing_runs -- attach RUN
//!
//! The cluster is that of the kubeconfig; `FAIRING_CONTEXT` and `FAIRING_NAMESPACE` name others.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use fairing_core::topology::Replica;

const USAGE: &str = "\
Usage: fairing_runs COMMAND

  list                       the runs in the namespace, the newest first
  attach RUN                 shows a run from the beginning and brings its result home
  stop RUN                   finishes the round in progress, evaluates, and brings the result home
  delete RUN                 ends a run at once; its result is lost
  logs RUN worker|ps RANK    what a replica has written so far
  sweep                      removes what is left of runs that have ended

FAIRING_CONTEXT names a context of the kubeconfig, FAIRING_NAMESPACE a namespace.";

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => list()?,
        ["attach", run] => show(fairing_core::attach(run)?.wait()?)?,
        ["stop", run] => show(fairing_core::stop(run)?)?,
        ["delete", run] => fairing_core::delete(run)?,
        ["logs", run, role, rank] => logs(run, role, rank)?,
        ["sweep"] => fairing_core::sweep_cluster()?.iter().for_each(|line| println!("{line}")),
        ["--help" | "-h" | "help"] => println!("{USAGE}"),
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
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

fn show(outcome: fairing_core::Outcome) -> anyhow::Result<()> {
    for name in outcome.metrics().names() {
        println!("{name} {:.4}", outcome.metric(name)?);
    }
    println!("model {}", outcome.model().display());
    Ok(())
}

fn logs(run: &str, role: &str, rank: &str) -> anyhow::Result<()> {
    let rank: u32 = rank.parse().with_context(|| format!("`{rank}` is no rank"))?;
    let replica = match role {
        "worker" => Replica::worker(rank),
        "ps" => Replica::ps(rank),
        other => bail!("`{other}` is no role (worker or ps)"),
    };
    match fairing_core::logs(run, replica)? {
        Some(text) => print!("{text}"),
        None => println!("{replica} of `{run}` has no pod"),
    }
    Ok(())
}
