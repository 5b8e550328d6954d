//! A container engine of the benchmark's own, in private namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::processes;

/// Far above what its start takes on a busy machine.
const START: Duration = Duration::from_secs(60);

/// An engine; it ends when it is dropped, or when this process ends.
pub(crate) struct Engine {
    process: Child,
    /// Its end is the engine's end.
    stdin: Option<ChildStdin>,
    folder: PathBuf,
}

/// Why no engine can be started here, and what to do about it.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some(
            "docker and everything in containers (a container engine of the benchmark's own needs root)".into(),
        );
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        |tool: &&str| std::env::split_paths(&path).chain(["/usr/sbin".into()]).any(|dir| dir.join(tool).is_file());
    let tools = ["docker", "dockerd", "containerd", "runc", "iptables", "unshare", "nsenter", "ip"];
    let missing: Vec<&str> = tools.iter().filter(|tool| !found(tool)).copied().collect();
    let how = "on Debian: apt-get install docker.io iptables iproute2";
    (!missing.is_empty())
        .then(|| format!("docker and everything in containers ({} missing; {how})", missing.join(", ")))
}

impl Engine {
    /// Starts an engine in `folder`, and beside it, in its network, a registry with the configuration in `registry`.
    pub(crate) fn start(folder: &Path, registry: &Path) -> anyhow::Result<Self> {
        fs::create_dir(folder)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine.sh");
        let mut process = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"])
            .args([&script, folder, registry])
            .env_remove("DOCKER_HOST")
            .stdin(Stdio::piped())
            .spawn()
            .context("no `unshare`")?;
        let stdin = process.stdin.take();
        let engine = Self { process, stdin, folder: folder.to_owned() };
        let deadline = Instant::now() + START;
        while let Err(error) = engine.docker(&["version"]) {
            anyhow::ensure!(Instant::now() < deadline, "the engine does not start: {error:#}");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(engine)
    }

    /// What DOCKER_HOST must be.
    pub(crate) fn host(&self) -> String {
        format!("unix://{}", self.folder.join("docker.sock").display())
    }

    /// Asks the engine with its own client.
    pub(crate) fn docker(&self, arguments: &[&str]) -> anyhow::Result<String> {
        // Somewhere on the path may be another program of that name.
        let client =
            ["/usr/bin/docker", "docker"].into_iter().find(|path| Path::new(path).exists()).unwrap_or("docker");
        let mut command = Command::new(client);
        command.args(arguments).env("DOCKER_HOST", self.host());
        Ok(String::from_utf8(processes::run(&mut command)?)?)
    }

    /// A command that will run in the engine's network, where only its own registry is.
    pub(crate) fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.process.id())).arg("--").arg(program);
        command
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.stdin.take());
        _ = self.process.wait();
    }
}
