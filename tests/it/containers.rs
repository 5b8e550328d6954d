//! Training in containers of a real engine, which is the tests' own and cannot be reached from here but by its socket.

#[expect(dead_code, reason = "the launcher's own tests use more of it")]
#[path = "../../fairing-core/tests/docker/engine.rs"]
mod engine;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use fairing_core::{DistributedTraining as _, Topology};
use fairing_tests::law::{Kind, Law, Rule};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::support::{Ended, PATIENCE, Program, Running, Signal};
use engine::Engine;

/// Four epochs of twenty steps, slow enough to be disturbed in the middle.
const LAW: Law = Law {
    kind: Kind::Cnn,
    rule: Rule::Adam,
    examples: 240,
    epochs: 4,
    batch_size: 12,
    learning_rate: 0.01,
    pause_ms: 20,
};

/// An engine, and a registry that both it and this program reach at one address: two of them share their storage, since what
/// is this machine's own address is another one in the engine's namespace.
struct Stage {
    engine: Engine,
    registry: String,
    /// Its end is the end of the registry on this side.
    _registry: Child,
    _folder: TempDir,
}

/// Who may push and pull where a password is wanted.
const USER: &str = "fairing";
/// Nothing else has this in it.
const PASSWORD: &str = "open-sesame-7f3a91";

impl Stage {
    fn start() -> Self {
        Self::with(|_| String::new())
    }

    /// With a registry that wants [`PASSWORD`].
    fn with_password() -> Self {
        Self::with(|folder| {
            let entry = Command::new("htpasswd").args(["-nbB", USER, PASSWORD]).output().unwrap().stdout;
            let path = folder.join("htpasswd");
            fs::write(&path, entry).unwrap();
            format!("auth:\n  htpasswd: {{ realm: tests, path: '{}' }}\n", path.display())
        })
    }

    /// What `extra` makes of the registry's folder goes into its configuration.
    fn with(extra: impl FnOnce(&Path) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let registry = format!("127.0.0.1:{port}");
        let configuration = folder.path().join("registry.yml");
        let storage = folder.path().join("storage");
        let extra = extra(folder.path());
        let text = format!(
            "version: 0.1\nlog: {{ level: error }}\n{extra}http: {{ addr: '{registry}' }}\nstorage:\n  filesystem: {{ rootdirectory: '{}' }}\n",
            storage.display()
        );
        fs::write(&configuration, text).unwrap();
        let script =
            "docker-registry serve \"$0\" </dev/null >/dev/null 2>&1 & cat >/dev/null; kill $!; wait; rm -rf \"$1\"";
        let mut command = Command::new("sh");
        let registering =
            command.args(["-c", script]).arg(&configuration).arg(folder.path()).stdin(Stdio::piped()).spawn();
        let engine = Engine::start_beside(Some(&configuration));
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(&registry).is_err() {
            assert!(Instant::now() < deadline, "the registry does not start");
            thread::sleep(Duration::from_millis(20));
        }
        Self { engine, registry, _registry: registering.unwrap(), _folder: folder }
    }

