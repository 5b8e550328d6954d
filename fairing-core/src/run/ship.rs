//! The program becomes an image, and the image gets to where it is run.
//!
//! ```text
//! pack      program, libraries, data, files → layers → an image with its digest; nothing leaves the machine
//! deliver   image → registry, or straight to the engine
//! ```
//!
//! A dry run ends between the two.

use std::path::{Path, PathBuf};

use crate::config::{Builder, Config, Env as _, Link, ProcessEnv, Surroundings};
use crate::image::append::{self, AppendError, ImagePlan};
use crate::image::archive::Archive;
use crate::image::cache::{Cache, CacheError, Packed};
use crate::image::executable::{Program, ProgramError};
use crate::image::layer::{Layer, LayerError, LayerName};
use crate::image::libraries::{Libraries, LibrariesError};
use crate::image::static_build::{Origin, StaticBuild, StaticBuildError};
use crate::image::{Architecture, Image, Notice};
use crate::launch::docker::{Engine, EngineError};
use crate::observe::terminal::View;
use crate::reactor::Reactor;
use crate::registry::{
    Base, BaseError, Client, ClientError, Keychain, Push, PushError, Reference, ReferenceError, Repository, Settings,
};

/// Where the data folder is in an image.
const DATA: &str = "/data";

/// The working folder in an image, beside which `files` lie.
const HOME: &str = "/app";

/// Failure to make the image of a run or to bring it where it is needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The program cannot be shipped.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A shared library of the program cannot be shipped.
    #[error(transparent)]
    Libraries(#[from] LibrariesError),
    /// The program cannot be built for the image.
    #[error(transparent)]
    StaticBuild(#[from] StaticBuildError),
    /// Data or files cannot be shipped.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Compressed layers cannot be kept.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The layers do not fit the base image.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// A name of an image or of a repository is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The client of the registry cannot be made.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The base image cannot be had.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The image cannot be pushed.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No thread could be started for talking to a registry.
    #[error("cannot start the threads that talk to the registry")]
    Reactor(#[source] std::io::Error),
}
