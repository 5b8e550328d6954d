//! What a launch and those who follow it do in the namespace, as rules of a Role.

use k8s_openapi::api::rbac::v1::{PolicyRule, Role};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Format, Scene, yaml};

/// What was created is looked at and deleted again.
const CREATED: [&str; 3] = ["create", "delete", "get"];

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
    // Runs are found by listing their owners, followed by watching, and released by a patch.
    let listed = [&CREATED[..], &["list", "watch"]].concat();
    let owned = [&CREATED[..], &["list", "patch", "watch"]].concat();
    let created: &[&str] = if format == Format::Jobs { &["secrets", "services"] } else { &["secrets"] };
    let mut rules = vec![
        rule("batch", &["jobs"], if format == Format::Jobs { &owned } else { &listed }),
        rule("", created, &CREATED),
        // One request ends all pods of a run; a pod is tried, and not created, before anything is built.
        rule("", &["pods"], &["create", "delete", "deletecollection", "get", "list", "watch"]),
        rule("", &["resourcequotas"], &["list"]),
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