    /// What the registry answers to a question.
    fn ask(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.registry).unwrap();
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        write!(stream, "GET /v2/{path} HTTP/1.0\r\nAccept: {manifest}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// One after another, so that each may ask the engine what is left.
static STAGE: LazyLock<Option<Mutex<Stage>>> = LazyLock::new(|| match missing() {
    None => Some(Mutex::new(Stage::start())),
    Some(reason) => {
        skip(&reason);
        None
    }
});

fn skip(reason: &str) {
    let skipped = format!("skipped: training in containers: {reason}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{skipped}");
    // libtest shows what the macros print of failed tests only.
    std::io::stderr().write_all(format!("{skipped}\n").as_bytes()).unwrap();
}

fn missing() -> Option<String> {
    let has_registry = || Command::new("docker-registry").arg("--version").output().is_ok();
    engine::missing()
        .or_else(|| (!has_registry()).then(|| "docker-registry is missing (Debian: apt-get install it)".into()))
}

fn stage() -> Option<MutexGuard<'static, Stage>> {
    // A test that failed has left nothing that the next one could not stand.
    Some(STAGE.as_ref()?.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

trait InContainers {
    fn in_containers(self, engine: &Engine) -> Self;
}

impl InContainers for Program {
    fn in_containers(self, engine: &Engine) -> Self {
        self.env("FAIRING_TARGET", "docker").env("DOCKER_HOST", &engine.host())
    }
}

/// What the engine has of runs: containers, networks, volumes, images without a name.
fn left(engine: &Engine) -> Vec<String> {
    let mut left = engine.lines(&["ps", "--all", "--format", "container {{.Names}} {{.Status}}"]);
    left.extend(engine.lines(&["network", "ls", "--filter", "label=fairing.dev/run", "--format", "network {{.Name}}"]));
    left.extend(engine.lines(&["volume", "ls", "--format", "volume {{.Name}}"]));
    left.extend(engine.lines(&["images", "--filter", "dangling=true", "--format", "image {{.ID}}"]));
    left
}

#[track_caller]
fn nothing_is_left(engine: &Engine) {
    assert_eq!(left(engine), Vec::<String>::new());
}

#[track_caller]
fn nothing_stays(engine: &Engine) {
    let deadline = Instant::now() + PATIENCE;
    while !left(engine).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", left(engine));
        thread::sleep(Duration::from_millis(100));
    }
}

#[track_caller]
fn in_second_epoch(program: Program, law: &Law) -> Running {
    let mut running = program.start();
    running.wait_for(&format!("epoch 1/{}  loss", law.epochs));
    running
}

/// Checks that a run has trained what one in memory trains, to the bit.
#[track_caller]
fn trained_as_in_memory(law: &Law, topology: Topology, ended: Ended) {
    let at_once = Law { pause_ms: 0, ..law.clone() };
    let in_memory = at_once.train_in_memory(topology).unwrap();
    let ended = ended.code(0).nothing_left();
    assert_eq!(ended.own_lines(), [format!("fingerprint {}", in_memory.model.fingerprint())]);
    assert_eq!(ended.summary()["status"], "succeeded");
    assert!(ended.has_model());
}

#[test]
fn containers_train_the_same_bits_as_threads() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { pause_ms: 0, ..LAW };
    for topology in [Topology::new(2, 2), Topology::new(2, 0)] {
        let program = Program::law(&law, topology.workers.get(), topology.ps).in_containers(engine);
        trained_as_in_memory(&law, topology, program.run());
        nothing_is_left(engine);
    }
}

#[test]
fn podman_trains_the_same_bits_and_leaves_nothing() {
    if let Some(reason) = engine::podman_is_missing() {
        return skip(&reason);
    }
    // One engine after another: the machine is small.
    let _stage = stage();
    let engine = Engine::start_podman();
    let law = Law { pause_ms: 0, ..LAW };
    for topology in [Topology::new(2, 2), Topology::new(2, 0)] {
        let program = Program::law(&law, topology.workers.get(), topology.ps).in_containers(&engine);
        trained_as_in_memory(&law, topology, program.run());
        nothing_is_left(&engine);
    }
    let law = Law { epochs: 100, ..LAW };
    let start = || in_second_epoch(Program::law(&law, 2, 1).in_containers(&engine), &law);
    let running = start();
    running.signal_replica("worker", 1, Signal::KILL);
    running.end().code(1).says("worker 1 was ended by signal 9 (SIGKILL)").says("cause: worker 1");
    nothing_is_left(&engine);
    let running = start();
    running.signal_group(Signal::INT);
    assert!(running.end().code(130).has_model());
    nothing_is_left(&engine);
    let running = start();
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL);
    nothing_stays(&engine);
}

#[test]
fn killed_worker_container_is_started_again_and_no_bit_differs() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let program = Program::law(&LAW, 2, 2).in_containers(engine).env("FAIRING_REJOIN", "30s");
    let mut running = in_second_epoch(program, &LAW);
    running.signal_replica("worker", 1, Signal::KILL);
    running.wait_for("warning: worker 1 is started again");
    trained_as_in_memory(&LAW, Topology::new(2, 2), running.end());
    nothing_is_left(engine);
}

#[test]
fn killed_container_fails_the_run_and_is_named() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    for (role, name) in [("worker", "worker 1"), ("ps", "ps 1"), ("ps", "ps 0")] {
        let law = Law { epochs: 100, ..LAW };
        let running = in_second_epoch(Program::law(&law, 2, 2).in_containers(engine), &law);
        let rank = name.rsplit(' ').next().unwrap().parse().unwrap();
        running.signal_replica(role, rank, Signal::KILL);
        let ended = running.end().code(1).nothing_left();
        assert_eq!(ended.summary()["status"], "failed");
        ended.says(&format!("{name} was ended by signal 9 (SIGKILL)")).says(&format!("cause: {name}"));
        nothing_is_left(engine);
    }
}

#[test]
fn interrupted_run_in_containers_saves_its_model() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { epochs: 100, ..LAW };
    let running = in_second_epoch(Program::law(&law, 2, 1).in_containers(engine), &law);
    running.signal_group(Signal::INT);
    let ended = running.end().code(130).nothing_left();
    assert_eq!(ended.summary()["status"], "stopped");
    assert!(ended.has_model());
    nothing_is_left(engine);
}

