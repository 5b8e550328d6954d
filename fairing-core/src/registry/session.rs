//! Requests to one repository: sent, logged in when asked to, and answered or failed by name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::header::{HeaderName, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::auth::{CredentialOrigin, Found, Login};
use super::challenge::{Bearer, Challenge};
use super::client::Client;
use super::error::{Doing, Refused, RequestError};
use super::patience::Attempts;
use super::reference::{Registry, Repository};
use super::upload::Pulse;
use crate::image::Digest;

/// Under which a registry says what a manifest's digest is.
const DIGEST_HEADER: HeaderName = HeaderName::from_static("docker-content-digest");
/// As much of a refusal as is read; a page of HTML is cut.
const REFUSAL_LENGTH: usize = 16 * 1024;
/// As much of the registry's words as an error repeats.
const WORDS_LENGTH: usize = 400;
/// Registries refuse larger manifests themselves.
const MANIFEST_LENGTH: usize = 4 * 1024 * 1024;
/// A token with the rights to many repositories is a few kilobytes long.
const TOKEN_LENGTH: usize = 256 * 1024;
/// From a registry to its storage, and maybe once more to a cache near by.
const REDIRECTIONS: usize = 5;
/// How long a token holds whose server does not say it; from the token specification.
const TOKEN_LIFE: Duration = Duration::from_secs(60);

/// Requests to one repository with one set of rights.
pub(super) struct Session {
    client: Client,
    repository: Repository,
    /// Rights to ask a token server for, beside those that the registry names.
    scopes: Vec<String>,
    authorization: Mutex<Option<Authorization>>,
}

/// What a request says who sends it. Has no `Debug`, so that nothing prints it.
#[derive(Clone)]
struct Authorization {
    header: HeaderValue,
    /// Where the next token is to be had, and when.
    renewal: Option<(Bearer, Instant)>,
}

/// One request.
pub(super) struct Ask<'a> {
    pub(super) doing: Doing,
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) payload: Payload<'a>,
    /// The answers that are none of a failure.
    pub(super) expected: &'a [StatusCode],
}

/// What is sent along.
pub(super) enum Payload<'a> {
    Nothing,
    Bytes(Bytes),
    /// Opened anew for each attempt.
    Stream {
        size: u64,
        pulse: &'a Pulse,
        open: &'a (dyn Fn() -> Feed + Send + Sync),
    },
}

/// The bytes of a blob, piece by piece.
pub(super) type Feed = BoxStream<'static, std::io::Result<Bytes>>;

/// An answer of an expected status, or a refusal that was read.
enum Answer {
    Expected(Response),
    Refusal(Refusal),
}

struct Refusal {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// What a request to upload a blob leads to.
pub(super) enum Opened {
    /// The blob is there: it was mounted.
    Mounted,
    /// It is to be sent, to this address if an upload is open.
    Upload(Option<Url>),
}

impl Session {
    /// For reading from `repository`.
    pub(super) fn read(client: &Client, repository: &Repository) -> Arc<Self> {
        Self::new(client, repository, vec![format!("repository:{}:pull", repository.name())])
    }

    /// For writing to `repository` and mounting from `base`, if it is in the same registry.
    pub(super) fn write(client: &Client, repository: &Repository, base: Option<&Repository>) -> Arc<Self> {
        let mut scopes = vec![format!("repository:{}:pull,push", repository.name())];
        let beside = base.filter(|base| base.registry() == repository.registry() && *base != repository);
        scopes.extend(beside.map(|base| format!("repository:{}:pull", base.name())));
        Self::new(client, repository, scopes)
    }

