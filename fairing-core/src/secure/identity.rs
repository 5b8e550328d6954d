//! Certificates: who issues them, and what a member of a run carries.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

use crate::topology::Member;

/// How far the clocks of two machines may be apart: a certificate is valid before it was issued.
const CLOCK_DIFFERENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a certificate is valid: longer than runs last, since no one can issue another one for a run once it has begun (a
/// connection that breaks after this time is not opened again), and short enough that one which was left lying around is soon
/// worth nothing. (That the authority is gone with its run already makes it so.)
const VALIDITY: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Failure to make a certificate or to use one. Returned by [`Authority::new`] and [`Authority::issue`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// No key or certificate could be made.
    #[error("cannot make a certificate for `{subject}`")]
    Issue {
        /// Whom it was for.
        subject: String,
        /// What refused: the machine's source of random numbers, say.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bytes hold no identity.
    #[error("there is no identity in what should be one (it was damaged on its way, or is another file)")]
    Unreadable {
        /// What is wrong with them.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An identity's bytes are not what an authority issued.
    #[error("the identity of `{member}` cannot be used (it was damaged on its way)")]
    Unusable {
        /// Whose it is.
        member: Member,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Says who is who in one run. Lives in the launching process: it cannot be written down, and its key cannot be read.
pub struct Authority {
    run: String,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority for `run`, with a key of its own; of two for runs of one name, neither accepts whom the other names.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Issue`] if the machine has no random numbers.
    pub fn new(run: &str) -> Result<Self, IdentityError> {
        let failed = failed_to_issue(run);
        let mut params = certificate(run, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().map_err(&failed)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(&failed)?;
        Ok(Self { run: run.to_owned(), issuer })
    }

    /// What `member` proves with that it is `member`. A second one for the same member has another key and is as good.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Issue`] if the machine has no random numbers.
    pub fn issue(&self, member: Member) -> Result<Identity, IdentityError> {
        let name = member.name();
        let failed = failed_to_issue(&name);
        let mut params = certificate(&self.run, &name);
        params.subject_alt_names = vec![rcgen::SanType::DnsName(name.clone().try_into().map_err(&failed)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match member {
            // A replica also calls others, whichever part it plays.
            Member::Replica(_) => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Member::Caller => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        let key = KeyPair::generate().map_err(&failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(&failed)?;
        Ok(Identity {
            member,
            authority: self.issuer.der().to_vec(),
            certificate: certificate.der().to_vec(),
            key: key.serialize_der(),
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("run", &self.run).finish_non_exhaustive()
    }
}

/// What a certificate of `run` has in common with all others.
fn certificate(run: &str, name: &str) -> CertificateParams {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(CLOCK_DIFFERENCE);
    params.not_after = epoch + now + VALIDITY;
    // For people only; the name that counts is the alternative one.
    params.distinguished_name.push(DnType::OrganizationName, "fairing");
    params.distinguished_name.push(DnType::CommonName, format!("{name} of {run}"));
    params
}

fn failed_to_issue<E: std::error::Error + Send + Sync + 'static>(subject: &str) -> impl Fn(E) -> IdentityError {
    move |source| IdentityError::Issue { subject: subject.to_owned(), source: Box::new(source) }
}

/// What one member of a run proves with who it is, and knows the others by. Holds a private key: it travels by a channel that
/// nobody else reads, never by environment, argument or image.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    pub(super) member: Member,
    /// The authority's certificate, DER.
    #[serde(with = "serde_bytes")]
    pub(super) authority: Vec<u8>,
    /// The member's own certificate, DER.
    #[serde(with = "serde_bytes")]
    pub(super) certificate: Vec<u8>,
    /// The private key that belongs to it, PKCS #8.
    #[serde(with = "serde_bytes")]
    pub(super) key: Vec<u8>,
}

impl Identity {
    /// Whose it is.
    pub fn member(&self) -> Member {
        self.member
    }

    /// What stands in the file of a Secret, or travels over a pipe.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        ciborium::into_writer(self, &mut bytes).expect("bytes can be written to memory");
        bytes
    }

    /// Inverse of [`Identity::to_bytes`].
    ///
    /// # Errors
    ///
    /// [`IdentityError::Unreadable`] if the bytes are those of something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IdentityError> {
        ciborium::from_reader(bytes).map_err(|source| IdentityError::Unreadable { source: Box::new(source) })
    }

    /// The same member with another idea of who says who is who.
    #[cfg(test)]
    pub(crate) fn trusting(self, other: &Identity) -> Self {
        Self { authority: other.authority.clone(), ..self }
    }

    /// The authority's certificate.
    #[cfg(test)]
    pub(crate) fn authority(&self) -> &[u8] {
        &self.authority
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&format_args!("{}", self.member.name())).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Replica;

    #[test]
    fn an_identity_survives_its_journey() {
        let issued = Authority::new("fashion-1").unwrap().issue(Replica::worker(3).into()).unwrap();
        let bytes = issued.to_bytes();
        let read = Identity::from_bytes(&bytes).unwrap();
        assert!(matches!(Identity::from_bytes(&bytes[1..]), Err(IdentityError::Unreadable { .. })));
        assert_eq!(read.member(), Member::Replica(Replica::worker(3)));
        assert_eq!(
            (&read.authority, &read.certificate, &read.key),
            (&issued.authority, &issued.certificate, &issued.key)
        );
        // As bytes, not as lists of numbers.
        assert!(bytes.len() < issued.authority.len() + issued.certificate.len() + issued.key.len() + 100);
    }

    #[test]
    fn what_is_printed_is_the_name_and_no_key() {
        let authority = Authority::new("fashion-1").unwrap();
        let identity = authority.issue(Member::Caller).unwrap();
        assert_eq!(format!("{authority:?}"), r#"Authority { run: "fashion-1", .. }"#);
        assert_eq!(format!("{identity:?}"), "Identity(caller)");
        assert_eq!(format!("{identity:#?}").split_whitespace().collect::<String>(), "Identity(caller,)");
    }

    #[test]
    fn every_identity_has_its_own_key() {
        let authority = Authority::new("fashion-1").unwrap();
        let [one, other] =
            [Replica::worker(0), Replica::worker(0)].map(|replica| authority.issue(replica.into()).unwrap());
        assert_ne!(one.key, other.key);
        assert_eq!(one.authority, other.authority);
    }
}