#[test]
fn launcher_killed_leaves_nothing_at_the_engine() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { epochs: 100, ..LAW };
    let running = in_second_epoch(Program::law(&law, 2, 1).in_containers(engine), &law);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL);
    nothing_stays(engine);
}

#[test]
fn replicas_end_by_themselves_when_nobody_is_left_to_end_them() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { epochs: 1000, ..LAW };
    let running = in_second_epoch(Program::law(&law, 2, 1).in_containers(engine), &law);
    running.kill_with_guardian();
    running.end().signalled(Signal::KILL);
    let deadline = Instant::now() + PATIENCE;
    while !engine.lines(&["ps", "--format", "{{.Names}}"]).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", left(engine));
        thread::sleep(Duration::from_millis(20));
    }
    // What has ended stays for `sweep`, which would wait until the run is no longer young.
    for container in engine.lines(&["ps", "--all", "--quiet"]) {
        engine.lines(&["rm", &container]);
    }
    engine.lines(&["network", "prune", "--force"]);
    nothing_is_left(engine);
}

#[test]
fn engine_that_goes_away_fails_the_run_and_says_so() {
    let Some(_stage) = stage() else { return };
    let engine = Engine::start();
    let law = Law { epochs: 100, ..LAW };
    let running = in_second_epoch(Program::law(&law, 2, 1).in_containers(&engine), &law);
    drop(engine);
    let ended = running.end().code(1).nothing_left();
    assert_eq!(ended.summary()["status"], "failed");
    ended.says("how its container ended was not seen: ").says("may be left at `unix:");
}

#[test]
fn two_runs_in_containers_do_not_disturb_each_other() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let start = || Program::law(&LAW, 2, 1).in_containers(engine).start();
    let (one, other) = (start(), start());
    trained_as_in_memory(&LAW, Topology::new(2, 1), one.end());
    trained_as_in_memory(&LAW, Topology::new(2, 1), other.end());
    nothing_is_left(engine);
}

