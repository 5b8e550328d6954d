//! What the user asked for: as written ([`RawConfig`]) and as meant ([`Config`]).

mod env;

pub use env::{Env, ProcessEnv};
