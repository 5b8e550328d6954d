//! What can be known to go wrong before anything is built: all of it in one message.
//!
//! Asked of the cluster with the rights of a user of the namespace: whether it is there, whether the user may do what the
//! launch does, whether the pods are admitted, find what they refer to, and the quota has room for them. Where the rights
//! reach further, whether any node could hold them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, ResourceRule, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SelfSubjectRulesReview,
    SelfSubjectRulesReviewSpec,
};
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, PodTemplateSpec, ResourceQuota, Secret};
use k8s_openapi::api::rbac::v1::PolicyRule;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Api, ListParams, PostParams};

use super::client::{Cluster, ClusterError};
use super::manifest::RUN_LABEL;
use crate::topology::Role;

/// Names the pods that are tried and not created.
const TRIED: &str = "fairing-preflight-";

/// What is to be launched, as far as the cluster can judge it beforehand.
#[derive(Debug, Clone)]
pub struct Preflight {
    /// Each role's pods: how many, and how they look.
    pub pods: Vec<(Role, u32, PodTemplateSpec)>,
    /// How many objects of each kind beside the pods there will be, by the names of quotas, for example `jobs.batch`.
    pub objects: BTreeMap<String, u32>,
    /// Whether the nodes that there are have to be large enough.
    pub check_nodes: bool,
    /// What the launch does.
    pub rules: Vec<PolicyRule>,
}

/// Why a launch would fail. Returned by [`Preflight::check`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub struct PreflightError {
    /// One sentence each, with the remedy; at least one.
    pub problems: Vec<String>,
    /// Namespace and API server, if the cluster could be asked at all.
    place: Option<(String, String)>,
}

impl fmt::Display for PreflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problems, place } = self;
        write!(f, "the run cannot be launched")?;
        if let Some((namespace, server)) = place {
            write!(f, " in the namespace `{namespace}` of {server}")?;
        }
        match problems.as_slice() {
            [problem] => write!(f, ": {problem}"),
            problems => problems.iter().try_for_each(|problem| write!(f, "\n  - {problem}")),
        }
    }
}

impl PreflightError {
    /// A cluster that cannot be asked anything.
    pub(crate) fn without_cluster(error: &ClusterError) -> Self {
        Self { problems: vec![error.to_string()], place: None }
    }

    /// The same with one problem more.
    #[must_use]
    pub(crate) fn and(mut self, problem: String) -> Self {
        self.problems.push(problem);
        self
    }
}

impl Preflight {
    /// Asks the cluster. Changes nothing there.
    ///
    /// Returns what could not be looked at, one sentence each.
    ///
    /// # Errors
    ///
    /// [`PreflightError`] with everything that would fail.
    pub fn check(&self, cluster: &Cluster, architectures: &[String]) -> Result<Vec<String>, PreflightError> {
        let (mut problems, notes) = cluster.reactor().wait(async {
            let rights = self.rights(cluster);
            let pods = self.admission(cluster);
            let room = self.room(cluster);
            let nodes = self.nodes(cluster, architectures);
            let references = self.references(cluster);
            let found = tokio::join!(rights, pods, references, room, nodes);
            let mut all = Found::default();
            for found in [found.0, found.1, found.2, found.3, found.4] {
                all.problems.extend(found.problems);
                all.notes.extend(found.notes);
            }
            (all.problems, all.notes)
        });
        // Several questions fail for one reason where the cluster cannot be reached at all.
        let mut seen = BTreeSet::new();
        problems.retain(|problem| seen.insert(problem.clone()));
        match problems.is_empty() {
            true => Ok(notes),
            false => Err(PreflightError {
                problems,
                place: Some((cluster.namespace().to_owned(), cluster.server().to_owned())),
            }),
        }
    }

