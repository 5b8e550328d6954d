//! Tests with real processes and real models.

mod laws;
mod lifecycle;
mod processes;
mod run;
mod structure;
mod support;
