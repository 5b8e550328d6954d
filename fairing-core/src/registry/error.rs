//! How a request to a registry fails.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::time::Duration;

use super::auth::{AuthError, CredentialOrigin};
use super::reference::{Registry, Repository};

/// Failure of a request to a registry, named so that it says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No credentials were found, or the registry did not take them.
    #[error("registry `{}` refused {}", .0.repository.registry(), .0)]
    Unauthorized(Box<Refused>),
    /// The credentials are good, but not for this.
    #[error("registry `{}` does not allow {}", .0.repository.registry(), .0)]
    Forbidden(Box<Refused>),
    /// The credentials could not be found out.
    #[error("failed to find the credentials for registry `{registry}`")]
    Credentials {
        /// The registry.
        registry: Registry,
        /// Why.
        #[source]
        source: AuthError,
    },
    /// The registry asks for a login that fairing does not know, or for one that would show the password.
    #[error("registry `{registry}` asks for a login that cannot be done: {reason}")]
    Login {
        /// The registry.
        registry: Registry,
        /// What it asks for.
        reason: String,
    },
    /// Nobody whom this machine trusts vouches for the registry's certificate.
    #[error(
        "the certificate of registry `{registry}` is signed by nobody known here (`registry_ca = \"FILE.pem\"` names the \
         certificate authority to trust)"
    )]
    UnknownAuthority {
        /// The registry.
        registry: Registry,
    },
    /// The registry's certificate is for another name, or its time is over.
    #[error("the certificate of registry `{registry}` does not hold: {reason}")]
    Certificate {
        /// The registry.
        registry: Registry,
        /// Why.
        reason: String,
    },
    /// The TLS connection failed in another way.
    #[error("failed to agree on TLS with registry `{registry}`: {reason}")]
    Tls {
        /// The registry.
        registry: Registry,
        /// Why.
        reason: String,
    },
    /// The registry does not speak TLS.
    #[error("registry `{registry}` speaks plain HTTP (`plain_http = [\"{registry}\"]` allows that for it)")]
    PlainHttp {
        /// The registry.
        registry: Registry,
    },
    /// The registry speaks TLS, but plain HTTP was asked for.
    #[error("registry `{registry}` speaks TLS (take it out of `plain_http`)")]
    NotPlainHttp {
        /// The registry.
        registry: Registry,
    },
    /// No connection came about.
    #[error("failed to reach registry `{registry}` at `{address}`: {reason} (does it run, and is its name right?)")]
    Unreachable {
        /// The registry.
        registry: Registry,
        /// Host and port that were called.
        address: String,
        /// Why.
        reason: String,
    },
    /// The connection broke in the middle.
    #[error("the connection to registry `{registry}` broke during {doing}: {reason}")]
    Broken {
        /// The registry.
        registry: Registry,
        /// What was going on.
        doing: Doing,
        /// How.
        reason: String,
    },
    /// The registry said nothing for too long.
    #[error("registry `{registry}` was silent for {} s during {doing}", waited.as_secs_f32())]
    Silent {
        /// The registry.
        registry: Registry,
        /// What was going on.
        doing: Doing,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The registry answered something else than what was asked for.
    #[error("registry `{registry}` answered {doing} with status {status}: {words}")]
    Answer {
        /// The registry.
        registry: Registry,
        /// What was asked for.
        doing: Doing,
        /// HTTP's status code.
        status: u16,
        /// What the registry says.
        words: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The registry's storage is full.
    #[error("registry `{registry}` has no space left for {doing}: {words}")]
    NoSpace {
        /// The registry.
        registry: Registry,
        /// What was to be stored.
        doing: Doing,
        /// What the registry says.
        words: String,
    },
    /// What came is not what was asked for, by its digest or its form.
    #[error("registry `{registry}` answered {doing} with something else: {reason}")]
    Content {
        /// The registry.
        registry: Registry,
        /// What was asked for.
        doing: Doing,
        /// What is wrong with it.
        reason: String,
    },
    /// Every attempt failed.
    #[error("gave up after {} attempts in {} s ({})", attempts.len(), elapsed.as_secs(), numbered(attempts))]
    GaveUp {
        /// Why each one failed, in order.
        attempts: Vec<String>,
        /// From the first attempt on.
        elapsed: Duration,
        /// The last failure.
        #[source]
        last: Box<RequestError>,
    },
}

/// What a registry did not let us do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refused {
    /// The repository.
    pub repository: Repository,
    /// What was asked for.
    pub doing: Doing,
    /// What the registry, or its token server, says.
    pub words: String,
    /// Where the credentials came from, with the remedy.
    pub origin: CredentialOrigin,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refused { repository, doing, words, origin } = self;
        write!(f, "{doing} in `{repository}`: {words} ({origin})")
    }
}

/// What a request is for, as an error names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing(pub(super) String);

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl RequestError {
    /// Whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            RequestError::Broken { .. } | RequestError::Silent { .. } => true,
            RequestError::Answer { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }

    /// Whether no connection came about.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, RequestError::Unreachable { .. })
    }

    /// What the last attempt failed with.
    pub fn last(&self) -> &RequestError {
        match self {
            RequestError::GaveUp { last, .. } => last.last(),
            other => other,
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            RequestError::Answer { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Names what went wrong on the way to the registry; the URL, which may carry a secret, is left out.
    pub(super) fn transport(registry: &Registry, address: String, doing: &Doing, error: &reqwest::Error) -> Self {
        let registry = registry.clone();
        if let Some(tls) = tls_error(error) {
            return match tls {
                rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => {
                    RequestError::UnknownAuthority { registry }
                }
                rustls::Error::InvalidCertificate(certificate) => {
                    RequestError::Certificate { registry, reason: certificate.to_string() }
                }
                rustls::Error::InvalidMessage(_) => RequestError::PlainHttp { registry },
                other => RequestError::Tls { registry, reason: other.to_string() },
            };
        }
        let reason = innermost(error);
        if error.is_connect() {
            return RequestError::Unreachable { registry, address, reason };
        }
        RequestError::Broken { registry, doing: doing.clone(), reason }
    }
}

/// The words of the innermost cause.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause = error.source();
    let mut words = if error.is_timeout() { "it took too long".to_owned() } else { "no reason given".to_owned() };
    while let Some(error) = cause {
        words = error.to_string();
        cause = error.source();
    }
    words
}

/// What rustls says, if it is the cause.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref() {
            return Some(tls);
        }
        // An IO error's own source is that of what it wraps.
        cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

/// The reasons with the numbers of their attempts; attempts in a row that failed alike are told once.
fn numbered(attempts: &[String]) -> String {
    let mut number = 1;
    let alike = attempts.chunk_by(|earlier, later| earlier == later).map(|alike| {
        let (first, last) = (number, number + alike.len() - 1);
        number = last + 1;
        let reason = &alike[0];
        if first == last { format!("{first}: {reason}") } else { format!("{first} to {last}: {reason}") }
    });
    alike.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_failed_alike_are_told_once() {
        let attempts = ["a", "b", "b", "b", "a"].map(str::to_owned);
        assert_eq!(numbered(&attempts), "1: a; 2 to 4: b; 5: a");
        assert_eq!(numbered(&[]), "");
    }
}
