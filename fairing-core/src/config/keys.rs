//! The table of keys. A new key is one row here, one field in [`Config`], [`LaunchOptions`](super::LaunchOptions) and, unless
//! it is about one launch, [`Attribute`](super::Attribute), and one row in the module's documentation; a test compares them.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::grammar::Rule;
use super::raw::Written;
use super::{
    Builder, Config, Cpu, Gpu, ImageSettings, Link, Memory, OnDisconnect, Renderer, Target, Toleration, Volume,
    cluster, grammar,
};
use crate::topology::Mode;

/// One setting: how it is spelt, read and shown.
#[derive(Debug)]
pub(super) struct Key {
    /// As `Fairing.toml` spells it.
    pub(super) name: &'static str,
    /// Its variable.
    pub(super) variable: &'static str,
    /// Reads what was written into the configuration. A relative path is meant from the given folder. The error is what was
    /// expected.
    pub(super) apply: fn(&mut Config, &Written, &Path) -> Result<(), String>,
    /// Its value in a configuration.
    pub(super) show: fn(&Config) -> String,
}

/// Every key, in the order in which they are explained.
pub(super) static KEYS: [Key; 53] = [
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
            config.env = list(written, "names, such as [\"HF_HOME\"]", grammar::variable_name)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.env),
    },
    Key {
        name: "data",
        variable: "FAIRING_DATA",
        apply: |config, written, base| {
            config.data_dir = Some(path(written, base, FOLDER)?);
            Ok(())
        },
        show: |config| or_dash(config.data_dir.as_ref().map(|path| path.display())),
    },
    Key {
        name: "target",
        variable: "FAIRING_TARGET",
        apply: |config, written, _| {
            let word = written.text().unwrap_or_default();
            grammar::target(word)?;
            config.target = match word {
                "local" => Target::Local,
                "docker" => compiled_in(Target::Docker, cfg!(feature = "docker"))?,
                _ => compiled_in(Target::Kubernetes, cfg!(feature = "kubernetes"))?,
            };
            Ok(())
        },
        show: |config| config.target.to_string(),
    },
    Key {
        name: "repository",
        variable: "FAIRING_REPOSITORY",
        apply: |config, written, _| {
            config.image.repository = Some(checked(written, grammar::repository)?);
            Ok(())
        },
        show: |config| or_dash(config.image.repository.as_ref()),
    },
    Key {
        name: "image",
        variable: "FAIRING_IMAGE",
        // Stands before all that is about building: it replaces that of the layers below and not that of its own, with which
        // it clashes. `REPLACED` says the same to those who ask where a value comes from.
        apply: |config, written, _| {
            let finished = Some(checked(written, grammar::image)?);
            let ImageSettings { repository, registry_ca, plain_http, .. } = std::mem::take(&mut config.image);
            config.image = ImageSettings { finished, repository, registry_ca, plain_http, ..ImageSettings::default() };
            Ok(())
        },
        show: |config| or_dash(config.image.finished.as_ref()),
    },
    Key {
        name: "base",
        variable: "FAIRING_BASE",
        apply: |config, written, _| {
            config.image.base = Some(checked(written, grammar::image)?);
            (config.image.finished, config.image.dockerfile) = (None, None);
            Ok(())
        },
        show: |config| or_dash(config.image.base.as_ref()),
    },
    Key {
        name: "dockerfile",
        variable: "FAIRING_DOCKERFILE",
        apply: |config, written, base| {
            config.image.dockerfile = Some(path(written, base, "the path of a Dockerfile")?);
            (config.image.finished, config.image.base) = (None, None);
            Ok(())
        },
        show: |config| or_dash(config.image.dockerfile.as_ref().map(|path| path.display())),
    },
    Key {
        name: "builder",
        variable: "FAIRING_BUILDER",
        apply: |config, written, _| {
            let word = written.text().unwrap_or_default();
            grammar::builder(word)?;
            config.image.builder = if word == "append" { Builder::Append } else { Builder::Docker };
            Ok(())
        },
        show: |config| config.image.builder.to_string(),
    },
    Key {
        name: "link",
        variable: "FAIRING_LINK",
        apply: |config, written, _| {
            let word = written.text().unwrap_or_default();
            grammar::link(word)?;
            config.image.link = if word == "dynamic" { Link::Dynamic } else { Link::Static };
            Ok(())
        },
        show: |config| config.image.link.to_string(),
    },
    Key {
        name: "architectures",
        variable: "FAIRING_ARCHITECTURES",
        apply: |config, written, _| {
            config.image.architectures = list(written, "architectures, such as [\"arm64\"]", grammar::architecture)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.image.architectures),
    },
    Key {
        name: "files",
        variable: "FAIRING_FILES",
        apply: |config, written, _| {
            config.image.files = files(written)?;
            Ok(())
        },
        show: |config| list_or_dash(config.image.files.iter().map(|path| path.display())),
    },
    Key {
        name: "root_certificates",
        variable: "FAIRING_ROOT_CERTIFICATES",
        apply: |config, written, _| {
            config.image.root_certificates = boolean(written)?;
            Ok(())
        },
        show: |config| config.image.root_certificates.to_string(),
    },
    Key {
        name: "registry_ca",
        variable: "FAIRING_REGISTRY_CA",
        apply: |config, written, base| {
            config.image.registry_ca = Some(path(written, base, "the path of a PEM file")?);
            Ok(())
        },
        show: |config| or_dash(config.image.registry_ca.as_ref().map(|path| path.display())),
    },
    Key {
        name: "plain_http",
        variable: "FAIRING_PLAIN_HTTP",
        apply: |config, written, _| {
            config.image.plain_http =
                list(written, "hosts, such as [\"registry.example:5000\"]", grammar::registry_host)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.image.plain_http),
    },
    Key {
        name: "on_disconnect",
        variable: "FAIRING_ON_DISCONNECT",
        apply: |config, written, _| {
            let word = written.text().unwrap_or_default();
            grammar::on_disconnect(word)?;
            config.on_disconnect = if word == "stop" { OnDisconnect::Stop } else { OnDisconnect::Continue };
            Ok(())
        },
        show: |config| config.on_disconnect.to_string(),
    },
    Key {
        name: "namespace",
        variable: "FAIRING_NAMESPACE",
        apply: |config, written, _| {
            config.kubernetes.namespace = Some(checked(written, cluster::namespace)?);
            Ok(())
        },
        show: |config| or_dash(config.kubernetes.namespace.as_ref()),
    },
    Key {
        name: "context",
        variable: "FAIRING_CONTEXT",
        apply: |config, written, _| {
            config.kubernetes.context = Some(checked(written, context)?);
            Ok(())
        },
        show: |config| or_dash(config.kubernetes.context.as_ref()),
    },
    Key {
        name: "launcher",
        variable: "FAIRING_LAUNCHER",
        apply: |config, written, _| {
            config.kubernetes.launcher = Renderer::read(written.text().unwrap_or_default())?;
            Ok(())
        },
        show: |config| config.kubernetes.launcher.to_string(),
    },
    Key {
        name: "deadline",
        variable: "FAIRING_DEADLINE",
        apply: |config, written, _| {
            config.kubernetes.deadline = duration(written, cluster::deadline)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.deadline).to_string(),
    },
    Key {
        name: "keep_result",
        variable: "FAIRING_KEEP_RESULT",
        apply: |config, written, _| {
            config.kubernetes.keep_result = duration(written, cluster::span)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.keep_result).to_string(),
    },
    Key {
        name: "ttl",
        variable: "FAIRING_TTL",
        apply: |config, written, _| {
            config.kubernetes.ttl = duration(written, cluster::span)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.ttl).to_string(),
    },
    Key {
        name: "launch_timeout",
        variable: "FAIRING_LAUNCH_TIMEOUT",
        apply: |config, written, _| {
            config.kubernetes.launch_timeout = duration(written, cluster::deadline)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.launch_timeout).to_string(),
    },
    Key {
        name: "join_timeout",
        variable: "FAIRING_JOIN_TIMEOUT",
        apply: |config, written, _| {
            config.kubernetes.join_timeout = duration(written, cluster::deadline)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.join_timeout).to_string(),
    },
    Key {
        name: "schedule_timeout",
        variable: "FAIRING_SCHEDULE_TIMEOUT",
        apply: |config, written, _| {
            config.kubernetes.schedule_timeout = duration(written, cluster::deadline)?;
            Ok(())
        },
        show: |config| humantime::format_duration(config.kubernetes.schedule_timeout).to_string(),
    },
    Key {
        name: "node_selector",
        variable: "FAIRING_NODE_SELECTOR",
        apply: |config, written, _| {
            config.kubernetes.node_selector =
                pairs(written, "labels of nodes, such as [\"disk=ssd\"]", cluster::selector)?;
            Ok(())
        },
        show: |config| pairs_or_dash(&config.kubernetes.node_selector),
    },
    Key {
        name: "tolerations",
        variable: "FAIRING_TOLERATIONS",
        apply: |config, written, _| {
            config.kubernetes.tolerations =
                read(written, "taints, such as [\"dedicated=training:NoSchedule\"]", Toleration::read)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.kubernetes.tolerations),
    },
    Key {
        name: "spread",
        variable: "FAIRING_SPREAD",
        apply: |config, written, _| {
            config.kubernetes.spread = boolean(written)?;
            Ok(())
        },
        show: |config| config.kubernetes.spread.to_string(),
    },
    Key {
        name: "priority_class",
        variable: "FAIRING_PRIORITY_CLASS",
        apply: |config, written, _| {
            config.kubernetes.priority_class = Some(checked(written, cluster::object)?);
            Ok(())
        },
        show: |config| or_dash(config.kubernetes.priority_class.as_ref()),
    },
    Key {
        name: "runtime_class",
        variable: "FAIRING_RUNTIME_CLASS",
        apply: |config, written, _| {
            config.kubernetes.runtime_class = Some(checked(written, cluster::object)?);
            Ok(())
        },
        show: |config| or_dash(config.kubernetes.runtime_class.as_ref()),
    },
    Key {
        name: "labels",
        variable: "FAIRING_LABELS",
        apply: |config, written, _| {
            config.kubernetes.labels = pairs(written, "labels, such as [\"team=vision\"]", cluster::label)?;
            Ok(())
        },
        show: |config| pairs_or_dash(&config.kubernetes.labels),
    },
    Key {
        name: "annotations",
        variable: "FAIRING_ANNOTATIONS",
        apply: |config, written, _| {
            config.kubernetes.annotations =
                pairs(written, "annotations, such as [\"example.org/note=text\"]", cluster::annotation)?;
            Ok(())
        },
        show: |config| pairs_or_dash(&config.kubernetes.annotations),
    },
    Key {
        name: "image_pull_secrets",
        variable: "FAIRING_IMAGE_PULL_SECRETS",
        apply: |config, written, _| {
            config.kubernetes.image_pull_secrets =
                list(written, "names, such as [\"registry-login\"]", cluster::object)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.kubernetes.image_pull_secrets),
    },
    Key {
        name: "volumes",
        variable: "FAIRING_VOLUMES",
        apply: |config, written, _| {
            config.kubernetes.volumes = volumes(written)?;
            Ok(())
        },
        show: |config| list_or_dash(&config.kubernetes.volumes),
    },
    Key {
        name: "service_account",
        variable: "FAIRING_SERVICE_ACCOUNT",
        apply: |config, written, _| {
            config.kubernetes.service_account = Some(checked(written, cluster::object)?);
            Ok(())
        },
        show: |config| or_dash(config.kubernetes.service_account.as_ref()),
    },
    Key {
        name: "tmp_size",
        variable: "FAIRING_TMP_SIZE",
        apply: |config, written, _| {
            config.kubernetes.tmp_size = memory(written)?;
            Ok(())
        },
        show: |config| config.kubernetes.tmp_size.to_string(),
    },
    Key {
        name: "runs",
        variable: "FAIRING_RUNS",
        apply: |config, written, base| {
            config.runs = path(written, base, FOLDER)?;
            Ok(())
        },
        show: |config| config.runs.display().to_string(),
    },
    Key {
        name: "cache",
        variable: "FAIRING_CACHE",
        apply: |config, written, base| {
            config.cache = path(written, base, FOLDER)?;
            Ok(())
        },
        show: |config| config.cache.display().to_string(),
    },
    Key {
        name: "detach",
        variable: "FAIRING_DETACH",
        apply: |config, written, _| {
            config.kubernetes.detach = boolean(written)?;
            Ok(())
        },
        show: |config| config.kubernetes.detach.to_string(),
    },
    Key {
        name: "another",
        variable: "FAIRING_ANOTHER",
        apply: |config, written, _| {
            config.kubernetes.another = boolean(written)?;
            Ok(())
        },
        show: |config| config.kubernetes.another.to_string(),
    },
    Key {
        name: "check_nodes",
        variable: "FAIRING_CHECK_NODES",
        apply: |config, written, _| {
            config.kubernetes.check_nodes = boolean(written)?;
            Ok(())
        },
        show: |config| config.kubernetes.check_nodes.to_string(),
    },
    Key {
        name: "dry_run",
        variable: "FAIRING_DRY_RUN",
        apply: |config, written, _| {
            config.dry_run = boolean(written)?;
            Ok(())
        },
        show: |config| config.dry_run.to_string(),
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
        name: "resources.worker.gpu",
        variable: "FAIRING_WORKER_GPU",
        apply: |config, written, _| {
            config.worker.gpu = gpu(written)?;
            Ok(())
        },
        show: |config| or_dash(config.worker.gpu.as_ref()),
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
    Key {
        name: "resources.ps.gpu",
        variable: "FAIRING_PS_GPU",
        apply: |config, written, _| {
            config.ps.gpu = gpu(written)?;
            Ok(())
        },
        show: |config| or_dash(config.ps.gpu.as_ref()),
    },
];

