//! Images that the engine itself fetches from a registry or sends to one.

use std::time::Duration;

use bollard::auth::DockerCredentials;
use bollard::models::{CreateImageInfo, ProgressDetail, PushImageInfo};
use bollard::query_parameters as query;

use super::engine::{Engine, EngineError};
use super::load::tag;
use super::stream::ask;
use crate::registry::Login;

/// How long a transfer may say nothing. While it unpacks a layer an engine says how far it is, and it tries again by itself
/// when a connection breaks.
const SILENCE: Duration = Duration::from_secs(300);

/// The registry that is meant where none is named, and the name under which engines keep a login for it.
const HUB: (&str, &str) = ("docker.io", "https://index.docker.io/v1/");

/// Failure of the engine to fetch or to send an image. Returned by [`Engine::pull`] and [`Engine::push_image`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The registry wants a login, or another one.
    #[error("the registry refused the engine `{image}`: {reason} (`docker login {registry}`, as a user who may)")]
    Unauthorized {
        /// The image.
        image: String,
        /// Its registry.
        registry: String,
        /// The engine's own words.
        reason: String,
    },
    /// The registry has no such image.
    #[error("there is no image `{image}`: {reason} (check its name and its tag or digest)")]
    Missing {
        /// The image.
        image: String,
        /// The engine's own words.
        reason: String,
    },
    /// The engine does not trust the registry's certificate.
    #[error(
        "the engine does not trust the registry of `{image}`: {reason} (`/etc/docker/certs.d/{registry}/ca.crt` on the \
         engine's machine names the certificate authority to trust; `registry_ca` is for fairing's own requests only)"
    )]
    Untrusted {
        /// The image.
        image: String,
        /// Its registry.
        registry: String,
        /// The engine's own words.
        reason: String,
    },
    /// The engine wants TLS, and the registry does not speak it.
    #[error(
        "the engine wants TLS from the registry of `{image}`: {reason} (`\"insecure-registries\": [\"{registry}\"]` in the \
         engine's configuration allows plain HTTP; `plain_http` is for fairing's own requests only)"
    )]
    PlainHttp {
        /// The image.
        image: String,
        /// Its registry.
        registry: String,
        /// The engine's own words.
        reason: String,
    },
    /// The image was sent, and the engine did not say what it is called in the registry.
    #[error("the engine sent the image `{image}` without saying its digest (use the builder `append`)")]
    NoDigest {
        /// The image.
        image: String,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How far one layer of an image is on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferProgress {
    /// The engine's short name for the layer.
    pub layer: String,
    /// What is done with it, in the engine's own words.
    pub status: String,
    /// Bytes done of all bytes, where there is something to count.
    pub bytes: Option<(u64, u64)>,
}

impl Engine {
    /// Makes the engine fetch the image `reference`, unless it has it, and returns the image's id.
    ///
    /// With a digest in it the reference means the same bytes for ever. With a tag it means whatever the engine has under
    /// that name, or else the registry. An image that has no name afterwards but its digest gets one, `fairing/NAME:ID`, so
    /// that it is none of those that a clean-up of the engine removes first.
    ///
    /// # Errors
    ///
    /// [`TransferError`], never with `login` in it; also if the engine says nothing for five minutes.
    pub fn pull(
        &self,
        reference: &str,
        login: Option<&Login>,
        progress: &mut (dyn FnMut(TransferProgress) + Send),
    ) -> Result<String, TransferError> {
        let name = wanted(reference);
        let look = || self.call(&format!("look for the image `{name}`"), self.docker().inspect_image(&name));
        let image = match look() {
            Err(error) if error.is_absence() => {
                let options = query::CreateImageOptionsBuilder::default().from_image(&name).build();
                let answer = self.docker().create_image(
                    Some(options),
                    None,
                    login.map(|login| credentials(registry(&name), login)),
                );
                let mut hear = |info: CreateImageInfo| hear(progress, info.id, info.status, info.progress_detail);
                let pulled = ask(self, &format!("pull the image `{name}`"), SILENCE, answer, &mut hear);
                pulled.map_err(|error| explained(error, reference, login))?;
                look()?
            }
            image => image?,
        };
        let id = image.id.unwrap_or_default();
        if image.repo_tags.is_none_or(|tags| tags.is_empty()) {
            let path = untagged(name.split('@').next().unwrap_or_default());
            let program = path.rsplit('/').next().unwrap_or_default();
            self.name(&id, &tag(program, id.trim_start_matches("sha256:")))?;
        }
        Ok(id)
    }

    /// Makes the engine send the image `id` to `repository`, as `host[:port]/path`, under each of `tags`, of which there is
    /// one at least. Returns the reference with the digest that the image has there.
    ///
    /// # Errors
    ///
    /// [`TransferError`], never with `login` in it; also if the engine says nothing for five minutes.
    pub fn push_image(
        &self,
        id: &str,
        repository: &str,
        tags: &[String],
        login: Option<&Login>,
        progress: &mut (dyn FnMut(TransferProgress) + Send),
    ) -> Result<String, TransferError> {
        let mut digest = None;
        for tag in tags {
            let image = format!("{repository}:{tag}");
            let is_new = self.called(&image).is_none();
            self.name(id, &image)?;
            let options = query::PushImageOptionsBuilder::default().tag(tag).build();
            let login_here = login.map(|login| credentials(registry(repository), login));
            let answer = self.docker().push_image(repository, Some(options), login_here);
            let mut hear = |info: PushImageInfo| {
                if let Some(said) = info.status.as_deref().and_then(digest_in) {
                    digest = Some(said.to_owned());
                }
                hear(progress, None, info.status, info.progress_detail);
            };
            let pushed = ask(self, &format!("push the image `{image}`"), SILENCE, answer, &mut hear);
            if let Err(error) = pushed {
                if is_new {
                    // A name that nobody else gave would make it the user's own, which is never removed.
                    let removed = self.docker().remove_image(&image, None::<query::RemoveImageOptions>, None);
                    let _ = self.call("take a name from an image", removed);
                }
                return Err(explained(error, &image, login));
            }
        }
        let known = || {
            let image = self.call("look at the pushed image", self.docker().inspect_image(id)).ok()?;
            image
                .repo_digests?
                .into_iter()
                .find_map(|name| Some(name.strip_prefix(repository)?.strip_prefix('@')?.to_owned()))
        };
        let digest = digest.or_else(known).ok_or_else(|| TransferError::NoDigest { image: repository.to_owned() })?;
        Ok(format!("{repository}@{digest}"))
    }
}

/// The reference as engines want it: without the tag if there is a digest, and never with neither, which means all tags.
fn wanted(reference: &str) -> String {
    if let Some((name, digest)) = reference.split_once('@') {
        return format!("{}@{digest}", untagged(name));
    }
    // An image's id.
    if reference.starts_with("sha256:") || untagged(reference) != reference {
        return reference.to_owned();
    }
    format!("{reference}:latest")
}

fn untagged(name: &str) -> &str {
    let path = name.rfind('/').map_or(0, |slash| slash + 1);
    name[path..].find(':').map_or(name, |colon| &name[..path + colon])
}

/// The registry that a reference names.
fn registry(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => HUB.0,
    }
}

