//! Who may push: passwords, tokens and helper programs; and that no secret is told to anybody but those whom it is for.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fairing_core::image::Architecture;
use fairing_core::registry::{AuthError, Keychain, Push, RequestError, Settings};
use rcgen::{CertificateParams, KeyPair, SigningKey};
use serde_json::{Value, json};

use crate::proxy::{Deed, Proxy, Request};
use crate::server::{Kind, Server, registry};
use crate::support::{base64, client_with, keychain, push, small_image, told, wait};
use crate::tls::Authority;

const USER: &str = "fairing";
/// No output may have it in it, nor its form as base64.
const PASSWORD: &str = "Tr0ub4dor-secret&9";
/// `htpasswd -nbBC 4 fairing 'Tr0ub4dor-secret&9'`
const HTPASSWD: &str = "fairing:$2y$04$fWaSsxAGQHnFN.RQZagwv.uhApoIqRL42WXVlhbTRWiGUziV2/vyO\n";
/// Set in a child process of this test program: the folder that it works in.
const CHILD: &str = "FAIRING_REGISTRY_TEST_FOLDER";

/// A registry that wants [`PASSWORD`].
fn with_password(folder: &Path) -> Kind {
    let path = folder.join("htpasswd");
    fs::write(&path, HTPASSWD).unwrap();
    Kind { auth: Some(format!("  htpasswd:\n    realm: test\n    path: {}\n", path.display())), ..Kind::default() }
}

/// A login as Docker's file has it.
fn login(registry: &str, password: &str) -> Value {
    json!({ "auths": { registry: { "auth": base64(format!("{USER}:{password}").as_bytes()) } } })
}

#[test]
fn a_password_from_dockers_file_opens_a_registry_that_asks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    let proxy = Proxy::start(server.address(), |_| Deed::Forward);
    let (image, _layers) = small_image(&[900_000, 20_000], 1);
    let repository = proxy.repository("team/x");
    let keychain = keychain(folder.path(), &login(&proxy.address().to_string(), PASSWORD));
    let client = client_with(Settings::default(), keychain);
    push(&client, &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();

    assert_eq!(server.tagged("team/x", "v1").unwrap(), image.manifest);
    let seen = proxy.seen();
    assert_eq!(seen[0].header("authorization"), None, "a password is shown when it is asked for, and not before");
    assert!(seen[1..].iter().all(|request| request.header("authorization").is_some()), "it is asked for once");
    let base = format!("{repository}:v1").parse().unwrap();
    assert_eq!(wait(client.base(&base, Architecture::Amd64)).unwrap().descriptor, image.descriptor);
}

#[test]
fn a_wrong_password_names_the_file_that_it_came_from() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let ask = Push::image(&image, &repository).tagged("v1".parse().unwrap());
    let registry = server.address().to_string();

    let wrong = keychain(folder.path(), &login(&registry, "Tr0ub4dor-wrong"));
    let error = push(&client_with(Settings::default(), wrong), &ask).unwrap_err();
    let file = folder.path().join("config.json");
    let expected = format!(
        "failed to push to `{repository}`: registry `{registry}` refused the question for manifest `v1` in \
         `{repository}`: unauthorized (the credentials came from `{}`; `docker login {registry}` replaces them)",
        file.display()
    );
    assert_eq!(told(&error), expected);
    assert!(!format!("{error:?}").contains("Tr0ub4dor"));

    let others = keychain(folder.path(), &login("registry.example", PASSWORD));
    let error = push(&client_with(Settings::default(), others), &ask).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Unauthorized(_))), "{}", told(&error));
    let expected =
        format!("(no credentials were found in `{}`; `docker login {registry}` stores some)", file.display());
    assert!(told(&error).ends_with(&expected), "{}", told(&error));

    let none = Keychain::from_env(&BTreeMap::new());
    let error = push(&client_with(Settings::default(), none), &ask).unwrap_err();
    assert!(told(&error).contains("no credentials were found in no file"), "{}", told(&error));
    assert_eq!(server.tagged("x", "v1"), None);
}

