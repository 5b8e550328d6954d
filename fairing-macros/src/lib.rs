//! The attribute of fairing. Use it through `fairing_core`, which re-exports it beside what its output calls.
//!
//! It works like a small compiler: `args` parses, `check` applies the rules and gathers every complaint, `expand` writes
//! the result. It knows syntax only; `grammar` and `cluster` are links to the files in `fairing-core`, on which this crate does
//! not depend.

mod args;
mod check;
mod cluster;
mod expand;
mod grammar;

use proc_macro2::TokenStream;

use args::Args;
use check::Job;

/// Makes a struct that implements `Train` launchable.
///
/// ```
/// # mod model { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/ui/model.rs")); }
/// # use model::Point;
/// use fairing_core::prelude::*;
///
/// #[distributed_training(workers = 2, ps = 1, data = "data", worker(cpu = 2, memory = "1Gi"))]
/// #[derive(Serialize, Deserialize)]
/// struct Job {
///     epochs: usize,
/// }
///
/// impl Train for Job {
///     type Model = Point;
///
///     fn train(&self, worker: &Worker) -> anyhow::Result<Point> {
///         // Load the data, join, and step through `self.epochs` epochs.
/// #       Ok(Point(0.0))
///     }
/// }
/// # fn main() {}
/// ```
///
/// # Arguments
///
/// All are optional, each may stand once. `Fairing.toml`, `FAIRING_*` variables and `LaunchOptions` override them.
///
/// | argument | default | meaning |
/// |---|---|---|
/// | `workers = 2` | 1 | number of workers, at least 1 |
/// | `ps = 1` | 1 | number of parameter servers; with 0, every worker also hosts the server of its share of the parameters |
/// | `mode = "async"` | `"sync"` | when gradients are applied: once all workers have pushed, or each on arrival |
/// | `staleness = 4` | no bound | async, but a worker more than 4 completed steps ahead of the slowest one waits for it |
/// | `rejoin = "30s"` | `"0s"` | how long the run waits for a lost worker, which is started again; at most `"1h"` |
/// | `seed = 7` | 0 | seed of the initial parameters, of the data order and of the framework's generator |
/// | `env = ["HF_HOME"]` | none | names of the variables that the replicas see |
/// | `data = "data"` | none | the folder behind `worker.data_dir()`, relative to the user's `Cargo.toml` |
/// | `target = "docker"` | `"local"` | where the replicas run: `"local"`, processes on this machine, `"docker"`, containers, or `"kubernetes"` |
/// | `repository = "registry.example/team/name"` | none | where the image is pushed; without it the engine gets it directly |
/// | `image = "registry.example/team/name:1"` | none | a finished image, used as it is |
/// | `base = "debian:12"` | none | the image that the program is put on; without it there is only what the program needs |
/// | `dockerfile = "Dockerfile"` | none | a Dockerfile of your own, relative to your `Cargo.toml`; the builder is then `"docker"` |
/// | `builder = "docker"` | `"append"` | who builds the image: fairing itself, without an engine, or the engine |
/// | `link = "static"` | `"dynamic"` | the program with its shared libraries beside it, or built anew with musl |
/// | `architectures = ["amd64", "arm64"]` | this program's | what the image is built for; several need a `repository` |
/// | `files = ["labels.txt"]` | none | files that are put beside the program, at the same path as from your `Cargo.toml` |
/// | `root_certificates = true` | `false` | whether the machine's root certificates go into the image |
/// | `registry_ca = "ca.pem"` | the machine's | certificate authority of the registry, relative to your `Cargo.toml` |
/// | `plain_http = ["registry.example:5000"]` | none | registries that are spoken to without TLS |
/// | `on_disconnect = "stop"` | the target's | what the run does when its launcher is gone: `"stop"`, or on a cluster `"continue"` |
/// | `namespace = "team-a"` | the context's | namespace of a run on a cluster |
/// | `launcher = "jobset"` | `"jobs"` | what runs the replicas there: `"jobs"`, `"jobset"`, `"tfjob"`, or `"auto"`, a JobSet where there are any |
/// | `deadline = "2h"` | `"24h"` | how long a run on a cluster may take |
/// | `keep_result = "10m"` | `"1h"` | how long it keeps its result for a caller |
/// | `ttl = "1m"` | `"10m"` | how long what is left of an ended run stays in the cluster |
/// | `launch_timeout = "30s"` | `"2m"` | how long a launch on a cluster may take to create its objects |
/// | `join_timeout = "5m"` | `"10m"` | how long replicas on a cluster wait for each other at the beginning |
/// | `schedule_timeout = "2m"` | `"5m"` | how long a pod may be without a node |
/// | `node_selector = ["disk=ssd"]` | any node | labels of the nodes that may run the pods |
/// | `tolerations = ["dedicated=training:NoSchedule"]` | none | taints that the pods bear; `"*"` for any |
/// | `spread = false` | `true` | whether workers go to different nodes where they can |
/// | `priority_class = "low"` | the cluster's | priority class of the pods |
/// | `runtime_class = "gvisor"` | the cluster's | runtime class of the pods |
/// | `labels = ["team=vision"]` | fairing's own | labels of all objects in the cluster |
/// | `annotations = ["example.org/note=text"]` | fairing's own | annotations of the pods |
/// | `image_pull_secrets = ["registry-login"]` | none | Secrets with which the nodes pull the image |
/// | `volumes = ["pvc:datasets:/data:ro"]` | none | volumes of all replicas: `pvc`, `secret`, `configmap`, or `empty` with a size |
/// | `service_account = "trainer"` | the namespace's | service account of the pods; its token is not mounted |
/// | `tmp_size = "1Gi"` | `"256Mi"` | the most that `/tmp` of a pod may hold |
/// | `runs = "runs"` | `target/fairing/runs` | the folder that gets a folder for each run, relative to the user's `Cargo.toml` |
/// | `cache = "layers"` | `fairing/cache` among your caches | the folder in which compressed layers are kept |
/// | `worker(cpu = 2, memory = "1Gi", gpu = 1)` | the target's choice | what a worker asks for; GPUs are for clusters |
/// | `ps(cpu = "500m", memory = "512Mi")` | the target's choice | what a parameter server asks for |
///
/// `staleness` alone means async; beside `mode = "sync"` it is an error. So are, beside `ps = 0`, async, `staleness`, and
/// `rejoin` above zero: a lost worker would take its share of the parameters with it. A duration is a sum of whole hours,
/// minutes, seconds and milliseconds (`"1m 30s"`, `"500ms"`).
///
/// `image` says all of the image: beside it `base`, `dockerfile`, `builder`, `link`, `architectures`, `files` and
/// `root_certificates` are errors, unless they have their default. So are `dockerfile` beside `base` or
/// `builder = "append"`, several `architectures` beside the builder `"docker"`, and `on_disconnect = "continue"` beside a
/// `target` that is no cluster, or `"stop"` beside `"kubernetes"`.
///
/// `workers`, `ps`, `staleness` and `cpu` also take a constant expression of type `u32`, `seed` one of type `u64`
/// (`workers = WORKERS`, `workers = 1 + 1`); a zero where none may be is found when the program is compiled. `cpu` also takes decimals
/// (`1.5`) and thousandths of a core in quotes (`"500m"`). `memory` takes a decimal unit (`"1k"`, `"1M"`, `"1G"`, `"1T"`) or a
/// binary one (`"1Ki"`, `"1Mi"`, `"1Gi"`, `"1Ti"`), with or without a `B`. `gpu` takes a number, of `nvidia.com/gpu`, or names its
/// resource (`"amd.com/gpu=1"`).
///
/// # Generated items
///
/// The struct stays as it is. Beside it, in an anonymous constant that adds no name to the module, are
///
/// - `impl fairing_core::DistributedTraining` for it, which gives it its launch methods,
/// - a registration under `module_path::Type`, by which a replica finds the type,
/// - for each constant expression a constant that holds its value and an assertion about it.
///
/// # Errors
///
/// Every mistake is reported in one compilation, each at its own token. An enum, a function, or a struct with generic
/// parameters is refused: a replica finds a type by its name, and a generic struct is many types. Annotate a concrete
/// struct that has the generic one as its field.
#[proc_macro_attribute]
pub fn distributed_training(args: proc_macro::TokenStream, item: proc_macro::TokenStream) -> proc_macro::TokenStream {
    expand_or_report(args.into(), item.into()).into()
}

fn expand_or_report(args: TokenStream, item: TokenStream) -> TokenStream {
    try_expand(args, item.clone()).unwrap_or_else(|error| {
        // Keep the item and what others call on it, so that one bad argument yields one error, not ten.
        let stub = expand::stub(item.clone());
        let error = error.into_compile_error();
        quote::quote!(#item #stub #error)
    })
}

fn try_expand(args: TokenStream, item: TokenStream) -> syn::Result<TokenStream> {
    let args: Args = syn::parse2(args)?;
    let item: syn::Item = syn::parse2(item)?;
    let job = Job::check(args, item)?;
    Ok(expand::job(&job))
}

#[cfg(test)]
mod tests;
