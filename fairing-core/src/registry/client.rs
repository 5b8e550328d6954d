//! The client: what it trusts, whom it speaks to without TLS, and what it knows about logins.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::auth::{AuthError, Found, Keychain};
use super::http::Connectors;
use super::patience::Patience;
use super::reference::{Registry, Repository};

/// Shorter words are left in an answer: they would be found in every sentence.
const SECRET_LENGTH: usize = 4;

/// What the user says about registries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// A PEM file with certificate authorities to trust beside the system's. None by default.
    pub registry_ca: Option<PathBuf>,
    /// Registries to speak plain HTTP to, as `host` or `host:port`, written as in the repository's name. None by default.
    /// A registry on this machine is asked in plain HTTP first in any case.
    pub plain_http: Vec<String>,
}

/// A client for registries; a clone shares its connections and logins.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    connectors: Connectors,
    plain_http: HashSet<Registry>,
    keychain: Keychain,
    patience: Patience,
    /// Registries on this machine that turned out to speak TLS.
    upgraded: Mutex<HashSet<Registry>>,
    credentials: tokio::sync::Mutex<HashMap<Repository, Arc<Found>>>,
    secrets: Mutex<HashSet<String>>,
}

/// The settings of a client are wrong. Returned by [`Client::new`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The file of `registry_ca` cannot be read.
    #[error("failed to read `{}`, which `registry_ca` names", path.display())]
    ReadAuthority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of `registry_ca` has no certificate in it.
    #[error(
        "`{}`, which `registry_ca` names, is no certificate: {reason} (it must be PEM: -----BEGIN CERTIFICATE-----)",
        path.display()
    )]
    NoAuthority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An entry of `plain_http` is no registry.
    #[error("`{entry}` in `plain_http` is no registry (write `host` or `host:port`, as in the repository's name)")]
    PlainHttp {
        /// The entry.
        entry: String,
    },
}

impl Client {
    /// A client that takes credentials from `keychain`. Reads `registry_ca`; does not connect yet.
    ///
    /// # Errors
    ///
    /// - [`ClientError::ReadAuthority`] and [`ClientError::NoAuthority`] if `registry_ca` is not there or no certificate.
    /// - [`ClientError::PlainHttp`] if an entry of `plain_http` is no registry.
    pub fn new(settings: Settings, keychain: Keychain) -> Result<Self, ClientError> {
        Self::with_patience(settings, keychain, Patience::default())
    }

    /// As [`Client::new`], with other deadlines and retries than the default ones.
    ///
    /// # Errors
    ///
    /// Those of [`Client::new`].
    pub fn with_patience(settings: Settings, keychain: Keychain, patience: Patience) -> Result<Self, ClientError> {
        let authorities = settings.registry_ca.map_or_else(|| Ok(Vec::new()), authorities)?;
        let named = settings.plain_http.into_iter().map(|entry| match entry.parse() {
            Ok(registry) => Ok(registry),
            Err(_) => Err(ClientError::PlainHttp { entry }),
        });
        let shared = Shared {
            connectors: Connectors::new(authorities, patience.connect),
            plain_http: named.collect::<Result<_, _>>()?,
            keychain,
            patience,
            upgraded: Mutex::default(),
            credentials: tokio::sync::Mutex::default(),
            secrets: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.shared.patience
    }

    /// The client for `url`; registries on this machine are reached without a proxy.
    pub(super) fn connector(&self, url: &Url) -> Result<reqwest::Client, reqwest::Error> {
        self.shared.connectors.client(url, is_loopback(url))
    }

    /// Whether `registry` is spoken to without TLS.
    pub(super) fn is_plain(&self, registry: &Registry) -> bool {
        let upgraded = || self.shared.upgraded.lock().unwrap_or_else(PoisonError::into_inner).contains(registry);
        self.is_named(registry) || (registry.is_loopback() && !upgraded())
    }

    /// Speaks TLS to `registry` from now on, if that was left to be found out; says whether it was.
    pub(super) fn upgrade(&self, registry: &Registry) -> bool {
        let open = registry.is_loopback() && !self.is_named(registry);
        open && self.shared.upgraded.lock().unwrap_or_else(PoisonError::into_inner).insert(registry.clone())
    }

    fn is_named(&self, registry: &Registry) -> bool {
        self.shared.plain_http.contains(registry)
    }

    /// Whether the host of `url` may be spoken to without TLS: it is on this machine, or the user named it.
    pub(super) fn allows_plain(&self, url: &Url) -> bool {
        is_loopback(url) || self.names(url)
    }

    /// Whether the user named the host of `url` in `plain_http`.
    pub(super) fn names(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let with_port = url.port_or_known_default().map(|port| format!("{host}:{port}"));
        // Without a port, the entry means the one that HTTP has anyway.
        let without_port = url.port().is_none().then(|| host.to_owned());
        let mut entries = with_port.into_iter().chain(without_port).filter_map(|entry| entry.parse().ok());
        entries.any(|registry| self.is_named(&registry))
    }

    /// The credentials for `repository`; files are read and helpers run once.
    pub(super) async fn credentials(&self, repository: &Repository) -> Result<Arc<Found>, AuthError> {
        // Held while a helper runs: uploads side by side must not start it several times.
        let mut known = self.shared.credentials.lock().await;
        if let Some(found) = known.get(repository) {
            return Ok(found.clone());
        }
        let found = Arc::new(self.shared.keychain.find(repository).await?);
        known.insert(repository.clone(), found.clone());
        Ok(found)
    }

    /// Remembers a secret, so that no error repeats it.
    pub(super) fn hide(&self, secret: &str) {
        if secret.len() >= SECRET_LENGTH {
            self.shared.secrets.lock().unwrap_or_else(PoisonError::into_inner).insert(secret.to_owned());
        }
    }

    /// The words of a registry as an error may show them: on one line, and without the secrets that it was sent.
    pub(super) fn presentable(&self, words: &str) -> String {
        let mut words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        for secret in self.shared.secrets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            words = words.replace(secret.as_str(), "(secret)");
        }
        words
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { plain_http, keychain, patience, .. } = &*self.shared;
        f.debug_struct("Client")
            .field("plain_http", plain_http)
            .field("keychain", keychain)
            .field("patience", patience)
            .finish_non_exhaustive()
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Reads and checks the certificates of a PEM file.
fn authorities(path: PathBuf) -> Result<Vec<reqwest::Certificate>, ClientError> {
    let pem = match fs::read(&path) {
        Ok(pem) => pem,
        Err(source) => return Err(ClientError::ReadAuthority { path, source }),
    };
    let no_authority = |reason: String| ClientError::NoAuthority { path: path.clone(), reason };
    let mut authorities = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| no_authority(error.to_string()))?;
        let checked = rustls::RootCertStore::empty().add(certificate.clone());
        checked.map_err(|error| no_authority(error.to_string()))?;
        let certificate = reqwest::Certificate::from_der(&certificate);
        authorities.push(certificate.map_err(|error| no_authority(error.to_string()))?);
    }
    match authorities.is_empty() {
        true => Err(no_authority("nothing in it is one".to_owned())),
        false => Ok(authorities),
    }
}
