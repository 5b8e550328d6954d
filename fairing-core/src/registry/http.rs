//! Connections: which ones carry TLS, whom they trust, and which ones go through a proxy.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::Url;
use rustls::crypto::{CryptoProvider, ring};

/// Short, since it is sent with every request.
const USER_AGENT: &str = concat!("fairing/", env!("CARGO_PKG_VERSION"));

/// Makes clients when they are needed and keeps them, for each holds a pool of open connections.
#[derive(Debug)]
pub(super) struct Connectors {
    authorities: Vec<reqwest::Certificate>,
    connect: Duration,
    made: Mutex<HashMap<Way, reqwest::Client>>,
}

/// What tells one client from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Way {
    /// Whether certificates are checked; loading the system's takes longer than asking a registry on this machine.
    tls: bool,
    /// Whether the proxy of the environment is passed by; none leads back to this machine.
    direct: bool,
}

impl Connectors {
    /// Trusts the system's certificate authorities and `authorities`.
    pub(super) fn new(authorities: Vec<reqwest::Certificate>, connect: Duration) -> Self {
        Self { authorities, connect, made: Mutex::default() }
    }

    /// The client for `url`.
    pub(super) fn client(&self, url: &Url, direct: bool) -> Result<reqwest::Client, reqwest::Error> {
        let way = Way { tls: url.scheme() == "https", direct };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&way) {
            return Ok(client.clone());
        }
        let client = self.make(way)?;
        made.insert(way, client.clone());
        Ok(client)
    }

    fn make(&self, way: Way) -> Result<reqwest::Client, reqwest::Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(self.connect)
            .tcp_nodelay(true)
            // A redirection is followed by hand: another host gets no credentials and needs another client.
            .redirect(reqwest::redirect::Policy::none());
        if way.direct {
            builder = builder.no_proxy();
        }
        builder = if way.tls {
            // The user's own choice stays.
            if CryptoProvider::get_default().is_none() {
                _ = ring::default_provider().install_default();
            }
            builder.tls_certs_merge(self.authorities.iter().cloned())
        } else {
            builder.tls_backend_preconfigured(trusts_nobody())
        };
        builder.build()
    }
}

/// For connections without TLS; reqwest wants a configuration all the same.
fn trusts_nobody() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("ring knows the default versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}