    /// Whether the user may do what the launch does.
    async fn rights(&self, cluster: &Cluster) -> Found {
        let mut found = Found::default();
        let reviews: Api<SelfSubjectRulesReview> = Api::all(cluster.client().clone());
        let review = SelfSubjectRulesReview {
            spec: SelfSubjectRulesReviewSpec { namespace: Some(cluster.namespace().to_owned()) },
            ..SelfSubjectRulesReview::default()
        };
        let parameters = PostParams::default();
        let asked = cluster.ask_once("ask for your rights", reviews.create(&parameters, &review)).await;
        let status = match asked {
            Ok(review) => review.status.unwrap_or_default(),
            Err(error) => return Found::of(error),
        };
        let wanted = self.rules.iter().flat_map(wanted);
        let mut missing: Vec<Right> =
            wanted.filter(|right| !status.resource_rules.iter().any(|rule| right.is_in(rule))).collect();
        if status.incomplete && !missing.is_empty() {
            // The cluster could not list everything that it would allow; then it has to be asked one by one.
            let mut refused = Vec::new();
            for right in missing {
                match is_allowed(cluster, &right).await {
                    Ok(true) => {}
                    Ok(false) => refused.push(right),
                    Err(error) => {
                        found.add(error);
                        return found;
                    }
                }
            }
            missing = refused;
        }
        if !missing.is_empty() {
            let mut verbs: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for right in &missing {
                verbs.entry(right.resource_and_group()).or_default().push(&right.verb);
            }
            let verbs: Vec<String> =
                verbs.iter().map(|(resource, verbs)| format!("{} {resource}", verbs.join("/"))).collect();
            found.problems.push(format!(
                "you lack the right to {} there (give your user the Role that FAIRING_DRY_RUN=1 prints)",
                verbs.join(", ")
            ));
        }
        found
    }

    /// Whether a pod of each role would be admitted: the namespace, Pod Security, limit ranges, other policies.
    async fn admission(&self, cluster: &Cluster) -> Found {
        let mut found = Found::default();
        for (role, _, template) in &self.pods {
            let mut metadata = template.metadata.clone().unwrap_or_default();
            metadata.generate_name = Some(TRIED.to_owned());
            let pod = Pod { metadata, spec: template.spec.clone(), status: None };
            let pods: Api<Pod> = cluster.api();
            let parameters = PostParams { dry_run: true, ..PostParams::default() };
            match cluster.ask_once(&format!("try a pod of a {role}"), pods.create(&parameters, &pod)).await {
                Ok(_) => {}
                Err(ClusterError::Forbidden { reason, .. }) if reason.contains("cannot create resource") => {
                    found.notes.push(
                        "whether pods are admitted was not checked: it takes the right to create pods".to_owned(),
                    );
                    break;
                }
                Err(ClusterError::Refused { status: 404, reason, .. }) if reason.contains("namespaces") => {
                    let namespace = cluster.namespace();
                    found.problems.push(format!(
                        "there is no such namespace (`kubectl create namespace {namespace}`, or set `namespace` or \
                         FAIRING_NAMESPACE to another)"
                    ));
                    break;
                }
                Err(
                    ClusterError::Forbidden { reason, .. } | ClusterError::Refused { reason, status: 400..=499, .. },
                ) => {
                    found.problems.push(format!("a pod of a {role} is not admitted: {}", without_name(&reason)));
                }
                Err(error) => {
                    found.add(error);
                    break;
                }
            }
        }
        found
    }

    /// Whether there is what the pods refer to: without it they would be made and never start.
    async fn references(&self, cluster: &Cluster) -> Found {
        let mut found = Found::default();
        let all: BTreeSet<Reference> = self.pods.iter().flat_map(|(_, _, template)| references(template)).collect();
        for Reference { kind, name } in all {
            let asked = match kind {
                Kind::Secret => is_there::<Secret>(cluster, &name).await,
                Kind::ConfigMap => is_there::<ConfigMap>(cluster, &name).await,
                Kind::Claim => is_there::<PersistentVolumeClaim>(cluster, &name).await,
            };
            match asked {
                Ok(()) => {}
                Err(error) if error.is_absence() => found.problems.push(format!(
                    "the pods need the {kind} `{name}`, and there is none of that name in the namespace (create it, or name \
                     another)"
                )),
                Err(ClusterError::Forbidden { .. }) => found.notes.push(format!(
                    "whether there is the {kind} `{name}` was not checked: it takes the right to get it"
                )),
                Err(error) => {
                    found.add(error);
                    break;
                }
            }
        }
        found
    }

