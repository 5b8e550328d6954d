//! Tests with real processes and real models.

mod bad_input;
mod laws;
mod outcome;
mod run;
mod terminal;
