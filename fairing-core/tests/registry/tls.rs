//! Registries with TLS: whom to trust, and who speaks what.

use std::fs;
use std::path::{Path, PathBuf};

use fairing_core::registry::{Client, ClientError, Keychain, Push, RequestError, Settings};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::proxy::{Deed, Proxy};
use crate::server::{Kind, registry};
use crate::support::{client, client_with, mention, push, small_image, told};

/// A certificate authority of the test's own.
pub(crate) struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A registry with a certificate for `names`.
    pub(crate) fn kind(&self, names: &[&str]) -> Kind {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        Kind { tls: Some((certificate.pem(), key.serialize_pem())), ..Kind::default() }
    }

    /// Its certificate in a file.
    pub(crate) fn file(&self, folder: &Path) -> PathBuf {
        let path = folder.join("ca.pem");
        fs::write(&path, &self.certificate).unwrap();
        path
    }
}

fn trusting(path: PathBuf) -> Client {
    client_with(Settings { registry_ca: Some(path), ..Settings::default() }, Keychain::empty())
}

#[test]
fn a_registry_with_an_authority_of_its_own_is_trusted_when_it_is_named() {
    let authority = Authority::new("ours");
    let server = registry!(&authority.kind(&["127.0.0.1"]));
    let (image, folder) = small_image(&[500_000], 1);
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    push(&trusting(authority.file(folder.path())), &ask).unwrap();
    assert_eq!(server.tagged("x", "v1").unwrap(), image.manifest);
}

#[test]
fn an_upload_does_not_step_down_from_tls() {
    let elsewhere = Proxy::alone(|_| Deed::Answer(201, "", vec![]));
    let authority = Authority::new("ours");
    let host = Some(format!("http://{}", elsewhere.address()));
    let server = registry!(&Kind { host, ..authority.kind(&["127.0.0.1"]) });
    let (image, folder) = small_image(&[1_000], 1);
    let client = trusting(authority.file(folder.path()));
    let error = push(&client, &Push::image(&image, &server.repository("x"))).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Content { .. })), "{}", told(&error));
    assert!(told(&error).ends_with("it leads to an address without TLS, at `127.0.0.1`"), "{}", told(&error));
    assert_eq!(elsewhere.seen().len(), 0);
}

#[test]
fn an_upload_goes_to_another_host_without_tls_only_if_that_is_named() {
    let server = registry!();
    let proxy = Proxy::start(server.address(), |request| match request.method.as_str() {
        "POST" => Deed::Answer(202, "", vec!["Location: http://storage.invalid:1/put".to_owned()]),
        _ => Deed::Forward,
    });
    let (image, _folder) = small_image(&[1_000], 1);
    let repository = proxy.repository("x");
    let error = push(&client(), &Push::image(&image, &repository)).unwrap_err();
    let expected = "it leads to another host without TLS, `storage.invalid` (that one in `plain_http` allows it)";
    assert!(told(&error).ends_with(expected), "{}", told(&error));

    let settings = Settings { plain_http: vec!["storage.invalid:1".to_owned()], ..Settings::default() };
    let error = push(&client_with(settings, Keychain::empty()), &Push::image(&image, &repository)).unwrap_err();
    let Some(RequestError::Unreachable { address, .. }) = error.request() else { panic!("{}", told(&error)) };
    assert_eq!(address, "storage.invalid:1");
}

#[test]
fn an_unknown_authority_is_refused_with_the_setting_that_names_it() {
    let authority = Authority::new("ours");
    let server = registry!(&authority.kind(&["127.0.0.1"]));
    let (image, folder) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    for client in [client(), trusting(Authority::new("another one").file(folder.path()))] {
        let error = push(&client, &ask).unwrap_err();
        assert!(matches!(error.request(), Some(RequestError::UnknownAuthority { .. })), "{}", told(&error));
        assert!(told(&error).contains("`registry_ca = \"FILE.pem\"` names"), "{}", told(&error));
    }
    assert_eq!(server.tagged("x", "v1"), None);
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let authority = Authority::new("ours");
    let server = registry!(&authority.kind(&["registry.example"]));
    let (image, folder) = small_image(&[1_000], 1);
    let error = push(&trusting(authority.file(folder.path())), &Push::image(&image, &server.repository("x")));
    let error = error.unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Certificate { .. })), "{}", told(&error));
    assert!(told(&error).contains("registry.example"), "{}", told(&error));
}

#[test]
fn a_registry_that_was_named_as_plain_is_not_spoken_to_in_tls() {
    let authority = Authority::new("ours");
    let server = registry!(&authority.kind(&["127.0.0.1"]));
    let (image, folder) = small_image(&[1_000], 1);
    let plain_http = vec![server.address().to_string()];
    let settings = Settings { registry_ca: Some(authority.file(folder.path())), plain_http };
    let error = push(&client_with(settings, Keychain::empty()), &Push::image(&image, &server.repository("x")));
    let error = error.unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::NotPlainHttp { .. })), "{}", told(&error));
    assert!(told(&error).contains("take it out of `plain_http`"), "{}", told(&error));
}

#[test]
fn a_plain_registry_where_tls_is_due_is_refused_with_the_setting_that_allows_it() {
    let server = registry!();
    // Not one of this machine by its name, though it is by its address: plain HTTP must be allowed for it.
    let host = format!("plain.localhost:{}", server.address().port());
    if std::net::ToSocketAddrs::to_socket_addrs(&host).is_err() {
        // Older systems do not know it, and no package of Debian 12 that a test may install makes them.
        return mention("`plain.localhost` is no name here (glibc resolves it with nss-myhostname or since 2.41)");
    }
    let (image, _folder) = small_image(&[1_000], 1);
    let repository = format!("{host}/x").parse().unwrap();
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    let error = push(&client(), &ask).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::PlainHttp { .. })), "{}", told(&error));
    assert!(told(&error).contains(&format!("`plain_http = [\"{host}\"]` allows that")), "{}", told(&error));

    let settings = Settings { plain_http: vec![host], ..Settings::default() };
    push(&client_with(settings, Keychain::empty()), &ask).unwrap();
    assert_eq!(server.tagged("x", "v1").unwrap(), image.manifest);
}

#[test]
fn a_file_that_is_no_certificate_is_named_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let open = || Client::new(Settings { registry_ca: Some(path.clone()), ..Settings::default() }, Keychain::empty());
    let error = open().unwrap_err();
    assert!(matches!(error, ClientError::ReadAuthority { .. }), "{}", told(&error));
    for wrong in ["", "nothing", "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"] {
        fs::write(&path, wrong).unwrap();
        let error = open().unwrap_err();
        assert!(matches!(error, ClientError::NoAuthority { .. }), "{wrong:?}: {}", told(&error));
        assert!(told(&error).contains(&path.display().to_string()), "{}", told(&error));
    }
}

#[test]
fn an_entry_of_plain_http_that_is_no_registry_is_named() {
    for entry in ["http://registry.example", "registry.example/team", "", "registry.example:x"] {
        let settings = Settings { plain_http: vec![entry.to_owned()], ..Settings::default() };
        let error = Client::new(settings, Keychain::empty()).unwrap_err();
        let expected = format!(
            "`{entry}` in `plain_http` is no registry (write `host` or `host:port`, as in the repository's name)"
        );
        assert_eq!(error.to_string(), expected);
    }
}