    /// Whether the quotas have room for all objects together.
    async fn room(&self, cluster: &Cluster) -> Found {
        let mut found = Found::default();
        let quotas: Api<ResourceQuota> = cluster.api();
        let list = match cluster.ask_once("list the quotas", quotas.list(&ListParams::default())).await {
            Ok(list) => list,
            Err(ClusterError::Forbidden { .. }) => {
                found.notes.push("quotas were not checked: it takes the right to list resourcequotas".to_owned());
                return found;
            }
            Err(error) => return Found::of(error),
        };
        let wanted = self.totals();
        for quota in list {
            let name = quota.metadata.name.unwrap_or_default();
            let scoped = quota.spec.as_ref().is_some_and(|spec| spec.scopes.is_some() || spec.scope_selector.is_some());
            let status = quota.status.unwrap_or_default();
            let (hard, used) = (status.hard.unwrap_or_default(), status.used.unwrap_or_default());
            for (resource, limit) in hard.iter().filter(|_| !scoped) {
                let (Some(wanted), Some(limit)) = (wanted.get(resource.as_str()), amount(limit)) else { continue };
                let left = limit - used.get(resource).and_then(amount).unwrap_or(0.0);
                if *wanted > left {
                    let is_amount = resource.contains("cpu") || resource.contains("memory");
                    let remedy = if is_amount { ", lower `cpu` or `memory` of the roles," } else { "" };
                    found.problems.push(format!(
                        "the quota `{name}` leaves {} of {resource}, and the run takes {} (ask for more{remedy} or end what \
                         runs there)",
                        show(resource, left.max(0.0)),
                        show(resource, *wanted)
                    ));
                }
            }
        }
        found
    }

    /// What everything takes together, by the names that quotas use.
    fn totals(&self) -> BTreeMap<String, f64> {
        let mut totals = BTreeMap::new();
        let mut add = |name: &str, count: f64| {
            *totals.entry(format!("count/{name}")).or_insert(0.0) += count;
            // Kinds of the core have a name without `count/` too.
            if !name.contains('.') {
                *totals.entry(name.to_owned()).or_insert(0.0) += count;
            }
        };
        self.objects.iter().for_each(|(name, count)| add(name, f64::from(*count)));
        self.pods.iter().for_each(|(_, count, _)| add("pods", f64::from(*count)));
        for (_, count, template) in &self.pods {
            let count = f64::from(*count);
            let resources =
                template.spec.iter().flat_map(|spec| &spec.containers).filter_map(|it| it.resources.as_ref());
            for resources in resources {
                for (kind, amounts) in [("requests", &resources.requests), ("limits", &resources.limits)] {
                    for (name, quantity) in amounts.iter().flatten() {
                        let value = amount(quantity).unwrap_or(0.0) * count;
                        *totals.entry(format!("{kind}.{name}")).or_insert(0.0) += value;
                        if kind == "requests" && matches!(name.as_str(), "cpu" | "memory") {
                            *totals.entry(name.clone()).or_insert(0.0) += value;
                        }
                    }
                }
            }
        }
        totals
    }