/// The tables of `Fairing.toml` that hold keys.
pub(super) static TABLES: [&str; 3] = ["resources", "resources.worker", "resources.ps"];

/// What a key whose value is a folder expects.
const FOLDER: &str = "the path of a folder";

impl Key {
    /// The key of this name.
    pub(super) fn named(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn list_or_dash(values: impl IntoIterator<Item = impl ToString>) -> String {
    let values: Vec<_> = values.into_iter().map(|value| value.to_string()).collect();
    or_dash((!values.is_empty()).then(|| values.join(",")))
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

/// The path itself, not yet meant from anywhere.
fn plain_path(written: &Written) -> Option<&Path> {
    match written {
        Written::Path(path) => Some(path),
        _ => written.text().map(Path::new),
    }
}

fn path(written: &Written, base: &Path, expected: &str) -> Result<PathBuf, String> {
    let path = plain_path(written).filter(|path| !path.as_os_str().is_empty()).ok_or(expected)?;
    // `components` drops the `.` of `./data`, so that one folder has one spelling in messages.
    Ok(base.join(path).components().collect())
}

/// A text that a rule of the grammar lets pass.
fn checked(written: &Written, rule: Rule) -> Result<String, String> {
    // What is no text is empty to the rule, which says what it wants.
    let text = written.text().unwrap_or_default();
    rule(text).map(|()| text.to_owned())
}

/// Whether `text` may name a context of a kubeconfig, which takes almost anything.
fn context(text: &str) -> Result<(), String> {
    if text.trim().is_empty() || text.contains(char::is_control) {
        return Err("the name of a context in the kubeconfig".to_owned());
    }
    Ok(())
}

fn boolean(written: &Written) -> Result<bool, String> {
    match written {
        Written::Boolean(value) => Ok(*value),
        Written::Bare(text) if ["true", "1"].contains(&text.trim()) => Ok(true),
        Written::Bare(text) if ["false", "0"].contains(&text.trim()) => Ok(false),
        Written::Text(text) if ["true", "false"].contains(&text.as_str()) => Err(format!("`{text}` without quotes")),
        _ => Err("`true` or `false`".to_owned()),
    }
}

/// The entries of a list, none twice: an array, or the parts of a variable between its commas.
fn entries(written: &Written, expected: &str) -> Result<Vec<Written>, String> {
    let entries = match written {
        Written::Bare(text) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            parts.map(|part| Written::Text(part.to_owned())).collect()
        }
        Written::List(entries) => entries.clone(),
        _ => return Err(format!("a list of {expected}")),
    };
    for (index, entry) in entries.iter().enumerate() {
        if plain_path(entry).is_none() {
            return Err(format!("a list of {expected}"));
        }
        if entries[..index].contains(entry) {
            return Err(format!("{entry} once"));
        }
    }
    Ok(entries)
}

fn list(written: &Written, expected: &str, rule: Rule) -> Result<Vec<String>, String> {
    let entries = entries(written, expected)?;
    let entry = |entry: &Written| checked(entry, rule).map_err(|expected| format!("for {entry} {expected}"));
    entries.iter().map(entry).collect()
}

fn files(written: &Written) -> Result<Vec<PathBuf>, String> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries(written, "paths, such as [\"labels.txt\"]")? {
        let path = plain_path(&entry).expect("the entries of a list are texts or paths");
        grammar::extra_file(path).map_err(|expected| format!("for {entry} {expected}"))?;
        // `a` and `./a` are one file.
        let path = path.components().filter(|part| *part != Component::CurDir).collect();
        if !files.contains(&path) {
            files.push(path);
        }
    }
    Ok(files)
}

/// The target, if its feature, which has its name, is compiled in.
fn compiled_in(target: Target, is_compiled_in: bool) -> Result<Target, String> {
    match is_compiled_in {
        true => Ok(target),
        false => Err(format!("another target (fairing-core is compiled without its feature `{target}`)")),
    }
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

/// GPUs; none if their number is 0.
fn gpu(written: &Written) -> Result<Option<Gpu>, String> {
    let text = match written {
        Written::Integer(number) => number.to_string(),
        _ => written.text().unwrap_or_default().to_owned(),
    };
    let gpu = text.parse::<Gpu>().map_err(|error| error.expected())?;
    Ok(Some(gpu).filter(|gpu| gpu.count() > 0))
}

fn rejoin(written: &Written) -> Result<Duration, String> {
    let duration = duration(written, grammar::rejoin)?;
    // Replicas are told milliseconds: all must have the same time.
    Ok(Duration::from_secs(duration.as_secs()) + Duration::from_millis(duration.subsec_millis().into()))
}

/// A span of time that a rule lets pass.
fn duration(written: &Written, rule: fn(Duration) -> Result<(), String>) -> Result<Duration, String> {
    let duration = match written {
        Written::Duration(duration) => *duration,
        Written::Integer(number) => grammar::duration(&number.to_string())?,
        _ => grammar::duration(written.text().unwrap_or_default())?,
    };
    rule(duration).map(|()| duration)
}

/// What each entry of a list is read as.
fn read<T>(written: &Written, expected: &str, rule: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let entry =
        |entry: &Written| rule(entry.text().unwrap_or_default()).map_err(|expected| format!("for {entry} {expected}"));
    entries(written, expected)?.iter().map(entry).collect()
}

/// A list of `key=value`, no key twice.
fn pairs(
    written: &Written,
    expected: &str,
    rule: fn(&str) -> Result<(&str, &str), String>,
) -> Result<BTreeMap<String, String>, String> {
    let mut pairs = BTreeMap::new();
    for entry in entries(written, expected)? {
        let (key, value) =
            rule(entry.text().unwrap_or_default()).map_err(|expected| format!("for {entry} {expected}"))?;
        if pairs.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(format!("`{key}` once"));
        }
    }
    Ok(pairs)
}

fn pairs_or_dash(pairs: &BTreeMap<String, String>) -> String {
    list_or_dash(pairs.iter().map(|(key, value)| format!("{key}={value}")))
}

fn volumes(written: &Written) -> Result<Vec<Volume>, String> {
    let volumes = read(written, "volumes, such as [\"pvc:datasets:/data:ro\"]", Volume::read)?;
    let mut paths = BTreeSet::new();
    match volumes.iter().find(|volume| !paths.insert(&volume.path)) {
        Some(volume) => Err(format!("one volume at `{}`", volume.path)),
        None => Ok(volumes),
    }
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