    fn new(client: &Client, repository: &Repository, scopes: Vec<String>) -> Arc<Self> {
        let (client, repository) = (client.clone(), repository.clone());
        Arc::new(Self { client, repository, scopes, authorization: Mutex::default() })
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn registry(&self) -> &Registry {
        self.repository.registry()
    }

    /// The digest of the manifest that `name`, a tag or a digest, stands for; `None` if there is none.
    pub(super) async fn find_manifest(
        &self,
        name: &str,
        accept: &str,
        first: bool,
    ) -> Result<Option<Option<Digest>>, RequestError> {
        let ask = Ask {
            doing: Doing(format!("the question for manifest `{name}`")),
            method: Method::HEAD,
            url: self.url(&format!("manifests/{name}")),
            headers: vec![(ACCEPT, header(accept))],
            payload: Payload::Nothing,
            expected: &[StatusCode::OK, StatusCode::NOT_FOUND],
        };
        let response = self.ask(&ask, !first).await?;
        Ok((response.status() == StatusCode::OK).then(|| digest(&response)))
    }

    /// The manifest that `name`, a tag or a digest, stands for: its media type, its digest and its bytes.
    pub(super) async fn get_manifest(
        &self,
        name: &str,
        accept: &str,
    ) -> Result<(String, Digest, Vec<u8>), RequestError> {
        let ask = Ask {
            doing: Doing(format!("the request for manifest `{name}`")),
            method: Method::GET,
            url: self.url(&format!("manifests/{name}")),
            headers: vec![(ACCEPT, header(accept))],
            payload: Payload::Nothing,
            expected: &[StatusCode::OK],
        };
        let (headers, body) = self.read_whole(&ask, MANIFEST_LENGTH).await?;
        let actual = Digest::of(&body);
        let promised = headers.get(DIGEST_HEADER).and_then(|value| value.to_str().ok()).unwrap_or(name);
        if promised.starts_with("sha256:") && promised != actual.to_string() {
            return Err(self.content(&ask.doing, format!("its digest is `{actual}`, not `{promised}`")));
        }
        let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        Ok((media_type, actual, body))
    }

    /// The bytes of a small blob, checked.
    pub(super) async fn get_blob(&self, digest: &Digest) -> Result<Vec<u8>, RequestError> {
        let ask = self.blob_download(digest);
        let (_, body) = self.read_whole(&ask, MANIFEST_LENGTH).await?;
        let actual = Digest::of(&body);
        if actual != *digest {
            return Err(self.content(&ask.doing, format!("its digest is `{actual}`")));
        }
        Ok(body)
    }

    /// Begins the download of a blob; nothing of it is checked yet.
    pub(super) async fn open_blob(&self, digest: &Digest) -> Result<Response, RequestError> {
        self.ask_once(&self.blob_download(digest)).await
    }

    pub(super) fn blob_download(&self, digest: &Digest) -> Ask<'static> {
        Ask {
            doing: Doing(format!("the download of blob `{digest}`")),
            method: Method::GET,
            url: self.url(&format!("blobs/{digest}")),
            headers: Vec::new(),
            payload: Payload::Nothing,
            expected: &[StatusCode::OK],
        }
    }

    /// Whether the repository has the blob.
    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool, RequestError> {
        let ask = Ask {
            doing: Doing(format!("the question for blob `{digest}`")),
            method: Method::HEAD,
            url: self.url(&format!("blobs/{digest}")),
            headers: Vec::new(),
            payload: Payload::Nothing,
            expected: &[StatusCode::OK, StatusCode::NOT_FOUND],
        };
        Ok(self.ask(&ask, true).await?.status() == StatusCode::OK)
    }

    /// Takes a blob over from the repository `from` of the same registry, where that works.
    ///
    /// Where it does not, a registry opens an upload; some refuse instead: one that does not know mounts, or one whose
    /// user may not read `from`. Then the blob is sent like another.
    pub(super) async fn mount(&self, digest: &Digest, from: &Repository) -> Result<Opened, RequestError> {
        let mut url = self.url("blobs/uploads/");
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from.name());
        let ask = Ask {
            doing: Doing(format!("the mount of blob `{digest}`")),
            method: Method::POST,
            url,
            headers: vec![(CONTENT_LENGTH, HeaderValue::from_static("0"))],
            payload: Payload::Nothing,
            expected: &[StatusCode::CREATED, StatusCode::ACCEPTED],
        };
        match self.ask(&ask, true).await {
            Ok(response) if response.status() == StatusCode::CREATED => Ok(Opened::Mounted),
            Ok(response) => Ok(Opened::Upload(Some(self.location(&ask.doing, &response)?))),
            Err(error) if is_refused_mount(&error) => Ok(Opened::Upload(None)),
            Err(error) => Err(error),
        }
    }

