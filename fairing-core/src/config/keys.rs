//! The table of keys. A new key is one row here, one field in [`Config`], [`Attribute`](super::Attribute) and
//! [`LaunchOptions`](super::LaunchOptions), and one row in the module's documentation; a test compares them.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::raw::Written;
use super::{Config, Cpu, Memory, Target, grammar};
use crate::topology::Mode;

/// One setting: how it is spelt, read and shown.
#[derive(Debug)]
pub(super) struct Key {
    /// As `Fairing.toml` spells it.
    pub(super) name: &'static str,
    /// Its variable.
    pub(super) variable: &'static str,
    /// Reads what was written into the configuration. A relative folder is meant from the given one. The error is what was
    /// expected.
    pub(super) apply: fn(&mut Config, &Written, &Path) -> Result<(), String>,
    /// Its value in a configuration.
    pub(super) show: fn(&Config) -> String,
}

/// Every key, in the order in which they are explained.
pub(super) static KEYS: [Key; 14] = [
    Key {
        name: "workers",
        variable: "FAIRING_WORKERS",
        apply: |config, written, _| {
            let workers = count(written).and_then(NonZeroU32::new);
            config.topology.workers = workers.ok_or_else(|| number_from(1, written))?;
            Ok(())
        },
        show: |config| config.topology.workers.to_string(),
    },
    Key {
        name: "ps",
        variable: "FAIRING_PS",
        apply: |config, written, _| {
            config.topology.ps = count(written).ok_or_else(|| match written {
                Written::Other("a table") => "a whole number from 0 (resources go into `[resources.ps]`)".to_owned(),
                _ => number_from(0, written),
            })?;
            Ok(())
        },
        show: |config| config.topology.ps.to_string(),
    },
    Key {
        name: "mode",
        variable: "FAIRING_MODE",
        // A layer's mode is applied before its staleness, so that it replaces the staleness of the layers below.
        apply: |config, written, _| {
            let word = written.text().unwrap_or_default();
            grammar::mode(word)?;
            config.mode = if word == "sync" { Mode::Sync } else { Mode::Async };
            Ok(())
        },
        show: |config| if config.mode.is_sync() { "sync" } else { "async" }.to_owned(),
    },
    Key {
        name: "staleness",
        variable: "FAIRING_STALENESS",
        apply: |config, written, _| {
            let staleness = count(written).ok_or_else(|| number_from(0, written))?;
            config.mode = Mode::Bounded { staleness };
            Ok(())
        },
        show: |config| {
            or_dash(match config.mode {
                Mode::Bounded { staleness } => Some(staleness),
                Mode::Sync | Mode::Async => None,
            })
        },
    },
    Key {
        name: "rejoin",
        variable: "FAIRING_REJOIN",
        apply: |config, written, _| {
            config.rejoin = rejoin(written)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.rejoin).to_string(),
    },
    Key {
        name: "seed",
        variable: "FAIRING_SEED",
        apply: |config, written, _| {
            let seed = written.integer().and_then(|seed| u64::try_from(seed).ok());
            config.seed = seed.ok_or_else(|| number_from(0, written))?;
            Ok(())
        },
        show: |config| config.seed.to_string(),
    },
    Key {
        name: "env",
        variable: "FAIRING_ENV",
        apply: |config, written, _| {
            config.env = names(written)?;
            Ok(())
        },
        show: |config| or_dash((!config.env.is_empty()).then(|| config.env.join(","))),
    },
    Key {
        name: "data",
        variable: "FAIRING_DATA",
        apply: |config, written, base| {
            config.data_dir = Some(folder(written, base)?);
            Ok(())
        },
        show: |config| or_dash(config.data_dir.as_ref().map(|path| path.display())),
    },
    Key {
        name: "target",
        variable: "FAIRING_TARGET",
        apply: |config, written, _| {
            grammar::target(written.text().unwrap_or_default())?;
            config.target = Target::Local;
            Ok(())
        },
        show: |config| config.target.to_string(),
    },
    Key {
        name: "runs",
        variable: "FAIRING_RUNS",
        apply: |config, written, base| {
            config.runs = folder(written, base)?;
            Ok(())
        },
        show: |config| config.runs.display().to_string(),
    },
    Key {
        name: "resources.worker.cpu",
        variable: "FAIRING_WORKER_CPU",
        apply: |config, written, _| {
            config.worker.cpu = Some(cpu(written)?);
            Ok(())
        },
        show: |config| or_dash(config.worker.cpu),
    },
    Key {
        name: "resources.worker.memory",
        variable: "FAIRING_WORKER_MEMORY",
        apply: |config, written, _| {
            config.worker.memory = Some(memory(written)?);
            Ok(())
        },
        show: |config| or_dash(config.worker.memory),
    },
    Key {
        name: "resources.ps.cpu",
        variable: "FAIRING_PS_CPU",
        apply: |config, written, _| {
            config.ps.cpu = Some(cpu(written)?);
            Ok(())
        },
        show: |config| or_dash(config.ps.cpu),
    },
    Key {
        name: "resources.ps.memory",
        variable: "FAIRING_PS_MEMORY",
        apply: |config, written, _| {
            config.ps.memory = Some(memory(written)?);
            Ok(())
        },
        show: |config| or_dash(config.ps.memory),
    },
];

