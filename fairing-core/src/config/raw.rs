//! What the user typed, layer by layer, before anyone asks what it means.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeInteger, DeTable, DeValue};

use super::keys::{KEYS, Key, TABLES};
use super::surroundings::FILE_NAME;
use super::{Attribute, AttributeCpu, Env, LaunchOptions, Origin, Problem, grammar};
use crate::topology::Mode;
use crate::topology::tf_config::{IDENTITY_FOLDER, PLAINTEXT};

/// Variables that the launcher sets for its replicas.
const OWN_VARIABLES: &str = "FAIRING_PLACEMENT_";

/// Every setting as written, a later layer behind an earlier one, and what is no setting at all.
#[derive(Debug, Default)]
pub(super) struct RawConfig {
    pub(super) entries: Vec<Entry>,
    pub(super) problems: Vec<Problem>,
}

/// One setting as written.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: &'static Key,
    pub(super) written: Written,
    pub(super) origin: Origin,
}

/// A value as written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Written {
    Integer(i128),
    Boolean(bool),
    /// A number with a point, as its digits stand there.
    Decimal(String),
    /// A text in quotes.
    Text(String),
    /// The value of a variable, which has no quotes to tell a text from a number.
    Bare(String),
    /// A path given in code.
    Path(PathBuf),
    /// A span of time given in code.
    Duration(Duration),
    List(Vec<Written>),
    /// Anything that no key takes, in words.
    Other(&'static str),
}

impl Entry {
    /// The place of its layer among the layers.
    pub(super) fn layer(&self) -> u8 {
        self.origin.place().0
    }
}

impl Written {
    /// The whole number, if it is one.
    pub(super) fn integer(&self) -> Option<i128> {
        match self {
            Written::Integer(number) => Some(*number),
            Written::Bare(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Written::Text(text) | Written::Bare(text) => Some(text),
            _ => None,
        }
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Written::Integer(number) => number.fmt(f),
            Written::Boolean(value) => write!(f, "`{value}`"),
            Written::Decimal(digits) => f.write_str(digits),
            Written::Text(text) | Written::Bare(text) => write!(f, "{:?}", grammar::shown(text)),
            Written::Path(path) => write!(f, "{path:?}"),
            Written::Duration(duration) => humantime::format_duration(*duration).fmt(f),
            Written::List(entries) => {
                let entries: Vec<_> = entries.iter().map(Written::to_string).collect();
                write!(f, "[{}]", entries.join(", "))
            }
            Written::Other(words) => f.write_str(words),
        }
    }
}

