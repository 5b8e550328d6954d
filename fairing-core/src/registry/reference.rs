//! What images are called: `host[:port]/path[:tag][@digest]`. Pure.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::image::Digest;

/// The registry that short names mean, as in `debian:12`.
const DOCKER_HUB: &str = "docker.io";
/// Where Docker Hub answers.
const DOCKER_HUB_ADDRESS: &str = "registry-1.docker.io";
/// The longest name of a repository that registries take, host included.
const NAME_LENGTH: usize = 255;
/// The longest tag.
const TAG_LENGTH: usize = 128;

/// A registry: `host` or `host:port`, as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Registry(String);

/// Where images are kept: `host[:port]/path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    registry: Registry,
    name: String,
}

/// A readable name beside a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// One image: a repository with a tag, a digest or both; the digest counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    repository: Repository,
    tag: Option<Tag>,
    digest: Option<Digest>,
}

/// A name that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Nothing, or blanks, stood there.
    #[error("`{text}` is no name of an image (host[:port]/path, such as `registry.example/team/name`)")]
    Empty {
        /// What stood there.
        text: String,
    },
    /// A URL stood there.
    #[error("`{text}` has a scheme in front (write `{remedy}`; `plain_http` names the registries without TLS)")]
    Scheme {
        /// What stood there.
        text: String,
        /// The same without it.
        remedy: String,
    },
    /// The host is missing.
    #[error(
        "`{text}` names no registry (write `host/{text}`, such as `localhost:5000/{text}`; `docker.io/{text}` is Docker Hub)"
    )]
    NoHost {
        /// What stood there.
        text: String,
    },
    /// The path is missing.
    #[error("`{text}` names a registry and no repository in it (write `{text}/name`)")]
    NoPath {
        /// What stood there.
        text: String,
    },
    /// A tag or a digest stood where only a repository is meant.
    #[error("`{text}` has `{extra}` behind the repository (write `{remedy}`; tag and digest are added by each run)")]
    Extra {
        /// What stood there.
        text: String,
        /// The tag or digest.
        extra: String,
        /// The same without it.
        remedy: String,
    },
    /// Repositories are written in lower case.
    #[error("`{text}` has upper case letters, which registries refuse (write `{remedy}`)")]
    UpperCase {
        /// What stood there.
        text: String,
        /// The lower-case spelling.
        remedy: String,
    },
    /// The host is none.
    #[error("`{host}` in `{text}` is no host (a name, an address or `[address]`, then maybe `:port`)")]
    Host {
        /// What stood there.
        text: String,
        /// Its host.
        host: String,
    },
    /// A part of the path is none.
    #[error("`{part}` in `{text}` is no part of a path (a to z, 0 to 9, with `.`, `_`, `__` or `-` between them)")]
    Path {
        /// What stood there.
        text: String,
        /// The part that is wrong.
        part: String,
    },
    /// The name is longer than registries take.
    #[error("`{text}` is longer than the 255 characters that registries take")]
    Long {
        /// What stood there.
        text: String,
    },
    /// The tag is none.
    #[error("`{tag}` is no tag (up to 128 letters, digits, `_`, `.` and `-`; the first one neither `.` nor `-`)")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// The digest is none.
    #[error("`{digest}` in `{text}` is no digest (sha256: and 64 hexadecimal digits)")]
    Digest {
        /// What stood there.
        text: String,
        /// Its digest.
        digest: String,
    },
}

impl Registry {
    /// Where its requests go, `host[:port]`: Docker Hub answers under another name.
    pub fn address(&self) -> &str {
        if self.is_docker_hub() { DOCKER_HUB_ADDRESS } else { &self.0 }
    }

    /// Whether it is on this machine.
    pub fn is_loopback(&self) -> bool {
        let host = self.host();
        host == "localhost"
            || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
    }

    /// Hosts have no case, and Docker Hub has several names.
    fn named(host: &str) -> Self {
        let host = host.to_ascii_lowercase();
        let hub = host == "index.docker.io" || host == DOCKER_HUB_ADDRESS;
        Self(if hub { DOCKER_HUB.to_owned() } else { host })
    }

    pub(super) fn is_docker_hub(&self) -> bool {
        self.0 == DOCKER_HUB
    }

    /// Without port and brackets.
    fn host(&self) -> &str {
        match self.0.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or(rest),
            None => self.0.split(':').next().unwrap_or(&self.0),
        }
    }
}

impl Repository {
    /// The registry that it is in.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Its path in the registry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image with `digest` in it.
    pub fn at(&self, digest: Digest) -> Reference {
        Reference { repository: self.clone(), tag: None, digest: Some(digest) }
    }
}

impl Reference {
    /// Where the image is kept.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Its tag.
    pub fn tag(&self) -> Option<&Tag> {
        self.tag.as_ref()
    }

    /// Its digest.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same image, pinned to `digest`.
    #[must_use]
    pub fn pinned(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }
}