#[test]
fn pushed_image_is_run_by_its_digest_and_sent_once() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let repository = format!("{}/team/fixture", stage.registry);
    let law = Law { pause_ms: 0, ..LAW };
    let program = || Program::law(&law, 2, 1).in_containers(engine).env("FAIRING_REPOSITORY", &repository);
    let said = |ended: &Ended, what: &str| {
        let text = ended.stderr();
        let line = text.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("no `{what}` in:\n{text}"));
        line.split_whitespace().find(|word| word.contains("@sha256:")).expect("a digest").to_owned()
    };
    let mut running = program().start();
    running.wait_for(" joined");
    let images = engine.lines(&["ps", "--format", "{{.Image}}", "--no-trunc"]);
    let first = running.end();
    let reference = said(&first, " pushed: ");
    // By digest, and no container by anything else. (Those that have ended meanwhile are not listed.)
    assert!(images.iter().all(|image| *image == reference), "{images:?}");
    trained_as_in_memory(&law, Topology::new(2, 1), first);
    let second = program().run();
    assert_eq!(said(&second, " is there already"), reference);
    trained_as_in_memory(&law, Topology::new(2, 1), second);
    nothing_is_left(engine);
    let digest = reference.split_once('@').unwrap().1;
    assert!(stage.ask(&format!("team/fixture/manifests/{digest}")).starts_with("HTTP/1.0 200"));
    // A name for people beside the digest.
    let tags = stage.ask("team/fixture/tags/list");
    assert!(tags.contains("\"tags\":[\""), "{tags}");
    // Outside of git it is that of the run, and the image is the same one.
    let outside = tempfile::tempdir().unwrap();
    let third = program().env("CARGO_MANIFEST_DIR", outside.path().to_str().unwrap()).run().code(0);
    assert_eq!(said(&third, " is there already"), reference);
    let run = fs::canonicalize(third.run_folder()).unwrap();
    let run = run.file_name().unwrap().to_str().unwrap();
    let tagged = stage.ask(&format!("team/fixture/manifests/{run}"));
    assert!(tagged.contains(reference.split_once('@').unwrap().1), "{tagged}");

    // containerd, which clusters use, takes it too; the one behind the engine, without the engine.
    let containerd = |arguments: &[&str]| {
        let output =
            engine.inside("ctr", &[&["--address", "/run/exec/containerd/containerd.sock"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    containerd(&["images", "pull", "--plain-http", &reference]);
    let help = containerd(&["run", "--rm", &reference, "fixture-help", "/app/fixture", "--help"]);
    assert!(help.contains("Usage: fixture"), "{help}");

    // What is in the registry is as good as a finished image, and as a base.
    for (variable, reference) in [("FAIRING_IMAGE", &reference), ("FAIRING_BASE", &reference)] {
        let ended = Program::law(&law, 2, 1).in_containers(engine).env(variable, reference).run();
        trained_as_in_memory(&law, Topology::new(2, 1), ended);
        nothing_is_left(engine);
    }
    let ended = program().env("FAIRING_BASE", &reference).run();
    trained_as_in_memory(&law, Topology::new(2, 1), ended);
    nothing_is_left(engine);
}

#[test]
fn engine_builds_the_image_from_a_dockerfile() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { pause_ms: 0, ..LAW };
    let program = || Program::law(&law, 2, 1).in_containers(engine).env("FAIRING_BUILDER", "docker");
    trained_as_in_memory(&law, Topology::new(2, 1), program().run());
    nothing_is_left(engine);

    let folder = tempfile::tempdir().unwrap();
    let dockerfile = folder.path().join("Dockerfile");
    let text = "FROM scratch\nADD fairing/libraries.tar /\nADD fairing/program.tar /\nENTRYPOINT [\"/app/fixture\"]\n";
    fs::write(&dockerfile, text).unwrap();
    let repository = format!("{}/team/own", stage.registry);
    let own = program().env("FAIRING_DOCKERFILE", dockerfile.to_str().unwrap()).env("FAIRING_REPOSITORY", &repository);
    let ended = own.run().says("Step 1/").says(" pushed by the engine");
    trained_as_in_memory(&law, Topology::new(2, 1), ended);
    nothing_is_left(engine);
    assert!(stage.ask("team/own/tags/list").contains("\"tags\":[\""));

    let missing = folder.path().join("Nowhere");
    // Named before anything is packed, as a dry run shows, which ends with that.
    for dry_run in ["0", "1"] {
        let program = program().env("FAIRING_DRY_RUN", dry_run);
        let ended = program.env("FAIRING_DOCKERFILE", missing.to_str().unwrap()).run().code(1);
        let ended = ended.says("cannot read the Dockerfile").says("Nowhere");
        assert!(!ended.run_folder().exists());
    }
}

#[test]
fn more_cores_than_the_engine_has_are_named_before_anything_is_made() {
    let Some(stage) = stage() else { return };
    for (variable, role) in [("FAIRING_WORKER_CPU", "worker"), ("FAIRING_PS_CPU", "ps")] {
        let program = Program::law(&LAW, 2, 1).in_containers(&stage.engine).env(variable, "9000");
        let ended = program.env("FAIRING_REPOSITORY", "127.0.0.1:1/not/reached").run().code(1);
        let ended = ended.says(&format!("each {role} is to have 9000 cores")).never_says("packed");
        assert!(!ended.run_folder().exists());
    }
    nothing_is_left(&stage.engine);
}

/// A folder with a Dockerfile whose entry point is a shell script that ends with `last`.
fn with_script(last: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy("/bin/sh", folder.path().join("sh")).unwrap();
    fs::write(folder.path().join("entry"), format!("echo from the script\n{last}\n")).unwrap();
    let text = "FROM scratch\nADD fairing/libraries.tar /\nADD fairing/program.tar /\nCOPY sh entry /\n\
                ENTRYPOINT [\"/sh\", \"/entry\"]\n";
    fs::write(folder.path().join("Dockerfile"), text).unwrap();
    folder
}

#[test]
fn entry_script_that_does_not_give_way_to_the_program_is_named() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { pause_ms: 0, ..LAW };
    let run = |last: &str| {
        let folder = with_script(last);
        let dockerfile = folder.path().join("Dockerfile");
        let program = Program::law(&law, 2, 1).in_containers(engine).env("FAIRING_BUILDER", "docker");
        program.env("FAIRING_DOCKERFILE", dockerfile.to_str().unwrap()).run()
    };
    for wrong in ["/app/fixture \"$@\"\nexit $?", "exec /app/fixture \"$@\" </entry"] {
        let ended = run(wrong).code(1).nothing_left().says("from the script");
        let ended = ended.says("is not attached to its launcher").says("`exec PROGRAM \"$@\"`");
        assert_eq!(ended.summary()["status"], "failed");
        nothing_is_left(engine);
    }
    trained_as_in_memory(&law, Topology::new(2, 1), run("exec /app/fixture \"$@\"").says("from the script"));
    nothing_is_left(engine);
}

#[test]
fn run_in_a_replica_is_a_run_of_its_own() {
    let Some(stage) = stage() else { return };
    Program::fixture("nested").in_containers(&stage.engine).run().code(0).nothing_left().says("slope 2.0");
    nothing_is_left(&stage.engine);
    Program::fixture("nested").run().code(0).nothing_left().says("slope 2.0");
}

/// A request that gets stuck: the first one whose head holds `text`.
#[derive(Clone, Copy)]
struct Stuck {
    text: &'static str,
    /// How much of it is passed on; of the answer nothing is.
    bytes: usize,
}

impl Stuck {
    /// One that arrives whole.
    fn after(text: &'static str) -> Self {
        Self { text, bytes: usize::MAX }
    }

    /// One of which only the beginning arrives.
    fn within(text: &'static str) -> Self {
        Self { text, bytes: 100_000 }
    }
}

/// A certificate authority of the tests' own.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// Writes `ca.pem`, and a `cert.pem` for `name` with its `key.pem`, into a new folder.
    fn issue(&self, name: &str, folder: &Path) -> PathBuf {
        fs::create_dir_all(folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        for (file, text) in
            [("ca.pem", &self.certificate), ("cert.pem", &certificate), ("key.pem", &key.serialize_pem())]
        {
            fs::write(folder.join(file), text).unwrap();
        }
        folder.to_owned()
    }
}

/// An address of the engine's namespace that is not its loopback, where everybody would be trusted.
const NOT_LOOPBACK: &str = "192.0.2.10";

#[test]
fn registry_with_an_authority_of_its_own_is_pushed_to_and_run_from() {
    let Some(_stage) = stage() else { return };
    let folder = tempfile::tempdir().unwrap();
    let registry = format!("{NOT_LOOPBACK}:5443");
    let authority = Authority::new("ours");
    let tls = authority.issue(NOT_LOOPBACK, &folder.path().join("tls"));
    let trusted = folder.path().join("certs.d");
    fs::create_dir_all(trusted.join(&registry)).unwrap();
    fs::write(trusted.join(&registry).join("ca.crt"), &authority.certificate).unwrap();
    let configuration = folder.path().join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{ level: error }}\nhttp:\n  addr: '{registry}'\n  tls: {{ certificate: '{tls}/cert.pem', key: \
         '{tls}/key.pem' }}\nstorage:\n  filesystem: {{ rootdirectory: '{}' }}\n",
        folder.path().join("storage").display(),
        tls = tls.display(),
    );
    fs::write(&configuration, text).unwrap();
    let engine = Engine::start_with(Some(&configuration), &[("FAIRING_TESTS_CERTIFICATES", &trusted)]);
    let law = Law { pause_ms: 0, ..LAW };
    let program = || {
        let program = Program::law(&law, 2, 1).in_containers(&engine).beside(engine.first());
        program.env("FAIRING_REPOSITORY", &format!("{registry}/team/secured"))
    };
    let ca = tls.join("ca.pem");
    let ended = program().env("FAIRING_REGISTRY_CA", ca.to_str().unwrap()).run();
    let ended = ended.says(&format!("image {registry}/team/secured@sha256:")).says(" pushed: ");
    trained_as_in_memory(&law, Topology::new(2, 1), ended);
    nothing_is_left(&engine);
    let ended = program().run().code(1).says("registry_ca");
    assert!(!ended.run_folder().exists());
}

