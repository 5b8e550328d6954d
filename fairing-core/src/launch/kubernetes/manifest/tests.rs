use std::collections::BTreeSet;
use std::ffi::OsString;

use expect_test::{ExpectFile, expect, expect_file};
use k8s_openapi::api::batch::v1::Job;
use proptest::prelude::*;
use serde_json::json;

use super::super::super::Program;
use super::*;
use crate::config::{Attribute, Config, LaunchOptions, Surroundings, Target};
use crate::topology::Placement;

/// Longer than any run is called, see `observe::run_folder::run_name`.
const LONGEST_RUN: &str = "a-name-of-eighteen-20260102-030405-a1b2-c3d4";

fn scene(format: Format, options: LaunchOptions) -> Scene {
    let surroundings = Surroundings {
        current: "/here".into(),
        manifest: "/project".into(),
        target: "/project/target".into(),
        cache: "/cache".into(),
        file: None,
    };
    let options = options.target(Target::Kubernetes).repository("registry.example/team/name");
    let env = BTreeMap::<String, String>::new();
    let config = Config::resolve(&Attribute::NONE, &surroundings, &env, &options).unwrap().config;
    Scene {
        format,
        image: format!("registry.example/team/name@sha256:{}", "0".repeat(64)),
        settings: config.kubernetes,
        worker: config.worker,
        ps: config.ps,
        provenance: Provenance {
            type_name: "vision::FashionMnist".to_owned(),
            extension: "bpk".to_owned(),
            commit: Some("1b6453892473a467d07372d45eb05abc2031647a".to_owned()),
            user: Some("me".to_owned()),
        },
    }
}

fn plan(scene: &Scene, run: &str, workers: u32, ps: u32, mode: Mode, rejoin: Duration) -> LaunchPlan {
    let topology = Topology::new(workers, ps);
    let servers = addresses(scene, run, &topology);
    let placement = |replica| Placement {
        run: run.to_owned(),
        replica,
        topology,
        seed: 7,
        threads: 2,
        servers: servers.clone(),
        data_dir: Some("/work/data".into()),
        mode,
        rejoin,
        join: scene.settings.join_timeout,
        keep_result: scene.settings.keep_result,
        first_stays: false,
    };
    LaunchPlan {
        run: run.to_owned(),
        placements: topology.replicas().map(placement).collect(),
        program: Program {
            executable: "/fairing/program".into(),
            arg0: "program".into(),
            arguments: vec!["--price".into(), "$5 and $(HOME)".into()],
            directory: "/work".into(),
        },
        variables: vec![("RUST_LOG".to_owned(), OsString::from("info"))],
        value: b"the value".to_vec(),
        // As long as one with its certificates and key is.
        identities: topology.replicas().map(|_| vec![0; 1300]).collect(),
        caller: b"the caller".to_vec(),
    }
}

/// A plan as a run has it if nobody says anything else.
fn usual(scene: &Scene, workers: u32, ps: u32) -> LaunchPlan {
    let rejoin = if ps == 0 { Duration::ZERO } else { Duration::from_secs(300) };
    plan(scene, "fashion-mnist-20260102-030405-a1b2", workers, ps, Mode::Sync, rejoin)
}

#[track_caller]
fn check(scene: &Scene, workers: u32, ps: u32, expected: ExpectFile) {
    expected.assert_eq(&describe(&objects(scene, &usual(scene, workers, ps))));
}

#[test]
fn jobs_run_servers_and_workers() {
    let scene = scene(Format::Jobs, LaunchOptions::new());
    check(&scene, 2, 1, expect_file!["snapshots/jobs-2-1.yaml"]);
    check(&scene, 3, 2, expect_file!["snapshots/jobs-3-2.yaml"]);
    check(&scene, 2, 0, expect_file!["snapshots/jobs-2-0.yaml"]);
}

#[test]
fn job_sets_run_servers_and_workers() {
    let scene = scene(Format::JobSet, LaunchOptions::new());
    check(&scene, 2, 1, expect_file!["snapshots/jobset-2-1.yaml"]);
    check(&scene, 3, 2, expect_file!["snapshots/jobset-3-2.yaml"]);
    check(&scene, 2, 0, expect_file!["snapshots/jobset-2-0.yaml"]);
}

