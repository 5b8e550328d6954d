//! A launch from inside of the cluster.

use serde_json::json;

use super::*;

/// The launcher is a pod with the Role that the dry run prints, and the run's own image.
#[test]
fn a_pod_launches_a_run_with_the_rights_of_its_service_account() {
    let namespace = Namespace::new();
    let law = Law { pause_ms: 0, epochs: 2, ..LAW };
    let image = pushed_image(&namespace);
    let dry = namespace.law(&law, 2, 1).env("FAIRING_DRY_RUN", "1").run().code(0);
    let text = dry.stdout().collect::<Vec<_>>().join("\n");
    namespace.apply(text.rsplit("---").next().unwrap());
    namespace.kubectl(&["create", "serviceaccount", "trainer"]);
    let account = format!("--serviceaccount={}:trainer", namespace.name);
    namespace.kubectl(&["create", "rolebinding", "trainer", "--role=fairing", &account]);
    let repository = std::env::var("FAIRING_REPOSITORY").unwrap();
    let variables = [
        ("FAIRING_TARGET", "kubernetes"),
        ("FAIRING_REPOSITORY", &repository),
        ("FAIRING_RUNS", "/tmp/runs"),
        ("FAIRING_CACHE", "/tmp/cache"),
    ];
    let variables: Vec<_> = variables.map(|(name, value)| json!({"name": name, "value": value})).into();
    let container = json!({
        "name": "launcher",
        "image": image,
        "args": ["law", serde_json::to_string(&law).unwrap(), "2", "1"],
        "env": variables,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    });
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "launcher"},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            "serviceAccountName": "trainer",
            "restartPolicy": "Never",
            // A registry on the node's loopback is reached from its network only.
            "hostNetwork": repository.starts_with("127.0.0.1"),
        },
    });
    namespace.apply(&pod.to_string());
    let phase = || namespace.kubectl(&["get", "pod", "launcher", "--output", "jsonpath={.status.phase}"]);
    wait_for(phase, |phase| matches!(phase.as_str(), "Succeeded" | "Failed"));
    let log = namespace.kubectl(&["logs", "launcher"]);
    assert_eq!(phase(), "Succeeded", "{log}");
    let in_memory = law.train_in_memory(Topology::new(2, 1)).unwrap();
    assert!(log.contains(&format!("fingerprint {}", in_memory.model.fingerprint())), "{log}");
    assert!(log.contains("Law trained by 2 workers + 1 parameter server"), "{log}");
    namespace.is_empty();
    namespace.kubectl(&["delete", "pod", "launcher"]);
}
