//! The rules: which arguments there are, what they take, and what the attribute can stand on.

use std::path::Path;

use proc_macro2::Span;
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::{Expr, ExprLit, Ident, Item, ItemStruct, Lit, LitBool, LitInt, LitStr, UnOp};

use crate::args::{Args, Argument, Errors, Value};
use crate::cluster;
use crate::grammar::{self, Rule};

/// What is to be written, after every rule holds.
pub(crate) struct Job {
    pub(crate) item: ItemStruct,
    pub(crate) settings: Vec<Setting>,
}

/// One field of `fairing_core`'s `Attribute`.
pub(crate) struct Setting {
    pub(crate) field: Ident,
    pub(crate) value: Checked,
}

/// A value that its key takes.
pub(crate) enum Checked {
    /// A number that was checked here, or one that the compiler will check.
    Number(Number),
    /// Cores as a number.
    Cores(Number),
    /// Cores as a text.
    CpuText(LitStr),
    Text(LitStr),
    Boolean(LitBool),
    List(Vec<LitStr>),
}

pub(crate) enum Number {
    Literal(LitInt),
    Constant {
        expr: Expr,
        kind: Integer,
        /// What to say if it is 0; `None` if it may be.
        zero: Option<String>,
    },
}

/// The type of a number.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Integer {
    U32,
    U64,
}

/// One argument that there is.
struct Key {
    name: &'static str,
    kind: Kind,
    example: &'static str,
}

