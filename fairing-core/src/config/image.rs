//! Settings of the container image: what it is made of, who builds it, where it goes.

use std::fmt;
use std::path::PathBuf;

/// What the user wants of the container image. Without meaning for a run on this machine, but checked for it all the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageSettings {
    /// Where the image is pushed, as `host[:port]/path`. Default none: the engine gets it directly.
    pub repository: Option<String>,
    /// The image that the program is put on, default none: nothing but what the program needs.
    pub base: Option<String>,
    /// A finished image that is used as it is, default none. Everything that is said of building has its default then.
    pub finished: Option<String>,
    /// The user's own Dockerfile, absolute, default none. [`ImageSettings::builder`] is [`Builder::Docker`] then, and there is
    /// no base. Whether it exists is not checked.
    pub dockerfile: Option<PathBuf>,
    /// Who builds the image.
    pub builder: Builder,
    /// How the program in the image finds its libraries.
    pub link: Link,
    /// The architectures that the image is built for, `amd64` or `arm64`, none twice. Default none: that of this program.
    pub architectures: Vec<String>,
    /// Files beside the program, default none: relative paths without `..`, none twice, meant from the folder of the user's
    /// `Cargo.toml` here and from the working folder in the image. Whether they exist is not checked.
    pub files: Vec<PathBuf>,
    /// Whether the root certificates of this machine go into the image, default no.
    pub root_certificates: bool,
    /// The certificate authority of the registry, a PEM file, absolute; default those that this machine trusts. Whether it
    /// exists is not checked.
    pub registry_ca: Option<PathBuf>,
    /// Registries that are spoken to without TLS, as `host[:port]`, none twice. Default none.
    pub plain_http: Vec<String>,
}

/// Who builds the image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Builder {
    /// Fairing itself: it puts layers on a base or on nothing. Needs no engine.
    #[default]
    Append,
    /// The Docker engine, from a Dockerfile.
    Docker,
}

/// How the program in the image finds its libraries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Link {
    /// The program that runs now, and its shared libraries beside it.
    #[default]
    Dynamic,
    /// Built anew for musl, with everything in it.
    Static,
}

/// What a run does when the process that launched it is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnDisconnect {
    /// It ends: nobody waits for its result.
    #[default]
    Stop,
    /// It goes on and keeps its result for whoever comes for it.
    Continue,
}

impl fmt::Display for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Builder::Append => "append",
            Builder::Docker => "docker",
        })
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Link::Dynamic => "dynamic",
            Link::Static => "static",
        })
    }
}

impl fmt::Display for OnDisconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnDisconnect::Stop => "stop",
            OnDisconnect::Continue => "continue",
        })
    }
}
