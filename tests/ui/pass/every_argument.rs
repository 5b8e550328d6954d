use fairing_core::config::{Attribute, AttributeCpu};
use fairing_core::prelude::*;

#[path = "../model.rs"]
mod model;
use model::Point;

#[distributed_training(
    workers = 2,
    ps = 1,
    mode = "async",
    staleness = 4,
    rejoin = "1m 30s",
    seed = 18446744073709551615,
    env = ["HF_HOME", "WANDB_MODE"],
    data = "data",
    target = "docker",
    repository = "registry.example:5000/team/name",
    base = "debian:12",
    builder = "append",
    link = "static",
    architectures = ["amd64", "arm64"],
    files = ["labels.txt", "words/en.txt"],
    root_certificates = true,
    registry_ca = "ca.pem",
    plain_http = ["registry.example:5000"],
    on_disconnect = "stop",
    namespace = "team-a",
    launcher = "jobset",
    deadline = "2h",
    keep_result = "10m",
    ttl = "0s",
    launch_timeout = "30s",
    join_timeout = "5m",
    schedule_timeout = "2m",
    node_selector = ["disk=ssd"],
    tolerations = ["dedicated=training:NoSchedule", "*"],
    spread = false,
    priority_class = "low",
    runtime_class = "gvisor",
    labels = ["team=vision"],
    annotations = ["example.org/note=any text"],
    image_pull_secrets = ["registry-login"],
    volumes = ["pvc:datasets:/data:ro", "empty:1Gi:/scratch"],
    service_account = "trainer",
    tmp_size = "1Gi",
    runs = "runs",
    cache = "layers",
    worker(cpu = 2, memory = "1Gi", gpu = 1),
    ps(cpu = 1.5, memory = "512MB", gpu = "amd.com/gpu=1"),
)]
#[derive(Serialize, Deserialize)]
struct Job {
    epochs: usize,
}

impl Train for Job {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

#[distributed_training(image = "registry.example/team/name:1", builder = "append", link = "dynamic", files = [])]
#[derive(Serialize, Deserialize)]
struct Finished;

impl Train for Finished {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

#[distributed_training(dockerfile = "Dockerfile", builder = "docker")]
#[derive(Serialize, Deserialize)]
struct OwnDockerfile;

impl Train for OwnDockerfile {
    type Model = Point;

    fn train(&self, _: &Worker) -> anyhow::Result<Point> {
        Ok(Point(0.0))
    }
}

fn main() {
    let expected = Attribute {
        workers: Some(2),
        ps: Some(1),
        mode: Some("async"),
        staleness: Some(4),
        rejoin: Some("1m 30s"),
        seed: Some(u64::MAX),
        env: Some(&["HF_HOME", "WANDB_MODE"]),
        data: Some("data"),
        target: Some("docker"),
        repository: Some("registry.example:5000/team/name"),
        image: None,
        base: Some("debian:12"),
        dockerfile: None,
        builder: Some("append"),
        link: Some("static"),
        architectures: Some(&["amd64", "arm64"]),
        files: Some(&["labels.txt", "words/en.txt"]),
        root_certificates: Some(true),
        registry_ca: Some("ca.pem"),
        plain_http: Some(&["registry.example:5000"]),
        on_disconnect: Some("stop"),
        namespace: Some("team-a"),
        launcher: Some("jobset"),
        deadline: Some("2h"),
        keep_result: Some("10m"),
        ttl: Some("0s"),
        launch_timeout: Some("30s"),
        join_timeout: Some("5m"),
        schedule_timeout: Some("2m"),
        node_selector: Some(&["disk=ssd"]),
        tolerations: Some(&["dedicated=training:NoSchedule", "*"]),
        spread: Some(false),
        priority_class: Some("low"),
        runtime_class: Some("gvisor"),
        labels: Some(&["team=vision"]),
        annotations: Some(&["example.org/note=any text"]),
        image_pull_secrets: Some(&["registry-login"]),
        volumes: Some(&["pvc:datasets:/data:ro", "empty:1Gi:/scratch"]),
        service_account: Some("trainer"),
        tmp_size: Some("1Gi"),
        runs: Some("runs"),
        cache: Some("layers"),
        worker_cpu: Some(AttributeCpu::Cores(2)),
        worker_memory: Some("1Gi"),
        worker_gpu: Some("1"),
        ps_cpu: Some(AttributeCpu::Text("1.5")),
        ps_memory: Some("512MB"),
        ps_gpu: Some("amd.com/gpu=1"),
    };
    assert_eq!(Job::ATTRIBUTE, expected);

    let expected = Attribute {
        image: Some("registry.example/team/name:1"),
        builder: Some("append"),
        link: Some("dynamic"),
        files: Some(&[]),
        ..Attribute::NONE
    };
    assert_eq!(Finished::ATTRIBUTE, expected);

    let expected = Attribute { dockerfile: Some("Dockerfile"), builder: Some("docker"), ..Attribute::NONE };
    assert_eq!(OwnDockerfile::ATTRIBUTE, expected);
}
