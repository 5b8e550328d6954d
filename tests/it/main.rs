//! Tests with real processes and real models.

mod structure;
mod laws;
mod run;
