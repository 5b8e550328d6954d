//! TFJobs that somebody else wrote, whose processes find their part in `TF_CONFIG`.

use fairing_core::secure::Authority;
use fairing_core::topology::{Member, Replica};
use serde_json::{Value, json};

use super::*;

/// A TFJob of one replica of each role, each with a pod as `spec` makes it.
fn tf_job(name: &str, roles: &[&str], spec: impl Fn(&str) -> Value) -> String {
    let replica = |role: &str| {
        (role.to_owned(), json!({"replicas": 1, "restartPolicy": "Never", "template": {"spec": spec(role)}}))
    };
    let replicas: serde_json::Map<String, Value> = roles.iter().map(|role| replica(role)).collect();
    json!({
        "apiVersion": "kubeflow.org/v1",
        "kind": "TFJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "tfReplicaSpecs": replicas},
    })
    .to_string()
}

/// A pod's container; `train` there checks that the two workers know of each other.
fn container(image: &str, variables: Value) -> Value {
    json!({"name": "tensorflow", "image": image, "args": ["prefetch"], "env": variables})
}

fn phase(namespace: &Namespace, pod: &str) -> String {
    namespace.try_kubectl(&["get", "pod", pod, "--output", "jsonpath={.status.phase}"]).unwrap_or_default()
}

#[track_caller]
fn trains(namespace: &Namespace, name: &str) {
    let path = "jsonpath={.status.conditions[?(@.status==\"True\")].type}";
    let conditions = || namespace.kubectl(&["get", "tfjob", name, "--output", path]);
    wait_for(conditions, |conditions| conditions.contains("Succeeded") || conditions.contains("Failed"));
    let logs = |pod: &str| namespace.try_kubectl(&["logs", &format!("{name}-{pod}-0")]).unwrap_or_default();
    let all: Vec<String> = ["chief", "worker", "ps"].map(logs).into();
    assert!(conditions().contains("Succeeded"), "{all:#?}");
    for pod in ["chief", "worker", "ps"] {
        wait_for(|| phase(namespace, &format!("{name}-{pod}-0")), |phase| phase == "Succeeded");
    }
    namespace.kubectl(&["delete", "tfjob", name]);
}

#[test]
fn a_tf_job_written_by_hand_trains_with_identities_or_with_encryption_given_up_by_name() {
    let namespace = Namespace::new();
    let image = pushed_image(&namespace);
    let roles = ["Chief", "Worker", "PS"];
    let authority = Authority::new("by-hand").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut secret = vec!["create".to_owned(), "secret".to_owned(), "generic".to_owned(), "by-hand".to_owned()];
    for (role, replica) in [("Chief", Replica::worker(0)), ("Worker", Replica::worker(1)), ("PS", Replica::ps(0))] {
        let path = folder.path().join(role);
        fs::write(&path, authority.issue(Member::from(replica)).unwrap().to_bytes()).unwrap();
        secret.push(format!("--from-file={role}={}", path.display()));
    }
    namespace.kubectl(&secret.iter().map(String::as_str).collect::<Vec<_>>());
    namespace.apply(&tf_job("by-hand", &roles, |role| {
        let mut container = container(&image, json!([{"name": "FAIRING_IDENTITY", "value": "/run/identity"}]));
        container["volumeMounts"] = json!([{"name": "identity", "mountPath": "/run/identity"}]);
        let secret = json!({"secretName": "by-hand", "items": [{"key": role, "path": "identity"}]});
        json!({"containers": [container], "volumes": [{"name": "identity", "secret": secret}]})
    }));
    trains(&namespace, "by-hand");
    let plaintext = json!([{"name": "FAIRING_PLAINTEXT_TF_CONFIG", "value": "yes-anyone-may-join"}]);
    namespace.apply(&tf_job("in-the-open", &roles, |_| json!({"containers": [container(&image, plaintext.clone())]})));
    trains(&namespace, "in-the-open");
    namespace.is_empty();
    namespace.kubectl(&["delete", "secret", "by-hand"]);
}

#[test]
fn a_tf_jobs_evaluator_and_who_has_no_identity_are_refused_by_name() {
    let namespace = Namespace::new();
    let image = pushed_image(&namespace);
    let pods = |_: &str| json!({"containers": [container(&image, json!([]))]});
    namespace.apply(&tf_job("refused", &["Chief", "Evaluator"], pods));
    for (pod, text) in [
        ("refused-evaluator-0", "`TF_CONFIG` makes this process an evaluator, which fairing does not have"),
        ("refused-chief-0", "has its part from `TF_CONFIG` and nothing to prove with that it is worker 0"),
    ] {
        wait_for(|| phase(&namespace, pod), |phase| phase == "Failed");
        let log = namespace.kubectl(&["logs", pod]);
        assert!(log.contains(text), "{log}");
        let path = "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}";
        assert_eq!(namespace.kubectl(&["get", "pod", pod, "--output", path]), "66");
    }
    namespace.kubectl(&["delete", "tfjob", "refused"]);
    namespace.is_empty();
}
