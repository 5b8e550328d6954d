//! The cluster: finding it, talking to it with deadlines, and saying in words what is wrong with it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::client::AuthError;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Error};
use rustls::crypto::{CryptoProvider, ring};

use crate::reactor::Reactor;

/// How long one request may take. A loaded API server takes seconds.
const CALL: Duration = Duration::from_secs(20);

/// How long the API server may be away, as when it is being restarted, before what needs it fails.
const OUTAGE: Duration = Duration::from_secs(90);

/// The pause after the first failure of a request that may be repeated; it doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How long a connection to the API server may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How the API server calls who has shown nothing, in its messages.
const ANONYMOUS: &str = "\"system:anonymous\"";

/// Failure of a cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// Nothing says where a cluster is.
    #[error(
        "no cluster is known: there is no kubeconfig at {} (set KUBECONFIG to one, or run `kubectl config view` to see what \
         kubectl uses)",
        files(places)
    )]
    NoConfig {
        /// Where one would have been.
        places: Vec<PathBuf>,
    },
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig {} cannot be used: {reason}", files(places))]
    BadConfig {
        /// The files that it is read from.
        places: Vec<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// The kubeconfig has no such context.
    #[error(
        "the kubeconfig has no context `{context}` (it has {}; set `context` or FAIRING_CONTEXT to one of them)",
        list(known)
    )]
    NoContext {
        /// What was asked for.
        context: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The kubeconfig says of no context that it is the one in use.
    #[error(
        "the kubeconfig has no current context (it has {}; set `context` or FAIRING_CONTEXT to one of them, or run `kubectl \
         config use-context NAME`)",
        list(known)
    )]
    NoCurrentContext {
        /// What there is.
        known: Vec<String>,
    },
    /// The credentials cannot be had, for example because their program is missing.
    #[error("cannot get credentials for the cluster at {server}: {reason}")]
    Credentials {
        /// The API server.
        server: String,
        /// Why not, and the remedy.
        reason: String,
    },
    /// The API server does not know the credentials.
    #[error(
        "the cluster at {server} does not accept the credentials of the kubeconfig (they may have expired: log in again)"
    )]
    Unauthorized {
        /// The API server.
        server: String,
    },
    /// Who answers is not the API server that the kubeconfig means, or cannot prove it.
    #[error(
        "the cluster at {server} does not prove that it is the one of the kubeconfig: {reason} (has it been made anew, or does \
         something in between answer? see `clusters: cluster: certificate-authority` of the kubeconfig)"
    )]
    Untrusted {
        /// The API server.
        server: String,
        /// What is wrong with its certificate.
        reason: String,
    },
    /// The user may not do that.
    #[error("no right to {action} in the cluster: {reason}")]
    Forbidden {
        /// What was to be done.
        action: String,
        /// The API server's words.
        reason: String,
    },
    /// Nobody answers.
    #[error("the cluster at {server} cannot be reached to {action}: {reason} (is it running, and the network up?)")]
    Unreachable {
        /// The API server.
        server: String,
        /// What was to be done.
        action: String,
        /// Why not.
        reason: String,
    },
    /// It did not do what it was asked to.
    #[error("the cluster failed to {action}: {reason}")]
    Refused {
        /// What it was to do.
        action: String,
        /// Its own words.
        reason: String,
        /// The status of its answer, as in HTTP.
        status: u16,
    },
    /// Something of somebody else's has the name of what was to be created.
    #[error(
        "there is a {kind} `{name}` in the namespace `{namespace}` already, which is not of this launch and was left as it is \
         (launch again: every launch gives its run another name; or remove it: `kubectl --namespace {namespace} delete \
         {} {name}`)",
        kind.to_lowercase()
    )]
    Taken {
        /// The kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// Where it is.
        namespace: String,
    },
    /// No thread could be started for talking to it.
    #[error("cannot start the threads that talk to the cluster")]
    Reactor(#[source] std::io::Error),
}

fn files(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ")
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}

impl ClusterError {
    /// Whether the cluster has no such kind, or shows none of it to this user.
    pub(super) fn is_without(&self) -> bool {
        self.is_absence() || matches!(self, ClusterError::Forbidden { .. })
    }

    /// Whether the cluster said that there is no such thing.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self, ClusterError::Refused { status: 404, .. })
    }

    /// Whether the cluster said that what there is does not allow it.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, ClusterError::Refused { status: 409, .. })
    }
}

/// A namespace of a cluster, and the connection to it.
#[derive(Clone)]
pub struct Cluster {
    reactor: Arc<Reactor>,
    client: Client,
    server: String,
    namespace: String,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, namespace, .. } = self;
        f.debug_struct("Cluster").field("server", server).field("namespace", namespace).finish_non_exhaustive()
    }
}

