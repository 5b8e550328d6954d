//! Pushing to registries that run here: Debian's docker-registry, with and without passwords, tokens and TLS, and one that is
//! made to fail through a proxy.

#![expect(clippy::print_stdout, reason = "a test that is skipped says so")]

mod bases;
mod faults;
mod logins;
mod proxy;
mod pushes;
mod server;
mod support;
mod tls;
