//! The container engine: finding it, talking to it with deadlines, and saying in words what is wrong with it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bollard::models::SystemInfo;
use bollard::{API_DEFAULT_VERSION, Docker};

use crate::config::Env;
use crate::image::Architecture;
use crate::reactor::Reactor;
use crate::topology::Role;

/// How long the engine may take to answer a request that makes, starts or removes something. A loaded engine takes seconds.
pub(super) const CALL: Duration = Duration::from_secs(60);

/// How long the engine may take to say that it is there.
const GREETING: Duration = Duration::from_secs(10);

/// Seconds that the client library itself waits for the head of an answer; the calls here have deadlines of their own.
const LIBRARY_TIMEOUT: u64 = 24 * 60 * 60;

/// Oldest engine interface that will do: that of Docker 20.10.
const OLDEST: (usize, usize) = (1, 41);

/// Failure of a container engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// No socket of an engine was found.
    #[error(
        "no container engine was found (looked for {}; start Docker or Podman, or set DOCKER_HOST{})",
        sockets.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", "),
        of_context(context.as_deref())
    )]
    NotFound {
        /// Where one would have been.
        sockets: Vec<PathBuf>,
        /// The context that Docker's own client would use, if that is not its default.
        context: Option<String>,
    },
    /// What proves who is who to an engine on another machine cannot be read.
    #[error("cannot read `{}`, with which the container engine is spoken to over TLS (set DOCKER_CERT_PATH to the folder of ca.pem, \
             cert.pem and key.pem)", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// There is an address, but nobody answers.
    #[error("no container engine answers at `{address}`: {reason} (start it, or set DOCKER_HOST to another one)")]
    NoAnswer {
        /// Where it should be.
        address: String,
        /// Why not.
        reason: String,
    },
    /// The socket may not be opened.
    #[error(
        "no right to use the container engine at `{address}` (join the group that owns the socket, for Docker: \
         `sudo usermod -aG docker $USER` and a new login; or use a rootless engine)"
    )]
    NoRights {
        /// Where it is.
        address: String,
    },
    /// An address of a kind that is not supported.
    #[error(
        "DOCKER_HOST is `{address}`, which is not supported: unix:// is, and tcp:// to this machine, or with \
         DOCKER_TLS_VERIFY=1, since what is sent includes keys (for a remote engine without TLS forward its socket, for \
         example `ssh -NL /tmp/engine.sock:/var/run/docker.sock HOST`, and set DOCKER_HOST to unix:///tmp/engine.sock)"
    )]
    Unsupported {
        /// What DOCKER_HOST says.
        address: String,
    },
    /// An engine from before 2020.
    #[error("the container engine at `{address}` speaks version {version} of the interface ({}.{} at least: Docker 20.10 or Podman 4)",
            OLDEST.0, OLDEST.1)]
    TooOld {
        /// Where it is.
        address: String,
        /// What it speaks.
        version: String,
    },
    /// A replica is to have more cores than there are.
    #[error("each {role} is to have {} cores, and the container engine's machine has {cores} (lower `resources.{role}.cpu`)",
            *millicores as f64 / 1e3)]
    TooFewCores {
        /// Whose limit it is.
        role: Role,
        /// Thousandths of a core that it is to have.
        millicores: u64,
        /// What the engine has.
        cores: u32,
    },
    /// It does not have the image that containers are to be made of; a run that ends may just have removed it.
    #[error("the container engine does not have the image `{image}` any more (start the run again)")]
    NoImage {
        /// Its id or name.
        image: String,
    },
    /// It did not do what it was asked to.
    #[error("the container engine failed to {action}: {reason}")]
    Refused {
        /// What it was to do.
        action: String,
        /// Its own words.
        reason: String,
        /// The status of its answer, as in HTTP; `None` if there was no answer.
        status: Option<u16>,
    },
}

/// What to say of the context that Docker's own client would use.
fn of_context(context: Option<&str>) -> String {
    let remedy = |context| {
        format!(
            "; the current context of `docker` is `{context}`, and contexts are not read: \
             `docker context inspect {context}` shows what to set DOCKER_HOST to"
        )
    };
    context.map(remedy).unwrap_or_default()
}

