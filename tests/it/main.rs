//! Tests with real processes and real models.

mod lifecycle;
mod processes;
mod support;
