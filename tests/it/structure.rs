//! The arrows between fairing-core's modules, read from its sources.
//!
//! ```text
//! config     topology   exit
//! relay      lifeline   observe    image      secure
//! registry   protocol   reactor
//! launch     runtime
//! run        training   __private
//! ```
//!
//! A module imports from rows above its own and from what [`ARROWS`] lists within a row; `launch` and `runtime` never
//! import each other. `lib.rs` and `prelude.rs` only re-export and are imported by nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module of the crate's root may name of the others: a module, or one item of it.
const ARROWS: [(&str, &[&str]); 18] = [
    ("build", &[]),
    ("exit", &[]),
    ("config", &["topology"]),
    ("topology", &["config::Env"]),
    ("lifeline", &["config::Env", "config::ProcessEnv", "exit", "relay", "topology"]),
    ("observe", &["config::Env", "topology"]),
    ("image", &[]),
    ("secure", &["topology"]),
    ("reactor", &[]),
    ("relay", &["config::Env", "config::ProcessEnv", "exit"]),
    ("registry", &["config::Env", "image"]),
    ("protocol", &["observe", "secure", "topology"]),
    (
        "launch",
        &[
            "config::Env",
            "config::ProcessEnv",
            "exit",
            "image",
            "lifeline",
            "observe",
            "reactor",
            "registry::Login",
            "relay",
            "topology",
        ],
    ),
    ("runtime", &["config::Env", "config::ProcessEnv", "observe", "protocol", "topology"]),
    (
        "run",
        &[
            "__private",
            "build",
            "config",
            "exit",
            "launch",
            "lifeline",
            "observe",
            "image",
            "protocol",
            "reactor",
            "registry",
            "runtime",
            "secure",
            "topology",
            "training",
        ],
    ),
    ("training", &["__private", "config", "run", "runtime", "topology"]),
    ("fuzzing", &["protocol", "runtime"]),
    ("__private", &["config", "exit", "run", "secure", "training"]),
];

/// These name everything and are named by nobody.
const ROOT: [&str; 2] = ["lib", "prelude"];

#[test]
fn every_import_follows_an_arrow() {
    let sources = sources();
    let root = Root::read(&sources);
    let known: BTreeSet<&str> = ARROWS.iter().map(|(module, _)| *module).chain(ROOT).collect();
    let mut used = BTreeSet::new();
    let mut offenders = Offenders::default();
    for source in &sources {
        let module = source.module[0].as_str();
        if !known.contains(module) {
            offenders.add(source, 1, &format!("module `{module}` is not in the table of arrows"));
        }
        if ROOT.contains(&module) {
            continue;
        }
        let allowed = ARROWS.iter().find(|(name, _)| *name == module).map_or(&[] as &[&str], |(_, allowed)| allowed);
        for Named { path, line } in source.paths() {
            let Some(path) = root.at_home(path) else {
                offenders.add(source, line, &format!("`{module}` imports everything, or a name that `lib.rs` lacks"));
                continue;
            };
            if path[0] == module {
                continue;
            }
            let name = path.join("::");
            match allowed.iter().find(|arrow| name == **arrow || name.starts_with(&format!("{arrow}::"))) {
                Some(arrow) => _ = used.insert((module.to_owned(), *arrow)),
                None => offenders.add(source, line, &format!("`{module}` may not import `{name}`")),
            }
        }
    }
    offenders.none("the arrows between the modules");
    for (module, allowed) in ARROWS {
        for arrow in allowed {
            assert!(used.contains(&(module.to_owned(), *arrow)), "`{module}` no longer needs its arrow to `{arrow}`");
        }
    }
}

#[test]
fn only_one_file_reads_the_process_environment() {
    let reads = |tokens: &[Token]| {
        let ["env", "::", name] = names(tokens) else { return None };
        let reads = ["var", "var_os", "vars", "vars_os", "set_var", "remove_var"].contains(&name);
        reads.then(|| format!("`env::{name}` goes through `config::Env`"))
    };
    only_in(&["config/env.rs"], 3, reads);
}

#[test]
fn only_the_adapter_names_burn() {
    let names_burn = |tokens: &[Token]| {
        let [crate_or_module, separator, "burn", "::"] = names(tokens) else { return None };
        let own = separator == "::" && ["crate", "runtime", "super"].contains(&crate_or_module);
        (!own).then(|| "burn is known to its adapter only".to_owned())
    };
    only_in(&["runtime/burn.rs"], 4, names_burn);
}

#[test]
fn bytes_of_numbers_are_written_where_formats_are_defined() {
    let converts = |tokens: &[Token]| {
        let [name] = names(tokens);
        let converts = (name.starts_with("to_") || name.starts_with("from_")) && name.ends_with("e_bytes");
        converts.then(|| format!("`{name}` belongs to the module of a format"))
    };
    // The frames; the length before the payload in a replica's pipe; a worker's count of examples in a collective;
    // TensorBoard's records; gzip's frame, programs, and the loader's cache.
    let formats = [
        "protocol/frame.rs",
        "lifeline.rs",
        "runtime/worker.rs",
        "observe/tensorboard.rs",
        "image/compress.rs",
        "image/elf.rs",
        "image/loader_cache.rs",
    ];
    only_in(&formats, 1, converts);
}