#[test]
fn podmans_files_are_read_too_and_the_first_that_knows_the_registry_counts() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("team/x");
    let ask = Push::image(&image, &repository);
    let registry = server.address().to_string();
    let write = |path: &str, config: &Value| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, config.to_string()).unwrap();
    };
    let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let value = |path: &str| folder.path().join(path).display().to_string();
        pairs.iter().map(|(name, path)| ((*name).to_owned(), value(path))).collect()
    };
    let accepted =
        |env: &BTreeMap<String, String>| push(&client_with(Settings::default(), Keychain::from_env(env)), &ask).is_ok();
    write("home/.docker/config.json", &json!({ "auths": { "other.example": { "auth": base64(b"a:b") } } }));
    assert!(!accepted(&env(&[("HOME", "home")])));
    // Podman keeps entries for parts of a registry.
    write("home/.config/containers/auth.json", &login(&format!("{registry}/team"), PASSWORD));
    assert!(accepted(&env(&[("HOME", "home")])));
    assert!(!accepted(&env(&[("HOME", "home"), ("XDG_CONFIG_HOME", "elsewhere")])));
    write("runtime/containers/auth.json", &login(&registry, PASSWORD));
    assert!(accepted(&env(&[("XDG_RUNTIME_DIR", "runtime")])));
    write("named.json", &login(&registry, "wrong"));
    assert!(!accepted(&env(&[("XDG_RUNTIME_DIR", "runtime"), ("REGISTRY_AUTH_FILE", "named.json")])));
    write(
        "named.json",
        &json!({ "auths": { format!("https://{registry}/v1/"): { "username": USER, "password": PASSWORD } } }),
    );
    assert!(accepted(&env(&[("REGISTRY_AUTH_FILE", "named.json")])));
}

#[test]
fn a_damaged_file_is_named_and_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let registry = server.address().to_string();
    let path = folder.path().join("config.json");
    let keychain = keychain(folder.path(), &json!({}));
    let fails = |text: &str, expected: &str| {
        fs::write(&path, text).unwrap();
        let client = client_with(Settings::default(), keychain.clone());
        let error = push(&client, &Push::image(&image, &repository)).unwrap_err();
        let told = told(&error);
        assert!(matches!(error.request(), Some(RequestError::Credentials { .. })), "{told}");
        assert!(told.contains(expected) && told.contains(&path.display().to_string()), "{told}");
        assert!(!told.contains(PASSWORD) && !format!("{error:?}").contains(PASSWORD), "{error:?}");
    };
    fails(&format!("{{\n  \"auths\": {{ \"x\": \"{PASSWORD}\" "), "is no configuration of Docker or Podman (line 2,");
    fails(&format!("{{ \"auths\": \"{PASSWORD}\" }}"), "is no configuration of Docker or Podman (line 1,");
    fails(
        &json!({ "auths": { &registry: { "auth": PASSWORD } } }).to_string(),
        &format!("the entry of `{registry}` in"),
    );
}

#[test]
fn a_helper_that_is_missing_is_named_with_the_file_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let registry = server.address().to_string();
    let helper = "fairing-test-that-is-nowhere";
    for config in [json!({ "credHelpers": { &registry: helper } }), json!({ "credsStore": helper })] {
        let client = client_with(Settings::default(), keychain(folder.path(), &config));
        let error = push(&client, &Push::image(&image, &repository)).unwrap_err();
        let expected = format!(
            "`docker-credential-{helper}`, which `{}` names for `{registry}`, did not listen (is it installed and on PATH?)",
            folder.path().join("config.json").display()
        );
        assert!(told(&error).ends_with(&expected), "{}", told(&error));
    }
}