#[derive(Clone, Copy)]
enum Kind {
    /// A `u32` from 1.
    Count,
    /// A number from 0.
    Number(Integer),
    /// A text that the rule lets pass.
    Text(Rule),
    Boolean,
    /// A list of such things, each a text that the rule lets pass.
    List(&'static str, Rule),
    Cpu,
    Gpu,
}

const fn key(name: &'static str, kind: Kind, example: &'static str) -> Key {
    Key { name, kind, example }
}

/// All but those of [`NOT_OF_A_TYPE`].
const KEYS: [Key; 42] = [
    key("workers", Kind::Count, "workers = 2"),
    key("ps", Kind::Number(Integer::U32), "ps = 1"),
    key("mode", Kind::Text(grammar::mode), "mode = \"async\""),
    key("staleness", Kind::Number(Integer::U32), "staleness = 4"),
    key("rejoin", Kind::Text(|text| grammar::duration(text).and_then(grammar::rejoin)), "rejoin = \"30s\""),
    key("seed", Kind::Number(Integer::U64), "seed = 7"),
    key("env", Kind::List("names", grammar::variable_name), "env = [\"HF_HOME\"]"),
    key("data", Kind::Text(|text| path(text, "a folder")), "data = \"data\""),
    key("target", Kind::Text(grammar::target), "target = \"local\""),
    key("repository", Kind::Text(grammar::repository), "repository = \"registry.example/team/name\""),
    key("image", Kind::Text(grammar::image), "image = \"registry.example/team/name:1\""),
    key("base", Kind::Text(grammar::image), "base = \"debian:12\""),
    key("dockerfile", Kind::Text(|text| path(text, "a Dockerfile")), "dockerfile = \"Dockerfile\""),
    key("builder", Kind::Text(grammar::builder), "builder = \"docker\""),
    key("link", Kind::Text(grammar::link), "link = \"static\""),
    key("architectures", Kind::List("architectures", grammar::architecture), "architectures = [\"arm64\"]"),
    key("files", Kind::List("paths", |text| grammar::extra_file(Path::new(text))), "files = [\"labels.txt\"]"),
    key("root_certificates", Kind::Boolean, "root_certificates = true"),
    key("registry_ca", Kind::Text(|text| path(text, "a PEM file")), "registry_ca = \"ca.pem\""),
    key("plain_http", Kind::List("hosts", grammar::registry_host), "plain_http = [\"registry.example:5000\"]"),
    key("on_disconnect", Kind::Text(grammar::on_disconnect), "on_disconnect = \"stop\""),
    key("namespace", Kind::Text(cluster::namespace), "namespace = \"team-a\""),
    key("launcher", Kind::Text(cluster::launcher), "launcher = \"jobset\""),
    key("deadline", Kind::Text(|text| grammar::duration(text).and_then(cluster::deadline)), "deadline = \"2h\""),
    key("keep_result", Kind::Text(|text| grammar::duration(text).and_then(cluster::span)), "keep_result = \"10m\""),
    key("ttl", Kind::Text(|text| grammar::duration(text).and_then(cluster::span)), "ttl = \"1m\""),
    key(
        "launch_timeout",
        Kind::Text(|text| grammar::duration(text).and_then(cluster::deadline)),
        "launch_timeout = \"30s\"",
    ),
    key(
        "join_timeout",
        Kind::Text(|text| grammar::duration(text).and_then(cluster::deadline)),
        "join_timeout = \"5m\"",
    ),
    key(
        "schedule_timeout",
        Kind::Text(|text| grammar::duration(text).and_then(cluster::deadline)),
        "schedule_timeout = \"2m\"",
    ),
    key(
        "node_selector",
        Kind::List("labels", |text| cluster::selector(text).map(drop)),
        "node_selector = [\"disk=ssd\"]",
    ),
    key(
        "tolerations",
        Kind::List("taints", |text| cluster::toleration(text).map(drop)),
        "tolerations = [\"dedicated=training:NoSchedule\"]",
    ),
    key("spread", Kind::Boolean, "spread = false"),
    key("priority_class", Kind::Text(cluster::object), "priority_class = \"low\""),
    key("runtime_class", Kind::Text(cluster::object), "runtime_class = \"gvisor\""),
    key("labels", Kind::List("labels", |text| cluster::label(text).map(drop)), "labels = [\"team=vision\"]"),
    key(
        "annotations",
        Kind::List("annotations", |text| cluster::annotation(text).map(drop)),
        "annotations = [\"example.org/note=text\"]",
    ),
    key("image_pull_secrets", Kind::List("names", cluster::object), "image_pull_secrets = [\"registry-login\"]"),
    key(
        "volumes",
        Kind::List("volumes", |text| cluster::volume(text).map(drop)),
        "volumes = [\"pvc:datasets:/data:ro\"]",
    ),
    key("service_account", Kind::Text(cluster::object), "service_account = \"trainer\""),
    key("tmp_size", Kind::Text(|text| grammar::bytes(text).map(drop)), "tmp_size = \"1Gi\""),
    key("runs", Kind::Text(|text| path(text, "a folder")), "runs = \"runs\""),
    key("cache", Kind::Text(|text| path(text, "a folder")), "cache = \"layers\""),
];

fn path(text: &str, what: &str) -> Result<(), String> {
    if text.is_empty() { Err(format!("the path of {what}")) } else { Ok(()) }
}

/// The arguments of a role's resources.
const RESOURCES: [Key; 3] = [
    key("cpu", Kind::Cpu, "cpu = 2"),
    key("memory", Kind::Text(|text| grammar::bytes(text).map(drop)), "memory = \"1Gi\""),
    key("gpu", Kind::Gpu, "gpu = 1"),
];

/// What belongs to a launch or to a machine and not to a type, with its reason.
const NOT_OF_A_TYPE: [(&str, &str); 5] = [
    ("dry_run", "is about one launch: set the variable `FAIRING_DRY_RUN=1`, or `LaunchOptions::dry_run`"),
    ("detach", "is about one launch: set the variable `FAIRING_DETACH=1`, or `LaunchOptions::detach`"),
    ("another", "is about one launch: set the variable `FAIRING_ANOTHER=1`, or `LaunchOptions::another`"),
    (
        "check_nodes",
        "is about one cluster: set the variable `FAIRING_CHECK_NODES=false`, or `LaunchOptions::check_nodes`",
    ),
    ("context", "is about one machine's kubeconfig: set the variable `FAIRING_CONTEXT`, or `LaunchOptions::context`"),
];

/// The roles that have resources.
const ROLES: [&str; 2] = ["worker", "ps"];

impl Job {
    /// Applies every rule.
    ///
    /// The error holds all complaints, each at the smallest token that is wrong.
    pub(crate) fn check(args: Args, item: Item) -> syn::Result<Self> {
        let mut errors = Errors::default();
        let item = check_item(item).map_err(|error| errors.push(error)).ok();
        let mut settings = Vec::new();
        check_args(args, &mut settings, &mut errors);
        check_together(&mut settings, &mut errors);
        errors.finish()?;
        let item = item.expect("an item that is refused leaves an error");
        Ok(Self { item, settings })
    }
}

fn check_item(item: Item) -> syn::Result<ItemStruct> {
    let refuse = |tokens: &dyn ToTokens, message: &str| {
        Err(syn::Error::new_spanned(
            tokens.to_token_stream(),
            format!("`distributed_training` goes on a struct; {message}"),
        ))
    };
    match item {
        Item::Struct(item) if item.generics.params.is_empty() => Ok(item),
        Item::Struct(item) => {
            let generics = item.generics.to_token_stream();
            let message = format!(
                "a generic struct cannot be registered, since a replica finds a type by its name; annotate a concrete \
                 struct that holds one, such as `struct My{0}({0}<...>)`",
                item.ident
            );
            Err(syn::Error::new_spanned(generics, message))
        }
        Item::Enum(item) => refuse(&item.enum_token, "put this enum into a field of one"),
        Item::Union(item) => refuse(&item.union_token, "a union cannot be sent to the replicas"),
        Item::Fn(item) => refuse(&item.sig.fn_token, "what this function does belongs into its `impl Train`"),
        Item::Impl(item) => refuse(&item.impl_token, "move it from this `impl` to the `struct` itself"),
        Item::Trait(item) => refuse(&item.trait_token, "move it from this trait to a type that implements `Train`"),
        Item::Type(item) => refuse(&item.type_token, "an alias adds no type; annotate `struct Job(...)` instead"),
        _ => Err(syn::Error::new(Span::call_site(), "`distributed_training` goes on a struct")),
    }
}

fn check_args(args: Args, settings: &mut Vec<Setting>, errors: &mut Errors) {
    errors.extend(args.errors);
    let mut seen: Vec<String> = Vec::new();
    for Argument { key: name, value } in args.arguments {
        let text = name.to_string();
        let is_group = matches!(value, Value::Group(_)) && ROLES.contains(&text.as_str());
        // `ps = 1` and `ps(cpu = 1)` are two arguments.
        let identity = if is_group { format!("{text}(...)") } else { text.clone() };
        if seen.contains(&identity) {
            errors.push(syn::Error::new(name.span(), format!("duplicate argument `{identity}`")));
            continue;
        }
        seen.push(identity);
        match (value, KEYS.iter().find(|key| key.name == text)) {
            (Value::Group(group), _) if is_group => check_resources(&text, group, settings, errors),
            (value, Some(key)) => check_value(key, &text, &name, value, settings, errors),
            (_, None) => errors.push(unknown(&name, &text)),
        }
    }
}

/// The rules about several settings. What is no literal here is left to the compiler, or to the program's start.
fn check_together(settings: &mut [Setting], errors: &mut Errors) {
    let find = |name: &str| settings.iter().find(|setting| setting.field == name);
    let text = |name: &str| match find(name).map(|setting| &setting.value) {
        Some(Checked::Text(literal)) => Some(literal.value()),
        _ => None,
    };
    let mode = text("mode");
    let mut needs_server = Vec::new();
    match (mode.as_deref(), find("staleness")) {
        (Some("sync"), Some(staleness)) => {
            errors.push(syn::Error::new(staleness.field.span(), grammar::STALENESS_IN_SYNC));
        }
        (_, Some(_)) => needs_server.push(grammar::needs_server("staleness")),
        (Some("async"), None) => needs_server.push(grammar::needs_server("mode = \"async\"")),
        _ => {}
    }
    if text("rejoin").is_some_and(|text| grammar::duration(&text).is_ok_and(|rejoin| !rejoin.is_zero())) {
        needs_server.push(grammar::REJOIN_WITHOUT_SERVER.to_owned());
    }
    check_image(settings, errors);
    let Some(ps) = settings.iter_mut().find(|setting| setting.field == "ps") else { return };
    match &mut ps.value {
        Checked::Number(Number::Literal(literal)) if literal.base10_parse().is_ok_and(|ps: u32| ps == 0) => {
            needs_server.into_iter().for_each(|message| errors.push(syn::Error::new(literal.span(), message)));
        }
        Checked::Number(Number::Constant { zero, .. }) => *zero = needs_server.into_iter().next(),
        _ => {}
    }
}

/// The rules about several settings of the image. Whether several architectures have a repository is left to the start, since
/// another layer may name one.
fn check_image(settings: &[Setting], errors: &mut Errors) {
    let find = |name: &str| settings.iter().find(|setting| setting.field == name);
    let text = |name: &str| match find(name).map(|setting| &setting.value) {
        Some(Checked::Text(literal)) => literal.value(),
        _ => String::new(),
    };
    let mut refuse = |key: &Ident, message: String| errors.push(syn::Error::new(key.span(), message));
    if find("image").is_some() {
        // The defaults, written out, contradict nothing.
        let has_meaning = |setting: &&Setting| match &setting.value {
            Checked::Text(literal) => !["append", "dynamic"].contains(&literal.value().as_str()),
            Checked::Boolean(literal) => literal.value,
            Checked::List(entries) => !entries.is_empty(),
            _ => true,
        };
        let building = ["base", "dockerfile", "builder", "link", "architectures", "files", "root_certificates"];
        for setting in building.into_iter().filter_map(find).filter(has_meaning) {
            refuse(&setting.field, grammar::no_meaning_with_image(&setting.field.to_string()));
        }
    } else {
        if let (Some(base), Some(_)) = (find("base"), find("dockerfile")) {
            refuse(&base.field, grammar::BASE_WITH_DOCKERFILE.to_owned());
        }
        let (builder, has_dockerfile) = (find("builder"), find("dockerfile").is_some());
        let is_docker = if builder.is_some() { text("builder") == "docker" } else { has_dockerfile };
        match (builder, find("architectures")) {
            (Some(builder), _) if has_dockerfile && text("builder") == "append" => {
                refuse(&builder.field, grammar::APPEND_WITH_DOCKERFILE.to_owned());
            }
            (_, Some(Setting { field, value: Checked::List(entries) })) if is_docker && entries.len() > 1 => {
                refuse(field, grammar::ARCHITECTURES_WITH_DOCKER.to_owned());
            }
            _ => {}
        }
    }
    if let (Some(on_disconnect), Some(_)) = (find("on_disconnect"), find("target")) {
        match (text("on_disconnect").as_str(), text("target").as_str()) {
            ("stop", "kubernetes") => refuse(&on_disconnect.field, cluster::STOP_ON_CLUSTER.to_owned()),
            ("continue", target) if target != "kubernetes" => {
                refuse(&on_disconnect.field, grammar::continue_needs_kubernetes(target));
            }
            _ => {}
        }
    }
}

fn check_resources(role: &str, args: Args, settings: &mut Vec<Setting>, errors: &mut Errors) {
    errors.extend(args.errors);
    let mut seen: Vec<String> = Vec::new();
    for Argument { key: name, value } in args.arguments {
        let text = name.to_string();
        if seen.contains(&text) {
            errors.push(syn::Error::new(name.span(), format!("duplicate argument `{text}` in `{role}(...)`")));
            continue;
        }
        match RESOURCES.iter().find(|key| key.name == text) {
            Some(key) => check_value(key, &format!("{role}_{text}"), &name, value, settings, errors),
            None => {
                let remedy = match grammar::nearest(&text, RESOURCES.iter().map(|key| key.name)) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => "it takes `cpu`, `memory` and `gpu`".to_owned(),
                };
                let message = format!("unknown argument `{text}` in `{role}(...)`; {remedy}");
                errors.push(syn::Error::new(name.span(), message));
            }
        }
        seen.push(text);
    }
}

