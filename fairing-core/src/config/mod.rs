//! What the user asked for: as written (raw) and as meant ([`Config`]).
//!
//! Five layers are read, and a later one wins: defaults, the attribute, `Fairing.toml` beside the user's `Cargo.toml`,
//! `FAIRING_*` variables, and [`LaunchOptions`] in code. [`Config::resolve`] joins them or lists everything that is wrong;
//! past it, nothing checks again. All of it is pure but for [`Surroundings::read`].
//!
//! | key in `Fairing.toml` | in the attribute | variable | meaning | example |
//! |---|---|---|---|---|
//! | `workers` | `workers = 2` | `FAIRING_WORKERS` | number of workers, default 1 | `workers = 2` |
//! | `ps` | `ps = 1` | `FAIRING_PS` | number of parameter servers, default 1; with 0 the workers host the parameters | `ps = 1` |
//! | `mode` | `mode = "async"` | `FAIRING_MODE` | when gradients are applied: `sync`, the default, or `async` | `mode = "async"` |
//! | `staleness` | `staleness = 4` | `FAIRING_STALENESS` | async with a bound: steps by which a worker may be ahead, default none | `staleness = 4` |
//! | `rejoin` | `rejoin = "30s"` | `FAIRING_REJOIN` | how long a run waits for a lost worker, started again, default `0s` | `rejoin = "30s"` |
//! | `seed` | `seed = 7` | `FAIRING_SEED` | seed of all that is random, default 0 | `seed = 7` |
//! | `env` | `env = ["HF_HOME"]` | `FAIRING_ENV` | variables that the replicas see, default none | `env = ["HF_HOME"]` |
//! | `data` | `data = "data"` | `FAIRING_DATA` | folder behind `worker.data_dir()`, default none | `data = "data"` |
//! | `target` | `target = "local"` | `FAIRING_TARGET` | where the replicas run, default `local` | `target = "local"` |
//! | `runs` | `runs = "runs"` | `FAIRING_RUNS` | folder of the run folders, default `fairing/runs` in Cargo's build folder | `runs = "runs"` |
//! | `resources.worker.cpu` | `worker(cpu = 2)` | `FAIRING_WORKER_CPU` | cores of a worker | `resources.worker.cpu = 2` |
//! | `resources.worker.memory` | `worker(memory = "1Gi")` | `FAIRING_WORKER_MEMORY` | memory of a worker | `resources.worker.memory = "1Gi"` |
//! | `resources.ps.cpu` | `ps(cpu = "500m")` | `FAIRING_PS_CPU` | cores of a parameter server | `resources.ps.cpu = "500m"` |
//! | `resources.ps.memory` | `ps(memory = "512Mi")` | `FAIRING_PS_MEMORY` | memory of a parameter server | `resources.ps.memory = "512Mi"` |
//!
//! In `Fairing.toml` the resources are tables, `[resources.worker]` and `[resources.ps]`, since `ps` itself is a number.
//! A variable holds a list with commas between its entries (`FAIRING_ENV=HF_HOME,WANDB_MODE`); a list replaces that of the
//! layer below. Cores are a count, decimals (`"1.5"`) or thousandths (`"500m"`); memory has a decimal or binary unit, its `B`
//! optional (`"1GB"`, `"512Mi"`). A duration has units (`"30s"`, `"2m"`, `"1m 30s"`). A relative folder is meant from the folder of the user's `Cargo.toml` in the attribute and
//! in `Fairing.toml`, and from the current folder in variables and in code.
//!
//! `staleness` alone means async. A layer that sets `mode` replaces both `mode` and `staleness` of the layers below, so that
//! `FAIRING_MODE=sync` undoes a `staleness` in the attribute; a `staleness` beside or above `mode = "sync"` is an error. So are
//! `ps = 0` with async or staleness, and `ps = 0` with a `rejoin` above zero.
//!
//! Variables that start with `FAIRING_PLACEMENT_` are fairing's own; any other unknown `FAIRING_` variable is an error.

mod attribute;
mod env;
mod error;
mod explain;
mod grammar;
mod keys;
mod options;
mod raw;
mod resolved;
mod resources;
mod surroundings;
mod together;

#[doc(hidden)]
pub use attribute::{Attribute, AttributeCpu};
pub use env::{Env, ProcessEnv};
pub use error::{ConfigError, Origin, Problem};
pub use explain::{Explanation, Row};
pub use options::LaunchOptions;
pub use resolved::{Config, Resolved, Target};
pub use resources::{Cpu, Memory, Resources, UnitError};
pub use surroundings::{FILE_NAME, Surroundings};