/// Runs `name`, a test of this program, with helper programs on its PATH; gives all that it printed.
fn with_helpers(name: &str, folder: &Path) -> String {
    let programs = folder.join("bin");
    fs::create_dir(&programs).unwrap();
    let helper = |name: &str, script: &str| {
        let path = programs.join(format!("docker-credential-{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let asked = folder.join("asked");
    let note = format!("read -r server; echo \"$1 $server\" >> '{}'", asked.display());
    helper("good", &format!("{note}\necho '{{\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'"));
    helper("empty", &format!("{note}\necho 'credentials not found in native keychain'; exit 1"));
    helper("locked", "read -r server; echo 'the drawer is locked'; exit 3");
    helper("talkative", &format!("read -r server; echo '{{\"Secret\":\"{PASSWORD}\"}}'; echo 'it jams' >&2; exit 1"));
    helper("babbling", "read -r server; echo 'no JSON'");
    // Gives no answer while someone could wait for it.
    helper("hanging", "read -r server; while kill -0 $PPID; do sleep 0.1; done");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("PATH", path)
        .env(CHILD, folder)
        // Leads nowhere: a registry on this machine is reached without it.
        .env("http_proxy", "http://127.0.0.1:9")
        .output()
        .unwrap();
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    printed
}

#[test]
fn helper_programs_are_asked_and_their_failures_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let server = registry!(&with_password(folder.path()));
    fs::write(folder.path().join("registry"), server.address().to_string()).unwrap();
    let printed = with_helpers("logins::child_that_asks_helpers", folder.path());
    assert!(!printed.contains(PASSWORD), "{printed}");
    let asked = fs::read_to_string(folder.path().join("asked")).unwrap();
    let line = format!("get {}\n", server.address());
    // `good` twice, for one registry and for all, each time once for two pushes; then `empty`.
    assert_eq!(asked, line.repeat(3));
}

/// A part of `helper_programs_are_asked_and_their_failures_are_named`, which starts it; by itself it does nothing.
#[test]
fn child_that_asks_helpers() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let folder = Path::new(&folder);
    let registry = fs::read_to_string(folder.join("registry")).unwrap();
    let repository = format!("{registry}/x").parse().unwrap();
    let open = |config: &Value| {
        let keychain = keychain(folder, config).with_helper_deadline(Duration::from_secs(5));
        client_with(Settings::default(), keychain)
    };
    for (seed, config) in
        [json!({ "credHelpers": { &registry: "good" } }), json!({ "credsStore": "good" })].iter().enumerate()
    {
        let client = open(config);
        for seed in [10 + seed as u64, 20 + seed as u64] {
            let (image, _layers) = small_image(&[1_000], seed);
            let pushed = push(&client, &Push::image(&image, &repository)).unwrap();
            println!("{pushed:?} {client:?}");
        }
    }
    let (image, _layers) = small_image(&[1_000], 30);
    let fails = |name: &str| {
        let error = push(&open(&json!({ "credHelpers": { &registry: name } })), &Push::image(&image, &repository));
        let error = error.unwrap_err();
        println!("{error:?} {}", told(&error));
        error
    };
    let empty = fails("empty");
    assert!(matches!(empty.request(), Some(RequestError::Unauthorized(_))), "{empty:?}");
    for (name, expected) in [
        ("locked", "failed: the drawer is locked"),
        ("talkative", "failed: it jams"),
        ("babbling", "failed: its answer is no credential"),
    ] {
        assert!(told(&fails(name)).ends_with(expected), "{name}: {}", told(&fails(name)));
    }
    let keychain =
        keychain(folder, &json!({ "credsStore": "hanging" })).with_helper_deadline(Duration::from_millis(200));
    let error = push(&client_with(Settings::default(), keychain), &Push::image(&image, &repository)).unwrap_err();
    let Some(RequestError::Credentials { source: AuthError::HelperSilent { program, .. }, .. }) = error.request()
    else {
        panic!("{}", told(&error))
    };
    assert_eq!(program, "docker-credential-hanging");
}

/// A token server and the registry that believes it.
struct Tokens {
    key: KeyPair,
    certificate: rcgen::Certificate,
}

impl Tokens {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["tokens".to_owned()]).unwrap().self_signed(&key).unwrap();
        Self { key, certificate }
    }

    /// A registry that sends its clients to a token server at `realm`.
    fn kind(&self, realm: SocketAddr, folder: &Path) -> Kind {
        let bundle = folder.join("tokens.pem");
        fs::write(&bundle, self.certificate.pem()).unwrap();
        let auth = format!(
            "  token:\n    realm: http://{realm}/token\n    service: here\n    issuer: us\n    rootcertbundle: {}\n",
            bundle.display()
        );
        Kind { auth: Some(auth), ..Kind::default() }
    }

    /// A token for the scopes that a request names, as docker-registry understands it.
    fn token(&self, scopes: &[String]) -> String {
        let access: Vec<_> = scopes
            .iter()
            .map(|scope| {
                let [kind, name, actions] = scope.split(':').collect::<Vec<_>>()[..] else { panic!("{scope}") };
                json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() })
            })
            .collect();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [base64(self.certificate.der())] });
        let claims = json!({
            "iss": "us", "sub": USER, "aud": "here", "nbf": now - 10, "iat": now, "exp": now + 300, "jti": "1",
            "access": access,
        });
        let signed =
            format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
        let signature = fixed(&self.key.sign(signed.as_bytes()).unwrap());
        format!("{signed}.{}", base64url(&signature))
    }
}