fn unknown(name: &Ident, text: &str) -> syn::Error {
    let message = if text == "worker" {
        "`worker` takes resources, for example `worker(cpu = 2, memory = \"1Gi\")`; the number of workers is `workers = 2`"
            .to_owned()
    } else if let Some((name, reason)) = NOT_OF_A_TYPE.iter().find(|(name, _)| *name == text) {
        format!("`{name}` {reason}")
    } else if let Some(key) = RESOURCES.iter().find(|key| key.name == text) {
        format!("`{text}` belongs to a role, for example `worker({})`", key.example)
    } else {
        let names = || KEYS.iter().map(|key| key.name).chain(["worker"]);
        match grammar::nearest(text, names()) {
            Some(near) => format!("unknown argument `{text}`; did you mean `{near}`?"),
            None => {
                let names: Vec<_> = names().map(|name| format!("`{name}`")).collect();
                format!("unknown argument `{text}`; there are {}", names.join(", "))
            }
        }
    };
    syn::Error::new(name.span(), message)
}

fn check_value(key: &Key, field: &str, name: &Ident, value: Value, settings: &mut Vec<Setting>, errors: &mut Errors) {
    let checked = match value {
        Value::Expr(expr) => key.check(ungroup(expr), errors),
        Value::Group(_) | Value::Missing => {
            let message = format!("`{}` takes a value, for example `{}`", key.name, key.example);
            errors.push(syn::Error::new(name.span(), message));
            None
        }
    };
    settings.extend(checked.map(|value| Setting { field: Ident::new(field, name.span()), value }));
}

