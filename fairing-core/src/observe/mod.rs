//! What a person sees of a run, and what is kept of it.
//!
//! Everything starts from an [`Event`](events::Event). A [`View`](terminal::View) shows events on the terminal, a
//! [`MetricsWriter`](metrics::MetricsWriter), a [`TensorBoard`](tensorboard::TensorBoard) and a
//! [`RunFolder`](run_folder::RunFolder) keep them, and a [`Summary`](report::Summary) closes the run, with a
//! [page](html::page) to look at. The [`Merger`](metrics::Merger) makes one number per round out of the
//! ranks' numbers; it is pure and runs where the coordinator runs. Nothing here starts a process (except `git`, with a
//! deadline) or reads the process environment.

mod clean;
pub mod events;
mod float;
pub mod git;
pub mod hashes;
pub mod html;
pub mod metrics;
pub mod report;
pub mod run_folder;
pub mod tensorboard;
pub mod terminal;
mod words;