    /// Opens an upload: the address to send `digest` to.
    pub(super) async fn open_upload(&self, digest: &Digest) -> Result<Url, RequestError> {
        let ask = Ask {
            doing: Doing(format!("the upload of blob `{digest}`")),
            method: Method::POST,
            url: self.url("blobs/uploads/"),
            headers: vec![(CONTENT_LENGTH, HeaderValue::from_static("0"))],
            payload: Payload::Nothing,
            expected: &[StatusCode::ACCEPTED],
        };
        let response = self.ask_once(&ask).await?;
        self.location(&ask.doing, &response)
    }

    /// Opens an upload and gives it up again: whether that works says whether a push would.
    pub(super) async fn try_upload(&self) -> Result<(), RequestError> {
        let ask = Ask {
            doing: Doing("the right to push".to_owned()),
            method: Method::POST,
            url: self.url("blobs/uploads/"),
            headers: vec![(CONTENT_LENGTH, HeaderValue::from_static("0"))],
            payload: Payload::Nothing,
            expected: &[StatusCode::ACCEPTED],
        };
        let response = self.ask_once(&ask).await?;
        let end = Ask {
            doing: Doing("the end of an upload".to_owned()),
            method: Method::DELETE,
            url: self.location(&ask.doing, &response)?,
            headers: Vec::new(),
            payload: Payload::Nothing,
            expected: &[StatusCode::NO_CONTENT, StatusCode::OK, StatusCode::ACCEPTED],
        };
        // Not every registry knows this; all give up an upload that nobody goes on with.
        let _ = self.ask_once(&end).await;
        Ok(())
    }