/// The name under which engines look for the login of `registry`.
pub(super) fn server(registry: &str) -> &str {
    if registry == HUB.0 { HUB.1 } else { registry }
}

/// What the engine is told for `registry`, in the clear: it has to log in by itself.
pub(super) fn credentials(registry: &str, login: &Login) -> DockerCredentials {
    let serveraddress = Some(server(registry).to_owned());
    match login.clone() {
        Login::Password { username, password } => DockerCredentials {
            username: Some(username),
            password: Some(password),
            serveraddress,
            ..DockerCredentials::default()
        },
        Login::Identity(token) => {
            DockerCredentials { identitytoken: Some(token), serveraddress, ..DockerCredentials::default() }
        }
    }
}

fn hear(
    progress: &mut (dyn FnMut(TransferProgress) + Send),
    layer: Option<String>,
    status: Option<String>,
    detail: Option<ProgressDetail>,
) {
    let count = |bytes: Option<i64>| u64::try_from(bytes?).ok();
    let bytes = detail.and_then(|detail| Some((count(detail.current)?, count(detail.total)?)));
    progress(TransferProgress { layer: layer.unwrap_or_default(), status: status.unwrap_or_default(), bytes });
}

/// The digest in `latest: digest: sha256:… size: 1234`.
fn digest_in(status: &str) -> Option<&str> {
    let mut words = status.split_whitespace().skip_while(|word| *word != "digest:").skip(1);
    words.next().filter(|digest| digest.parse::<crate::image::Digest>().is_ok())
}

/// No engine is known to repeat a secret, and none shall get it into a log through here.
pub(super) fn without_secrets<'a>(text: String, logins: impl IntoIterator<Item = &'a Login>) -> String {
    let secrets = logins.into_iter().map(Login::secret).filter(|secret| !secret.is_empty());
    secrets.fold(text, |text, secret| text.replace(secret, "…"))
}