impl RawConfig {
    /// Adds what stands in the attribute.
    pub(super) fn attribute(&mut self, attribute: &Attribute) {
        let text = |text: &str| Written::Text(text.to_owned());
        let list = |entries: &[&str]| Written::List(entries.iter().map(|entry| text(entry)).collect());
        let cpu = |cpu: AttributeCpu| match cpu {
            AttributeCpu::Cores(count) => Written::Integer(count.into()),
            AttributeCpu::Text(digits) => text(digits),
        };
        self.layer(
            &Origin::Attribute,
            [
                ("workers", attribute.workers.map(|count| Written::Integer(count.into()))),
                ("ps", attribute.ps.map(|count| Written::Integer(count.into()))),
                ("mode", attribute.mode.map(text)),
                ("staleness", attribute.staleness.map(|steps| Written::Integer(steps.into()))),
                ("rejoin", attribute.rejoin.map(text)),
                ("seed", attribute.seed.map(|seed| Written::Integer(seed.into()))),
                ("env", attribute.env.map(list)),
                ("data", attribute.data.map(text)),
                ("target", attribute.target.map(text)),
                ("repository", attribute.repository.map(text)),
                ("image", attribute.image.map(text)),
                ("base", attribute.base.map(text)),
                ("dockerfile", attribute.dockerfile.map(text)),
                ("builder", attribute.builder.map(text)),
                ("link", attribute.link.map(text)),
                ("architectures", attribute.architectures.map(list)),
                ("files", attribute.files.map(list)),
                ("root_certificates", attribute.root_certificates.map(Written::Boolean)),
                ("registry_ca", attribute.registry_ca.map(text)),
                ("plain_http", attribute.plain_http.map(list)),
                ("on_disconnect", attribute.on_disconnect.map(text)),
                ("namespace", attribute.namespace.map(text)),
                // Which cluster it is depends on the machine of whoever launches, not on the program.
                ("context", None),
                ("launcher", attribute.launcher.map(text)),
                ("deadline", attribute.deadline.map(text)),
                ("keep_result", attribute.keep_result.map(text)),
                ("ttl", attribute.ttl.map(text)),
                ("launch_timeout", attribute.launch_timeout.map(text)),
                ("join_timeout", attribute.join_timeout.map(text)),
                ("schedule_timeout", attribute.schedule_timeout.map(text)),
                ("node_selector", attribute.node_selector.map(list)),
                ("tolerations", attribute.tolerations.map(list)),
                ("spread", attribute.spread.map(Written::Boolean)),
                ("priority_class", attribute.priority_class.map(text)),
                ("runtime_class", attribute.runtime_class.map(text)),
                ("labels", attribute.labels.map(list)),
                ("annotations", attribute.annotations.map(list)),
                ("image_pull_secrets", attribute.image_pull_secrets.map(list)),
                ("volumes", attribute.volumes.map(list)),
                ("service_account", attribute.service_account.map(text)),
                ("tmp_size", attribute.tmp_size.map(text)),
                ("runs", attribute.runs.map(text)),
                ("cache", attribute.cache.map(text)),
                // Whether a launch is a rehearsal, or is waited for, is nothing that stands in a program.
                ("detach", None),
                ("another", None),
                ("check_nodes", None),
                ("dry_run", None),
                ("resources.worker.cpu", attribute.worker_cpu.map(cpu)),
                ("resources.worker.memory", attribute.worker_memory.map(text)),
                ("resources.worker.gpu", attribute.worker_gpu.map(text)),
                ("resources.ps.cpu", attribute.ps_cpu.map(cpu)),
                ("resources.ps.memory", attribute.ps_memory.map(text)),
                ("resources.ps.gpu", attribute.ps_gpu.map(text)),
            ],
        );
    }

    /// Adds what stands in `Fairing.toml`, whose text is `text`, in the folder `manifest`.
    pub(super) fn file(&mut self, text: &str, manifest: &Path) {
        let path = manifest.join(FILE_NAME);
        let origin = |span: Range<usize>| {
            let line = text.bytes().take(span.start).filter(|byte| *byte == b'\n').count() + 1;
            Origin::File { path: path.clone(), line }
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let origin = origin(error.span().unwrap_or_default());
            // The parser's words may be several lines; a problem is one.
            let message = error.message().lines().collect::<Vec<_>>().join("; ");
            self.problems.push(Problem::Syntax { origin, message });
        }
        let mut found = Vec::new();
        flatten("", table.get_ref(), &mut found);
        // The parser sorts by name; a reader of the messages goes through the file from its top.
        found.sort_by_key(|(_, span, _)| span.start);
        for (name, span, written) in found {
            let table = TABLES.iter().find(|table| **table == name);
            match (Key::named(&name), table) {
                (Some(key), _) => self.entries.push(Entry { key, written, origin: origin(span) }),
                (None, Some(key)) => {
                    let (found, expected) = (written.to_string(), "a table".to_owned());
                    self.problems.push(Problem::Value { origin: origin(span), key, found, expected });
                }
                (None, None) => {
                    let suggestion = similar_key(&name);
                    self.problems.push(Problem::Unknown { origin: origin(span), name, suggestion });
                }
            }
        }
    }

