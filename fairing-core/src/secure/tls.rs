//! From an identity to the settings of a TLS connection: version 1.3 only, both ends with a certificate of the run's own
//! authority, which is the only one they know.

use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

use super::identity::{Identity, IdentityError};
use crate::topology::Member;

/// What one member needs to open connections and to accept them. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Settings {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Settings {
    /// The settings of `identity`'s owner.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Unusable`] if its bytes are not what was issued.
    pub(crate) fn new(identity: &Identity) -> Result<Self, IdentityError> {
        Self::with_provider(identity, provider())
    }

    /// The same with keys that wear out after some records.
    #[cfg(test)]
    pub(crate) fn with_short_lived_keys(identity: &Identity, records: u64) -> Result<Self, IdentityError> {
        let mut provider = CryptoProvider::clone(&provider());
        for suite in &mut provider.cipher_suites {
            let known = suite.tls13().expect("no other is left");
            let common = rustls::crypto::CipherSuiteCommon { confidentiality_limit: records, ..known.common };
            let short_lived = rustls::Tls13CipherSuite { common, ..*known };
            *suite = rustls::SupportedCipherSuite::Tls13(Box::leak(Box::new(short_lived)));
        }
        Self::with_provider(identity, Arc::new(provider))
    }

    fn with_provider(identity: &Identity, provider: Arc<CryptoProvider>) -> Result<Self, IdentityError> {
        let failed = unusable(identity.member());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_slice(&identity.authority)).map_err(|error| failed(error.into()))?;
        let roots = Arc::new(roots);
        let chain = vec![CertificateDer::from(identity.certificate.clone())];
        let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.clone()));

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .and_then(|builder| {
                builder.with_root_certificates(roots.clone()).with_client_auth_cert(chain.clone(), key())
            })
            .map_err(|error| failed(error.into()))?;
        // Connections live as long as the run: there is nothing to gain from a session that is resumed.
        client.resumption = Resumption::disabled();
        // The server has one certificate and need not be told which.
        client.enable_sni = false;

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| failed(error.into()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .and_then(|builder| builder.with_client_cert_verifier(verifier).with_single_cert(chain, key()))
            .map_err(|error| failed(error.into()))?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// The near end of a connection to `server`; it goes no further than the handshake if somebody else answers.
    pub(crate) fn connect(&self, server: Member) -> Result<Connection, rustls::Error> {
        ClientConnection::new(self.client.clone(), name(server)).map(Connection::Client)
    }

    /// The near end of a connection that somebody of the same run has opened.
    pub(crate) fn accept(&self) -> Result<Connection, rustls::Error> {
        ServerConnection::new(self.server.clone()).map(Connection::Server)
    }
}

/// Whether the other end of `connection` has proved that it is `member`. Nobody has before the handshake.
pub(crate) fn is(connection: &Connection, member: Member) -> bool {
    let Some([certificate, ..]) = connection.peer_certificates() else { return false };
    ParsedCertificate::try_from(certificate)
        .is_ok_and(|certificate| verify_server_name(&certificate, &name(member)).is_ok())
}

fn name(member: Member) -> ServerName<'static> {
    ServerName::try_from(member.name()).expect("roles and ranks make a name")
}

fn unusable(member: Member) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> IdentityError {
    move |source| IdentityError::Unusable { member, source }
}

/// Given explicitly, since the process' default is the user's to choose.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.tls13().is_some());
    Arc::new(provider)
}