impl Key {
    /// The value, or `None` after a complaint.
    fn check(&self, expr: Expr, errors: &mut Errors) -> Option<Checked> {
        let checked = match self.kind {
            Kind::Count => self.number(expr, Integer::U32).map(Checked::Number),
            Kind::Number(integer) => self.number(expr, integer).map(Checked::Number),
            Kind::Text(rule) => self.text(expr, rule),
            Kind::Boolean => self.boolean(expr),
            Kind::List(what, rule) => return self.list(expr, what, rule, errors),
            Kind::Cpu => self.cpu(expr),
            Kind::Gpu => self.gpu(expr),
        };
        checked.map_err(|error| errors.push(error)).ok()
    }

    fn takes(&self, expr: &Expr, what: &str) -> syn::Error {
        syn::Error::new_spanned(expr, format!("`{}` takes {what}, for example `{}`", self.name, self.example))
    }

    fn zero(&self) -> Option<String> {
        match self.kind {
            Kind::Number(_) => None,
            _ => Some(format!("`{}` must be at least 1", self.name)),
        }
    }

    fn number(&self, expr: Expr, kind: Integer) -> syn::Result<Number> {
        let Expr::Lit(ExprLit { lit: Lit::Int(literal), .. }) = expr else {
            return match may_be_number(&expr) {
                true => Ok(Number::Constant { expr, kind, zero: self.zero() }),
                false => Err(self.takes(&expr, "a whole number")),
            };
        };
        let (max, suffix) = match kind {
            Integer::U32 => (u64::from(u32::MAX), "u32"),
            Integer::U64 => (u64::MAX, "u64"),
        };
        let refuse = |message: String| Err(syn::Error::new(literal.span(), message));
        if !["", suffix].contains(&literal.suffix()) {
            return refuse(format!("`{}` is a `{suffix}`, for example `{}`", self.name, self.example));
        }
        match (literal.base10_parse::<u64>(), self.zero()) {
            (Ok(0), Some(message)) => refuse(message),
            (Ok(number), _) if number <= max => Ok(Number::Literal(literal)),
            _ => refuse(format!("`{}` must be at most {max}", self.name)),
        }
    }

