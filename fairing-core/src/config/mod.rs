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
//! | `rejoin` | `rejoin = "30s"` | `FAIRING_REJOIN` | how long a run waits for a lost worker, started again, default `0s`, on a cluster with parameter servers `5m` | `rejoin = "30s"` |
//! | `seed` | `seed = 7` | `FAIRING_SEED` | seed of all that is random, default 0 | `seed = 7` |
//! | `env` | `env = ["HF_HOME"]` | `FAIRING_ENV` | variables that the replicas see, default none | `env = ["HF_HOME"]` |
//! | `data` | `data = "data"` | `FAIRING_DATA` | folder behind `worker.data_dir()`, default none | `data = "data"` |
//! | `target` | `target = "docker"` | `FAIRING_TARGET` | where the replicas run: `local`, the default, `docker` or `kubernetes` | `target = "local"` |
//! | `repository` | `repository = "registry.example/team/name"` | `FAIRING_REPOSITORY` | where the image is pushed, as `host[:port]/path`; default none: the engine gets it directly; a cluster needs one | `repository = "localhost:5000/name"` |
//! | `image` | `image = "registry.example/team/name:1"` | `FAIRING_IMAGE` | a finished image that is used as it is, default none | `image = "registry.example/team/name:1"` |
//! | `base` | `base = "debian:12"` | `FAIRING_BASE` | image that the program is put on, default none: only what it needs | `base = "debian:12"` |
//! | `dockerfile` | `dockerfile = "Dockerfile"` | `FAIRING_DOCKERFILE` | a Dockerfile of your own, default none; implies `builder = "docker"` | `dockerfile = "Dockerfile"` |
//! | `builder` | `builder = "docker"` | `FAIRING_BUILDER` | who builds the image: `append`, the default, needs no engine, or `docker` | `builder = "docker"` |
//! | `link` | `link = "static"` | `FAIRING_LINK` | libraries of the program: `dynamic`, the default, ships them beside it, `static` builds it anew with musl | `link = "static"` |
//! | `architectures` | `architectures = ["amd64", "arm64"]` | `FAIRING_ARCHITECTURES` | what the image is built for, `amd64` or `arm64`, default that of this program; several need `repository` | `architectures = ["arm64"]` |
//! | `files` | `files = ["labels.txt"]` | `FAIRING_FILES` | files that are put beside the program, default none | `files = ["labels.txt"]` |
//! | `root_certificates` | `root_certificates = true` | `FAIRING_ROOT_CERTIFICATES` | whether this machine's root certificates go into the image, default no | `root_certificates = true` |
//! | `registry_ca` | `registry_ca = "ca.pem"` | `FAIRING_REGISTRY_CA` | certificate authority of the registry, a PEM file; default those that this machine trusts | `registry_ca = "ca.pem"` |
//! | `plain_http` | `plain_http = ["registry.example:5000"]` | `FAIRING_PLAIN_HTTP` | registries spoken to without TLS, as `host[:port]`, default none | `plain_http = ["registry.example:5000"]` |
//! | `on_disconnect` | `on_disconnect = "stop"` | `FAIRING_ON_DISCONNECT` | what a run does when its launcher is gone: `stop`, or on a cluster `continue` | `on_disconnect = "stop"` |
//! | `namespace` | `namespace = "team-a"` | `FAIRING_NAMESPACE` | namespace of a run on Kubernetes, default that of the context | `namespace = "team-a"` |
//! | `context` | - | `FAIRING_CONTEXT` | context of the kubeconfig, default its current one | `context = "staging"` |
//! | `launcher` | `launcher = "jobset"` | `FAIRING_LAUNCHER` | what runs the replicas on a cluster: `jobs`, the default, `jobset`, `tfjob`, or `auto`, a JobSet where there are any | `launcher = "jobset"` |
//! | `deadline` | `deadline = "2h"` | `FAIRING_DEADLINE` | how long a run on a cluster may take, default `24h` | `deadline = "2h"` |
//! | `keep_result` | `keep_result = "10m"` | `FAIRING_KEEP_RESULT` | how long a run on a cluster keeps its result for a caller, default `1h` | `keep_result = "10m"` |
//! | `ttl` | `ttl = "1m"` | `FAIRING_TTL` | how long what is left of an ended run stays in the cluster, default `10m` | `ttl = "1m"` |
//! | `launch_timeout` | `launch_timeout = "30s"` | `FAIRING_LAUNCH_TIMEOUT` | how long a launch on a cluster may take to create its objects; one that broke off is removed after that, default `2m` | `launch_timeout = "30s"` |
//! | `join_timeout` | `join_timeout = "5m"` | `FAIRING_JOIN_TIMEOUT` | how long replicas on a cluster wait for each other at the beginning, default `10m` | `join_timeout = "5m"` |
//! | `schedule_timeout` | `schedule_timeout = "2m"` | `FAIRING_SCHEDULE_TIMEOUT` | how long a pod may be without a node, default `5m` | `schedule_timeout = "2m"` |
//! | `node_selector` | `node_selector = ["disk=ssd"]` | `FAIRING_NODE_SELECTOR` | labels of the nodes that may run the pods, default any | `node_selector = ["disk=ssd"]` |
//! | `tolerations` | `tolerations = ["dedicated=training:NoSchedule"]` | `FAIRING_TOLERATIONS` | taints that the pods bear, default none | `tolerations = ["dedicated=training:NoSchedule"]` |
//! | `spread` | `spread = false` | `FAIRING_SPREAD` | whether workers go to different nodes where they can, default yes | `spread = false` |
//! | `priority_class` | `priority_class = "low"` | `FAIRING_PRIORITY_CLASS` | priority class of the pods, default the cluster's | `priority_class = "low"` |
//! | `runtime_class` | `runtime_class = "gvisor"` | `FAIRING_RUNTIME_CLASS` | runtime class of the pods, default the cluster's | `runtime_class = "gvisor"` |
//! | `labels` | `labels = ["team=vision"]` | `FAIRING_LABELS` | labels of all objects, default fairing's own | `labels = ["team=vision"]` |
//! | `annotations` | `annotations = ["example.org/note=text"]` | `FAIRING_ANNOTATIONS` | annotations of the pods, default fairing's own | `annotations = ["example.org/note=text"]` |
//! | `image_pull_secrets` | `image_pull_secrets = ["registry-login"]` | `FAIRING_IMAGE_PULL_SECRETS` | Secrets with which the nodes pull the image, default none | `image_pull_secrets = ["registry-login"]` |
//! | `volumes` | `volumes = ["pvc:datasets:/data:ro"]` | `FAIRING_VOLUMES` | volumes of all replicas, default none | `volumes = ["pvc:datasets:/data:ro"]` |
//! | `service_account` | `service_account = "trainer"` | `FAIRING_SERVICE_ACCOUNT` | service account of the pods, default the namespace's; its token is not mounted | `service_account = "trainer"` |
//! | `tmp_size` | `tmp_size = "1Gi"` | `FAIRING_TMP_SIZE` | the most that `/tmp` of a pod may hold, default `256Mi` | `tmp_size = "1Gi"` |
//! | `runs` | `runs = "runs"` | `FAIRING_RUNS` | folder of the run folders, default `fairing/runs` in Cargo's build folder | `runs = "runs"` |
//! | `cache` | `cache = "layers"` | `FAIRING_CACHE` | folder in which compressed layers are kept, default `fairing/cache` in the user's folder of caches | `cache = "layers"` |
//! | `detach` | - | `FAIRING_DETACH` | whether a launch on a cluster ends once the replicas are started, default no | `detach = false` |
//! | `another` | - | `FAIRING_ANOTHER` | whether a launch on a cluster starts another run although one trains the same type with the same value, default no | `another = false` |
//! | `check_nodes` | - | `FAIRING_CHECK_NODES` | whether a launch on a cluster is refused if no node that there is now could hold a pod, default yes | `check_nodes = true` |
//! | `dry_run` | - | `FAIRING_DRY_RUN` | whether a launch only says what it would do, default no | `dry_run = true` |
//! | `resources.worker.cpu` | `worker(cpu = 2)` | `FAIRING_WORKER_CPU` | cores of a worker | `resources.worker.cpu = 2` |
//! | `resources.worker.memory` | `worker(memory = "1Gi")` | `FAIRING_WORKER_MEMORY` | memory of a worker | `resources.worker.memory = "1Gi"` |
//! | `resources.worker.gpu` | `worker(gpu = 1)` | `FAIRING_WORKER_GPU` | GPUs of a worker on a cluster, default none | `resources.worker.gpu = 0` |
//! | `resources.ps.cpu` | `ps(cpu = "500m")` | `FAIRING_PS_CPU` | cores of a parameter server | `resources.ps.cpu = "500m"` |
//! | `resources.ps.memory` | `ps(memory = "512Mi")` | `FAIRING_PS_MEMORY` | memory of a parameter server | `resources.ps.memory = "512Mi"` |
//! | `resources.ps.gpu` | `ps(gpu = 1)` | `FAIRING_PS_GPU` | GPUs of a parameter server on a cluster, default none | `resources.ps.gpu = 0` |
//!
//! In `Fairing.toml` the resources are tables, `[resources.worker]` and `[resources.ps]`, since `ps` itself is a number.
//! A variable holds a list with commas between its entries (`FAIRING_ENV=HF_HOME,WANDB_MODE`); a list replaces that of the
//! layer below. A variable also takes 1 and 0 for `true` and `false` (`FAIRING_DRY_RUN=1`). Cores are a count, decimals (`"1.5"`) or thousandths (`"500m"`); memory has a decimal or binary unit, its `B`
//! optional (`"1GB"`, `"512Mi"`). A duration has units (`"30s"`, `"2m"`, `"1m 30s"`). A relative path is meant from the folder of the user's `Cargo.toml` in the attribute and
//! in `Fairing.toml`, and from the current folder in variables and in code. Only `files` are always meant from the folder of
//! `Cargo.toml`: they have the same relative path in the image, below its working folder.
//!
//! `staleness` alone means async. A layer that sets `mode` replaces both `mode` and `staleness` of the layers below, so that
//! `FAIRING_MODE=sync` undoes a `staleness` in the attribute; a `staleness` beside or above `mode = "sync"` is an error. So are
//! `ps = 0` with async or staleness, and `ps = 0` with a `rejoin` above zero.
//!
//! What the image is made of is said by `image`, `base` or `dockerfile`, one of them in one layer. A layer that sets one replaces
//! the others of the layers below, and `image` also all that they say of building: `builder`, `link`, `architectures`, `files`
//! and `root_certificates`. Beside or above `image` these are errors, and so are `dockerfile` with `builder = "append"`, several
//! `architectures` with `builder = "docker"`. With `target = "local"` no image is made; what is said of it is checked all the same.
//!
//! With `target = "kubernetes"` a `repository` or an `image` is needed, and `on_disconnect` is `continue`; with another target it is
//! `stop`, and `detach` and GPUs are errors. Anything else that is about clusters has no meaning there and is checked all the same.
//! GPUs are a number, of `nvidia.com/gpu`, or name their resource (`"amd.com/gpu=1"`); 0 takes back what a layer below asks for. A
//! toleration is `key=value:Effect`, `key:Effect`, `key=value`, `key`, `:Effect`, or `*` for any taint. A volume is `pvc:CLAIM:/path`
//! (`:ro` behind it for reading only), `secret:NAME:/path`, `configmap:NAME:/path` or `empty:SIZE:/path`.
//!
//! Variables that start with `FAIRING_PLACEMENT_` are fairing's own; any other unknown `FAIRING_` variable is an error.

mod attribute;
mod cluster;
mod env;
mod error;
mod explain;
mod grammar;
mod image;
mod keys;
mod kubernetes;
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
pub use image::{Builder, ImageSettings, Link, OnDisconnect};
#[cfg(feature = "kubernetes")]
pub use kubernetes::PodMutators;
pub use kubernetes::{Gpu, KubernetesSettings, Renderer, Toleration, Volume, VolumeSource};
pub use options::LaunchOptions;
pub use resolved::{Config, Resolved, Target};
pub use resources::{Cpu, Memory, Resources, UnitError};
pub use surroundings::{FILE_NAME, Surroundings};