#[test]
fn tf_jobs_run_servers_and_workers() {
    let scene = scene(Format::TfJob, LaunchOptions::new());
    check(&scene, 2, 1, expect_file!["snapshots/tfjob-2-1.yaml"]);
    check(&scene, 3, 2, expect_file!["snapshots/tfjob-3-2.yaml"]);
    check(&scene, 2, 0, expect_file!["snapshots/tfjob-2-0.yaml"]);
}

#[test]
fn every_setting_reaches_the_pods() {
    let resources = |text: [&str; 3]| Resources {
        cpu: Some(text[0].parse().unwrap()),
        memory: Some(text[1].parse().unwrap()),
        gpu: Some(text[2].parse().unwrap()),
    };
    let options = LaunchOptions::new()
        .node_selector(["disk=ssd"])
        .tolerations(["dedicated=training:NoSchedule", "spot:NoExecute", "*"])
        .spread(false)
        .priority_class("low")
        .runtime_class("gvisor")
        .labels(["team=vision"])
        .annotations(["example.org/note=any text", "sidecar.istio.io/inject=true"])
        .image_pull_secrets(["login"])
        .volumes([
            "pvc:datasets:/data:ro",
            "secret:token:/etc/token",
            "configmap:words:/etc/words",
            "empty:10Gi:/scratch",
        ])
        .service_account("trainer")
        .tmp_size("1Gi".parse().unwrap())
        .deadline(Duration::from_secs(3600))
        .keep_result(Duration::from_secs(60))
        .ttl(Duration::from_secs(5))
        .worker_resources(resources(["1.5", "2Gi", "1"]))
        .ps_resources(resources(["500m", "512Mi", "amd.com/gpu=2"]))
        .pod(|role, pod| {
            let spec = pod.spec.as_mut().unwrap();
            spec.scheduler_name = Some(format!("scheduler-of-{role}"));
        });
    check(&scene(Format::Jobs, options), 2, 1, expect_file!["snapshots/settings.yaml"]);
}

#[test]
fn the_role_has_what_a_launch_takes() {
    let text: String = [Format::Jobs, Format::JobSet, Format::TfJob]
        .map(|format| role(&scene(format, LaunchOptions::new())))
        .join("---\n");
    expect_file!["snapshots/roles.yaml"].assert_eq(&text);
    // What the documentation tells people to ask for is what a launch takes.
    let documented = role(&scene(Format::Jobs, LaunchOptions::new()));
    assert!(include_str!("../../../../../README.md").contains(&documented), "{documented}");
}

#[test]
fn a_held_owner_makes_no_pods_and_ends_soon() {
    let scene = scene(Format::Jobs, LaunchOptions::new().launch_timeout(Duration::from_secs(7)));
    for (workers, ps) in [(2, 1), (2, 0)] {
        let objects = objects(&scene, &usual(&scene, workers, ps));
        let [held] = &objects.held[..] else { panic!("one owner") };
        assert_eq!((held.name.as_str(), &held.resource), (objects.released.name.as_str(), &objects.released.resource));
        let mut as_released = held.object.clone();
        assert_eq!(as_released["spec"]["parallelism"], 0);
        assert_eq!(as_released["spec"]["activeDeadlineSeconds"], 7);
        as_released["spec"]["parallelism"] = json!(if ps > 0 { ps } else { workers });
        as_released["spec"]["activeDeadlineSeconds"] = json!(25 * 3600);
        assert_eq!(as_released, objects.released.object, "only what can be changed is");
    }
}

#[test]
fn suspended_objects_are_held_by_an_anchor() {
    for format in [Format::JobSet, Format::TfJob] {
        let scene = scene(format, LaunchOptions::new());
        let objects = objects(&scene, &usual(&scene, 2, 1));
        let [anchor, held] = &objects.held[..] else { panic!("an anchor and an owner") };
        assert_eq!(anchor.object, objects.anchor.as_ref().unwrap().object);
        assert_eq!(anchor.object["spec"]["parallelism"], 0);
        assert_eq!(anchor.name, "fashion-mnist-20260102-030405-a1b2-launch");
        let mut as_released = held.object.clone();
        match format {
            Format::TfJob => as_released["spec"]["runPolicy"]["suspend"] = json!(false),
            _ => as_released["spec"]["suspend"] = json!(false),
        }
        assert_ne!(held.object, objects.released.object);
        assert_eq!(as_released, objects.released.object);
    }
}

