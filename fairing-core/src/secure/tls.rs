//! From an identity to the settings of a TLS connection: version 1.3 only, both ends with a certificate of the run's own
//! authority, which is the only one they know.

use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

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
        Self::with(identity, provider(), Arc::new(DefaultTimeProvider))
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
        Self::with(identity, Arc::new(provider), Arc::new(DefaultTimeProvider))
    }

    fn with(
        identity: &Identity,
        provider: Arc<CryptoProvider>,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Self, IdentityError> {
        let failed = unusable(identity.member());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_slice(&identity.authority)).map_err(|error| failed(error.into()))?;
        let roots = Arc::new(roots);
        let chain = vec![CertificateDer::from(identity.certificate.clone())];
        let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.clone()));

        let mut client = ClientConfig::builder_with_details(provider.clone(), clock.clone())
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
        let mut server = ServerConfig::builder_with_details(provider, clock)
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
    // The shorter key is long enough and costs a twentieth less: 2.05 s of processor time against 2.17 s for 60 transfers of
    // 100 MB. ChaCha20, for processors without AES, takes twice as long.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::identity::Authority;
    use crate::topology::Replica;
    use rustls::pki_types::UnixTime;
    use std::time::Duration;

    const SERVER: Member = Member::Replica(Replica { role: crate::topology::Role::Ps, rank: crate::topology::Rank(0) });

    /// Exchanges what the two have to say until both are done, or one refuses.
    fn shake_hands(near: &mut Connection, far: &mut Connection) -> Result<(), rustls::Error> {
        while near.is_handshaking() || far.is_handshaking() {
            carry(near, far)?;
            carry(far, near)?;
        }
        Ok(())
    }

    fn carry(from: &mut Connection, to: &mut Connection) -> Result<(), rustls::Error> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn the_fastest_suite_is_agreed_on_without_tickets() {
        let authority = Authority::new("test").unwrap();
        let settings = |member| Settings::new(&authority.issue(member).unwrap()).unwrap();
        let mut near = settings(Member::Caller).connect(SERVER).unwrap();
        let mut far = settings(SERVER).accept().unwrap();
        shake_hands(&mut near, &mut far).unwrap();
        assert_eq!(near.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let suite = near.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert!(!far.wants_write());
    }

    #[derive(Debug)]
    struct Clock(UnixTime);

    impl TimeProvider for Clock {
        fn current_time(&self) -> Option<UnixTime> {
            Some(self.0)
        }
    }

    #[test]
    fn a_certificate_outlasts_a_long_run_and_clocks_that_differ() {
        const HOUR: i64 = 3600;
        let authority = Authority::new("test").unwrap();
        let now = UnixTime::now().as_secs() as i64;
        for (later, good) in [(-25, false), (-23, true), (0, true), (24 * 29, true), (24 * 30 + 1, false)] {
            let clock = Clock(UnixTime::since_unix_epoch(Duration::from_secs((now + later * HOUR) as u64)));
            let clock: Arc<dyn TimeProvider> = Arc::new(clock);
            let settings =
                |member, clock| Settings::with(&authority.issue(member).unwrap(), provider(), clock).unwrap();
            let right = || Arc::new(DefaultTimeProvider) as Arc<dyn TimeProvider>;
            for (calling, called) in [(clock.clone(), right()), (right(), clock.clone())] {
                let mut near = settings(Member::Caller, calling).connect(SERVER).unwrap();
                let mut far = settings(SERVER, called).accept().unwrap();
                let shaken = shake_hands(&mut near, &mut far);
                assert_eq!(shaken.is_ok(), good, "{later} h later: {shaken:?}");
            }
        }
    }

    #[test]
    fn a_damaged_identity_is_found_before_anything_is_sent() {
        let authority = Authority::new("test").unwrap();
        let [one, other] = [(); 2].map(|()| authority.issue(SERVER).unwrap());
        let damaged = [
            Identity { authority: vec![1, 2, 3], ..one.clone() },
            Identity { certificate: one.certificate[..40].to_vec(), ..one.clone() },
            Identity { key: one.key[..40].to_vec(), ..one.clone() },
            // Each whole, and they do not belong together.
            Identity { key: other.key.clone(), ..one.clone() },
        ];
        for (index, identity) in damaged.iter().enumerate() {
            let error = Settings::new(identity).err().unwrap_or_else(|| panic!("number {index} is taken"));
            assert!(error.to_string().contains("`ps 0`"), "{error}");
        }
        assert!(Settings::new(&one).is_ok());
    }
}