    /// Whether some node could hold a pod of each role, if nothing else were there.
    async fn nodes(&self, cluster: &Cluster, architectures: &[String]) -> Found {
        let mut found = Found::default();
        if !self.check_nodes {
            return found;
        }
        let nodes: Api<Node> = Api::all(cluster.client().clone());
        let list = match cluster.ask_once("list the nodes", nodes.list(&ListParams::default())).await {
            Ok(list) => list.items,
            Err(ClusterError::Forbidden { .. }) => {
                found.notes.push(
                    "whether a node is large enough and of the image's architecture was not checked: it takes the right to \
                     list nodes"
                        .to_owned(),
                );
                return found;
            }
            Err(error) => return Found::of(error),
        };
        if list.is_empty() {
            // Some clusters make nodes when they are needed.
            return found;
        }
        let way_around =
            "or set `check_nodes = false` or FAIRING_CHECK_NODES=false if such nodes are made when they are needed";
        for (role, _, template) in &self.pods {
            let Some(spec) = &template.spec else { continue };
            let wanted = spec.containers.iter().filter_map(|container| container.resources.as_ref()?.requests.as_ref());
            let wanted: Vec<(&String, f64)> =
                wanted.flatten().filter_map(|(name, quantity)| Some((name, amount(quantity)?))).collect();
            let allocatable = |node: &Node, name: &str| {
                let quantity = node.status.as_ref()?.allocatable.as_ref()?.get(name)?;
                amount(quantity)
            };
            let fits = |node: &Node| {
                wanted.iter().all(|(name, wanted)| allocatable(node, name).is_some_and(|has| has >= *wanted))
            };
            let selector = spec.node_selector.clone().unwrap_or_default();
            let labels = |node: &Node| node.metadata.labels.clone().unwrap_or_default();
            let selected: Vec<&Node> = list
                .iter()
                .filter(|node| selector.iter().all(|(key, value)| labels(node).get(key) == Some(value)))
                .collect();
            if selected.is_empty() {
                let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
                found
                    .problems
                    .push(format!("no node has the labels {} (`node_selector`; {way_around})", selector.join(", ")));
                break;
            }
            let architecture = |node: &Node| Some(node.status.as_ref()?.node_info.as_ref()?.architecture.clone());
            let is_of = |node: &Node| architecture(node).is_none_or(|it| architectures.contains(&it));
            if !architectures.is_empty() && !selected.iter().any(|node| is_of(node)) {
                let theirs: BTreeSet<String> = selected.iter().filter_map(|node| architecture(node)).collect();
                let theirs = theirs.into_iter().collect::<Vec<_>>().join(", ");
                found.problems.push(format!(
                    "no node runs what is built for {} (they are {theirs}: set `architectures` or FAIRING_ARCHITECTURES, \
                     {way_around})",
                    architectures.join(", ")
                ));
                break;
            }
            if !selected.iter().any(|node| fits(node)) {
                let largest =
                    |name: &str| selected.iter().filter_map(|node| allocatable(node, name)).fold(0.0, f64::max);
                let words = wanted.iter().map(|(name, wanted)| {
                    format!("{} of {name} (the largest node has {})", show(name, *wanted), show(name, largest(name)))
                });
                let words: Vec<String> = words.collect();
                found.problems.push(format!(
                    "no node can hold a {role}, which asks for {} (lower its `cpu`, `memory` or `gpu`, {way_around})",
                    words.join(" and ")
                ));
            }
        }
        found
    }
}

/// Something in the namespace that a pod does not start without.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    kind: Kind,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Secret,
    ConfigMap,
    Claim,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Secret => "Secret",
            Kind::ConfigMap => "ConfigMap",
            Kind::Claim => "PersistentVolumeClaim",
        })
    }
}

/// What the pods of `template` refer to, but for what the launch itself creates.
fn references(template: &PodTemplateSpec) -> Vec<Reference> {
    let labels = template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    let own = labels.and_then(|labels| labels.get(RUN_LABEL));
    let Some(spec) = &template.spec else { return Vec::new() };
    let mut references = Vec::new();
    let mut refer = |kind: Kind, name: &str, optional: Option<bool>| {
        if optional != Some(true) && own.is_none_or(|own| own != name) {
            references.push(Reference { kind, name: name.to_owned() });
        }
    };
    for volume in spec.volumes.iter().flatten() {
        if let Some(secret) = &volume.secret {
            refer(Kind::Secret, secret.secret_name.as_deref().unwrap_or_default(), secret.optional);
        }
        if let Some(map) = &volume.config_map {
            refer(Kind::ConfigMap, &map.name, map.optional);
        }
        if let Some(claim) = &volume.persistent_volume_claim {
            refer(Kind::Claim, &claim.claim_name, None);
        }
    }
    for secret in spec.image_pull_secrets.iter().flatten() {
        refer(Kind::Secret, &secret.name, None);
    }
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        for source in container.env_from.iter().flatten() {
            if let Some(secret) = &source.secret_ref {
                refer(Kind::Secret, &secret.name, secret.optional);
            }
            if let Some(map) = &source.config_map_ref {
                refer(Kind::ConfigMap, &map.name, map.optional);
            }
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            if let Some(secret) = &source.secret_key_ref {
                refer(Kind::Secret, &secret.name, secret.optional);
            }
            if let Some(map) = &source.config_map_key_ref {
                refer(Kind::ConfigMap, &map.name, map.optional);
            }
        }
    }
    references
}

async fn is_there<K>(cluster: &Cluster, name: &str) -> Result<(), ClusterError>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let objects: Api<K> = cluster.api();
    let action = format!("look for the {} `{name}`", K::kind(&()));
    cluster.ask_once(&action, objects.get_metadata(name)).await.map(drop)
}

/// What one question brought up.
#[derive(Default)]
struct Found {
    problems: Vec<String>,
    notes: Vec<String>,
}

impl Found {
    fn of(error: ClusterError) -> Self {
        let mut found = Self::default();
        found.add(error);
        found
    }