#[test]
fn engine_behind_mutual_tls_trains_and_is_refused_without() {
    let Some(_stage) = stage() else { return };
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let at_engine = authority.issue("127.0.0.1", &folder.path().join("engine"));
    let ours = authority.issue("fairing", &folder.path().join("ours"));
    let others = Authority::new("another").issue("fairing", &folder.path().join("others"));
    let engine = Engine::start_with(None, &[("FAIRING_TESTS_TLS", &at_engine)]);
    let law = Law { pause_ms: 0, epochs: 100, ..LAW };
    let program = |law: &Law, certificates: &Path| {
        let program = Program::law(law, 2, 1).env("FAIRING_TARGET", "docker").beside(engine.first());
        let program = program.env("DOCKER_HOST", "tcp://127.0.0.1:2376").env("DOCKER_TLS_VERIFY", "1");
        program.env("DOCKER_CERT_PATH", certificates.to_str().unwrap())
    };
    let short = Law { epochs: 4, ..law.clone() };
    trained_as_in_memory(&short, Topology::new(2, 1), program(&short, &ours).run());
    nothing_is_left(&engine);
    // The guardian finds its way, too.
    let law = Law { pause_ms: 20, ..law };
    let running = in_second_epoch(program(&law, &ours), &law);
    running.signal(Signal::KILL);
    running.end().signalled(Signal::KILL);
    nothing_stays(&engine);

    let ended = program(&law, &others).run().code(1).says("no container engine answers at `tcp://127.0.0.1:2376`");
    assert!(!ended.run_folder().exists());
    program(&law, folder.path()).run().code(1).says("ca.pem").says("DOCKER_CERT_PATH");
}

/// Stands before a server and passes everything on, until a request gets stuck.
struct Dam(Receiver<()>);