/// The scopes in a query or a form; one parameter may name several.
fn scopes(query: &str) -> Vec<String> {
    let query = reqwest::Url::parse(&format!("form:?{query}")).unwrap();
    let values = query.query_pairs().filter(|(name, _)| name == "scope").map(|(_, value)| value.into_owned());
    values.flat_map(|value| value.split(' ').map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Two integers in DER as the 64 bytes that a token has.
fn fixed(der: &[u8]) -> Vec<u8> {
    let mut rest = &der[2..];
    let mut signature = Vec::new();
    for _ in 0..2 {
        let length = rest[1] as usize;
        let integer = &rest[2..2 + length];
        let integer = &integer[integer.len().saturating_sub(32)..];
        signature.extend(vec![0; 32 - integer.len()]);
        signature.extend(integer);
        rest = &rest[2 + length..];
    }
    signature
}

fn base64url(bytes: &[u8]) -> String {
    base64(bytes).trim_end_matches('=').replace('+', "-").replace('/', "_")
}

/// A registry and its token server, which gives what `give` makes of a request and its scopes.
fn token_registry(
    folder: &Path,
    give: impl Fn(&Request, &Tokens, &[String]) -> Deed + Send + Sync + 'static,
) -> Option<(Server, Proxy)> {
    let tokens = Arc::new(Tokens::new());
    let token_server = Proxy::alone({
        let tokens = tokens.clone();
        move |request| {
            let query = request.path.split_once('?').map_or(request.form.as_str(), |(_, query)| query);
            give(request, &tokens, &scopes(query))
        }
    });
    let server = Server::start(&tokens.kind(token_server.address(), folder))?;
    Some((server, token_server))
}

#[test]
fn a_token_is_fetched_with_the_password_for_the_rights_that_are_needed() {
    let folder = tempfile::tempdir().unwrap();
    let started = token_registry(folder.path(), |request, tokens, scopes| {
        let password = format!("Basic {}", base64(format!("{USER}:{PASSWORD}").as_bytes()));
        if request.header("authorization") != Some(&password) {
            return Deed::Answer(401, "who are you?", vec![]);
        }
        Deed::Say(json!({ "token": tokens.token(scopes), "expires_in": 300 }).to_string())
    });
    let Some((server, token_server)) = started else { return };
    let proxy = Proxy::start(server.address(), |_| Deed::Forward);
    let (image, _layers) = small_image(&[600_000, 20_000], 1);
    let repository = proxy.repository("team/x");
    let base = proxy.repository("library/base");
    let ask = Push::image(&image, &repository).on_base(&base).tagged("v1".parse().unwrap());
    let keychain = keychain(folder.path(), &login(&proxy.address().to_string(), PASSWORD));
    push(&client_with(Settings::default(), keychain), &ask).unwrap();
    assert_eq!(server.tagged("team/x", "v1").unwrap(), image.manifest);

    let asked = token_server.seen();
    assert_eq!(asked.len(), 1, "one token serves the whole push");
    let query = asked[0].path.split_once('?').unwrap().1;
    assert_eq!(scopes(query)[..2], ["repository:team/x:pull,push", "repository:library/base:pull"]);
    assert!(query.contains("service=here"));
    // The registry itself never sees the password.
    let shown =
        |request: &Request| request.header("authorization").is_some_and(|header| !header.starts_with("Bearer "));
    assert_eq!(proxy.count(shown), 0);
}

#[test]
fn a_token_without_a_password_reads_a_public_base() {
    let folder = tempfile::tempdir().unwrap();
    let started = token_registry(folder.path(), |request, tokens, scopes| match request.header("authorization") {
        None if request.path.contains("push") => Deed::Say(json!({ "token": tokens.token(&[]) }).to_string()),
        _ => Deed::Say(json!({ "access_token": tokens.token(scopes) }).to_string()),
    });
    let Some((server, _tokens)) = started else { return };
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("library/base");
    let ask = Push::image(&image, &repository).tagged("12".parse().unwrap());
    let error = push(&client_with(Settings::default(), Keychain::empty()), &ask).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Unauthorized(_))), "{}", told(&error));

    let keychain = keychain(folder.path(), &login(&server.address().to_string(), PASSWORD));
    push(&client_with(Settings::default(), keychain), &ask).unwrap();
    let reference = format!("{repository}:12").parse().unwrap();
    let public = client_with(Settings::default(), Keychain::empty());
    assert_eq!(wait(public.base(&reference, Architecture::Amd64)).unwrap().descriptor, image.descriptor);
}

