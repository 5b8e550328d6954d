//! Tests with real processes and real models.

mod bad_input;
mod containers;
mod formats;
mod laws;
mod lifecycle;
mod outcome;
mod processes;
mod recovery;
mod run;
mod structure;
mod support;
mod terminal;