impl Dam {
    /// Before an engine; with it what DOCKER_HOST must be.
    fn before_engine(engine: &Engine, folder: &Path, stuck: Stuck) -> (Self, String) {
        let (path, socket) = (folder.join("dam.sock"), engine.socket());
        let listener = UnixListener::bind(&path).unwrap();
        let pair = move || Some((listener.accept().ok()?.0.into(), UnixStream::connect(&socket).ok()?.into()));
        (Self::new(pair, stuck), format!("unix://{}", path.display()))
    }

    /// Before a registry; with it its address.
    fn before_registry(registry: &str, stuck: Stuck) -> (Self, String) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let (address, registry) = (listener.local_addr().unwrap().to_string(), registry.to_owned());
        let pair = move || Some((listener.accept().ok()?.0.into(), TcpStream::connect(&registry).ok()?.into()));
        (Self::new(pair, stuck), address)
    }

    fn new(pair: impl Fn() -> Option<(OwnedFd, OwnedFd)> + Send + 'static, stuck: Stuck) -> Self {
        let (told, is_stuck) = channel();
        thread::spawn(move || {
            while let Some((near, far)) = pair() {
                let told = told.clone();
                thread::spawn(move || pass(near.into(), far.into(), stuck, &told));
            }
        });
        Self(is_stuck)
    }

    /// Waits until the request is stuck.
    #[track_caller]
    fn wait(&self) {
        self.0.recv_timeout(PATIENCE).expect("a request that gets stuck");
    }
}

fn pass(mut near: fs::File, mut far: fs::File, stuck: Stuck, told: &Sender<()>) {
    /// Where the text of a request's head is looked for.
    const HEAD_BYTES: usize = 200;
    let holds_back = Arc::new(AtomicBool::new(false));
    let (mut answers, mut back) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let seen = holds_back.clone();
    thread::spawn(move || {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(size @ 1..) = answers.read(&mut chunk) {
            if !seen.load(Ordering::SeqCst) && back.write_all(&chunk[..size]).is_err() {
                break;
            }
        }
        if !seen.load(Ordering::SeqCst) {
            // Fails if it is closed already.
            let _ = rustix::net::shutdown(&back, rustix::net::Shutdown::Both);
        }
    });
    let (mut chunk, mut left) = (vec![0; 1 << 16], usize::MAX);
    // What is not passed on is read all the same, up to the end of whoever asks.
    while let Ok(size @ 1..) = near.read(&mut chunk) {
        let head = &chunk[..size.min(HEAD_BYTES)];
        let is_it = head.windows(stuck.text.len()).any(|window| window == stuck.text.as_bytes());
        if is_it && !holds_back.swap(true, Ordering::SeqCst) {
            left = stuck.bytes;
        }
        let passed = size.min(left);
        if far.write_all(&chunk[..passed]).is_err() {
            break;
        }
        if holds_back.load(Ordering::SeqCst) && left > 0 {
            left = if left == usize::MAX { 0 } else { left - passed };
            if left == 0 {
                let _ = told.send(());
            }
        }
    }
    let _ = rustix::net::shutdown(&far, rustix::net::Shutdown::Both);
}

#[test]
fn interrupt_ends_a_launch_that_is_stuck() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    for (interrupts, limit) in [(1, Duration::from_secs(15)), (2, Duration::from_secs(3))] {
        let folder = tempfile::tempdir().unwrap();
        let (dam, host) = Dam::before_engine(engine, folder.path(), Stuck::after("/start "));
        let running = Program::law(&LAW, 2, 1).in_containers(engine).env("DOCKER_HOST", &host).start();
        dam.wait();
        let began = Instant::now();
        for _ in 0..interrupts {
            running.signal_group(Signal::INT);
            // Two signals of one kind that nobody has looked at are one.
            thread::sleep(Duration::from_millis(200));
        }
        running.end().code(130).says("stopped before the replicas were started");
        assert!(began.elapsed() < limit, "{interrupts}: {:?}", began.elapsed());
        nothing_stays(engine);
    }
}