/// The tables of `Fairing.toml` that hold keys.
pub(super) static TABLES: [&str; 3] = ["resources", "resources.worker", "resources.ps"];

impl Key {
    /// The key of this name.
    pub(super) fn named(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn count(written: &Written) -> Option<u32> {
    u32::try_from(written.integer()?).ok()
}

fn number_from(least: u32, written: &Written) -> String {
    match written {
        Written::Text(text) if text.parse::<u64>().is_ok() => format!("the number {text} without quotes"),
        _ if written.integer().is_some_and(|number| number > u32::MAX.into()) => "a smaller number".to_owned(),
        _ => format!("a whole number from {least}"),
    }
}

fn folder(written: &Written, base: &Path) -> Result<PathBuf, String> {
    let path = match written {
        Written::Path(path) => Some(path.as_path()),
        _ => written.text().map(Path::new),
    };
    let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or("the path of a folder")?;
    // `components` drops the `.` of `./data`, so that one folder has one spelling in messages.
    Ok(base.join(path).components().collect())
}

fn names(written: &Written) -> Result<Vec<String>, String> {
    let names: Option<Vec<&str>> = match written {
        Written::Bare(text) => Some(text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect()),
        Written::List(entries) => entries.iter().map(Written::text).collect(),
        _ => None,
    };
    let names = names.ok_or("a list of names, such as [\"HF_HOME\"]")?;
    for (index, name) in names.iter().enumerate() {
        grammar::variable_name(name).map_err(|expected| format!("for \"{name}\" {expected}"))?;
        if names[..index].contains(name) {
            return Err(format!("\"{name}\" once"));
        }
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

fn cpu(written: &Written) -> Result<Cpu, String> {
    let number = match written {
        Written::Integer(number) => number.to_string(),
        Written::Decimal(number) => number.clone(),
        _ => written.text().unwrap_or_default().to_owned(),
    };
    number.parse::<Cpu>().map_err(|error| error.expected())
}

fn memory(written: &Written) -> Result<Memory, String> {
    let number = match written {
        Written::Integer(number) => number.to_string(),
        _ => written.text().unwrap_or_default().to_owned(),
    };
    number.parse::<Memory>().map_err(|error| error.expected())
}

fn rejoin(written: &Written) -> Result<Duration, String> {
    let duration = match written {
        Written::Duration(duration) => *duration,
        Written::Integer(number) => grammar::duration(&number.to_string())?,
        _ => grammar::duration(written.text().unwrap_or_default())?,
    };
    grammar::rejoin(duration)?;
    // Replicas are told milliseconds: all must have the same time.
    Ok(Duration::from_secs(duration.as_secs()) + Duration::from_millis(duration.subsec_millis().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_a_row_for_each_key() {
        let documentation = include_str!("mod.rs");
        let rows: Vec<_> = documentation.lines().filter(|line| line.starts_with("//! | `")).collect();
        assert_eq!(rows.len(), KEYS.len());
        for (row, key) in rows.into_iter().zip(&KEYS) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            assert_eq!((cells[1], cells[3]), (&*format!("`{}`", key.name), &*format!("`{}`", key.variable)));
            assert!(cells[5].starts_with(&format!("`{} = ", key.name)), "{row}");
        }
    }
}