impl fmt::Display for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

impl FromStr for Registry {
    type Err = ReferenceError;

    /// Reads `host[:port]`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        match is_host(text) {
            true => Ok(Registry::named(text)),
            false => Err(ReferenceError::Host { text: text.to_owned(), host: text.to_owned() }),
        }
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;

    fn from_str(tag: &str) -> Result<Self, ReferenceError> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let fits = (1..=TAG_LENGTH).contains(&tag.len())
            && tag.starts_with(word)
            && tag.chars().all(|c| word(c) || c == '.' || c == '-');
        if fits { Ok(Tag(tag.to_owned())) } else { Err(ReferenceError::Tag { tag: tag.to_owned() }) }
    }
}

impl FromStr for Repository {
    type Err = ReferenceError;

    /// Reads `host[:port]/path`; the host must be named, tag and digest must not.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let parts = Parts::split(text)?;
        let Some(host) = parts.host else {
            return Err(ReferenceError::NoHost { text: text.to_owned() });
        };
        let repository = Repository::new(text, host, parts.path.to_owned())?;
        match parts.path_end < text.len() {
            true => Err(ReferenceError::Extra {
                text: text.to_owned(),
                extra: text[parts.path_end..].to_owned(),
                remedy: repository.to_string(),
            }),
            false => Ok(repository),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    /// Reads `[host[:port]/]path[:tag][@digest]`. Without a host it is an image of Docker Hub, without tag and digest the
    /// tag is `latest`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let parts = Parts::split(text)?;
        let host = parts.host.unwrap_or(DOCKER_HUB);
        let official = host == DOCKER_HUB && !parts.path.contains('/');
        let path = if official { format!("library/{}", parts.path) } else { parts.path.to_owned() };
        let repository = Repository::new(text, host, path)?;
        let digest = parts.digest.map(|digest| {
            digest.parse().map_err(|_| ReferenceError::Digest { text: text.to_owned(), digest: digest.to_owned() })
        });
        let (tag, digest) = (parts.tag.map(str::parse).transpose()?, digest.transpose()?);
        let latest = tag.is_none() && digest.is_none();
        Ok(Reference { repository, tag: if latest { Some(Tag("latest".to_owned())) } else { tag }, digest })
    }
}

impl Repository {
    /// Checks host and path; `text` is what was written.
    fn new(text: &str, host: &str, path: String) -> Result<Self, ReferenceError> {
        if !is_host(host) {
            return Err(ReferenceError::Host { text: text.to_owned(), host: host.to_owned() });
        }
        if path.is_empty() {
            return Err(ReferenceError::NoPath { text: text.trim_end_matches('/').to_owned() });
        }
        if path.contains(|c: char| c.is_ascii_uppercase()) {
            let remedy = text.replacen(&path, &path.to_ascii_lowercase(), 1);
            return Err(ReferenceError::UpperCase { text: text.to_owned(), remedy });
        }
        if let Some(part) = path.split('/').find(|part| !is_path_component(part)) {
            return Err(ReferenceError::Path { text: text.to_owned(), part: part.to_owned() });
        }
        let repository = Repository { registry: Registry::named(host), name: path };
        match repository.registry.0.len() + 1 + repository.name.len() > NAME_LENGTH {
            true => Err(ReferenceError::Long { text: text.to_owned() }),
            false => Ok(repository),
        }
    }
}

/// A reference as written, cut where its parts meet.
struct Parts<'a> {
    host: Option<&'a str>,
    path: &'a str,
    /// Where tag or digest begin in the text.
    path_end: usize,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, ReferenceError> {
        if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(ReferenceError::Empty { text: text.escape_default().to_string() });
        }
        if let Some((_, rest)) = text.split_once("://") {
            return Err(ReferenceError::Scheme { text: text.to_owned(), remedy: rest.to_owned() });
        }
        let (named, digest) = text.split_once('@').map_or((text, None), |(named, digest)| (named, Some(digest)));
        // As Docker decides it: what stands before the first slash is a host if it can be nothing else.
        let (host, rest) = match named.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':', '[']) || first == "localhost" => (Some(first), rest),
            _ => (None, named),
        };
        let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
        let path_end = named.len() - rest.len() + path.len();
        Ok(Parts { host, path, path_end, tag, digest })
    }
}

/// A domain name, an IPv4 address or an IPv6 address in brackets, then maybe a port.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) if address.parse::<Ipv6Addr>().is_ok() => (None, port),
        Some(_) => return false,
        None => text.find(':').map_or((Some(text), ""), |colon| (Some(&text[..colon]), &text[colon..])),
    };
    let port_fits = port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|digit| digit.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    port_fits && host.is_none_or(|host| host.split('.').all(label))
}