/// Kills the launcher in the middle of what is done before there are containers.
#[test]
fn launcher_killed_before_there_are_containers_leaves_nothing() {
    let Some(stage) = stage() else { return };
    let engine = &stage.engine;
    let law = Law { pause_ms: 0, ..LAW };
    let folder = tempfile::tempdir().unwrap();
    let program = |name: &str| {
        // Of each its own, so that what one has made is not there for the next.
        let copy = folder.path().join(name);
        fs::copy(env!("CARGO_BIN_EXE_fixture"), &copy).unwrap();
        let program = Program::fixture_at(&copy, &format!("law {} 2 1", serde_json::to_string(&law).unwrap()));
        program.in_containers(engine).env("FAIRING_CACHE", folder.path().join("cache").to_str().unwrap())
    };
    let killed = |running: Running| {
        running.signal(Signal::KILL);
        running.end().signalled(Signal::KILL).nothing_stays();
        nothing_stays(engine);
    };

    // Packing.
    let running = program("packs").env("FAIRING_REPOSITORY", &format!("{}/team/packs", stage.registry)).start();
    let cache = folder.path().join("cache");
    let is_half =
        || files_if_any(&cache).iter().any(|path| path.extension().is_some_and(|extension| extension == "new"));
    let deadline = Instant::now() + PATIENCE;
    while !is_half() {
        assert!(Instant::now() < deadline, "nothing is packed");
        thread::sleep(Duration::from_millis(1));
    }
    killed(running);

    // Handing the image over, sending what it is built from, fetching it.
    for (name, text, variables) in
        [("loads", "/images/load", vec![]), ("sends", "/build?", vec![("FAIRING_BUILDER", "docker")])]
    {
        let folder = tempfile::tempdir().unwrap();
        let (dam, host) = Dam::before_engine(engine, folder.path(), Stuck::within(text));
        let program = variables.iter().fold(program(name), |program, (variable, value)| program.env(variable, value));
        let running = program.env("DOCKER_HOST", &host).start();
        dam.wait();
        killed(running);
    }
    let dammed = tempfile::tempdir().unwrap();
    let (dam, host) = Dam::before_engine(engine, dammed.path(), Stuck::after("/images/create"));
    let repository = format!("{}/team/pulls", stage.registry);
    let running = program("pulls").env("DOCKER_HOST", &host).env("FAIRING_REPOSITORY", &repository).start();
    dam.wait();
    killed(running);

    // Building.
    let built = tempfile::tempdir().unwrap();
    let text = "FROM scratch\nADD fairing/libraries.tar /\nADD fairing/program.tar /\nENV STEP=1\n\
                RUN [\"/app/builds\", \"sleep\"]\nENTRYPOINT [\"/app/builds\"]\n";
    fs::write(built.path().join("Dockerfile"), text).unwrap();
    let program_that_builds = program("builds").env("FAIRING_BUILDER", "docker");
    let dockerfile = built.path().join("Dockerfile");
    let mut running = program_that_builds.env("FAIRING_DOCKERFILE", dockerfile.to_str().unwrap()).start();
    running.wait_for("RUN [\"/app/builds\"");
    let deadline = Instant::now() + PATIENCE;
    while engine.lines(&["ps", "--quiet"]).is_empty() {
        assert!(Instant::now() < deadline, "the step does not begin");
        thread::sleep(Duration::from_millis(20));
    }
    killed(running);
    let images = engine.lines(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    assert!(images.contains(&"fairing/builds:unfinished".to_owned()), "{images:?}");

    // Pushing.
    let (dam, registry) = Dam::before_registry(&stage.registry, Stuck::within("PUT /v2/team/pushes/blobs/uploads/"));
    let repository = format!("{registry}/team/pushes");
    let running = program("pushes").env("FAIRING_REPOSITORY", &repository).start();
    dam.wait();
    killed(running);
    let tags = stage.ask("team/pushes/tags/list");
    assert!(!tags.contains("\"tags\":[\""), "{tags}");
}

fn files_if_any(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

#[test]
fn dry_run_prints_what_would_be_done_and_does_nothing() {
    let program = Program::law(&LAW, 2, 1).env("FAIRING_TARGET", "docker").env("FAIRING_DRY_RUN", "1");
    // No engine is asked.
    let ended = program.env("DOCKER_HOST", "unix:///nowhere").run().code(0);
    for expected in [
        "image for linux/",
        "  layer libraries",
        "  layer program",
        "network RUN: private, without a way out",
        "container RUN-ps-0: fixture, all cores, all memory",
        "container RUN-worker-1: fixture, all cores, all memory",
    ] {
        assert!(ended.stdout().any(|line| line.starts_with(expected)), "{expected}\n{}", ended.stderr());
    }
    assert!(!ended.run_folder().exists());
}

/// Every file below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() && !path.is_symlink() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn password_reaches_the_registry_and_nothing_else() {
    let Some(_stage) = stage() else { return };
    let stage = Stage::with_password();
    let engine = &stage.engine;
    let (cache, logins) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let log_in = |password: &str| {
        let mut encoding = Command::new("base64").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        write!(encoding.stdin.take().unwrap(), "{USER}:{password}").unwrap();
        let encoded = String::from_utf8(encoding.wait_with_output().unwrap().stdout).unwrap().trim().to_owned();
        let config = format!("{{ \"auths\": {{ \"{}\": {{ \"auth\": \"{encoded}\" }} }} }}", stage.registry);
        fs::write(logins.path().join("config.json"), config).unwrap();
        [password.to_owned(), encoded]
    };
    let program = || {
        let program = Program::law(&LAW, 2, 1).in_containers(engine).env("RUST_LOG", "trace");
        let program = program.env("FAIRING_REPOSITORY", &format!("{}/team/secret", stage.registry));
        let program = program.env("FAIRING_CACHE", cache.path().to_str().unwrap());
        program.env("DOCKER_CONFIG", logins.path().to_str().unwrap())
    };
    let wrong = log_in("sesame-shut-0b1c22");
    let ended = program().run().code(1).says("docker login").never_says(&wrong[0]).never_says(&wrong[1]);
    assert!(!ended.run_folder().exists());

    let secrets = log_in(PASSWORD);
    let mut running = program().start();
    running.wait_for(" joined");
    let containers = engine.lines(&["ps", "--quiet"]);
    let inspected = containers.iter().flat_map(|container| engine.lines(&["inspect", container])).collect::<String>();
    let ended = running.end().never_says(&secrets[0]).never_says(&secrets[1]);
    let mut seen: Vec<(PathBuf, Vec<u8>)> = vec![("docker inspect".into(), inspected.into_bytes())];
    for image in engine.lines(&["images", "--quiet"]) {
        seen.push(("docker save".into(), engine.docker(&["save", &image]).stdout));
    }
    assert!(seen.len() >= 2 && seen.iter().all(|(_, bytes)| !bytes.is_empty()));
    for path in [files(&ended.run_folder()), files(cache.path())].concat() {
        seen.push((path.clone(), fs::read(path).unwrap_or_default()));
    }
    for (place, bytes) in &seen {
        for secret in &secrets {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "a secret in {}", place.display());
        }
    }
    trained_as_in_memory(&LAW, Topology::new(2, 1), ended);
    nothing_is_left(engine);
}

