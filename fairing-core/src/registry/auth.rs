//! Who we are for a registry: credentials from Docker's and Podman's configuration.
//!
//! The files are read, and helper programs run, when a registry asks for a login and not before.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::reference::{Registry, Repository};
use crate::config::Env;

/// Long enough to type a passphrase that a helper asks for.
const HELPER_DEADLINE: Duration = Duration::from_secs(60);
/// The name under which Docker keeps the login of its own registry.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// As much of a helper's complaint as fits on a line or two.
const COMPLAINT_LENGTH: usize = 200;

/// The files in which credentials may be.
#[derive(Debug, Clone)]
pub struct Keychain {
    files: Vec<PathBuf>,
    helper_deadline: Duration,
}

/// Failure to find out credentials that are configured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// A file is there but cannot be read.
    #[error("failed to read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no configuration of Docker or Podman. What stands in it is not repeated, for it may be a secret.
    #[error("`{}` is no configuration of Docker or Podman (line {line}, column {column})", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line of the mistake, from 1.
        line: usize,
        /// Column of the mistake, from 1.
        column: usize,
    },
    /// The entry of a registry is no credential.
    #[error("the entry of `{registry}` in `{}` is damaged (`docker login {registry}` writes it again)", path.display())]
    Entry {
        /// The registry.
        registry: Registry,
        /// The file.
        path: PathBuf,
    },
    /// A helper program is missing, cannot be started or ends before it is asked.
    #[error("`{program}`, which `{}` names for `{registry}`, did not listen (is it installed and on PATH?)", path.display())]
    HelperMissing {
        /// The program.
        program: String,
        /// The registry.
        registry: Registry,
        /// The file.
        path: PathBuf,
    },
    /// A helper program says that something is wrong.
    #[error("`{program}`, which `{}` names for `{registry}`, failed: {complaint}", path.display())]
    HelperFailed {
        /// The program.
        program: String,
        /// The registry.
        registry: Registry,
        /// The file.
        path: PathBuf,
        /// Its words.
        complaint: String,
    },
    /// A helper program does not end.
    #[error(
        "`{program}`, which `{}` names for `{registry}`, gave no answer in {} s (does it wait for a passphrase?)",
        path.display(), waited.as_secs()
    )]
    HelperSilent {
        /// The program.
        program: String,
        /// The registry.
        registry: Registry,
        /// The file.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
}

/// Where the credentials for a registry came from; says the remedy when they were not enough.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CredentialOrigin {
    /// This file, or the helper that it names.
    File {
        /// The registry that they are for.
        registry: Registry,
        /// The file.
        path: PathBuf,
    },
    /// None are configured.
    Nowhere {
        /// The registry without credentials.
        registry: Registry,
        /// The files that were looked into.
        files: Vec<PathBuf>,
    },
    /// Nobody asked for any, so no file was read.
    Unasked {
        /// The registry that did not ask.
        registry: Registry,
    },
}

impl fmt::Display for CredentialOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CredentialOrigin::File { registry, path } => {
                write!(f, "the credentials came from `{}`; `docker login {registry}` replaces them", path.display())
            }
            CredentialOrigin::Nowhere { registry, files } => {
                let files: Vec<_> = files.iter().map(|file| format!("`{}`", file.display())).collect();
                let looked = if files.is_empty() { "no file".to_owned() } else { files.join(" or ") };
                write!(f, "no credentials were found in {looked}; `docker login {registry}` stores some")
            }
            CredentialOrigin::Unasked { registry } => write!(f, "`{registry}` did not ask for credentials"),
        }
    }
}

/// Credentials and where they came from.
pub(super) struct Found {
    pub(super) secret: Option<Login>,
    pub(super) origin: CredentialOrigin,
}

/// What opens a registry. Its `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A user's name and password.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// A token that stands for the user, to be exchanged for another one at the registry's token server.
    Identity(String),
}

impl Login {
    /// What nobody but the registry may see.
    pub(crate) fn secret(&self) -> &str {
        match self {
            Login::Password { password, .. } => password,
            Login::Identity(token) => token,
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Login::Password { username, .. } => {
                f.debug_struct("Password").field("username", username).finish_non_exhaustive()
            }
            Login::Identity(_) => f.debug_struct("Identity").finish_non_exhaustive(),
        }
    }
}