/// Runs of `a-z0-9` with `.`, `_`, `__` or dashes between them.
fn is_path_component(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.starts_with(plain)
        && text.ends_with(plain)
        && text
            .split(plain)
            .all(|between| matches!(between, "" | "." | "_" | "__") || between.chars().all(|c| c == '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        assert_eq!(text.parse::<Repository>().unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_repository_is_written_as_it_is_read() {
        for text in [
            "registry.example/team/name",
            "localhost/x",
            "localhost:5000/x",
            "127.0.0.1:5000/a/b.c/d_e/f__g/h---i",
            "[::1]:5000/x",
            "docker.io/me/x",
        ] {
            assert_eq!(text.parse::<Repository>().unwrap().to_string(), text);
        }
        let capital: Repository = "Registry.Example/x".parse().unwrap();
        assert_eq!(capital.to_string(), "registry.example/x", "hosts have no case");
    }

    #[test]
    fn a_wrong_repository_is_told_what_is_wrong_and_what_to_write() {
        refused("", "`` is no name of an image (host[:port]/path, such as `registry.example/team/name`)");
        refused("a b", "`a b` is no name of an image (host[:port]/path, such as `registry.example/team/name`)");
        refused(
            "https://host.example/x",
            "`https://host.example/x` has a scheme in front (write `host.example/x`; `plain_http` names the registries \
             without TLS)",
        );
        refused(
            "team/name",
            "`team/name` names no registry (write `host/team/name`, such as `localhost:5000/team/name`; \
             `docker.io/team/name` is Docker Hub)",
        );
        refused("host.example/", "`host.example` names a registry and no repository in it (write `host.example/name`)");
        refused(
            "host.example/team/x:v1",
            "`host.example/team/x:v1` has `:v1` behind the repository (write `host.example/team/x`; tag and digest are \
             added by each run)",
        );
        refused(
            "host.example/Team/x",
            "`host.example/Team/x` has upper case letters, which registries refuse (write `host.example/team/x`)",
        );
        refused(
            "host.example:70000/x",
            "`host.example:70000` in `host.example:70000/x` is no host (a name, an address or `[address]`, then maybe \
             `:port`)",
        );
        refused(
            "host.example/a//b",
            "`` in `host.example/a//b` is no part of a path (a to z, 0 to 9, with `.`, `_`, `__` or `-` between them)",
        );
        let long = format!("host.example/{}", "x".repeat(243));
        assert!(long[..255].parse::<Repository>().is_ok());
        assert_eq!(long.parse::<Repository>(), Err(ReferenceError::Long { text: long.clone() }));
        for part in ["_x", "x_", "x___y", "x..y", "x._y", "x~", "é"] {
            let wrong = format!("host.example/{part}").parse::<Repository>();
            assert!(matches!(wrong, Err(ReferenceError::Path { .. })), "{part}");
        }
        for host in ["-a.b", "a-.b", "a..b", "a.b:", "a.b:x", "a.b:0", "[::g]", "a_b.c"] {
            let wrong = format!("{host}/x").parse::<Repository>();
            assert!(matches!(wrong, Err(ReferenceError::Host { .. })), "{host}");
        }
    }

    #[test]
    fn short_names_mean_docker_hub() {
        let check = |text: &str, expected: &str| {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), expected);
            assert_eq!(expected.parse(), Ok(reference), "a full name is read as it is written");
        };
        check("debian", "docker.io/library/debian:latest");
        check("debian:12", "docker.io/library/debian:12");
        check("me/tool:v1.2-x_y", "docker.io/me/tool:v1.2-x_y");
        check("index.docker.io/library/debian:12", "docker.io/library/debian:12");
        check("localhost:5000/x", "localhost:5000/x:latest");
        let digest = Digest::of(b"fairing");
        check(&format!("debian@{digest}"), &format!("docker.io/library/debian@{digest}"));
        check(&format!("a.example/x:v1@{digest}"), &format!("a.example/x:v1@{digest}"));
        let hub: Reference = "debian".parse().unwrap();
        assert_eq!(hub.repository().registry().address(), "registry-1.docker.io");
    }

    #[test]
    fn a_wrong_tag_or_digest_is_named() {
        for tag in ["", ".x", "-x", "a b", "é", "x/y", &"x".repeat(129)] {
            assert_eq!(tag.parse::<Tag>(), Err(ReferenceError::Tag { tag: tag.to_owned() }));
        }
        assert!("x".repeat(128).parse::<Tag>().is_ok());
        let wrong = "debian@sha256:12".parse::<Reference>();
        let expected = ReferenceError::Digest { text: "debian@sha256:12".into(), digest: "sha256:12".into() };
        assert_eq!(wrong, Err(expected));
    }

    #[test]
    fn loopback_is_known_by_its_addresses() {
        let loopback = |host: &str| format!("{host}/x").parse::<Repository>().unwrap().registry().is_loopback();
        assert!(["localhost", "localhost:1", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"].into_iter().all(loopback));
        assert!(!["localhost.example", "128.0.0.1", "[::2]:5000", "127.0.0.1.example"].into_iter().any(loopback));
    }
}
