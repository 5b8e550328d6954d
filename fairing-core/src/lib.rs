//! fairing: distributed training of burn models, from `cargo run`.
//!
//! A struct with [`#[distributed_training]`](macro@distributed_training) and an implementation of [`Train`] is a training
//! job. Its [`launch()`](DistributedTraining::launch) starts this very program again as workers and parameter servers,
//! which train one model together, shows how it goes, and brings model and metrics home.
//!
#![cfg_attr(feature = "burn", doc = "```no_run")]
#![cfg_attr(not(feature = "burn"), doc = "```text")]
//! use burn::nn::{Linear, LinearConfig};
//! use burn::prelude::*;
//! use fairing_core::prelude::*;
//!
//! /// The fields are the hyperparameters; every worker trains with the same value.
//! #[distributed_training(workers = 2, ps = 1)]
//! #[derive(Serialize, Deserialize)]
//! struct Line {
//!     epochs: usize,
//! }
//!
//! impl Train for Line {
//!     type Model = Linear;
//!
//!     fn train(&self, worker: &Worker) -> anyhow::Result<Linear> {
//!         let xs: Vec<f32> = (0..1_000).map(|i| i as f32 / 500.0 - 1.0).collect();
//!         let mut line = worker.join(LinearConfig::new(1, 1).init(worker.device()), Sgd::new())?;
//!         for epoch in worker.epochs(self.epochs) {
//!             for batch in epoch.batches(&xs, 25) {
//!                 let x = Tensor::<1>::from_floats(batch.as_slice(), worker.device()).unsqueeze_dim::<2>(1);
//!                 let loss = (line.forward(x.clone()) - (x * 3.0 - 1.0)).square().mean();
//!                 worker.metric("loss", loss.clone().into_scalar::<f64>());
//!                 line = worker.step(line, Gradient::mean(loss.backward(), batch.len()), 0.1)?;
//!             }
//!         }
//!         Ok(line)
//!     }
//! }
//!
//! fn main() -> anyhow::Result<()> {
//!     let outcome = Line { epochs: 10 }.launch()?;
//!     println!("loss {:.6}, model in {}", outcome.metric("loss")?, outcome.model().display());
//!     Ok(())
//! }
//! ```
//!
//! [`config`] lists the settings, [`exit::ExitCode`] what a process of a run ends with. The feature `burn` is the adapter for
//! burn's modules; without it a model implements [`Model`] itself. The feature `docker` is the target of that name, and packs
//! and pushes images. The feature `mimalloc` sets the program's allocator. All are on by default.
//!
//! # Code map
//!
//! A training job is a value that flows one way: attribute → configuration → topology → plan → launch; inside each process,
//! environment → placement → runtime. Each row imports only from rows above it, or as an arrow says; a test holds that.
//!
//! ```text
//! config     topology   exit           what was asked for; who takes part; how processes end
//! relay      lifeline   observe        a way into a container; what ties a replica to its launcher; what a person sees
//! image      secure                    what is shipped; who is who in a run
//! registry   protocol   reactor        pushing images; frames, messages, deadlines, transports; waiting for the network
//! launch     runtime                   starting and ending replicas; what happens inside one
//! run        training   __private      the way of a run; the user's traits; what the attribute's output calls
//! ```
//!
//! What is absent matters as much:
//!
//! - `launch` and `runtime` never import each other. They share [`topology::Placement`], which the one writes into the
//!   environment and the other gets back, and `run` brings them together.
//! - [`topology`] and, but for [`config::Surroundings::read`] and [`config::ProcessEnv`], [`config`] do no IO.
//! - Only [`config::ProcessEnv`] reads the process environment.
//! - Only `runtime::burn` names burn; optimizers and servers know a flat vector.
//! - Only `launch` starts replicas. Other processes are few: `git` for the commit, `cargo` for a program that is built for
//!   another machine, helper programs for a registry's password, and the guardian, which cleans up after a dead launcher.
//! - Numbers become bytes in `protocol::frame`, in the lifeline's pipe, and in the parts of a worker's collective, in
//!   the records of [`observe::tensorboard`], and where files of others are read or written: programs and gzip.
//! - [`image`] talks to nobody; [`registry`] and `launch` know asynchronous libraries, and wait for them by `reactor`.
//! - Where others could reach the replicas there is no way without TLS.
//! - The caller prints through [`observe::terminal`] only; a replica says why it ends on its standard error.
//! - `fairing-macros` does not depend on this crate: it knows syntax only.

extern crate self as fairing_core;

mod build;
pub mod config;
pub mod exit;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "image")]
pub mod image;
pub mod launch;
pub mod lifeline;
pub mod observe;
pub mod prelude;
mod protocol;
#[cfg(feature = "image")]
mod reactor;
#[cfg(feature = "image")]
pub mod registry;
mod relay;
mod run;
pub mod runtime;
pub mod secure;
pub mod topology;
mod training;

#[doc(hidden)]
pub mod __private;

pub use config::LaunchOptions;
pub use fairing_macros::distributed_training;
#[cfg(feature = "docker")]
pub use launch::docker::{Swept, sweep};
#[cfg(feature = "kubernetes")]
pub use launch::kubernetes::{ClusterRun, ClusterRunState};
pub use protocol::failure::{Failure, FailureKind};
#[cfg(feature = "docker")]
pub use run::ImageError;
pub use run::{Outcome, OutcomeError, Run, RunError, TrainError, Trained, in_replica};
#[cfg(feature = "kubernetes")]
pub use run::{attach, delete, logs, runs, stop, sweep_cluster};
pub use runtime::data;
pub use runtime::{Gradient, Model, Worker};
pub use topology::{Mode, Topology};
pub use training::{DistributedTraining, Train};

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

// The program in the README is compiled as a doc test.
#[cfg(all(doctest, feature = "burn"))]
#[doc = include_str!("../../README.md")]
mod readme {}
