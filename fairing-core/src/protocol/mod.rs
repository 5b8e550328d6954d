//! What replicas and the caller say to each other.
//!
//! [`frame`] is the only module that knows bytes; [`message`] holds the control messages; [`connection`] reads and
//! writes both over a [`transport`], of which [`tcp`] is the one between machines. Every wait is bounded by a constant of [`deadline`].

pub(crate) mod connection;
pub(crate) mod deadline;
pub(crate) mod failure;
#[cfg(test)]
pub(crate) mod faulty;
pub(crate) mod frame;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
pub(crate) mod message;
pub(crate) mod tcp;
pub(crate) mod transport;
