//! What is refused before anything is built, and what cannot start afterwards.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Child;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A kubeconfig of a test's own for the same cluster.
struct Kubeconfig {
    folder: TempDir,
    content: Value,
}

impl Kubeconfig {
    /// As another user.
    fn of_user(user: Value) -> Self {
        let mut kubeconfig = Self { folder: tempfile::tempdir().unwrap(), content: own_kubeconfig() };
        kubeconfig.content["users"][0]["user"] = user;
        kubeconfig
    }

    fn path(&self) -> String {
        let path = self.folder.path().join("kubeconfig");
        // JSON is YAML.
        fs::write(&path, self.content.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// The kubeconfig of the tests with everything in it that it names.
fn own_kubeconfig() -> Value {
    let command = ["config", "view", "--minify", "--flatten", "--raw", "--output", "json"];
    serde_json::from_slice(&output("kubectl", &command)).unwrap()
}

#[track_caller]
fn output(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A registry that refuses a push; it ends with this value.
struct Registry {
    process: Child,
    address: String,
    _folder: TempDir,
}

impl Registry {
    /// One with these lines in its configuration, which may name its folder as FOLDER.
    fn start(settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().to_string();
        // `htpasswd -nbBC 4 fairing 'Tr0ub4dor-secret&9'`
        let password = "fairing:$2y$04$fWaSsxAGQHnFN.RQZagwv.uhApoIqRL42WXVlhbTRWiGUziV2/vyO\n";
        fs::write(folder.path().join("htpasswd"), password).unwrap();
        let settings = settings.replace("FOLDER", folder.path().to_str().unwrap());
        let path = folder.path().join("config.yml");
        fs::write(&path, format!("version: 0.1\nhttp: {{addr: \"{address}\"}}\n{settings}\n")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("the test cluster needs docker-registry too");
        let registry = Self { process, address, _folder: folder };
        wait_for(|| std::net::TcpStream::connect(&registry.address), |connection| connection.is_ok());
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Each with a registry that is not there either: both are said at once.
#[test]
fn credentials_that_do_not_work_are_named_before_anything_is_built() {
    let namespace = Namespace::new();
    let exec = |command: &str, arguments: &[&str]| {
        let version = "client.authentication.k8s.io/v1";
        json!({"exec": {"apiVersion": version, "command": command, "args": arguments, "interactiveMode": "Never"}})
    };
    let shell = |script: &str| exec("sh", &["-c", script]);
    let other = own_kubeconfig()["users"][0]["user"]["client-certificate-data"].clone();
    let mut untrusted = Kubeconfig::of_user(json!({"token": "tr0ub4dor"}));
    // A certificate, but none of an authority.
    untrusted.content["clusters"][0]["cluster"]["certificate-authority-data"] = other;
    let not_accepted = "does not accept the credentials of the kubeconfig (they may have expired: log in again)";
    for (kubeconfig, text) in [
        (Kubeconfig::of_user(json!({})), not_accepted),
        (Kubeconfig::of_user(json!({"token": "tr0ub4dor"})), not_accepted),
        (
            Kubeconfig::of_user(exec("log-in-to-the-cloud", &[])),
            "`log-in-to-the-cloud`, that the kubeconfig names for getting them, is not installed or not in PATH",
        ),
        (
            Kubeconfig::of_user(shell("echo tr0ub4dor; echo log in first >&2; exit 3")),
            "`sh`, that the kubeconfig names for getting them, ended with exit status: 3: log in first",
        ),
        (
            Kubeconfig::of_user(shell("echo '{\"status\": {\"token\": \"tr0ub4dor\"'")),
            "`sh`, that the kubeconfig names for getting them, printed something else (an ExecCredential is expected",
        ),
        (untrusted, "does not prove that it is the one of the kubeconfig: invalid peer certificate"),
    ] {
        let began = Instant::now();
        let program = namespace.law(&LAW, 2, 1).env("KUBECONFIG", &kubeconfig.path());
        let ended = program.env("FAIRING_REPOSITORY", "127.0.0.1:1/fairing").run().code(1);
        let ended = ended.says("the run cannot be launched").says(text).says("127.0.0.1:1").never_says("tr0ub4dor");
        assert!(!ended.run_folder().exists(), "{text}: nothing has begun");
        assert!(began.elapsed() < Duration::from_secs(30), "{text}: {:?}", began.elapsed());
    }
    namespace.is_empty();
}

#[test]
fn an_expired_certificate_is_named_before_anything_is_built() {
    let Some(control) = control() else { return };
    let namespace = Namespace::new();
    let pki = control.parent().unwrap().join("pki");
    let (authority, key) = (pki.join("ca.crt"), pki.join("ca.key"));
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let subject = "/O=system:masters/CN=late";
    let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", &file("key")];
    output("openssl", &[&["req", "-new", "-subj", subject, "-out", &file("request")][..], &new_key].concat());
    fs::write(file("extensions"), "basicConstraints=CA:FALSE\nextendedKeyUsage=clientAuth\n").unwrap();
    let signed_by = ["-CA", authority.to_str().unwrap(), "-CAkey", key.to_str().unwrap(), "-CAcreateserial"];
    let serial = ["-CAserial", &file("serial"), "-extfile", &file("extensions")];
    let sign = ["x509", "-req", "-in", &file("request"), "-out", &file("certificate"), "-days", "-1"];
    output("openssl", &[&sign[..], &signed_by, &serial].concat());
    let kubeconfig = Kubeconfig::of_user(json!({"client-certificate": file("certificate"), "client-key": file("key")}));
    let ended = namespace.law(&LAW, 2, 1).env("KUBECONFIG", &kubeconfig.path()).run().code(1);
    let ended = ended.says("does not accept the credentials of the kubeconfig (they may have expired: log in again)");
    assert!(!ended.never_says("pushed").run_folder().exists());
    namespace.is_empty();
}

#[test]
fn a_registry_that_refuses_a_push_is_named_before_anything_is_built() {
    let namespace = Namespace::new();
    let storage = "storage: {filesystem: {rootdirectory: FOLDER/storage}";
    let with_password = format!("{storage}}}\nauth: {{htpasswd: {{realm: test, path: FOLDER/htpasswd}}}}");
    let read_only = format!("{storage}, maintenance: {{readonly: {{enabled: true}}}}}}");
    for (settings, text) in [(with_password, "docker login"), (read_only, "405")] {
        let registry = Registry::start(&settings);
        let repository = format!("{}/team/model", registry.address);
        let nobody = registry._folder.path().join("docker").to_str().unwrap().to_owned();
        let program = namespace.law(&LAW, 2, 1).env("FAIRING_REPOSITORY", &repository).env("DOCKER_CONFIG", &nobody);
        // The cluster has a word to say too, and both are heard.
        let ended = program.env("FAIRING_WORKER_CPU", "1000").run().code(1);
        let ended = ended.says(&registry.address).says(text).says("no node can hold a worker").never_says("pushed");
        assert!(!ended.run_folder().exists(), "{text}: nothing has begun");
    }
    namespace.is_empty();
}

#[test]
fn quotas_of_objects_and_what_pods_refer_to_are_looked_at_before_anything_is_built() {
    let namespace = Namespace::new();
    namespace.kubectl(&[
        "create",
        "quota",
        "few",
        "--hard=count/jobs.batch=1,secrets=10,count/services=0,count/pods=2",
    ]);
    let path = "jsonpath={.status.hard}";
    wait_for(|| namespace.kubectl(&["get", "quota", "few", "--output", path]), |hard| !hard.is_empty());
    let ended = namespace.law(&LAW, 2, 1).env("FAIRING_VOLUMES", "secret:key:/a,configmap:names:/b,pvc:data:/c");
    let ended = ended.env("FAIRING_IMAGE_PULL_SECRETS", "login").run().code(1);
    let ended = ended
        .says("the quota `few` leaves 1 of count/jobs.batch, and the run takes 2 (ask for more or end what runs there)")
        .says("leaves 0 of count/services, and the run takes 1")
        .says("leaves 2 of count/pods, and the run takes 3")
        .never_says("of secrets")
        .says("the pods need the Secret `key`, and there is none of that name in the namespace")
        .says("the pods need the Secret `login`")
        .says("the pods need the ConfigMap `names`")
        .says("the pods need the PersistentVolumeClaim `data`")
        .never_says("pushed");
    assert!(!ended.run_folder().exists());
    namespace.is_empty();
}

/// Where nodes are made when they are needed, that there is none yet means nothing.
#[test]
fn a_node_that_is_not_there_yet_is_waited_for_if_the_user_says_so() {
    let namespace = Namespace::new();
    let program = namespace.law(&LAW, 2, 1).env("FAIRING_WORKER_CPU", "1000").env("FAIRING_CHECK_NODES", "false");
    let ended = program.env("FAIRING_SCHEDULE_TIMEOUT", "3s").run().code(1);
    ended
        .says("could not be started: it did not start within 3s: 0/")
        .says("nodes are available")
        .says("Insufficient cpu");
    namespace.is_empty();
}

/// The cluster itself says so only once the pods are there.
#[test]
fn a_pod_that_cannot_start_ends_the_run_at_once_with_the_clusters_reason() {
    let namespace = Namespace::new();
    namespace.kubectl(&["create", "secret", "generic", "login", "--from-literal=user=fairing"]);
    for (how, text) in [
        ("key", "CreateContainerConfigError: couldn't find key password in Secret"),
        ("command", "/no/such/program: no such file or directory"),
    ] {
        let began = Instant::now();
        let ended = namespace.target(Program::fixture(&format!("broken {how}"))).run().code(1);
        ended.says("Error: worker ").says(text);
        assert!(began.elapsed() < Duration::from_secs(60), "{how}: {:?}", began.elapsed());
        namespace.is_empty();
    }
    namespace.kubectl(&["delete", "secret", "login"]);
}