#[test]
fn only_launchers_and_two_questions_start_processes() {
    let starts = |tokens: &[Token]| {
        (names(tokens) == ["Command", "::", "new"]).then(|| "processes are started by a launcher".to_owned())
    };
    // Replicas; who cleans up after a dead launcher; git about the commit; cargo about the user's package, and to build it.
    only_in(&["launch/local.rs", "launch/docker/guardian.rs", "observe/git.rs", "image/static_build.rs"], 3, starts);
}

#[test]
fn configuration_and_topology_do_no_io() {
    let mut offenders = Offenders::default();
    for source in &sources() {
        let pure = ["config", "topology"].contains(&source.module[0].as_str());
        if !pure || ["config/env.rs", "config/surroundings.rs"].contains(&&*source.name) {
            continue;
        }
        for tokens in source.tokens.windows(3) {
            if let ["std", "::", name @ ("fs" | "env" | "net" | "process" | "os" | "thread" | "{")] = names(tokens) {
                offenders.add(source, tokens[0].line, &format!("`std::{name}` in a pure module"));
            }
        }
    }
    offenders.none("what is pure");
}

#[test]
fn the_macros_do_not_depend_on_the_library_or_on_burn() {
    let manifest = fs::read_to_string(workspace().join("fairing-macros/Cargo.toml")).unwrap();
    let mut table = "";
    for (number, line) in manifest.lines().enumerate() {
        let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
        match line.strip_prefix('[') {
            Some(header) => table = header.trim_end_matches(']'),
            None if table == "dev-dependencies" && name == "fairing-core" => (),
            None => assert!(
                !["fairing-core", "burn"].contains(&name),
                "fairing-macros/Cargo.toml:{}: `{name}` stands in `[{table}]`",
                number + 1
            ),
        }
    }
}

#[test]
fn the_scanner_sees_through_groups_strings_and_comments() {
    let text = r##"
        use crate::{launch::{self, plan::Plan as P}, observe::*};
        // crate::comment and /* */
        const A: &str = "crate::string \" crate::string";
        const B: &str = r#"crate::raw " crate::raw"#;
        const C: char = '"';
        pub(crate) fn f<'a>(x: &'a crate::topology::Rank) -> super::sibling::Thing {}
        mod tests { use super::*; use super::super::super::launch; }
    "##;
    let source = Source::new("observe/live.rs", text);
    let found: Vec<_> = source.paths().into_iter().map(|named| (named.line, named.path.join("::"))).collect();
    let expected = [
        (2, "launch"),
        (2, "launch::plan::Plan"),
        (2, "observe::*"),
        (7, "topology::Rank"),
        (7, "observe::sibling::Thing"),
        (8, "observe::live::*"),
        (8, "launch"),
    ];
    assert_eq!(found, expected.map(|(line, path)| (line, path.to_owned())));
}

/// Fails with every place outside `files` where `rule` says something of `width` tokens in a row. What a file's own tests do,
/// which stand at its end, is their business.
#[track_caller]
fn only_in(files: &[&str], width: usize, rule: impl Fn(&[Token]) -> Option<String>) {
    let mut offenders = Offenders::default();
    let mut needed = BTreeSet::new();
    for source in &sources() {
        let tests = source.tokens.windows(3).position(|tokens| names(tokens) == ["mod", "tests", "{"]);
        for tokens in source.tokens[..tests.unwrap_or(source.tokens.len())].windows(width) {
            let Some(complaint) = rule(tokens) else { continue };
            if files.contains(&&*source.name) {
                needed.insert(source.name.clone());
            } else {
                offenders.add(source, tokens[0].line, &complaint);
            }
        }
    }
    offenders.none("what only some files do");
    for file in files {
        assert!(needed.contains(*file), "fairing-core/src/{file} no longer needs its exception");
    }
}

#[derive(Default)]
struct Offenders(String);

impl Offenders {
    fn add(&mut self, source: &Source, line: usize, complaint: &str) {
        writeln!(self.0, "fairing-core/src/{}:{line}: {complaint}", source.name).unwrap();
    }

    #[track_caller]
    fn none(self, rule: &str) {
        assert!(self.0.is_empty(), "against {rule}:\n{}", self.0);
    }
}

/// What the crate's root offers: its modules, and items that are at home in one of them.
struct Root {
    modules: BTreeSet<String>,
    items: BTreeMap<String, Vec<String>>,
}

impl Root {
    fn read(sources: &[Source]) -> Self {
        let modules = sources.iter().map(|source| source.module[0].clone()).collect::<BTreeSet<_>>();
        let lib = sources.iter().find(|source| source.name == "lib.rs").expect("a crate has a root");
        let mut items = BTreeMap::new();
        for (at, token) in lib.tokens.iter().enumerate() {
            if token.text != "use" {
                continue;
            }
            let mut paths = Vec::new();
            tree(&lib.tokens, at + 1, Vec::new(), &mut paths);
            for Named { path, .. } in paths {
                items.insert(path.last().expect("a path names something").clone(), path);
            }
        }
        Self { modules, items }
    }

