//! What a launch and those who follow it do in the namespace, as rules of a Role.

use k8s_openapi::api::rbac::v1::{PolicyRule, Role};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Format, Scene, yaml};

/// Server-side apply is a `patch` that may `create`. What was applied is looked at and deleted again.
const APPLIED: [&str; 4] = ["create", "delete", "get", "patch"];

pub(super) fn rules(format: Format) -> Vec<PolicyRule> {
    let rule = |group: &str, resources: &[&str], verbs: &[&str]| {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        PolicyRule {
            api_groups: Some(vec![group.to_owned()]),
            resources: Some(owned(resources)),
            verbs: owned(verbs),
            ..PolicyRule::default()
        }
    };
    // Runs are found by listing their owners, and followed by watching.
    let owned = [&APPLIED[..], &["list", "watch"]].concat();
    // One request removes all Jobs of a run, another one ends its pods.
    let jobs = [&owned[..], &["deletecollection"]].concat();
    let mut rules = vec![
        rule("batch", &["jobs"], &jobs),
        rule("", &["secrets"], &APPLIED),
        // An operator makes its own, which are removed with what is left of a run all the same.
        rule("", &["services"], if format == Format::Jobs { &APPLIED } else { &["delete", "get"] }),
        rule("", &["pods"], &["delete", "deletecollection", "get", "list", "watch"]),
        rule("", &["pods/log"], &["get"]),
        // Which of the two verbs a port-forward takes depends on the version of the cluster.
        rule("", &["pods/portforward"], &["create", "get"]),
        rule("", &["events"], &["list", "watch"]),
    ];
    match format {
        Format::Jobs => {}
        Format::JobSet => rules.push(rule("jobset.x-k8s.io", &["jobsets"], &owned)),
        Format::TfJob => rules.push(rule("kubeflow.org", &["tfjobs"], &owned)),
    }
    rules
}

/// The Role as YAML, to be given to a user of the namespace.
pub(crate) fn role(scene: &Scene) -> String {
    yaml(&Role {
        metadata: ObjectMeta { name: Some("fairing".to_owned()), ..ObjectMeta::default() },
        rules: Some(rules(scene.format)),
    })
}
