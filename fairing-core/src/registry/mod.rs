//! Talking to a container registry: looking up a base image, pushing an image.
//!
//! [`Client`] asks before it sends: [`Client::base`] fetches a base image's manifest and configuration, [`Client::push`]
//! brings an [`Image`](crate::image::Image) into a [`Repository`] so that its digest and tags are there whole or not at
//! all. Credentials come from Docker's and Podman's files through a [`Keychain`].
//!
//! The requests are our own, over reqwest. oci-client, which stands on it too, asks `/v2/` before every request to a
//! registry without passwords, swallows a refused login, loses the upload that a refused mount opens, a busy registry's
//! `Retry-After` and the length of an endless answer, cannot exchange identity tokens, and loads the system's
//! certificates (or fails without any) where plain HTTP is spoken. What is needed of the protocol is seven requests.

mod auth;
mod base;
mod challenge;
mod client;
mod error;
mod http;
mod patience;
mod push;
mod reference;
mod session;
mod upload;

pub use auth::{AuthError, CredentialOrigin, Keychain, Login};
pub use base::{Base, BaseError};
pub use client::{Client, ClientError, Settings};
pub use error::{Doing, Refused, RequestError};
pub use patience::Patience;
pub use push::{Progress, Push, PushError, Pushed, Watcher};
pub use reference::{Reference, ReferenceError, Registry, Repository, Tag};