    /// Adds what the `FAIRING_*` variables say.
    pub(super) fn variables(&mut self, env: &impl Env) {
        let mut names = env.names();
        names.retain(|name| name.starts_with("FAIRING_") && !name.starts_with(OWN_VARIABLES));
        // They say how a replica is reached, not how a run is to be.
        names.retain(|name| ![IDENTITY_FOLDER, PLAINTEXT].contains(&name.as_str()));
        names.sort();
        for name in names {
            match (KEYS.iter().find(|key| key.variable == name), env.get(&name)) {
                (Some(key), Some(value)) => {
                    let (written, origin) = (Written::Bare(value), Origin::Variable(name));
                    self.entries.push(Entry { key, written, origin });
                }
                (Some(key), None) => {
                    let (found, expected) = ("not Unicode".to_owned(), "readable text".to_owned());
                    let origin = Origin::Variable(name);
                    self.problems.push(Problem::Value { origin, key: key.name, found, expected });
                }
                (None, _) => {
                    let suggestion = similar_variable(&name);
                    let origin = Origin::Variable(name.clone());
                    self.problems.push(Problem::Unknown { origin, name, suggestion });
                }
            }
        }
    }

    /// Adds what the code says.
    pub(super) fn options(&mut self, options: &LaunchOptions) {
        let path = |path: &Option<PathBuf>| path.clone().map(Written::Path);
        let text = |value: &dyn ToString| Written::Text(value.to_string());
        let string = |value: &Option<String>| value.clone().map(Written::Text);
        let list = |entries: &Option<Vec<String>>| {
            entries.as_ref().map(|entries| Written::List(entries.iter().map(|entry| text(entry)).collect()))
        };
        let paths = |paths: &Option<Vec<PathBuf>>| {
            paths.as_ref().map(|paths| Written::List(paths.iter().cloned().map(Written::Path).collect()))
        };
        let (mode, staleness) = match options.mode {
            None => (None, None),
            Some(Mode::Sync) => (Some("sync"), None),
            Some(Mode::Async) => (Some("async"), None),
            Some(Mode::Bounded { staleness }) => (Some("async"), Some(staleness)),
        };
        self.layer(
            &Origin::Options,
            [
                ("workers", options.workers.map(|count| Written::Integer(count.into()))),
                ("ps", options.ps.map(|count| Written::Integer(count.into()))),
                ("mode", mode.map(|mode| text(&mode))),
                ("staleness", staleness.map(|steps| Written::Integer(steps.into()))),
                ("rejoin", options.rejoin.map(Written::Duration)),
                ("seed", options.seed.map(|seed| Written::Integer(seed.into()))),
                ("env", list(&options.env)),
                ("data", path(&options.data)),
                ("target", options.target.map(|target| text(&target))),
                ("repository", string(&options.repository)),
                ("image", string(&options.image)),
                ("base", string(&options.base)),
                ("dockerfile", path(&options.dockerfile)),
                ("builder", options.builder.map(|builder| text(&builder))),
                ("link", options.link.map(|link| text(&link))),
                ("architectures", list(&options.architectures)),
                ("files", paths(&options.files)),
                ("root_certificates", options.root_certificates.map(Written::Boolean)),
                ("registry_ca", path(&options.registry_ca)),
                ("plain_http", list(&options.plain_http)),
                ("on_disconnect", options.on_disconnect.map(|on_disconnect| text(&on_disconnect))),
                ("namespace", string(&options.namespace)),
                ("context", string(&options.context)),
                ("launcher", options.launcher.map(|launcher| text(&launcher))),
                ("deadline", options.deadline.map(Written::Duration)),
                ("keep_result", options.keep_result.map(Written::Duration)),
                ("ttl", options.ttl.map(Written::Duration)),
                ("launch_timeout", options.launch_timeout.map(Written::Duration)),
                ("join_timeout", options.join_timeout.map(Written::Duration)),
                ("schedule_timeout", options.schedule_timeout.map(Written::Duration)),
                ("node_selector", list(&options.node_selector)),
                ("tolerations", list(&options.tolerations)),
                ("spread", options.spread.map(Written::Boolean)),
                ("priority_class", string(&options.priority_class)),
                ("runtime_class", string(&options.runtime_class)),
                ("labels", list(&options.labels)),
                ("annotations", list(&options.annotations)),
                ("image_pull_secrets", list(&options.image_pull_secrets)),
                ("volumes", list(&options.volumes)),
                ("service_account", string(&options.service_account)),
                ("tmp_size", options.tmp_size.map(|size| text(&size))),
                ("runs", path(&options.runs)),
                ("cache", path(&options.cache)),
                ("detach", options.detach.map(Written::Boolean)),
                ("another", options.another.map(Written::Boolean)),
                ("check_nodes", options.check_nodes.map(Written::Boolean)),
                ("dry_run", options.dry_run.map(Written::Boolean)),
                ("resources.worker.cpu", options.worker.cpu.map(|cpu| text(&cpu))),
                ("resources.worker.memory", options.worker.memory.map(|memory| text(&memory))),
                ("resources.worker.gpu", options.worker.gpu.as_ref().map(|gpu| text(gpu))),
                ("resources.ps.cpu", options.ps_resources.cpu.map(|cpu| text(&cpu))),
                ("resources.ps.memory", options.ps_resources.memory.map(|memory| text(&memory))),
                ("resources.ps.gpu", options.ps_resources.gpu.as_ref().map(|gpu| text(gpu))),
            ],
        );
    }