    fn add(&mut self, error: ClusterError) {
        self.problems.push(match error {
            // Whichever question it was.
            ClusterError::Unreachable { server, reason, .. } => {
                format!("the cluster at {server} cannot be reached: {reason} (is it running, and the network up?)")
            }
            error => error.to_string(),
        });
    }
}

/// One thing that the user must be allowed to do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Right {
    group: String,
    resource: String,
    verb: String,
}

fn wanted(rule: &PolicyRule) -> Vec<Right> {
    let mut rights = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                rights.push(Right { group: group.clone(), resource: resource.clone(), verb: verb.clone() });
            }
        }
    }
    rights
}

impl Right {
    fn is_in(&self, rule: &ResourceRule) -> bool {
        let has =
            |names: &Option<Vec<String>>, name: &str| names.iter().flatten().any(|known| known == "*" || known == name);
        // Rules for single objects by name do not help with new ones.
        rule.resource_names.as_ref().is_none_or(Vec::is_empty)
            && has(&Some(rule.verbs.clone()), &self.verb)
            && has(&rule.api_groups, &self.group)
            && (has(&rule.resources, &self.resource)
                || self.resource.split_once('/').is_some_and(|(_, sub)| has(&rule.resources, &format!("*/{sub}"))))
    }

    fn resource_and_group(&self) -> String {
        match self.group.as_str() {
            "" => self.resource.clone(),
            group => format!("{}.{group}", self.resource),
        }
    }
}

async fn is_allowed(cluster: &Cluster, right: &Right) -> Result<bool, ClusterError> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client().clone());
    let (resource, subresource) = match right.resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (right.resource.as_str(), None),
    };
    let attributes = ResourceAttributes {
        group: Some(right.group.clone()),
        namespace: Some(cluster.namespace().to_owned()),
        resource: Some(resource.to_owned()),
        subresource,
        verb: Some(right.verb.clone()),
        ..ResourceAttributes::default()
    };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() },
        ..SelfSubjectAccessReview::default()
    };
    let parameters = PostParams::default();
    let review = cluster.ask_once("ask for your rights", reviews.create(&parameters, &review)).await?;
    Ok(review.status.is_some_and(|status| status.allowed))
}

/// A refusal without the name of the pod that was only tried.
fn without_name(reason: &str) -> String {
    match reason.split_once(" is forbidden: ") {
        Some((head, rest)) if head.contains(TRIED) => rest.to_owned(),
        _ => reason.to_owned(),
    }
}

