//! Tests with real processes and real models.

mod laws;
mod run;
mod structure;
