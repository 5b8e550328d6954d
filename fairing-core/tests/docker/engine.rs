//! The tests' own container engine, one for the whole program.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Far above what anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An engine in private namespaces; ends when it is dropped, or when this process ends.
pub(crate) struct Engine {
    process: Child,
    /// Its end is the engine's end.
    stdin: Option<ChildStdin>,
    folder: TempDir,
}

/// Why no engine can be started here, and what to do about it.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("a container engine of the tests' own needs root".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        |tool: &&str| std::env::split_paths(&path).chain(["/usr/sbin".into()]).any(|dir| dir.join(tool).is_file());
    let tools = ["dockerd", "containerd", "runc", "iptables", "unshare", "ip", "docker-registry"];
    let missing: Vec<&str> = tools.iter().filter(|tool| !found(tool)).copied().collect();
    (!missing.is_empty()).then(|| {
        format!("{} missing (Debian: apt-get install docker.io docker-registry iptables iproute2)", missing.join(", "))
    })
}

/// Why Podman cannot be started here, and what to do about it.
pub(crate) fn podman_is_missing() -> Option<String> {
    let has = |path: &str| Path::new(path).exists();
    let missing = missing().or_else(|| {
        let names = ["/usr/bin/podman", "/usr/lib/podman/netavark", "/usr/lib/podman/aardvark-dns"];
        (!names.into_iter().all(has)).then(|| "podman or its network is missing".to_owned())
    });
    missing.map(|reason| format!("{reason} (Debian: apt-get install podman netavark aardvark-dns)"))
}

impl Engine {
    pub(crate) fn start() -> Self {
        Self::start_beside(None)
    }

    /// Podman instead of Docker, with the same interface.
    pub(crate) fn start_podman() -> Self {
        Self::start_kind("podman", None, &[])
    }

    /// With the registry of this configuration beside it, which is on the engine's own loopback interface.
    pub(crate) fn start_beside(registry: Option<&Path>) -> Self {
        Self::start_kind("docker", registry, &[])
    }

    /// With variables of the script, beside the registry of a configuration or alone.
    pub(crate) fn start_with(registry: Option<&Path>, variables: &[(&str, &Path)]) -> Self {
        Self::start_kind("docker", registry, variables)
    }

    fn start_kind(kind: &str, registry: Option<&Path>, variables: &[(&str, &Path)]) -> Self {
        let folder = tempfile::Builder::new().prefix("engine-").tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/engine.sh");
        let mut process = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"])
            .arg(script)
            .arg(folder.path())
            .args(registry)
            .env_remove("DOCKER_HOST")
            .env("FAIRING_TESTS_ENGINE", kind)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take();
        let engine = Self { process, stdin, folder };
        let deadline = Instant::now() + PATIENCE;
        while !engine.docker(&["version"]).status.success() {
            let log = || fs::read_to_string(engine.folder.path().join("docker.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the engine does not start:\n{}", log());
            thread::sleep(Duration::from_millis(50));
        }
        engine
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// What DOCKER_HOST must be.
    pub(crate) fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Asks the engine with its own client.
    pub(crate) fn docker(&self, arguments: &[&str]) -> std::process::Output {
        // Somewhere on the path may be another program of that name.
        let client =
            ["/usr/bin/docker", "docker"].into_iter().find(|path| Path::new(path).exists()).unwrap_or("docker");
        Command::new(client).args(arguments).env("DOCKER_HOST", self.host()).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn lines(&self, arguments: &[&str]) -> Vec<String> {
        let output = self.docker(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Stops the engine where it stands until the result is dropped; its containers go on.
    pub(crate) fn freeze(&self) -> Frozen {
        let is_engine = |id: &u32| {
            let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            name.trim() == "dockerd"
        };
        let id =
            children(self.first()).into_iter().find(is_engine).expect("the engine is a child of the first process");
        let engine = rustix::process::Pid::from_raw(id.cast_signed()).unwrap();
        rustix::process::kill_process(engine, rustix::process::Signal::STOP).unwrap();
        Frozen(engine)
    }

    /// The first process of the engine's namespaces.
    pub(crate) fn first(&self) -> u32 {
        children(self.process.id())[0]
    }

    /// Runs a program among the engine's own, in its namespaces.
    pub(crate) fn inside(&self, program: &str, arguments: &[&str]) -> std::process::Output {
        let first = self.first().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &first, "--mount", "--net", "--pid", program]).args(arguments);
        command.output().unwrap()
    }

    /// Makes an image of a root folder's archive.
    pub(crate) fn import(&self, archive: &[u8], changes: &[&str], name: &str) {
        let mut command = Command::new("/usr/bin/docker");
        command.args(["import"]).env("DOCKER_HOST", self.host());
        for change in changes {
            command.args(["--change", change]);
        }
        let mut importing = command.args(["-", name]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        importing.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(importing.wait().unwrap().success());
    }
}

/// The processes that `id` has started.
fn children(id: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    children.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

/// An engine that does not do anything until this is dropped.
pub(crate) struct Frozen(rustix::process::Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        // Fails if the engine has been ended meanwhile.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.process.wait();
    }
}