    /// Sends a blob to the address of an upload, in one piece.
    pub(super) async fn send_blob(
        &self,
        mut url: Url,
        digest: &Digest,
        payload: Payload<'_>,
    ) -> Result<(), RequestError> {
        url.query_pairs_mut().append_pair("digest", &digest.to_string());
        let ask = Ask {
            doing: Doing(format!("the upload of blob `{digest}`")),
            method: Method::PUT,
            url,
            headers: vec![(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))],
            payload,
            expected: &[StatusCode::CREATED, StatusCode::NO_CONTENT],
        };
        self.ask_once(&ask).await.map(drop)
    }

    /// Stores a manifest under `name`, a tag or its digest.
    pub(super) async fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        manifest: &[u8],
        digest: &Digest,
    ) -> Result<(), RequestError> {
        let ask = Ask {
            doing: Doing(format!("the manifest `{name}`")),
            method: Method::PUT,
            url: self.url(&format!("manifests/{name}")),
            headers: vec![(CONTENT_TYPE, header(media_type))],
            payload: Payload::Bytes(Bytes::copy_from_slice(manifest)),
            expected: &[StatusCode::CREATED, StatusCode::OK],
        };
        let response = self.ask(&ask, true).await?;
        match self::digest(&response) {
            Some(stored) if stored != *digest => Err(self.content(&ask.doing, format!("it stored `{stored}`"))),
            _ => Ok(()),
        }
    }

    /// Sends a request, again and again while that may help.
    ///
    /// `unreachable` is as in [`Attempts::again`].
    async fn ask(&self, ask: &Ask<'_>, unreachable: bool) -> Result<Response, RequestError> {
        let mut attempts = Attempts::new(self.client.patience());
        loop {
            match self.ask_once(ask).await {
                Ok(response) => return Ok(response),
                Err(error) => attempts.again(error, unreachable).await?,
            }
        }
    }

    /// As [`Session::ask`], and reads the answer, which must not be longer than `longest`.
    async fn read_whole(&self, ask: &Ask<'_>, longest: usize) -> Result<(HeaderMap, Vec<u8>), RequestError> {
        let mut attempts = Attempts::new(self.client.patience());
        loop {
            let read = async {
                let mut response = self.ask_once(ask).await?;
                let body = self.body(&ask.doing, &mut response, longest).await?;
                if body.len() > longest {
                    return Err(self.content(&ask.doing, format!("it is longer than {longest} bytes")));
                }
                Ok((std::mem::take(response.headers_mut()), body))
            };
            match read.await {
                Ok(read) => return Ok(read),
                Err(error) => attempts.again(error, false).await?,
            }
        }
    }

    /// Sends a request once; logs in and follows redirections where that is asked for.
    pub(super) async fn ask_once(&self, ask: &Ask<'_>) -> Result<Response, RequestError> {
        let mut url = ask.url.clone();
        let (mut logins, mut redirections) = (0, 0);
        loop {
            let authorization = if self.is_home(&url) { self.authorization().await? } else { None };
            let refusal = match self.send(ask, &url, authorization.as_ref()).await {
                Ok(Answer::Expected(response)) => return Ok(response),
                Ok(Answer::Refusal(refusal)) => refusal,
                Err(RequestError::NotPlainHttp { .. }) if self.client.upgrade(self.registry()) => {
                    self.to_tls(&mut url);
                    continue;
                }
                Err(RequestError::NotPlainHttp { .. }) if !self.client.is_plain(self.registry()) => {
                    // Another request found it out meanwhile.
                    self.to_tls(&mut url);
                    continue;
                }
                Err(error) => return Err(error),
            };
            if refusal.status == StatusCode::UNAUTHORIZED && self.is_home(&url) && logins < 2 {
                self.log_in(ask, &refusal, authorization.as_ref()).await?;
                logins += 1;
            } else if refusal.status.is_redirection() && redirections < REDIRECTIONS {
                url = self.redirected(ask, &url, &refusal)?;
                redirections += 1;
            } else {
                let origin = match &authorization {
                    Some(_) => self.found().await?.origin.clone(),
                    None => CredentialOrigin::Unasked { registry: self.registry().clone() },
                };
                return Err(self.refused(ask, &refusal, origin));
            }
        }
    }

    /// Sends a request to `url` and waits for the head of its answer.
    async fn send(
        &self,
        ask: &Ask<'_>,
        url: &Url,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, RequestError> {
        let client = self.client.connector(url).map_err(|error| self.transport(url, &ask.doing, &error))?;
        let mut request = client.request(ask.method.clone(), url.clone());
        for (name, value) in &ask.headers {
            request = request.header(name, value);
        }
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization.header.clone());
        }
        let answer_deadline = self.client.patience().answer;
        let (request, pulse) = match &ask.payload {
            Payload::Nothing => (request, None),
            Payload::Bytes(bytes) => (request.body(bytes.clone()), None),
            Payload::Stream { size, pulse, open } => {
                pulse.begin();
                let body = reqwest::Body::wrap_stream(open());
                (request.header(CONTENT_LENGTH, *size).body(body), Some(*pulse))
            }
        };
        let sent = match pulse {
            None => tokio::time::timeout(answer_deadline, request.send()).await.map_err(|_| answer_deadline),
            Some(pulse) => tokio::select! {
                sent = request.send() => Ok(sent),
                waited = pulse.stands_still(self.client.patience()) => Err(waited),
            },
        };
        let sent = sent.map_err(|waited| self.silent(&ask.doing, waited))?;
        let mut response = sent.map_err(|error| self.transport(url, &ask.doing, &error))?;
        if ask.expected.contains(&response.status()) {
            return Ok(Answer::Expected(response));
        }
        let (status, headers) = (response.status(), response.headers().clone());
        // What a refusal says is welcome, but its status is what counts.
        let body = self.body(&ask.doing, &mut response, REFUSAL_LENGTH).await.unwrap_or_default();
        if url.scheme() == "http" && status == StatusCode::BAD_REQUEST {
            let mute = ask.method == Method::HEAD;
            if wants_tls(&if mute { self.reason(&client, url, &ask.doing).await } else { body.clone() }) {
                return Err(RequestError::NotPlainHttp { registry: self.registry().clone() });
            }
        }
        Ok(Answer::Refusal(Refusal { status, headers, body }))
    }

    /// Why a question was refused whose answer has no words: it is asked again in another way.
    async fn reason(&self, client: &reqwest::Client, url: &Url, doing: &Doing) -> Vec<u8> {
        let asked = tokio::time::timeout(self.client.patience().answer, client.get(url.clone()).send()).await;
        match asked {
            Ok(Ok(mut response)) => self.body(doing, &mut response, REFUSAL_LENGTH).await.unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Reads an answer up to a little more than `longest` bytes.
    async fn body(&self, doing: &Doing, response: &mut Response, longest: usize) -> Result<Vec<u8>, RequestError> {
        let url = response.url().clone();
        let deadline = self.client.patience().answer;
        let read = async {
            let mut body = Vec::new();
            while body.len() <= longest {
                match response.chunk().await {
                    Ok(Some(piece)) => body.extend_from_slice(&piece),
                    Ok(None) => break,
                    Err(error) => return Err(self.transport(&url, doing, &error)),
                }
            }
            Ok(body)
        };
        tokio::time::timeout(deadline, read).await.unwrap_or_else(|_| Err(self.silent(doing, deadline)))
    }

    /// What the registry is told; a token that has run out is renewed first.
    async fn authorization(&self) -> Result<Option<Authorization>, RequestError> {
        let mut current = self.authorization.lock().await;
        let due = current.as_ref().and_then(|authorization| authorization.renewal.clone());
        if let Some((bearer, _)) = due.filter(|(_, due)| *due <= Instant::now()) {
            let found = self.found().await?;
            *current = Some(self.token(&bearer, &found).await?);
        }
        Ok(current.clone())
    }

    /// Does what the registry asks for when it refuses a request that was sent with `used`.
    async fn log_in(&self, ask: &Ask<'_>, refusal: &Refusal, used: Option<&Authorization>) -> Result<(), RequestError> {
        let mut current = self.authorization.lock().await;
        let header = |authorization: Option<&Authorization>| authorization.map(|known| known.header.clone());
        if header(current.as_ref()) != header(used) {
            // Another request has logged in meanwhile.
            return Ok(());
        }
        let found = self.found().await?;
        let next = match (Challenge::read(&refusal.headers), &found.secret) {
            (Some(Challenge::Bearer(bearer)), _) => self.token(&bearer, &found).await?,
            (Some(Challenge::Other(scheme)), _) => {
                return Err(self.login(format!("`{}` is unknown here", self.client.presentable(&scheme))));
            }
            (Some(Challenge::Basic) | None, Some(Login::Password { username, password })) => {
                Authorization { header: self.basic(username, password)?, renewal: None }
            }
            (Some(Challenge::Basic) | None, Some(Login::Identity(_))) => {
                return Err(self.login(format!(
                    "it wants a password, and what is stored is an identity token ({})",
                    found.origin
                )));
            }
            (Some(Challenge::Basic) | None, None) => return Err(self.unauthorized(ask, refusal, found.origin.clone())),
        };
        if used.is_some_and(|used| used.header == next.header) {
            return Err(self.unauthorized(ask, refusal, found.origin.clone()));
        }
        *current = Some(next);
        Ok(())
    }

    /// Asks a token server for a token.
    ///
    /// # Source
    ///
    /// The token authentication specification of the CNCF's distribution, and its OAuth 2 variant for identity tokens.
    async fn token(&self, bearer: &Bearer, found: &Found) -> Result<Authorization, RequestError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }

        let doing = Doing("the request for a token".to_owned());
        let realm = self.client.presentable(&bearer.realm);
        let Ok(mut url) = Url::parse(&bearer.realm) else {
            return Err(self.login(format!("its token server `{realm}` has no valid address")));
        };
        if !matches!(url.scheme(), "http" | "https") {
            return Err(self.login(format!("its token server `{realm}` has no valid address")));
        }
        // Who may hear the password is a question of the token server's host, which need not be the registry's. Nor does
        // a registry with TLS send it to this machine in clear, where any program may have taken the port.
        let is_plain = self.client.is_plain(self.registry());
        let is_safe = url.scheme() == "https" || self.client.names(&url) || is_plain && self.client.allows_plain(&url);
        if found.secret.is_some() && !is_safe {
            return Err(self.login(format!(
                "the password would be sent to `{realm}`, which does not speak TLS (its host in `plain_http` allows that)"
            )));
        }
        let mut scopes = self.scopes.clone();
        scopes.extend(bearer.scope.clone().filter(|scope| !scopes.contains(scope)));

        let client = self.client.connector(&url).map_err(|error| self.transport(&url, &doing, &error))?;
        let request = match &found.secret {
            Some(Login::Identity(identity)) => {
                self.client.hide(identity);
                let mut form = Url::parse("form:").expect("it is a URL");
                form.query_pairs_mut()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("refresh_token", identity)
                    .append_pair("client_id", "fairing")
                    .append_pair("service", bearer.service.as_deref().unwrap_or_default())
                    .append_pair("scope", &scopes.join(" "));
                let form = form.query().unwrap_or_default().to_owned();
                client.post(url.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
            password => {
                url.query_pairs_mut()
                    .extend_pairs(bearer.service.iter().map(|service| ("service", service)))
                    .extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
                let request = client.get(url.clone());
                match password {
                    Some(Login::Password { username, password }) => {
                        request.header(AUTHORIZATION, self.basic(username, password)?)
                    }
                    _ => request,
                }
            }
        };
        let deadline = self.client.patience().answer;
        let sent = tokio::time::timeout(deadline, request.send()).await.map_err(|_| self.silent(&doing, deadline))?;
        let mut response = sent.map_err(|error| self.transport(&url, &doing, &error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = self.body(&doing, &mut response, TOKEN_LENGTH).await?;
        let ask = Ask {
            doing,
            method: Method::GET,
            url,
            headers: Vec::new(),
            payload: Payload::Nothing,
            expected: &[StatusCode::OK],
        };
        if status != StatusCode::OK {
            return Err(self.refused(&ask, &Refusal { status, headers, body }, found.origin.clone()));
        }
        let token = serde_json::from_slice(&body).ok().and_then(|token: Token| {
            let text = token.token.filter(|text| !text.is_empty()).or(token.access_token)?;
            let life = token.expires_in.map_or(TOKEN_LIFE, Duration::from_secs);
            Some((text, life))
        });
        let Some((token, life)) = token else {
            return Err(self.content(&ask.doing, "there is no token in it".to_owned()));
        };
        self.client.hide(&token);
        let Ok(mut header) = HeaderValue::try_from(format!("Bearer {token}")) else {
            return Err(self.content(&ask.doing, "its token has characters that none has".to_owned()));
        };
        header.set_sensitive(true);
        // A little early: it must still hold when it arrives. One that holds for a moment only is tried all the same.
        let due = Instant::now() + life.mul_f32(0.9).min(Duration::from_secs(24 * 60 * 60));
        Ok(Authorization { header, renewal: Some((bearer.clone(), due)) })
    }

    /// Name and password as a header.
    fn basic(&self, username: &str, password: &str) -> Result<HeaderValue, RequestError> {
        self.client.hide(password);
        let url = self.url("");
        let request = self
            .client
            .connector(&url)
            .and_then(|client| client.get(url.clone()).basic_auth(username, Some(password)).build());
        let mut request = request.map_err(|error| self.transport(&url, &Doing("the login".to_owned()), &error))?;
        let mut header = request.headers_mut().remove(AUTHORIZATION).expect("it was just put there");
        header.set_sensitive(true);
        if let Some((_, encoded)) = header.to_str().ok().and_then(|text| text.split_once(' ')) {
            self.client.hide(encoded);
        }
        Ok(header)
    }

    async fn found(&self) -> Result<Arc<Found>, RequestError> {
        let found = self.client.credentials(&self.repository).await;
        found.map_err(|source| RequestError::Credentials { registry: self.registry().clone(), source })
    }

    /// An address in the repository.
    fn url(&self, path: &str) -> Url {
        let scheme = if self.client.is_plain(self.registry()) { "http" } else { "https" };
        let text = format!("{scheme}://{}/v2/{}/{path}", self.registry().address(), self.repository.name());
        Url::parse(&text).expect("a repository's name is part of a URL as it is")
    }

    /// Whether a request to `url` may carry credentials: it goes to the registry itself, as safely as agreed.
    fn is_home(&self, url: &Url) -> bool {
        url.origin() == self.url("").origin()
    }

    fn to_tls(&self, url: &mut Url) {
        url.set_scheme("https").expect("http becomes https");
    }

    /// Where an upload goes.
    fn location(&self, doing: &Doing, response: &Response) -> Result<Url, RequestError> {
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        match location.and_then(|location| response.url().join(location).ok()) {
            Some(to) => self.led(doing, response.url(), to),
            None => Err(self.content(doing, "it says no address to send the blob to".to_owned())),
        }
    }

    fn redirected(&self, ask: &Ask<'_>, from: &Url, refusal: &Refusal) -> Result<Url, RequestError> {
        let location = refusal.headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let followed = [Method::GET, Method::HEAD].contains(&ask.method);
        match location.filter(|_| followed).and_then(|location| from.join(location).ok()) {
            Some(to) => self.led(&ask.doing, from, to),
            None => Err(self.content(&ask.doing, format!("it is a redirection, with status {}", refusal.status))),
        }
    }

    /// The address `to`, to which an answer from `from` leads, if it is no less safe: there is no way from TLS to plain
    /// HTTP, and from plain HTTP none to another host that the user did not name.
    fn led(&self, doing: &Doing, from: &Url, to: Url) -> Result<Url, RequestError> {
        let host = self.client.presentable(to.host_str().unwrap_or_default());
        match to.scheme() {
            "https" => Ok(to),
            "http" if from.scheme() == "https" => {
                Err(self.content(doing, format!("it leads to an address without TLS, at `{host}`")))
            }
            "http" if to.host() == from.host() || self.client.allows_plain(&to) => Ok(to),
            "http" => Err(self.content(
                doing,
                format!("it leads to another host without TLS, `{host}` (that one in `plain_http` allows it)"),
            )),
            scheme => Err(self.content(doing, format!("it leads to an address of the kind `{scheme}:`"))),
        }
    }

    /// The failure that a refusal is.
    fn refused(&self, ask: &Ask<'_>, refusal: &Refusal, origin: CredentialOrigin) -> RequestError {
        let registry = self.registry().clone();
        let doing = ask.doing.clone();
        let (_, full) = words(refusal);
        let words = self.presentable(refusal);
        let status = refusal.status.as_u16();
        match refusal.status {
            StatusCode::UNAUTHORIZED => self.unauthorized(ask, refusal, origin),
            StatusCode::FORBIDDEN => {
                RequestError::Forbidden(Box::new(Refused { repository: self.repository.clone(), doing, words, origin }))
            }
            _ if full => RequestError::NoSpace { registry, doing, words },
            _ => {
                let retry_after = refusal.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
                let retry_after = retry_after.and_then(|value| value.parse().ok()).map(Duration::from_secs);
                RequestError::Answer { registry, doing, status, words, retry_after }
            }
        }
    }

    fn unauthorized(&self, ask: &Ask<'_>, refusal: &Refusal, origin: CredentialOrigin) -> RequestError {
        let (repository, doing) = (self.repository.clone(), ask.doing.clone());
        let words = self.presentable(refusal);
        RequestError::Unauthorized(Box::new(Refused { repository, doing, words, origin }))
    }

    /// The words of a refusal, as an error may show them.
    fn presentable(&self, refusal: &Refusal) -> String {
        self.client.presentable(&words(refusal).0).chars().take(WORDS_LENGTH).collect()
    }

    fn login(&self, reason: String) -> RequestError {
        RequestError::Login { registry: self.registry().clone(), reason }
    }

    pub(super) fn content(&self, doing: &Doing, reason: String) -> RequestError {
        RequestError::Content { registry: self.registry().clone(), doing: doing.clone(), reason }
    }

    pub(super) fn silent(&self, doing: &Doing, waited: Duration) -> RequestError {
        RequestError::Silent { registry: self.registry().clone(), doing: doing.clone(), waited }
    }

    pub(super) fn transport(&self, url: &Url, doing: &Doing, error: &reqwest::Error) -> RequestError {
        let port = url.port_or_known_default().map_or_else(String::new, |port| format!(":{port}"));
        let address = format!("{}{port}", url.host_str().unwrap_or_default());
        RequestError::transport(self.registry(), address, doing, error)
    }
}

/// Whether a mount failed in a way that says nothing about an upload. A user without credentials needs some for that too.
fn is_refused_mount(error: &RequestError) -> bool {
    match error {
        RequestError::Answer { status: 400..=499, .. } => !error.is_transient(),
        RequestError::Forbidden(_) => true,
        RequestError::Unauthorized(refused) => matches!(refused.origin, CredentialOrigin::File { .. }),
        _ => false,
    }
}

/// What a manifest's digest is by the words of the registry.
fn digest(response: &Response) -> Option<Digest> {
    response.headers().get(DIGEST_HEADER)?.to_str().ok()?.parse().ok()
}

fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("application/octet-stream"))
}

/// Whether a refusal is that of a server which expected TLS: Go's, nginx's and Apache's words.
fn wants_tls(body: &[u8]) -> bool {
    let words = String::from_utf8_lossy(body).to_lowercase();
    ["http request to an https server", "plain http request was sent to https", "speaking plain http to an ssl-enabled"]
        .iter()
        .any(|known| words.contains(known))
}

/// What a registry says about a refusal, and whether it means that its storage is full.
///
/// # Source
///
/// The error envelope of the OCI distribution specification. The CNCF's registry answers a full disk with status 500 and
/// the system's error number in the detail: 28 is `ENOSPC`, 122 is `EDQUOT`.
fn words(refusal: &Refusal) -> (String, bool) {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<Problem>,
    }
    #[derive(Deserialize)]
    struct Problem {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
        #[serde(default)]
        detail: serde_json::Value,
    }

    let text = String::from_utf8_lossy(&refusal.body);
    let spoken = match serde_json::from_slice::<Envelope>(&refusal.body) {
        Ok(Envelope { errors }) => {
            let problems = errors.into_iter().map(|Problem { code, message, detail }| {
                let detail = if detail.is_null() { String::new() } else { format!(" {detail}") };
                format!("{code} {message}{detail}")
            });
            problems.collect::<Vec<_>>().join(", ")
        }
        Err(_) => text.trim().to_owned(),
    };
    let full = refusal.status == StatusCode::INSUFFICIENT_STORAGE
        || refusal.status.is_server_error()
            && (["no space left", "disk quota exceeded"].iter().any(|known| text.to_lowercase().contains(known))
                || ["\"Err\":28", "\"Err\":122"].iter().any(|known| text.contains(known)));
    let spoken = match spoken.is_empty() {
        true => refusal.status.canonical_reason().unwrap_or("no reason given").to_lowercase(),
        false => spoken,
    };
    (spoken, full)
}