impl EngineError {
    /// Whether the engine said that there is no such thing.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self, EngineError::Refused { status: Some(404), .. })
    }

    /// Whether the engine did not answer at all.
    pub(super) fn is_silence(&self) -> bool {
        matches!(self, EngineError::Refused { status: None, .. })
    }
}

/// A connection to a container engine.
#[derive(Clone)]
pub struct Engine {
    reactor: Arc<Reactor>,
    docker: Docker,
    address: String,
    cores: u32,
    architecture: String,
    takes_parts: bool,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine that DOCKER_HOST names, or the first whose socket is found: Docker, rootless Docker, Docker Desktop,
    /// Podman. With DOCKER_TLS_VERIFY one at tcp:// is spoken to over mutual TLS, with the files in DOCKER_CERT_PATH.
    ///
    /// # Errors
    ///
    /// [`EngineError`]; within ten seconds.
    pub fn connect(env: &impl Env) -> Result<Self, EngineError> {
        let address = address(env)?;
        let unsupported = || EngineError::Unsupported { address: address.clone() };
        let wants_tls = env.get("DOCKER_TLS_VERIFY").is_some_and(|value| !value.is_empty());
        let no_answer = |reason: String| EngineError::NoAnswer { address: address.clone(), reason };
        let connected = if let Some(path) = address.strip_prefix("unix://") {
            check_rights(Path::new(path), &address)?;
            Docker::connect_with_unix(&address, LIBRARY_TIMEOUT, API_DEFAULT_VERSION)
        } else if wants_tls && address.starts_with("tcp://") {
            let [ca, certificate, key] = certificates(env)?;
            // The client library takes the program's choice, and panics where there is none. Where the program has not made
            // one, it is what the rest of fairing uses; an error is another thread's choice in between.
            let _ = rustls::crypto::ring::default_provider().install_default();
            Docker::connect_with_ssl(&address, &key, &certificate, &ca, LIBRARY_TIMEOUT, API_DEFAULT_VERSION)
        } else if is_on_this_machine(&address) && !wants_tls {
            Docker::connect_with_http(&address, LIBRARY_TIMEOUT, API_DEFAULT_VERSION)
        } else {
            return Err(unsupported());
        };
        let docker = connected.map_err(|error| no_answer(error.to_string()))?;
        let reactor = Reactor::start().map_err(|error| no_answer(format!("cannot start a thread: {error}")))?;
        let greeting = async {
            let docker = docker.negotiate_version().await?;
            let info = docker.info().await?;
            Ok::<_, bollard::errors::Error>((docker, info))
        };
        let greeted = reactor.wait(async { tokio::time::timeout(GREETING, greeting).await });
        let (docker, info) = match greeted {
            Err(_) => return Err(no_answer(format!("nothing within {} s", GREETING.as_secs()))),
            Ok(greeted) => greeted.map_err(|error| no_answer(words(&error)))?,
        };
        let version = docker.client_version();
        if (version.major_version, version.minor_version) < OLDEST {
            return Err(EngineError::TooOld { address, version: version.to_string() });
        }
        let cores = info.ncpu.and_then(|cores| u32::try_from(cores).ok()).unwrap_or(1).max(1);
        Ok(Self {
            reactor: Arc::new(reactor),
            docker,
            address,
            cores,
            takes_parts: takes_parts(&info),
            architecture: info.architecture.unwrap_or_default(),
        })
    }

    /// Where it is, as DOCKER_HOST spells it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its processor cores.
    pub fn cores(&self) -> u32 {
        self.cores
    }

    /// The architecture of its processor, if images of it can be built.
    pub fn architecture(&self) -> Option<Architecture> {
        match self.architecture.as_str() {
            "x86_64" | "amd64" => Some(Architecture::Amd64),
            "aarch64" | "arm64" => Some(Architecture::Arm64),
            _ => None,
        }
    }

    /// Whether an image may be loaded without the layers that the engine has.
    pub(super) fn takes_parts(&self) -> bool {
        self.takes_parts
    }