impl Cluster {
    /// The cluster that `context` of the kubeconfig names, or its current one; inside of a cluster without a kubeconfig that
    /// one. `namespace` takes the place of the context's. Reads files and does not connect yet.
    ///
    /// # Errors
    ///
    /// [`ClusterError`] with what is wrong with the kubeconfig.
    pub fn find(context: Option<&str>, namespace: Option<&str>) -> Result<Self, ClusterError> {
        // The user's own choice stays.
        if CryptoProvider::get_default().is_none() {
            _ = ring::default_provider().install_default();
        }
        let reactor = Reactor::start().map_err(ClusterError::Reactor)?;
        let mut config = reactor.wait(configuration(context))?;
        config.connect_timeout = Some(CONNECT);
        let server = config.cluster_url.to_string();
        let server = server.trim_end_matches('/').to_owned();
        let namespace = namespace.map_or_else(|| config.default_namespace.clone(), str::to_owned);
        let login = config.auth_info.exec.as_ref().and_then(|exec| exec.command.clone());
        let client = reactor.wait(async { Client::try_from(config) });
        let client = client.map_err(|error| match error {
            Error::Auth(error) => {
                ClusterError::Credentials { server: server.clone(), reason: credentials(&error, login.as_deref()) }
            }
            error => said("connect", &server, error),
        })?;
        Ok(Self { reactor: Arc::new(reactor), client, server, namespace })
    }