#[test]
fn damaged_cache_is_noticed_and_made_anew() {
    let Some(stage) = stage() else { return };
    let cache = tempfile::tempdir().unwrap();
    let program = |name: &str| {
        let repository = format!("{}/{name}", stage.registry);
        let program = Program::law(&Law { pause_ms: 0, ..LAW }, 1, 1).in_containers(&stage.engine);
        program.env("FAIRING_REPOSITORY", &repository).env("FAIRING_CACHE", cache.path().to_str().unwrap())
    };
    let planned = program("team/damaged").env("FAIRING_DRY_RUN", "1").run().code(0);
    let digest = planned.stdout().find_map(|line| line.strip_prefix("image ")?.split(' ').next()).unwrap().to_owned();
    let mut damaged = 0;
    for entry in fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|extension| extension == "gz") {
            let mut bytes = fs::read(&entry).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&entry, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged >= 2, "the layers are not where they should be");
    program("team/damaged").run().code(0).says(&format!("{digest} pushed: "));
    nothing_is_left(&stage.engine);
}

#[test]
fn cache_without_space_is_named_before_anything_is_sent() {
    let program = Program::law(&LAW, 2, 1).env("FAIRING_TARGET", "docker").env("FAIRING_DRY_RUN", "1");
    let program = program.env("FAIRING_REPOSITORY", "127.0.0.1:9/team/nowhere").env("FAIRING_CACHE", "runs/cache");
    // Too little for the libraries.
    let Some(program) = program.with_disk_of(512) else { return };
    program.run().code(1).says("no space in the cache folder").says("FAIRING_CACHE");
}

#[test]
fn engine_without_the_right_to_use_it_is_named() {
    let Some(stage) = stage() else { return };
    // Another user may neither read this user's folders nor open the engine's socket.
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let fixture = folder.path().join("fixture");
    fs::copy(env!("CARGO_BIN_EXE_fixture"), &fixture).unwrap();
    fs::set_permissions(stage.engine.socket().parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = Program::new("setpriv".as_ref()).in_containers(&stage.engine);
    let program = program.env("CARGO_MANIFEST_DIR", folder.path().to_str().unwrap());
    let program =
        ["--reuid=65534", "--regid=65534", "--clear-groups"].iter().fold(program, |it, word| it.argument(word));
    let program = program.argument(fixture.to_str().unwrap()).argument("start-and-wait");
    let ended =
        program.run().code(1).says(&format!("no right to use the container engine at `{}`", stage.engine.host()));
    ended.says("usermod -aG docker");
}

#[test]
fn engine_that_is_not_there_is_named_before_anything_is_done() {
    let program = Program::law(&LAW, 2, 1).env("FAIRING_TARGET", "docker").env("DOCKER_HOST", "unix:///nowhere");
    let ended = program.run().code(1).says("no container engine answers at `unix:///nowhere`");
    assert!(!ended.run_folder().exists());
}