    /// The path by which an item of the root is known at home; `None` for what the root does not offer.
    fn at_home(&self, path: Vec<String>) -> Option<Vec<String>> {
        let first = path.first()?;
        if self.modules.contains(first) { Some(path) } else { self.items.get(first).cloned() }
    }
}

/// One file: its name below `src`, the module that it is, and its tokens.
struct Source {
    name: String,
    module: Vec<String>,
    tokens: Vec<Token>,
}

struct Token {
    text: String,
    line: usize,
}

/// A path from the crate's root, and where it stands.
struct Named {
    path: Vec<String>,
    line: usize,
}

impl Source {
    fn new(name: &str, text: &str) -> Self {
        let module = name.trim_end_matches(".rs").trim_end_matches("/mod").split('/').map(str::to_owned).collect();
        Self { name: name.to_owned(), module, tokens: tokens(text) }
    }

    /// Every path that starts with `crate`, `super` or this crate's name.
    fn paths(&self) -> Vec<Named> {
        let mut paths = Vec::new();
        // The name of each inline module that is open, and nothing for other braces.
        let mut open: Vec<Option<String>> = Vec::new();
        let mut at = 0;
        while at < self.tokens.len() {
            match names(&self.tokens[at..(at + 2).min(self.tokens.len())]) {
                ["{", _] => {
                    let text = |back: usize| at.checked_sub(back).map(|at| self.tokens[at].text.as_str());
                    let inline = (text(2) == Some("mod")).then(|| text(1).unwrap_or_default().to_owned());
                    open.push(inline);
                }
                ["}", _] => _ = open.pop(),
                ["crate" | "fairing_core", "::"] => {
                    at = tree(&self.tokens, at + 2, Vec::new(), &mut paths);
                    continue;
                }
                ["super", "::"] => {
                    let mut base: Vec<_> = self.module.iter().chain(open.iter().flatten()).cloned().collect();
                    while self.tokens[at].text == "super" {
                        base.pop();
                        at += 1;
                        if self.tokens[at].text == "::" {
                            at += 1;
                        }
                    }
                    at = tree(&self.tokens, at, base, &mut paths);
                    continue;
                }
                _ => (),
            }
            at += 1;
        }
        paths
    }
}

/// Reads what follows a `::`: a path or a group of them. Returns the index after it.
fn tree(tokens: &[Token], mut at: usize, mut path: Vec<String>, paths: &mut Vec<Named>) -> usize {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let line = tokens.get(at).map_or(0, |token| token.line);
    loop {
        match text(at) {
            "{" => {
                at += 1;
                while !["}", ""].contains(&text(at)) {
                    at = tree(tokens, at, path.clone(), paths);
                    if text(at) == "as" {
                        at += 2;
                    }
                    if text(at) == "," {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "self" => at += 1,
            name @ "*" => {
                path.push(name.to_owned());
                at += 1;
            }
            name if !name.is_empty() && name.chars().all(is_word) => {
                path.push(name.to_owned());
                at += 1;
                if text(at) == "::" {
                    at += 1;
                    continue;
                }
            }
            // `pub(in super::super)` or the turbofish of a function.
            _ => (),
        }
        if !path.is_empty() {
            paths.push(Named { path, line });
        }
        return at;
    }
}

fn names<const N: usize>(tokens: &[Token]) -> [&str; N] {
    std::array::from_fn(|at| tokens.get(at).map_or("", |token| token.text.as_str()))
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Words, `::` and single characters; comments, strings and characters are left out.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|character| !is_word(character)).unwrap_or(rest.len());
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string(rest) {
            let (open, close) = (rest.find('"').expect("a raw string has quotes") + 1, format!("\"{hashes}"));
            rest[open..].find(&close).map_or(rest.len(), |end| open + end + close.len())
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            let length = if word > 0 { word } else { first.len_utf8() };
            let length = if rest.starts_with("::") { 2 } else { length };
            if !first.is_whitespace() {
                tokens.push(Token { text: rest[..length].to_owned(), line });
            }
            length
        };
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    tokens
}

/// The hashes of the raw string that `rest` starts with.
fn raw_string(rest: &str) -> Option<&str> {
    let rest = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let quote = rest.find(|character| character != '#')?;
    rest[quote..].starts_with('"').then(|| &rest[..quote])
}

/// Whether a quote opens a character and not a lifetime.
fn is_character(rest: &str) -> bool {
    let mut characters = rest.chars().skip(1);
    characters.next() == Some('\\') || characters.next() == Some('\'')
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return at + 1,
            _ => (),
        }
    }
    rest.len()
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace")
}

fn sources() -> Vec<Source> {
    let root = workspace().join("fairing-core/src");
    let mut folders = vec![root.clone()];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(files.len() > 40, "the sources of fairing-core are not where they should be");
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
        Source::new(name, &fs::read_to_string(path).unwrap())
    };
    files.iter().map(read).collect()
}