    /// The namespace of the run.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Where its API server is.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Whether it has the kind JobSet.
    pub(crate) fn serves_jobsets(&self) -> Result<bool, ClusterError> {
        let kinds = self.client.list_api_group_resources("jobset.x-k8s.io/v1alpha2");
        // Once: at the beginning of a launch a person waits, and a cluster that is away is better said at once.
        match self.reactor.wait(self.ask_once("look for JobSets", kinds)) {
            Ok(_) => Ok(true),
            Err(error) if error.is_without() => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn reactor(&self) -> &Reactor {
        &self.reactor
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The objects of one kind in the namespace.
    pub(super) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Makes a request, again if the API server is away for a while: only for requests that may arrive twice.
    ///
    /// `action` follows "failed to".
    pub(super) async fn ask<T, F>(&self, action: &str, request: impl Fn() -> F) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.ask_until(action, Instant::now() + OUTAGE, request).await
    }

    /// As [`Cluster::ask`], but with the first answer that comes: what is merely useful is not waited for.
    pub(super) async fn ask_once<T>(
        &self,
        action: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, ClusterError> {
        match tokio::time::timeout(CALL, request).await {
            Ok(answer) => answer.map_err(|error| said(action, &self.server, error)),
            Err(_) => Err(self.silent(action)),
        }
    }

    /// As [`Cluster::ask`], with the time by which the cluster must have answered.
    pub(super) async fn ask_until<T, F>(
        &self,
        action: &str,
        deadline: Instant,
        request: impl Fn() -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match tokio::time::timeout(CALL, request()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if !passes(&error) => return Err(said(action, &self.server, error)),
                Ok(Err(error)) => said(action, &self.server, error),
                Err(_) => self.silent(action),
            };
            if Instant::now() + pause > deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn silent(&self, action: &str) -> ClusterError {
        let reason = format!("no answer within {} s", CALL.as_secs());
        ClusterError::Unreachable { server: self.server.clone(), action: action.to_owned(), reason }
    }
}

async fn configuration(context: Option<&str>) -> Result<kube::Config, ClusterError> {
    let places = kubeconfigs();
    let bad = |reason: String| ClusterError::BadConfig { places: places.clone(), reason };
    let kubeconfig = match Kubeconfig::read() {
        Ok(kubeconfig) => kubeconfig,
        Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == std::io::ErrorKind::NotFound => {
            return kube::Config::incluster().map_err(|_| ClusterError::NoConfig { places });
        }
        Err(KubeconfigError::FindPath) => {
            return kube::Config::incluster().map_err(|_| ClusterError::NoConfig { places });
        }
        Err(error) => return Err(bad(error.to_string())),
    };
    let known: Vec<String> = kubeconfig.contexts.iter().map(|context| context.name.clone()).collect();
    if let Some(context) = context.filter(|context| !known.iter().any(|name| name == context)) {
        return Err(ClusterError::NoContext { context: context.to_owned(), known });
    }
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
    config.map_err(|error| match error {
        KubeconfigError::CurrentContextNotSet => ClusterError::NoCurrentContext { known },
        KubeconfigError::LoadContext(context) => ClusterError::NoContext { context, known },
        error => bad(error.to_string()),
    })
}

/// The files that a kubeconfig is read from.
fn kubeconfigs() -> Vec<PathBuf> {
    use crate::config::{Env as _, ProcessEnv};
    match ProcessEnv.get("KUBECONFIG").filter(|value| !value.is_empty()) {
        Some(value) => std::env::split_paths(&value).collect(),
        None => vec![PathBuf::from(ProcessEnv.get("HOME").unwrap_or_default()).join(".kube").join("config")],
    }
}

/// Whether a request that failed so may do better in a moment.
fn passes(error: &Error) -> bool {
    match error {
        Error::Api(status) => matches!(status.code, 429 | 500 | 502..=504),
        Error::HyperError(_) | Error::ReadEvents(_) => true,
        Error::Service(error) => auth_error(error.as_ref()).is_none() && certificate_error(error.as_ref()).is_none(),
        _ => false,
    }
}

fn auth_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a AuthError> {
    causes(error).find_map(|error| error.downcast_ref())
}

/// An error and everything behind it.
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// What is wrong with the certificates, if that is why there is no connection: the server could not prove who it is, or did not
/// believe the client.
fn certificate_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    // An `io::Error` does not name what it wraps as its source, and there may be one in another.
    let within = |error: &'a (dyn std::error::Error + 'static)| {
        std::iter::successors(Some(error), |error| {
            Some(error.downcast_ref::<std::io::Error>()?.get_ref()? as &(dyn std::error::Error + 'static))
        })
    };
    causes(error).flat_map(within).find_map(|error| {
        error
            .downcast_ref::<rustls::Error>()
            .filter(|error| matches!(error, rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)))
    })
}

/// An error of the client library, in words.
pub(super) fn said(action: &str, server: &str, error: Error) -> ClusterError {
    let (action, server) = (action.to_owned(), server.to_owned());
    match error {
        Error::Api(status) => match status.code {
            401 => ClusterError::Unauthorized { server },
            // Without credentials one is somebody too, who has no rights.
            403 if status.message.contains(ANONYMOUS) => ClusterError::Unauthorized { server },
            403 if status.reason == "Forbidden" && !status.message.contains("exceeded quota") => {
                ClusterError::Forbidden { action, reason: status.message.clone() }
            }
            code => ClusterError::Refused { action, reason: status.message.clone(), status: code },
        },
        Error::Auth(error) => ClusterError::Credentials { server, reason: credentials(&error, None) },
        Error::Service(error) => match (auth_error(error.as_ref()), certificate_error(error.as_ref())) {
            (Some(error), _) => ClusterError::Credentials { server, reason: credentials(error, None) },
            (None, Some(error)) => ClusterError::Untrusted { server, reason: error.to_string() },
            (None, None) => ClusterError::Unreachable { server, action, reason: root(error.as_ref()) },
        },
        error => ClusterError::Unreachable { server, action, reason: root(&error) },
    }
}

/// Why there are no credentials; `login` is the program that was to give them, if it is known.
fn credentials(error: &AuthError, login: Option<&str>) -> String {
    let login = login.map_or_else(|| "the program".to_owned(), |login| format!("`{login}`"));
    let named = "that the kubeconfig names for getting them";
    match error {
        AuthError::AuthExecStart(error) if error.kind() == std::io::ErrorKind::NotFound => {
            format!("{login}, {named}, is not installed or not in PATH (see `users: user: exec` of the kubeconfig)")
        }
        AuthError::AuthExecStart(error) => format!("{login}, {named}, cannot be started: {error}"),
        // Without what it printed on standard output, where the token is, and without the variables that it was given. On
        // standard error it has spoken for itself, if it may ask its user something.
        AuthError::AuthExecRun { out, .. } => {
            let words = String::from_utf8_lossy(&out.stderr);
            let words = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
            let words = if words.is_empty() { "its own words are above".to_owned() } else { words };
            format!("{login}, {named}, ended with {}: {words}", out.status)
        }
        AuthError::AuthExecParse(_) => {
            format!("{login}, {named}, printed something else (an ExecCredential is expected; run it by hand to see)")
        }
        error => error.to_string(),
    }
}

/// The innermost cause: the outer ones only say that a request failed.
fn root(error: &(dyn std::error::Error + 'static)) -> String {
    causes(error).last().expect("the error itself").to_string()
}

/// An error of a stream, in words.
pub(super) fn words(error: &(dyn std::error::Error + 'static)) -> String {
    root(error)
}