    /// A layer that is a struct has every key; the type of the array keeps it complete.
    fn layer(&mut self, origin: &Origin, values: [(&str, Option<Written>); KEYS.len()]) {
        self.entries.extend(values.into_iter().filter_map(|(name, written)| {
            let key = Key::named(name).expect("the layers and the table of keys have the same names");
            Some(Entry { key, written: written?, origin: origin.clone() })
        }));
    }
}

/// The leaves of a TOML table under dotted names, each with the span of its key. A table is entered only where a key lies
/// below it, so that what is unknown is named as a whole.
fn flatten(prefix: &str, table: &DeTable<'_>, found: &mut Vec<(String, Range<usize>, Written)>) {
    for (key, value) in table {
        let name = format!("{prefix}{}", key.get_ref());
        match value.get_ref() {
            DeValue::Table(table) if TABLES.contains(&name.as_str()) => flatten(&format!("{name}."), table, found),
            value => found.push((name, key.span(), written(value))),
        }
    }
}

fn written(value: &DeValue<'_>) -> Written {
    match value {
        DeValue::String(text) => Written::Text(text.clone().into_owned()),
        DeValue::Integer(number) => integer(number),
        DeValue::Float(number) => Written::Decimal(number.as_str().to_owned()),
        DeValue::Boolean(value) => Written::Boolean(*value),
        DeValue::Datetime(_) => Written::Other("a date"),
        DeValue::Array(entries) => Written::List(entries.iter().map(|entry| written(entry.get_ref())).collect()),
        DeValue::Table(_) => Written::Other("a table"),
    }
}

fn integer(number: &DeInteger<'_>) -> Written {
    match i128::from_str_radix(number.as_str(), number.radix()) {
        Ok(number) => Written::Integer(number),
        Err(_) => Written::Other("a number out of range"),
    }
}

/// The key that `name` may have meant: the resources are first looked for without what stands before them.
fn similar_key(name: &str) -> Option<String> {
    let misplaced = |key: &&str| key.strip_prefix("resources.") == Some(name);
    let all = || KEYS.iter().map(|key| key.name).chain(TABLES);
    all().find(misplaced).or_else(|| grammar::nearest(name, all())).map(str::to_owned)
}

/// The variable that `name` may have meant, compared without the prefix that all of them have.
fn similar_variable(name: &str) -> Option<String> {
    let bare = |variable: &'static str| variable.trim_start_matches("FAIRING_");
    let meant = grammar::nearest(name.trim_start_matches("FAIRING_"), KEYS.iter().map(|key| bare(key.variable)))?;
    Some(format!("FAIRING_{meant}"))
}