    fn text(&self, expr: Expr, rule: Rule) -> syn::Result<Checked> {
        let Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) = expr else {
            return Err(self.takes(&expr, "a text in quotes"));
        };
        let text = literal.value();
        match rule(&text) {
            Ok(()) => Ok(Checked::Text(literal)),
            Err(expected) => {
                let message = format!("`{}` is {:?}; expected {expected}", self.name, grammar::shown(&text));
                Err(syn::Error::new(literal.span(), message))
            }
        }
    }

    fn cpu(&self, expr: Expr) -> syn::Result<Checked> {
        let literal = match &expr {
            Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) => literal.clone(),
            Expr::Lit(ExprLit { lit: Lit::Float(literal), .. }) => {
                LitStr::new(&literal.token().to_string(), literal.span())
            }
            _ => return self.number(expr, Integer::U32).map(Checked::Cores),
        };
        match grammar::millicores(&literal.value()) {
            Ok(_) => Ok(Checked::CpuText(literal)),
            Err(expected) => {
                let message = format!("`{}` is {}; expected {expected}", self.name, expr.to_token_stream());
                Err(syn::Error::new(literal.span(), message))
            }
        }
    }

    fn gpu(&self, expr: Expr) -> syn::Result<Checked> {
        let literal = match &expr {
            Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) => literal.clone(),
            Expr::Lit(ExprLit { lit: Lit::Int(literal), .. }) if literal.suffix().is_empty() => {
                LitStr::new(literal.base10_digits(), literal.span())
            }
            _ => return Err(self.takes(&expr, "a number or a text in quotes")),
        };
        match cluster::gpu(&literal.value()) {
            Ok(_) => Ok(Checked::Text(literal)),
            Err(expected) => {
                let message = format!("`{}` is {}; expected {expected}", self.name, expr.to_token_stream());
                Err(syn::Error::new(literal.span(), message))
            }
        }
    }

    fn boolean(&self, expr: Expr) -> syn::Result<Checked> {
        match expr {
            Expr::Lit(ExprLit { lit: Lit::Bool(literal), .. }) => Ok(Checked::Boolean(literal)),
            _ => Err(self.takes(&expr, "`true` or `false`")),
        }
    }

    fn list(&self, expr: Expr, what: &str, rule: Rule, errors: &mut Errors) -> Option<Checked> {
        let Expr::Array(array) = expr else {
            errors.push(self.takes(&expr, &format!("a list of {what}")));
            return None;
        };
        let mut entries: Vec<LitStr> = Vec::new();
        for entry in array.elems {
            let Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) = ungroup(entry.clone()) else {
                let message = format!("`{}` lists {what} in quotes, for example `{}`", self.name, self.example);
                errors.push(syn::Error::new_spanned(entry, message));
                continue;
            };
            let text = literal.value();
            let mut refuse = |message: String| {
                let message = format!("`{}` has {:?}{message}", self.name, grammar::shown(&text));
                errors.push(syn::Error::new(literal.span(), message));
            };
            if let Err(expected) = rule(&text) {
                refuse(format!("; expected {expected}"));
            } else if entries.iter().any(|other| other.value() == text) {
                refuse(" twice".to_owned());
            } else {
                entries.push(literal);
            }
        }
        Some(Checked::List(entries))
    }
}

/// What a `macro_rules` variable wraps in an invisible group.
fn ungroup(expr: Expr) -> Expr {
    match expr {
        Expr::Group(group) => ungroup(*group.expr),
        expr => expr,
    }
}

/// Whether an expression may have a whole number as its value; its type is left to the compiler.
fn may_be_number(expr: &Expr) -> bool {
    match expr {
        Expr::Unary(unary) => !matches!(unary.op, UnOp::Neg(_)),
        Expr::Path(_) | Expr::Binary(_) | Expr::Paren(_) | Expr::Cast(_) | Expr::Block(_) | Expr::Const(_) => true,
        Expr::Call(_) | Expr::MethodCall(_) | Expr::Macro(_) | Expr::If(_) | Expr::Match(_) => true,
        Expr::Field(_) | Expr::Index(_) => true,
        _ => false,
    }
}

impl Number {
    /// Where an expression starts and ends; on a stable compiler `span` alone is its first token.
    pub(crate) fn ends(expr: &Expr) -> (Span, Span) {
        let mut tokens = expr.to_token_stream().into_iter();
        let first = tokens.next().map_or_else(|| expr.span(), |token| token.span());
        (first, tokens.last().map_or(first, |token| token.span()))
    }
}