#[test]
fn a_release_changes_what_held_the_owner_and_nothing_else() {
    for (format, ps, release) in [
        (Format::Jobs, 1, json!({ "spec": { "parallelism": 1, "activeDeadlineSeconds": 25 * 3600 } })),
        (Format::Jobs, 0, json!({ "spec": { "parallelism": 2, "activeDeadlineSeconds": 25 * 3600 } })),
        (Format::JobSet, 1, json!({ "metadata": { "ownerReferences": null }, "spec": { "suspend": false } })),
        (
            Format::TfJob,
            1,
            json!({ "metadata": { "ownerReferences": null }, "spec": { "runPolicy": { "suspend": false } } }),
        ),
    ] {
        let scene = scene(format, LaunchOptions::new());
        assert_eq!(objects(&scene, &usual(&scene, 2, ps)).release(), release);
    }
}

#[test]
fn a_launch_knows_its_own_objects_from_those_of_others() {
    for format in [Format::Jobs, Format::JobSet, Format::TfJob] {
        let scene = scene(format, LaunchOptions::new());
        let usual = usual(&scene, 2, 1);
        let another = LaunchPlan { caller: b"another".to_vec(), ..usual.clone() };
        let all = |plan: &LaunchPlan| {
            let Objects { held, rest, .. } = objects(&scene, plan);
            held.into_iter().chain(rest).collect::<Vec<_>>()
        };
        for (own, others) in all(&usual).iter().zip(all(&another)) {
            assert_eq!(own.launch(), all(&usual)[0].launch());
            assert_ne!(own.launch(), others.launch());
        }
        // So have the pods, and what operators make.
        for (role, _, template) in pods(&scene, &usual) {
            let labels = template.metadata.unwrap().labels.unwrap();
            assert_eq!(labels.get(LAUNCH_LABEL).map(String::as_str), all(&usual)[0].launch(), "{role}");
        }
        // Nothing is created by a dry run, which has no caller.
        let dry = LaunchPlan { caller: Vec::new(), ..usual };
        assert!(all(&dry).iter().all(|manifest| manifest.launch().is_none()));
    }
}