#[test]
fn a_token_server_that_refuses_is_told_in_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let refuse = |_: &Request, _: &Tokens, _: &[String]| {
        Deed::Answer(401, r#"{"details":"incorrect username or password"}"#, vec![])
    };
    let Some((server, _tokens)) = token_registry(folder.path(), refuse) else { return };
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let keychain = keychain(folder.path(), &login(&server.address().to_string(), PASSWORD));
    let error = push(&client_with(Settings::default(), keychain), &Push::image(&image, &repository)).unwrap_err();
    let told = told(&error);
    assert!(told.contains("refused the request for a token") && told.contains("incorrect username"), "{told}");
    assert!(told.contains("the credentials came from"), "{told}");
}

#[test]
fn an_identity_token_is_exchanged() {
    let folder = tempfile::tempdir().unwrap();
    let started = token_registry(folder.path(), |request, tokens, scopes| {
        let given = request.method == "POST"
            && request.form.contains("grant_type=refresh_token")
            && request.form.contains("refresh_token=Tr0ub4dor-identity");
        if !given {
            return Deed::Answer(400, "no refresh token", vec![]);
        }
        Deed::Say(json!({ "access_token": tokens.token(scopes) }).to_string())
    });
    let Some((server, _tokens)) = started else { return };
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = server.repository("x");
    let registry = server.address().to_string();
    let config = json!({ "auths": { registry: { "identitytoken": "Tr0ub4dor-identity" } } });
    let client = client_with(Settings::default(), keychain(folder.path(), &config));
    push(&client, &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();
    assert_eq!(server.tagged("x", "v1").unwrap(), image.manifest);

    let server = registry!(&with_password(folder.path()));
    let config = json!({ "auths": { server.address().to_string(): { "identitytoken": "Tr0ub4dor-identity" } } });
    let client = client_with(Settings::default(), keychain(folder.path(), &config));
    let error = push(&client, &Push::image(&image, &server.repository("x"))).unwrap_err();
    assert!(told(&error).contains("it wants a password, and what is stored is an identity token"), "{}", told(&error));
    assert!(!format!("{error:?} {}", told(&error)).contains("Tr0ub4dor"));
}

#[test]
fn a_token_that_runs_out_is_renewed() {
    let folder = tempfile::tempdir().unwrap();
    let started = token_registry(folder.path(), |_, tokens, scopes| {
        // Runs out at once, as far as the client is told.
        Deed::Say(json!({ "token": tokens.token(scopes), "expires_in": 0 }).to_string())
    });
    let Some((server, token_server)) = started else { return };
    let (image, _layers) = small_image(&[1_000, 2_000], 1);
    let repository = server.repository("x");
    let client = client_with(Settings::default(), Keychain::empty());
    push(&client, &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();
    assert!(token_server.seen().len() > 5, "each request had a token of its own");

    // One that the registry no longer takes, though it should hold.
    let started = token_registry(folder.path(), |_, tokens, scopes| {
        Deed::Say(json!({ "token": tokens.token(scopes), "expires_in": 300 }).to_string())
    });
    let Some((server, token_server)) = started else { return };
    let realm = format!("Www-Authenticate: Bearer realm=\"http://{}/token\",service=\"here\"", token_server.address());
    let refused = AtomicUsize::new(0);
    let proxy = Proxy::start(server.address(), move |request| {
        let upload = request.is_upload() && request.length == 2_000;
        match upload && refused.fetch_add(1, Ordering::SeqCst) == 0 {
            true => Deed::Answer(401, "", vec![realm.clone()]),
            false => Deed::Forward,
        }
    });
    let repository = proxy.repository("x");
    let client = client_with(Settings::default(), Keychain::empty());
    push(&client, &Push::image(&image, &repository).tagged("v1".parse().unwrap())).unwrap();
    assert_eq!(token_server.seen().len(), 2);
    assert_eq!(server.tagged("x", "v1").unwrap(), image.manifest);
}

#[test]
fn a_password_is_not_sent_to_a_token_server_without_tls() {
    let folder = tempfile::tempdir().unwrap();
    let token_server = Proxy::alone(|_| Deed::Say(json!({ "token": "anything" }).to_string()));
    let authority = Authority::new("ours");
    let tokens = Tokens::new();
    let kind = Kind { auth: tokens.kind(token_server.address(), folder.path()).auth, ..authority.kind(&["127.0.0.1"]) };
    let server = registry!(&kind);
    let (image, _layers) = small_image(&[1_000], 1);
    let keychain = keychain(folder.path(), &login(&server.address().to_string(), PASSWORD));
    let settings = Settings { registry_ca: Some(authority.file(folder.path())), ..Settings::default() };
    let error = push(&client_with(settings, keychain), &Push::image(&image, &server.repository("x"))).unwrap_err();
    assert!(matches!(error.request(), Some(RequestError::Login { .. })), "{}", told(&error));
    assert!(told(&error).contains("which does not speak TLS"), "{}", told(&error));
    assert_eq!(token_server.seen().len(), 0);
}

#[test]
fn a_password_goes_to_a_token_server_without_tls_only_if_its_own_host_is_named() {
    let folder = tempfile::tempdir().unwrap();
    // The registry on this machine may be spoken to in clear; the host of its token server is nowhere.
    let realm = "Www-Authenticate: Bearer realm=\"http://tokens.invalid:1/token\",service=\"here\"";
    let proxy = Proxy::alone(move |_| Deed::Answer(401, "", vec![realm.to_owned()]));
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = proxy.repository("x");
    let registry = proxy.address().to_string();
    for (plain_http, is_asked) in [
        (vec![], false),
        (vec![registry.clone()], false),
        (vec!["tokens.invalid".to_owned()], false),
        (vec!["tokens.invalid:1".to_owned()], true),
    ] {
        let keychain = keychain(folder.path(), &login(&registry, PASSWORD));
        let client = client_with(Settings { plain_http, ..Settings::default() }, keychain);
        let error = push(&client, &Push::image(&image, &repository)).unwrap_err();
        let told = told(&error);
        match is_asked {
            true => assert!(matches!(error.request(), Some(RequestError::Unreachable { .. })), "{told}"),
            false => {
                assert!(matches!(error.request(), Some(RequestError::Login { .. })), "{told}");
                let expected =
                    "`http://tokens.invalid:1/token`, which does not speak TLS (its host in `plain_http` allows that)";
                assert!(told.ends_with(expected), "{told}");
            }
        }
    }
}

#[test]
fn credentials_stay_with_the_registry_that_they_are_for() {
    let folder = tempfile::tempdir().unwrap();
    // A registry that keeps blobs elsewhere: uploads and downloads are sent there.
    let storage = Proxy::alone(|_| Deed::Answer(201, "", vec![]));
    let elsewhere = format!("Location: http://localhost:{}/put?signed=x", storage.address().port());
    let proxy = Proxy::alone(move |request| match request.method.as_str() {
        _ if request.header("authorization").is_none() => {
            Deed::Answer(401, "", vec!["WWW-Authenticate: Basic realm=\"x\"".to_owned()])
        }
        "HEAD" => Deed::Answer(404, "", vec![]),
        "POST" => Deed::Answer(202, "", vec![elsewhere.clone()]),
        "GET" => Deed::Answer(307, "", vec![elsewhere.clone()]),
        _ => Deed::Answer(201, "", vec![]),
    });
    let (image, _layers) = small_image(&[1_000], 1);
    let repository = proxy.repository("x");
    let keychain = keychain(folder.path(), &login(&proxy.address().to_string(), PASSWORD));
    let client = client_with(Settings::default(), keychain);
    push(&client, &Push::image(&image, &repository)).unwrap();
    let reference = format!("{repository}:12").parse().unwrap();
    _ = wait(client.base(&reference, Architecture::Amd64));

    let seen = storage.seen();
    assert_eq!(seen.iter().filter(|request| request.method == "PUT").count(), 2, "the layer and the configuration");
    assert_eq!(seen.iter().filter(|request| request.method == "GET").count(), 1);
    assert!(seen.iter().all(|request| request.header("authorization").is_none()));
    assert!(seen[0].path.contains("signed=x&digest=sha256%3A"), "{}", seen[0].path);
}

#[test]
fn a_registry_that_forbids_without_asking_has_no_helper_started() {
    let folder = tempfile::tempdir().unwrap();
    let proxy = Proxy::alone(|_| Deed::Answer(403, "not for you", vec![]));
    let keychain = keychain(folder.path(), &json!({ "credsStore": "fairing-test-that-is-nowhere" }));
    let reference = format!("{}:12", proxy.repository("x")).parse().unwrap();
    let error = wait(client_with(Settings::default(), keychain).base(&reference, Architecture::Amd64)).unwrap_err();
    let expected = format!("not for you (`{}` did not ask for credentials)", proxy.address());
    assert!(told(&error).ends_with(&expected), "{}", told(&error));
}

#[test]
fn a_registry_that_repeats_the_password_does_not_get_it_shown() {
    let folder = tempfile::tempdir().unwrap();
    let encoded = base64(format!("{USER}:{PASSWORD}").as_bytes());
    for status in [400, 403, 404, 418, 500] {
        let proxy = Proxy::alone(move |request| match request.header("authorization") {
            None => Deed::Answer(401, "", vec!["WWW-Authenticate: Basic realm=\"x\"".to_owned()]),
            Some(_) if request.method == "HEAD" => Deed::Answer(404, "", vec![]),
            Some(_) => Deed::Echo(status),
        });
        let (image, _layers) = small_image(&[1_000], 1);
        let repository = proxy.repository("x");
        let keychain = keychain(folder.path(), &login(&proxy.address().to_string(), PASSWORD));
        let client = client_with(Settings::default(), keychain);
        let error = push(&client, &Push::image(&image, &repository)).unwrap_err();
        let reference = format!("{repository}:12").parse().unwrap();
        let base = wait(client.base(&reference, Architecture::Amd64)).unwrap_err();
        let shown = format!("{error:?} {} {base:?} {} {client:?}", told(&error), told(&base));
        assert!(shown.contains("(secret)"), "the registry did repeat it: {shown}");
        assert!(!shown.contains(&encoded) && !shown.contains(PASSWORD), "{shown}");
    }
}