/// What the failure means; engines say it in words only.
fn explained(error: EngineError, image: &str, login: Option<&Login>) -> TransferError {
    let EngineError::Refused { action, reason, status } = error else { return error.into() };
    let reason = without_secrets(reason, login);
    let lower = reason.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let image = image.to_owned();
    if has(&["x509:", "verify certificate", "certificate signed by"]) {
        return TransferError::Untrusted { registry: registry(&image).to_owned(), image, reason };
    }
    if has(&["http response to https client"]) {
        return TransferError::PlainHttp { registry: registry(&image).to_owned(), image, reason };
    }
    if has(&["unauthorized", "denied", "authentication required", "no basic auth credentials", "incorrect username"]) {
        return TransferError::Unauthorized { registry: registry(&image).to_owned(), image, reason };
    }
    if has(&["manifest unknown", "name unknown", "not found", "does not exist"]) {
        return TransferError::Missing { image, reason };
    }
    EngineError::Refused { action, reason, status }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_asked_for_by_digest_or_by_one_tag() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (written, asked) in [
            ("debian", "debian:latest"),
            ("debian:12", "debian:12"),
            ("localhost:5000/team/a", "localhost:5000/team/a:latest"),
            (&format!("localhost:5000/a:1@{digest}"), &format!("localhost:5000/a@{digest}")),
            (&format!("debian@{digest}"), &format!("debian@{digest}")),
            (&digest, &digest),
        ] {
            assert_eq!(wanted(written), asked);
        }
    }

    #[test]
    fn the_registry_is_the_part_that_looks_like_a_host() {
        for (reference, host) in [
            ("debian:12", "docker.io"),
            ("team/image", "docker.io"),
            ("localhost/image", "localhost"),
            ("127.0.0.1:5000/team/image", "127.0.0.1:5000"),
            ("ghcr.io/team/image", "ghcr.io"),
        ] {
            assert_eq!(registry(reference), host);
        }
    }

    #[test]
    fn the_digest_is_read_from_the_engines_words() {
        let digest = format!("sha256:{}", "a1".repeat(32));
        assert_eq!(digest_in(&format!("latest: digest: {digest} size: 528")), Some(digest.as_str()));
        for other in ["Pushed", "digest:", "latest: digest: sha256:a1 size: 3"] {
            assert_eq!(digest_in(other), None);
        }
    }

    fn password() -> Login {
        Login::Password { username: "user".to_owned(), password: "hunter2".to_owned() }
    }

    fn refused(reason: &str) -> EngineError {
        EngineError::Refused { action: "push".to_owned(), reason: reason.to_owned(), status: None }
    }

    #[test]
    fn a_secret_is_not_repeated() {
        for login in [password(), Login::Identity("hunter2".to_owned())] {
            let error = explained(refused("unauthorized: hunter2 is wrong"), "localhost:5000/a:1", Some(&login));
            assert!(!format!("{error:?}{error}{login:?}").contains("hunter2"));
            let expected = "the registry refused the engine `localhost:5000/a:1`: unauthorized: … is wrong \
                            (`docker login localhost:5000`, as a user who may)";
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn an_engine_is_told_the_password_or_the_identity_token() {
        let told = |registry, login| serde_json::to_value(credentials(registry, &login)).unwrap();
        let said = |value: serde_json::Value| {
            let fields = value.as_object().unwrap().clone();
            fields.into_iter().filter(|(_, value)| !value.is_null()).collect::<serde_json::Map<_, _>>()
        };
        let expected = serde_json::json!({ "username": "user", "password": "hunter2", "serveraddress": "ghcr.io" });
        assert_eq!(serde_json::Value::from(said(told("ghcr.io", password()))), expected);
        let expected = serde_json::json!({ "identitytoken": "token", "serveraddress": "https://index.docker.io/v1/" });
        assert_eq!(serde_json::Value::from(said(told("docker.io", Login::Identity("token".to_owned())))), expected);
    }

    #[test]
    fn an_engine_that_cannot_speak_to_the_registry_is_told_what_to_be_set() {
        let image = "registry.lan:5000/team/a:1";
        let untrusted = "Get \"https://registry.lan:5000/v2/\": tls: failed to verify certificate: x509: certificate \
                         signed by unknown authority";
        assert_eq!(
            explained(refused(untrusted), image, None).to_string(),
            format!(
                "the engine does not trust the registry of `{image}`: {untrusted} \
                 (`/etc/docker/certs.d/registry.lan:5000/ca.crt` on the engine's machine names the certificate authority \
                 to trust; `registry_ca` is for fairing's own requests only)"
            )
        );
        let plain = "Get \"https://registry.lan:5000/v2/\": http: server gave HTTP response to HTTPS client";
        assert_eq!(
            explained(refused(plain), image, None).to_string(),
            format!(
                "the engine wants TLS from the registry of `{image}`: {plain} (`\"insecure-registries\": \
                 [\"registry.lan:5000\"]` in the engine's configuration allows plain HTTP; `plain_http` is for fairing's \
                 own requests only)"
            )
        );
        // An image may be called anything.
        let missing =
            explained(refused("manifest for ghcr.io/a/certificate:1 not found"), "ghcr.io/a/certificate:1", None);
        assert!(matches!(missing, TransferError::Missing { .. }), "{missing}");
    }
}