#[test]
fn what_becomes_of_a_lost_worker_follows_mode_and_rejoin() {
    let scene = scene(Format::Jobs, LaunchOptions::new());
    let summary = |mode: Mode, rejoin_s: u64| {
        let plan = plan(&scene, "a", 3, 1, mode, Duration::from_secs(rejoin_s));
        let workers = objects(&scene, &plan).rest.pop().unwrap();
        let spec = serde_json::from_value::<Job>(workers.object).unwrap().spec.unwrap();
        let rules = spec.pod_failure_policy.unwrap().rules.into_iter().map(|rule| {
            let codes = rule.on_exit_codes.map(|codes| format!("{:?}", codes.values));
            format!("{} {}", rule.action, codes.unwrap_or_else(|| "disruption".to_owned()))
        });
        format!(
            "{mode}, rejoin {rejoin_s} s: {} per index, {} indexes may fail; {}\n",
            spec.backoff_limit_per_index.unwrap(),
            spec.max_failed_indexes.unwrap(),
            rules.collect::<Vec<_>>().join(", ")
        )
    };
    let modes = [Mode::Sync, Mode::Async, Mode::Bounded { staleness: 2 }];
    expect![[r#"
        sync, rejoin 300 s: 3 per index, 0 indexes may fail; Ignore disruption, Ignore [143], FailJob [64, 65, 66, 67, 68, 69, 101]
        sync, rejoin 0 s: 0 per index, 0 indexes may fail; FailJob [64, 65, 66, 67, 68, 69, 101]
        async, rejoin 300 s: 3 per index, 3 indexes may fail; Ignore disruption, Ignore [143], FailJob [64, 65, 66, 67, 68, 69, 101]
        async, rejoin 0 s: 0 per index, 3 indexes may fail; FailJob [64, 65, 66, 67, 68, 69, 101]
        async, staleness 2, rejoin 300 s: 3 per index, 3 indexes may fail; Ignore disruption, Ignore [143], FailJob [64, 65, 66, 67, 68, 69, 101]
        async, staleness 2, rejoin 0 s: 0 per index, 3 indexes may fail; FailJob [64, 65, 66, 67, 68, 69, 101]
    "#]]
        .assert_eq(&modes.iter().flat_map(|mode| [summary(*mode, 300), summary(*mode, 0)]).collect::<String>());
}

#[test]
fn codes_fail_the_job_or_count() {
    for code in [64, 65, 66, 67, 68, 69, 101] {
        assert!(fails_the_job(code), "{code}");
    }
    for code in [0, 1, 70, 71, 130, 137, 139, 143, 255] {
        assert!(!fails_the_job(code), "{code}");
    }
}

#[test]
fn what_a_person_reads_has_no_secrets() {
    let scene = scene(Format::Jobs, LaunchOptions::new());
    let text = describe(&objects(&scene, &usual(&scene, 2, 1)));
    assert!(text.contains("value: <9 bytes>") && text.contains("worker-0: <1300 bytes>"), "{text}");
    assert!(text.contains("identity: <10 bytes>"), "{text}");
}

#[test]
fn whoever_comes_later_knows_the_run() {
    for format in [Format::Jobs, Format::JobSet, Format::TfJob] {
        let scene = scene(format, LaunchOptions::new());
        let plan = usual(&scene, 3, 2);
        let owner = objects(&scene, &plan).released.object;
        let annotations: BTreeMap<String, String> =
            serde_json::from_value(owner["metadata"]["annotations"].clone()).unwrap();
        let known = Known::read(&annotations).unwrap();
        assert_eq!(known, scene.known(&plan));
        let servers: Vec<Address> = known.servers.iter().map(|server| server.parse().unwrap()).collect();
        assert_eq!(servers, plan.placements[0].servers);
        assert_eq!(annotations[VALUE_ANNOTATION], value_hash(&plan.value));
        let following = known.following();
        assert_eq!((following.restarts, following.port), (true, PORT));
        assert_eq!(following.memory, [1 << 30, 512 << 20]);
    }
    assert_eq!(Known::read(&BTreeMap::new()), None);
}

#[test]
fn pods_have_a_rank_if_they_have_an_index() {
    let pod = |metadata: Value| serde_json::from_value::<Pod>(json!({ "metadata": metadata })).unwrap();
    assert_eq!(rank_of(&pod(json!({ "annotations": { INDEX_ANNOTATION: "12" } }))), Some(12));
    assert_eq!(rank_of(&pod(json!({ "labels": { INDEX_LABEL: "3" } }))), Some(3));
    assert_eq!(rank_of(&pod(json!({ "labels": { INDEX_LABEL: "x" } }))), None);
    assert_eq!(rank_of(&pod(json!({}))), None);
}

#[test]
fn a_type_has_a_label() {
    for (name, expected) in [
        ("vision::FashionMnist", "FashionMnist"),
        ("_Job_", "Job"),
        ("a::Größe", "Gr--e"),
        ("模型", "run"),
        ("", "run"),
    ] {
        assert_eq!(shared::job_label(name), expected);
    }
    assert_eq!(shared::job_label(&"x".repeat(100)).len(), 63);
}

/// Whether `name` can name a Service, which is the strictest: RFC 1035.
fn is_dns_label(name: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(is_inner)
}

/// What the API server would say of names, labels and references, as far as one object does not tell.
fn is_consistent(scene: &Scene, plan: &LaunchPlan) {
    let objects = objects(scene, plan);
    let topology = plan.placements[0].topology;
    let mut names = BTreeSet::new();
    let mut secrets = BTreeMap::new();
    for manifest in objects.held.iter().chain(&objects.rest) {
        let Manifest { resource, name, object } = manifest;
        assert!(is_dns_label(name), "{name}");
        assert!(names.insert((resource.kind.clone(), name.clone())), "{name} twice");
        assert_eq!((&object["metadata"]["name"], &object["kind"]), (&json!(name), &json!(resource.kind)));
        assert_eq!(object["apiVersion"], json!(resource.api_version));
        assert!(object["metadata"].get("ownerReferences").is_none() && object["metadata"].get("namespace").is_none());
        let labels: BTreeMap<String, String> = serde_json::from_value(object["metadata"]["labels"].clone()).unwrap();
        assert_eq!(labels[RUN_LABEL], plan.run);
        assert!(labels.values().all(|value| value.len() <= 63));
        no_nulls(object);
        if resource.kind == "Secret" {
            let data = object["data"].as_object().unwrap().clone();
            let bytes: usize = data.values().map(|value| value.as_str().unwrap().len() / 4 * 3).sum();
            assert!(bytes < (1 << 20) - MAX_VALUE_BYTES, "{bytes} bytes leave no room for the value");
            secrets.insert(name.clone(), data);
        }
    }
    for (role, count, template) in pods(scene, plan) {
        let spec = template.spec.unwrap();
        let [container] = &spec.containers[..] else { panic!("one container") };
        let volumes = spec.volumes.unwrap();
        let mounts = container.volume_mounts.as_ref().unwrap();
        assert_eq!(mounts.iter().map(|it| &it.mount_path).collect::<BTreeSet<_>>().len(), mounts.len());
        for mount in mounts {
            assert!(volumes.iter().any(|volume| volume.name == mount.name), "no volume `{}`", mount.name);
        }
        for volume in &volumes {
            assert!(mounts.iter().any(|mount| mount.name == volume.name), "nobody mounts `{}`", volume.name);
        }
        let secret = volumes.iter().find_map(|volume| volume.secret.as_ref()).unwrap();
        let items = secret.items.as_ref().unwrap();
        assert_eq!(items.len(), count as usize + 1);
        let data = &secrets[secret.secret_name.as_ref().unwrap()];
        for item in items {
            assert!(data.contains_key(&item.key), "no key `{}`", item.key);
        }
        for rank in 0..count {
            let folder = format!("{rank}/identity");
            let item = items.iter().find(|item| item.path == folder).unwrap();
            assert_eq!(item.key, format!("{role}-{rank}"));
        }
        // A replica is what its placement says, but for the rank.
        let variables = container.env.as_ref().unwrap();
        let names: BTreeSet<&str> = variables.iter().map(|variable| variable.name.as_str()).collect();
        assert_eq!(names.len(), variables.len());
        let mut env: BTreeMap<String, String> = variables
            .iter()
            .filter_map(|variable| Some((variable.name.clone(), variable.value.as_ref()?.replace("$$", "$"))))
            .collect();
        env.insert("FAIRING_PLACEMENT_RANK".to_owned(), (count - 1).to_string());
        let placement = Placement::from_env(&env).unwrap();
        assert_eq!(&placement, plan.placements.iter().rfind(|it| it.replica.role == role).unwrap());
    }
    let hosts: Vec<String> = topology
        .servers()
        .zip(&plan.placements[0].servers)
        .map(|(server, address)| {
            let Address::Tls { server: named, host, port: PORT } = address else { panic!("{address}") };
            assert_eq!(*named, server);
            host.clone()
        })
        .collect();
    assert!(hosts.iter().flat_map(|host| host.split('.')).all(is_dns_label), "{hosts:?}");
    assert_eq!(hosts.iter().collect::<BTreeSet<_>>().len(), topology.server_count());
    // JobSet's controller wants room for what it makes of the names.
    let longest = format!("{}-worker-0-{}-abcde", plan.run, topology.worker_count() - 1);
    assert!(scene.format != Format::JobSet || is_dns_label(&longest), "{longest}");
}

fn no_nulls(value: &Value) {
    match value {
        Value::Null => panic!("an explicit null claims its field"),
        Value::Array(values) => values.iter().for_each(no_nulls),
        Value::Object(fields) => fields.values().for_each(no_nulls),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_plan_is_consistent(
        workers in 1..=100u32,
        ps in 0..=10u32,
        format in prop_oneof![Just(Format::Jobs), Just(Format::JobSet), Just(Format::TfJob)],
        staleness in proptest::option::of(proptest::option::of(0..9u32)),
        rejoin_s in prop_oneof![Just(0), 1..3600u64],
    ) {
        let scene = scene(format, LaunchOptions::new().volumes(["pvc:a:/a", "empty:1Gi:/b"]).labels(["a=b"]));
        let mode = match staleness {
            None => Mode::Sync,
            Some(None) => Mode::Async,
            Some(Some(staleness)) => Mode::Bounded { staleness },
        };
        let (mode, rejoin) = if ps == 0 { (Mode::Sync, Duration::ZERO) } else { (mode, Duration::from_secs(rejoin_s)) };
        is_consistent(&scene, &plan(&scene, LONGEST_RUN, workers, ps, mode, rejoin));
    }
}

#[test]
fn a_hundred_workers_fit() {
    for format in [Format::Jobs, Format::JobSet, Format::TfJob] {
        let scene = scene(format, LaunchOptions::new());
        is_consistent(&scene, &plan(&scene, LONGEST_RUN, 100, 10, Mode::Sync, Duration::from_secs(300)));
    }
}