impl Keychain {
    /// Where Docker and Podman keep credentials for the user of `env`.
    pub fn from_env(env: &impl Env) -> Self {
        let folder = |variable: &str| env.get(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = folder("HOME");
        let docker = folder("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
        let config = folder("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
        let podman = |folder: PathBuf| folder.join("containers/auth.json");
        let files = [
            folder("REGISTRY_AUTH_FILE"),
            docker.map(|folder| folder.join("config.json")),
            folder("XDG_RUNTIME_DIR").map(podman),
            config.map(podman),
        ];
        Self { files: files.into_iter().flatten().collect(), helper_deadline: HELPER_DEADLINE }
    }

    /// No credentials at all.
    pub fn empty() -> Self {
        Self { files: Vec::new(), helper_deadline: HELPER_DEADLINE }
    }

    /// How long a helper program may take; one minute by default.
    #[must_use]
    pub fn with_helper_deadline(mut self, deadline: Duration) -> Self {
        self.helper_deadline = deadline;
        self
    }

    /// What opens `repository`, for an engine that talks to the registry itself. None is no failure.
    ///
    /// # Errors
    ///
    /// [`AuthError`] if a file or a helper program does not say what it should.
    pub async fn login(&self, repository: &Repository) -> Result<Option<Login>, AuthError> {
        Ok(self.find(repository).await?.secret)
    }

    /// The credentials for `repository`: the first file that has some counts. None is no failure.
    pub(super) async fn find(&self, repository: &Repository) -> Result<Found, AuthError> {
        let registry = repository.registry();
        for path in &self.files {
            let Some(file) = File::read(path)? else { continue };
            if let Some(secret) = file.find(repository, self.helper_deadline).await? {
                let origin = CredentialOrigin::File { registry: registry.clone(), path: path.clone() };
                return Ok(Found { secret: Some(secret), origin });
            }
        }
        let origin = CredentialOrigin::Nowhere { registry: registry.clone(), files: self.files.clone() };
        Ok(Found { secret: None, origin })
    }
}

/// A configuration file: its text, and what it has entries for.
struct File<'a> {
    path: &'a Path,
    text: String,
    entries: Entries,
}

/// The names in a configuration file; the secrets are not even parsed.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Entries {
    auths: BTreeMap<String, serde::de::IgnoredAny>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

impl<'a> File<'a> {
    /// A file that is not there is none.
    fn read(path: &'a Path) -> Result<Option<Self>, AuthError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(source) => return Err(AuthError::Read { path: path.to_owned(), source }),
        };
        let entries = serde_json::from_str(&text).map_err(|error| AuthError::Malformed {
            path: path.to_owned(),
            line: error.line(),
            column: error.column(),
        })?;
        Ok(Some(Self { path, text, entries }))
    }

    async fn find(self, repository: &Repository, deadline: Duration) -> Result<Option<Login>, AuthError> {
        let key = self.key(repository);
        let registry = repository.registry().clone();
        let path = self.path.to_owned();
        let helper = self.entries.cred_helpers.get(&key).filter(|name| !name.is_empty());
        let helper = helper.or(self.entries.creds_store.as_ref()).map(|name| format!("docker-credential-{name}"));
        let program = helper.unwrap_or_default();

        // A thread of its own: a helper is waited for without end in there.
        let (done, result) = oneshot::channel();
        let (text, server) = (self.text, key);
        let started = thread::Builder::new().name("fairing-login".to_owned()).spawn(move || {
            _ = done.send(docker_credential::get_credential_from_reader(text.as_bytes(), &server));
        });
        started.map_err(|source| AuthError::Read { path: path.clone(), source })?;
        match tokio::time::timeout(deadline, result).await {
            Ok(Ok(Ok(DockerCredential::UsernamePassword(username, password)))) => {
                // Docker writes an identity token beside an empty password.
                let empty = username.is_empty() && password.is_empty();
                Ok((!empty).then_some(Login::Password { username, password }))
            }
            Ok(Ok(Ok(DockerCredential::IdentityToken(token)))) => Ok(Some(Login::Identity(token))),
            Ok(Ok(Err(error))) => match error {
                CredentialRetrievalError::NoCredentialConfigured => Ok(None),
                CredentialRetrievalError::HelperFailure { stdout, stderr, .. } => {
                    let complaint = complaint(&stdout, &stderr);
                    // The words of Docker's own helpers for an empty drawer.
                    let unknown = ["credentials not found", "not found in native keychain"];
                    if unknown.iter().any(|words| complaint.to_lowercase().contains(words)) {
                        return Ok(None);
                    }
                    Err(AuthError::HelperFailed { program, registry, path, complaint })
                }
                CredentialRetrievalError::HelperCommunicationError => {
                    Err(AuthError::HelperMissing { program, registry, path })
                }
                CredentialRetrievalError::MalformedHelperResponse => {
                    let complaint = "its answer is no credential".to_owned();
                    Err(AuthError::HelperFailed { program, registry, path, complaint })
                }
                _ => Err(AuthError::Entry { registry, path }),
            },
            Ok(Err(_)) => Err(AuthError::Entry { registry, path }),
            Err(_) => Err(AuthError::HelperSilent { program, registry, path, waited: deadline }),
        }
    }

    /// The name under which the file has something for `repository`: Podman also keeps entries for parts of a registry.
    fn key(&self, repository: &Repository) -> String {
        let registry = repository.registry();
        let known = |key: &str| self.entries.auths.contains_key(key) || self.entries.cred_helpers.contains_key(key);
        let mut key = repository.to_string();
        loop {
            if known(&key) {
                return key;
            }
            match key.rsplit_once('/') {
                Some((shorter, _)) => key = shorter.to_owned(),
                None => break,
            }
        }
        if !registry.is_docker_hub() {
            return registry.to_string();
        }
        let names = [DOCKER_HUB_KEY, "index.docker.io", "registry-1.docker.io"];
        names.into_iter().find(|name| known(name)).unwrap_or(DOCKER_HUB_KEY).to_owned()
    }
}

/// The first line that a failed helper wrote. Its standard output carries the complaint by Docker's protocol; what looks
/// like an answer is left out, for it has the secret in it.
fn complaint(stdout: &str, stderr: &str) -> String {
    let line = |text: &str| text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned);
    let spoken = line(stdout).filter(|line| !line.contains(['{', '"'])).or_else(|| line(stderr));
    let words = spoken.unwrap_or_else(|| "it gave no reason".to_owned());
    words.chars().filter(|c| !c.is_control()).take(COMPLAINT_LENGTH).collect()
}
