//! fairing: distributed training of burn models, from `cargo run`.

extern crate self as fairing_core;

pub mod config;
pub mod exit;
pub mod launch;
pub mod lifeline;
pub mod observe;
pub mod runtime;
pub mod topology;
