//! What the tests and benchmarks share: models with data for them, and the reference that fairing is held against.
//!
//! [`plain`] is an ordinary burn loop with burn's own optimizer. It takes the order of the examples as an argument and
//! uses no part of fairing, so that the two sides of a law have nothing in common but burn.

pub mod data;
pub mod law;
pub mod line;
pub mod models;
pub mod plain;
pub mod report;