/// The number that a quantity stands for.
///
/// # Source
///
/// Kubernetes API, `resource.Quantity`: a decimal number with a suffix of thousands or of 1024, or with an exponent.
fn amount(quantity: &Quantity) -> Option<f64> {
    let text = quantity.0.trim();
    let suffixes = [
        ("Ki", 1024f64),
        ("Mi", 1024f64.powi(2)),
        ("Gi", 1024f64.powi(3)),
        ("Ti", 1024f64.powi(4)),
        ("Pi", 1024f64.powi(5)),
        ("Ei", 1024f64.powi(6)),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let scaled = suffixes.iter().find_map(|(suffix, scale)| Some((text.strip_suffix(suffix)?, *scale)));
    let (number, scale) = scaled.unwrap_or((text, 1.0));
    number.parse::<f64>().ok().map(|number| number * scale)
}

/// An amount of a resource as people write it.
fn show(resource: &str, amount: f64) -> String {
    match resource.rsplit('.').next() {
        Some("memory") => format!("{:.0}Mi", amount / 1024.0 / 1024.0),
        Some("cpu") if amount.fract() != 0.0 => format!("{:.0}m", amount * 1e3),
        _ => format!("{amount}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_the_numbers_that_they_stand_for() {
        for (text, expected) in [
            ("1", 1.0),
            ("500m", 0.5),
            ("1.5", 1.5),
            ("128Mi", 134_217_728.0),
            ("1e3", 1e3),
            ("2E", 2e18),
            ("5Ei", 5.0 * 1024f64.powi(6)),
            ("100k", 1e5),
        ] {
            assert_eq!(amount(&Quantity(text.to_owned())), Some(expected), "{text}");
        }
        assert_eq!(amount(&Quantity("many".to_owned())), None);
        assert_eq!(
            (show("requests.memory", 3e9), show("cpu", 0.5), show("limits.cpu", 2.0)),
            ("2861Mi".into(), "500m".into(), "2".into())
        );
    }

    #[test]
    fn a_right_is_found_in_rules_with_stars_and_not_in_those_for_one_object() {
        let rule = |groups: &[&str], resources: &[&str], verbs: &[&str], names: &[&str]| {
            let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
            ResourceRule {
                api_groups: Some(owned(groups)),
                resources: Some(owned(resources)),
                verbs: owned(verbs),
                resource_names: Some(owned(names)),
            }
        };
        let right = Right { group: String::new(), resource: "pods/log".into(), verb: "get".into() };
        for (rule, expected) in [
            (rule(&["*"], &["*"], &["*"], &[]), true),
            (rule(&[""], &["pods/log"], &["get", "list"], &[]), true),
            (rule(&[""], &["*/log"], &["get"], &[]), true),
            (rule(&[""], &["pods"], &["get"], &[]), false),
            (rule(&["batch"], &["pods/log"], &["get"], &[]), false),
            (rule(&[""], &["pods/log"], &["list"], &[]), false),
            (rule(&[""], &["pods/log"], &["get"], &["one"]), false),
        ] {
            assert_eq!(right.is_in(&rule), expected, "{rule:?}");
        }
    }

    #[test]
    fn totals_have_the_names_of_quotas() {
        let mut template = PodTemplateSpec::default();
        template.spec.get_or_insert_default().containers.push(Default::default());
        let requests = BTreeMap::from([("memory".to_owned(), Quantity("1Gi".to_owned()))]);
        let container = &mut template.spec.as_mut().unwrap().containers[0];
        container.resources.get_or_insert_default().requests = Some(requests);
        let preflight = Preflight {
            pods: vec![(Role::Ps, 1, template.clone()), (Role::Worker, 2, template)],
            objects: BTreeMap::from([("jobs.batch".to_owned(), 2), ("secrets".to_owned(), 2)]),
            check_nodes: true,
            rules: Vec::new(),
        };
        let totals = preflight.totals();
        let totals: Vec<String> = totals.iter().map(|(name, total)| format!("{name} {}", show(name, *total))).collect();
        assert_eq!(
            totals,
            [
                "count/jobs.batch 2",
                "count/pods 3",
                "count/secrets 2",
                "memory 3072Mi",
                "pods 3",
                "requests.memory 3072Mi",
                "secrets 2"
            ]
        );
    }

    #[test]
    fn a_pod_refers_to_what_it_does_not_start_without() {
        let mut template = PodTemplateSpec::default();
        let labels = BTreeMap::from([(RUN_LABEL.to_owned(), "run".to_owned())]);
        template.metadata.get_or_insert_default().labels = Some(labels);
        let spec = template.spec.get_or_insert_default();
        let volumes = spec.volumes.get_or_insert_default();
        for (name, optional) in [("run", None), ("password", None), ("perhaps", Some(true))] {
            volumes.push(Default::default());
            let secret = volumes.last_mut().unwrap().secret.get_or_insert_default();
            (secret.secret_name, secret.optional) = (Some(name.to_owned()), optional);
        }
        volumes.push(Default::default());
        volumes.last_mut().unwrap().persistent_volume_claim.get_or_insert_default().claim_name = "data".to_owned();
        spec.containers.push(Default::default());
        let variables = spec.containers[0].env.get_or_insert_default();
        variables.push(Default::default());
        let source = variables[0].value_from.get_or_insert_default();
        source.config_map_key_ref.get_or_insert_default().name = "settings".to_owned();
        let found: Vec<String> =
            references(&template).into_iter().map(|Reference { kind, name }| format!("{kind} {name}")).collect();
        assert_eq!(found, ["Secret password", "PersistentVolumeClaim data", "ConfigMap settings"]);
    }

    #[test]
    fn several_problems_are_one_message() {
        let error = |problems: &[&str]| PreflightError {
            problems: problems.iter().map(|problem| (*problem).to_owned()).collect(),
            place: Some(("team".into(), "https://host".into())),
        };
        assert_eq!(
            error(&["one"]).to_string(),
            "the run cannot be launched in the namespace `team` of https://host: one"
        );
        assert!(error(&["one", "two"]).to_string().ends_with("https://host\n  - one\n  - two"));
    }
}