    pub(super) fn docker(&self) -> &Docker {
        &self.docker
    }

    pub(super) fn reactor(&self) -> &Reactor {
        &self.reactor
    }

    /// Waits for anything on the threads that talk to this engine.
    pub(crate) fn wait<F>(&self, future: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        self.reactor.wait(future)
    }

    /// Asks for something and waits for the answer, at most [`CALL`].
    pub(super) fn call<T: Send>(
        &self,
        action: &str,
        request: impl Future<Output = Result<T, bollard::errors::Error>> + Send,
    ) -> Result<T, EngineError> {
        self.reactor.wait(in_time(action, request))
    }
}

/// Docker's own store takes an image of which it has some layers. Its newer one, containerd's, says its type, and wants all of
/// it; so does Podman, whose driver has a name that is none of Docker's.
fn takes_parts(info: &SystemInfo) -> bool {
    let is_containerd = info.driver_status.iter().flatten().flatten().any(|word| word == "driver-type");
    !is_containerd && matches!(info.driver.as_deref(), Some("overlay2" | "fuse-overlayfs"))
}

/// The answer to a request, within [`CALL`].
pub(super) async fn in_time<T>(
    action: &str,
    request: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, EngineError> {
    match tokio::time::timeout(CALL, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(refused(action, &error)),
        Err(_) => {
            let reason = format!("no answer within {} s", CALL.as_secs());
            Err(EngineError::Refused { action: action.to_owned(), reason, status: None })
        }
    }
}

pub(super) fn refused(action: &str, error: &bollard::errors::Error) -> EngineError {
    let status = match error {
        bollard::errors::Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    };
    EngineError::Refused { action: action.to_owned(), reason: words(error), status }
}

/// What the engine said, or else the innermost cause of a request that failed.
pub(super) fn words(error: &bollard::errors::Error) -> String {
    use bollard::errors::Error::{DockerResponseServerError, DockerStreamError};
    if let DockerResponseServerError { message, .. } | DockerStreamError { error: message } = error {
        return message.clone();
    }
    // Around it stand only the layers of the client.
    let error: &dyn std::error::Error = error;
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().unwrap_or(error).to_string()
}

/// Whether the address is a port of this machine's own, so that nobody else hears what is sent there.
fn is_on_this_machine(address: &str) -> bool {
    let place = address.strip_prefix("tcp://").and_then(|rest| rest.trim_end_matches('/').rsplit_once(':'));
    let host = place.map(|(host, _)| host.trim_start_matches('[').trim_end_matches(']'));
    host.is_some_and(|host| {
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    })
}

fn address(env: &impl Env) -> Result<String, EngineError> {
    if let Some(address) = env.get("DOCKER_HOST").filter(|address| !address.is_empty()) {
        return Ok(address);
    }
    let sockets = sockets(env);
    let found = sockets.iter().find(|path| path.exists());
    let found = found.map(|path| format!("unix://{}", path.display()));
    found.ok_or_else(|| EngineError::NotFound { sockets, context: context(env) })
}

/// The folder of Docker's own client.
fn client_folder(env: &impl Env) -> Option<PathBuf> {
    let named = env.get("DOCKER_CONFIG").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    named.or_else(|| Some(PathBuf::from(env.get("HOME")?).join(".docker")))
}

/// The context that Docker's own client would use, if that is not its default.
fn context(env: &impl Env) -> Option<String> {
    let written = || {
        let text = std::fs::read(client_folder(env)?.join("config.json")).ok()?;
        let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(config["currentContext"].as_str()?.to_owned())
    };
    env.get("DOCKER_CONTEXT").or_else(written).filter(|name| !name.is_empty() && name != "default")
}

/// The files with which both sides prove who they are: the authority's, the certificate and its key.
fn certificates(env: &impl Env) -> Result<[PathBuf; 3], EngineError> {
    let named = env.get("DOCKER_CERT_PATH").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let folder = named.or_else(|| client_folder(env)).unwrap_or_default();
    let files = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
    for path in &files {
        // The client library reads two of them much later, and goes on without.
        std::fs::File::open(path).map_err(|source| EngineError::Certificates { path: path.clone(), source })?;
    }
    Ok(files)
}

/// Where engines have their sockets, the most common first.
fn sockets(env: &impl Env) -> Vec<PathBuf> {
    let runtime = env.get("XDG_RUNTIME_DIR").map(PathBuf::from);
    let home = env.get("HOME").map(PathBuf::from);
    let places = [
        Some("/var/run/docker.sock".into()),
        runtime.as_ref().map(|folder| folder.join("docker.sock")),
        home.map(|folder| folder.join(".docker/run/docker.sock")),
        runtime.map(|folder| folder.join("podman/podman.sock")),
        Some("/run/podman/podman.sock".into()),
    ];
    places.into_iter().flatten().collect()
}

/// Tells a socket that may not be opened from an engine that is not there; the client library does not.
fn check_rights(path: &Path, address: &str) -> Result<(), EngineError> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(EngineError::NoRights { address: address.to_owned() })
        }
        Err(error) => Err(EngineError::NoAnswer { address: address.to_owned(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn error(pairs: &[(&str, &str)]) -> String {
        let env: BTreeMap<String, String> =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Engine::connect(&env).unwrap_err().to_string()
    }

    #[test]
    fn an_engine_that_is_not_there_is_named_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let missing = format!("unix://{}/no.sock", folder.path().display());
        let message = error(&[("DOCKER_HOST", &missing)]);
        assert!(message.starts_with(&format!("no container engine answers at `{missing}`: No such file")), "{message}");
        assert!(message.ends_with("(start it, or set DOCKER_HOST to another one)"), "{message}");
        let message = error(&[("DOCKER_HOST", "ssh://host")]);
        assert!(message.contains("`ssh://host`, which is not supported"), "{message}");
        for open in ["tcp://192.0.2.1:2375", "tcp://engine:2375", "tcp://2375"] {
            assert!(error(&[("DOCKER_HOST", open)]).contains("since what is sent includes keys"), "{open}");
        }
        let certificates = folder.path().to_str().unwrap();
        let with_tls = |address| {
            error(&[("DOCKER_HOST", address), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", certificates)])
        };
        let message = with_tls("tcp://127.0.0.1:1");
        assert!(message.starts_with(&format!("cannot read `{certificates}/ca.pem`")), "{message}");
        assert!(with_tls("http://127.0.0.1:1").contains("which is not supported"));
        let message = error(&[("DOCKER_HOST", "tcp://127.0.0.1:1")]);
        assert!(message.contains("Connection refused"), "{message}");
    }

    #[test]
    fn a_context_that_is_not_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let home = folder.path().to_str().unwrap();
        std::fs::create_dir(folder.path().join(".docker")).unwrap();
        let write = |text| std::fs::write(folder.path().join(".docker/config.json"), text).unwrap();
        assert_eq!(context(&env(&[("HOME", home)])), None);
        write(r#"{ "currentContext": "default" }"#);
        assert_eq!(context(&env(&[("HOME", home)])), None);
        write(r#"{ "currentContext": "far-away" }"#);
        assert_eq!(context(&env(&[("HOME", home)])).as_deref(), Some("far-away"));
        assert_eq!(context(&env(&[("HOME", home), ("DOCKER_CONTEXT", "near")])).as_deref(), Some("near"));
        let message =
            EngineError::NotFound { sockets: vec!["/a".into()], context: Some("far-away".into()) }.to_string();
        let expected = "no container engine was found (looked for `/a`; start Docker or Podman, or set DOCKER_HOST; the current \
                        context of `docker` is `far-away`, and contexts are not read: `docker context inspect far-away` shows \
                        what to set DOCKER_HOST to)";
        assert_eq!(message, expected);
    }

    #[test]
    fn a_socket_that_says_nothing_does_not_hold_anybody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("silent.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let message = error(&[("DOCKER_HOST", &format!("unix://{}", path.display()))]);
        assert!(message.contains("nothing within 10 s"), "{message}");
    }
}
