use proc_macro2::TokenStream;
use quote::quote;

use super::{expand_or_report, try_expand};

/// The messages for `args` on a plain struct.
fn messages(args: TokenStream) -> Vec<String> {
    refused(
        args,
        quote!(
            struct Job {
                epochs: usize,
            }
        ),
    )
}

fn refused(args: TokenStream, item: TokenStream) -> Vec<String> {
    let error = try_expand(args, item).expect_err("the mistake is found");
    error.into_iter().map(|error| error.to_string()).collect()
}

#[track_caller]
fn accepted(args: TokenStream) -> String {
    match try_expand(
        args,
        quote!(
            struct Job {
                epochs: usize,
            }
        ),
    ) {
        Ok(tokens) => tokens.to_string(),
        Err(error) => panic!("{:?}", error.into_iter().map(|error| error.to_string()).collect::<Vec<_>>()),
    }
}

#[test]
fn every_argument_reaches_its_field() {
    let tokens = accepted(quote! {
        workers = 2, ps = 1, mode = "async", staleness = 4, rejoin = "30s", seed = 7, env = ["A", "B"], data = "data", target = "local", runs = "runs",
        repository = "localhost:5000/a", base = "debian:12", builder = "docker", link = "static", architectures = ["arm64"],
        files = ["a", "b"], root_certificates = true, registry_ca = "ca.pem", plain_http = ["a:80"], on_disconnect = "stop",
        cache = "layers", worker(cpu = 2, memory = "1Gi", gpu = 1), ps(cpu = "500m", memory = "1GB", gpu = "amd.com/gpu=1"),
        namespace = "team-a", launcher = "jobset", deadline = "2h", keep_result = "10m", ttl = "0s", launch_timeout = "30s",
        join_timeout = "5m", schedule_timeout = "2m", node_selector = ["disk=ssd"], tolerations = ["*"], spread = false, priority_class = "low",
        runtime_class = "gvisor", labels = ["a=b"], annotations = ["c=d"], image_pull_secrets = ["e"],
        volumes = ["pvc:datasets:/data:ro"], service_account = "trainer", tmp_size = "1Gi",
    });
    for field in [
        "workers : :: core :: option :: Option :: Some (2)",
        "ps : :: core :: option :: Option :: Some (1)",
        "mode : :: core :: option :: Option :: Some (\"async\")",
        "staleness : :: core :: option :: Option :: Some (4)",
        "rejoin : :: core :: option :: Option :: Some (\"30s\")",
        "seed : :: core :: option :: Option :: Some (7)",
        "env : :: core :: option :: Option :: Some (& [\"A\" , \"B\"])",
        "data : :: core :: option :: Option :: Some (\"data\")",
        "target : :: core :: option :: Option :: Some (\"local\")",
        "repository : :: core :: option :: Option :: Some (\"localhost:5000/a\")",
        "base : :: core :: option :: Option :: Some (\"debian:12\")",
        "builder : :: core :: option :: Option :: Some (\"docker\")",
        "link : :: core :: option :: Option :: Some (\"static\")",
        "architectures : :: core :: option :: Option :: Some (& [\"arm64\"])",
        "files : :: core :: option :: Option :: Some (& [\"a\" , \"b\"])",
        "root_certificates : :: core :: option :: Option :: Some (true)",
        "registry_ca : :: core :: option :: Option :: Some (\"ca.pem\")",
        "plain_http : :: core :: option :: Option :: Some (& [\"a:80\"])",
        "on_disconnect : :: core :: option :: Option :: Some (\"stop\")",
        "runs : :: core :: option :: Option :: Some (\"runs\")",
        "cache : :: core :: option :: Option :: Some (\"layers\")",
        "worker_cpu : :: core :: option :: Option :: Some (:: fairing_core :: __private :: AttributeCpu :: Cores (2))",
        "worker_memory : :: core :: option :: Option :: Some (\"1Gi\")",
        "ps_cpu : :: core :: option :: Option :: Some (:: fairing_core :: __private :: AttributeCpu :: Text (\"500m\"))",
        "ps_memory : :: core :: option :: Option :: Some (\"1GB\")",
        "worker_gpu : :: core :: option :: Option :: Some (\"1\")",
        "ps_gpu : :: core :: option :: Option :: Some (\"amd.com/gpu=1\")",
        "namespace : :: core :: option :: Option :: Some (\"team-a\")",
        "launcher : :: core :: option :: Option :: Some (\"jobset\")",
        "deadline : :: core :: option :: Option :: Some (\"2h\")",
        "keep_result : :: core :: option :: Option :: Some (\"10m\")",
        "ttl : :: core :: option :: Option :: Some (\"0s\")",
        "launch_timeout : :: core :: option :: Option :: Some (\"30s\")",
        "join_timeout : :: core :: option :: Option :: Some (\"5m\")",
        "schedule_timeout : :: core :: option :: Option :: Some (\"2m\")",
        "node_selector : :: core :: option :: Option :: Some (& [\"disk=ssd\"])",
        "tolerations : :: core :: option :: Option :: Some (& [\"*\"])",
        "spread : :: core :: option :: Option :: Some (false)",
        "priority_class : :: core :: option :: Option :: Some (\"low\")",
        "runtime_class : :: core :: option :: Option :: Some (\"gvisor\")",
        "labels : :: core :: option :: Option :: Some (& [\"a=b\"])",
        "annotations : :: core :: option :: Option :: Some (& [\"c=d\"])",
        "image_pull_secrets : :: core :: option :: Option :: Some (& [\"e\"])",
        "volumes : :: core :: option :: Option :: Some (& [\"pvc:datasets:/data:ro\"])",
        "service_account : :: core :: option :: Option :: Some (\"trainer\")",
        "tmp_size : :: core :: option :: Option :: Some (\"1Gi\")",
    ] {
        assert!(tokens.contains(field), "{field} in {tokens}");
    }
}

#[test]
fn no_argument_is_fine() {
    assert!(!accepted(quote!()).contains("Some"));
}

#[test]
fn constants_are_asserted_and_stand_once() {
    let tokens = accepted(quote!(workers = WORKERS, seed = 1 << 40, worker(cpu = CORES)));
    assert_eq!(tokens.matches("= WORKERS").count(), 1);
    assert_eq!(tokens.matches("assert !").count(), 2, "a seed may be 0: {tokens}");
}

#[test]
fn a_constant_number_of_servers_is_asserted_where_one_is_needed() {
    let message = "needs a parameter server";
    for settings in [quote!(mode = "async"), quote!(staleness = 4), quote!(rejoin = "30s")] {
        assert!(accepted(quote!(ps = SERVERS, #settings)).contains(message), "{settings}");
        assert!(!accepted(quote!(ps = 1, #settings)).contains(message), "{settings}");
    }
    for settings in [quote!(mode = "sync"), quote!(rejoin = "0s"), quote!(workers = 1)] {
        assert!(!accepted(quote!(ps = SERVERS, #settings)).contains(message), "{settings}");
        accepted(quote!(ps = 0, #settings));
    }
    assert_eq!(messages(quote!(ps = 0, mode = "async", rejoin = "30s")).len(), 2);
}

#[test]
fn each_mistake_has_its_message() {
    let cases = [
        (quote!(wrokers = 2), "unknown argument `wrokers`; did you mean `workers`?"),
        (
            quote!(quota = 2),
            "unknown argument `quota`; there are `workers`, `ps`, `mode`, `staleness`, `rejoin`, `seed`, `env`, `data`, `target`, `repository`, `image`, `base`, `dockerfile`, `builder`, `link`, `architectures`, `files`, `root_certificates`, `registry_ca`, `plain_http`, `on_disconnect`, `namespace`, `launcher`, `deadline`, `keep_result`, `ttl`, `launch_timeout`, `join_timeout`, `schedule_timeout`, `node_selector`, `tolerations`, `spread`, `priority_class`, `runtime_class`, `labels`, `annotations`, `image_pull_secrets`, `volumes`, `service_account`, `tmp_size`, `runs`, `cache`, `worker`",
        ),
        (
            quote!(crate = 2),
            "unknown argument `crate`; there are `workers`, `ps`, `mode`, `staleness`, `rejoin`, `seed`, `env`, `data`, `target`, `repository`, `image`, `base`, `dockerfile`, `builder`, `link`, `architectures`, `files`, `root_certificates`, `registry_ca`, `plain_http`, `on_disconnect`, `namespace`, `launcher`, `deadline`, `keep_result`, `ttl`, `launch_timeout`, `join_timeout`, `schedule_timeout`, `node_selector`, `tolerations`, `spread`, `priority_class`, `runtime_class`, `labels`, `annotations`, `image_pull_secrets`, `volumes`, `service_account`, `tmp_size`, `runs`, `cache`, `worker`",
        ),
        (quote!(cpu = 2), "`cpu` belongs to a role, for example `worker(cpu = 2)`"),
        (quote!(gpu = 2), "`gpu` belongs to a role, for example `worker(gpu = 1)`"),
        (
            quote!(worker = 2),
            "`worker` takes resources, for example `worker(cpu = 2, memory = \"1Gi\")`; the number of workers is `workers = 2`",
        ),
        (quote!(workers = 2, workers = 2), "duplicate argument `workers`"),
        (quote!(ps(cpu = 1), ps(cpu = 1)), "duplicate argument `ps(...)`"),
        (quote!(ps(cpu = 1, cpu = 1)), "duplicate argument `cpu` in `ps(...)`"),
        (quote!(ps(cpus = 1)), "unknown argument `cpus` in `ps(...)`; did you mean `cpu`?"),
        (quote!(worker(disk = 1)), "unknown argument `disk` in `worker(...)`; it takes `cpu`, `memory` and `gpu`"),
        (quote!(workers = 0), "`workers` must be at least 1"),
        (quote!(mode = "asinc"), "`mode` is \"asinc\"; expected \"sync\" or \"async\"; did you mean \"async\"?"),
        (
            quote!(mode = "bounded"),
            "`mode` is \"bounded\"; expected \"sync\" or \"async\" (bounded asynchrony is `staleness = 4`)",
        ),
        (quote!(mode = Async), "`mode` takes a text in quotes, for example `mode = \"async\"`"),
        (quote!(staleness = "4"), "`staleness` takes a whole number, for example `staleness = 4`"),
        (quote!(staleness = 4294967296), "`staleness` must be at most 4294967295"),
        (quote!(rejoin = 30), "`rejoin` takes a text in quotes, for example `rejoin = \"30s\"`"),
        (
            quote!(rejoin = "30"),
            "`rejoin` is \"30\"; expected a duration such as \"30s\" or \"2m\" (a unit is missing)",
        ),
        (quote!(rejoin = "61m"), "`rejoin` is \"61m\"; expected at most \"1h\""),
        (quote!(mode = "sync", staleness = 4), "`staleness` has no meaning with `mode = \"sync\"`"),
        (quote!(staleness = LIMIT, ps = 0, mode = "sync"), "`staleness` has no meaning with `mode = \"sync\"`"),
        (quote!(ps = 0, mode = "async"), "`mode = \"async\"` needs a parameter server; set `ps = 1`"),
        (quote!(staleness = 0, ps = 0), "`staleness` needs a parameter server; set `ps = 1`"),
        (
            quote!(rejoin = "1ms", ps = 0),
            "`rejoin` needs a parameter server, since a lost worker would take its share of the parameters with it; set `ps = 1`",
        ),
        (quote!(worker(cpu = 0)), "`cpu` must be at least 1"),
        (quote!(workers = -1), "`workers` takes a whole number, for example `workers = 2`"),
        (quote!(workers = "2"), "`workers` takes a whole number, for example `workers = 2`"),
        (quote!(workers = 2.0), "`workers` takes a whole number, for example `workers = 2`"),
        (quote!(workers = [2]), "`workers` takes a whole number, for example `workers = 2`"),
        (quote!(workers = 2usize), "`workers` is a `u32`, for example `workers = 2`"),
        (quote!(workers = 4294967296), "`workers` must be at most 4294967295"),
        (quote!(seed = 18446744073709551616), "`seed` must be at most 18446744073709551615"),
        (quote!(workers), "`workers` takes a value, for example `workers = 2`"),
        (quote!(workers =), "`workers` takes a value, for example `workers = 2`"),
        (quote!(workers(2 = 1)), "`workers` takes a value, for example `workers = 2`"),
        (quote!(workers: 2), "expected `=` after `workers`"),
        (quote!(workers = 2 ps = 1), "expected `,`"),
        (quote!("workers"), "expected the name of an argument, for example `workers = 2`"),
        (quote!(data = 1), "`data` takes a text in quotes, for example `data = \"data\"`"),
        (quote!(data = ""), "`data` is \"\"; expected the path of a folder"),
        (quote!(env = "A"), "`env` takes a list of names, for example `env = [\"HF_HOME\"]`"),
        (quote!(env = [A]), "`env` lists names in quotes, for example `env = [\"HF_HOME\"]`"),
        (quote!(env = ["A=1"]), "`env` has \"A=1\"; expected the name alone, \"A\"; the value is that of the launcher"),
        (
            quote!(env = ["FAIRING_SEED"]),
            "`env` has \"FAIRING_SEED\"; expected a variable of your own (those that start with `FAIRING_` are fairing's)",
        ),
        (quote!(env = ["A", "A"]), "`env` has \"A\" twice"),
        (
            quote!(target = "dokcer"),
            "`target` is \"dokcer\"; expected \"local\", \"docker\" or \"kubernetes\"; did you mean \"docker\"?",
        ),
        (quote!(target = "moon"), "`target` is \"moon\"; expected \"local\", \"docker\" or \"kubernetes\""),
        (
            quote!(repository = "registry.example/Team/name"),
            "`repository` is \"registry.example/Team/name\"; expected lower case, \"registry.example/team/name\"",
        ),
        (
            quote!(repository = "team/name"),
            "`repository` is \"team/name\"; expected the host of the registry in front, such as \"docker.io/team/name\"",
        ),
        (
            quote!(repository = "me:hunter2@a.b/c"),
            "`repository` is \"...@a.b/c\"; expected a host and a path, such as \"registry.example/team/name\", without a user or a password (`docker login` keeps them)",
        ),
        (quote!(image = ""), "`image` is \"\"; expected the name of an image, such as \"debian:12\""),
        (quote!(base = "debian 12"), "`base` is \"debian 12\"; expected the name of an image, such as \"debian:12\""),
        (quote!(dockerfile = ""), "`dockerfile` is \"\"; expected the path of a Dockerfile"),
        (
            quote!(builder = "apend"),
            "`builder` is \"apend\"; expected \"append\" or \"docker\"; did you mean \"append\"?",
        ),
        (quote!(link = true), "`link` takes a text in quotes, for example `link = \"static\"`"),
        (
            quote!(architectures = "arm64"),
            "`architectures` takes a list of architectures, for example `architectures = [\"arm64\"]`",
        ),
        (quote!(architectures = ["x86_64"]), "`architectures` has \"x86_64\"; expected \"amd64\", as images call it"),
        (quote!(architectures = ["arm64", "arm64"]), "`architectures` has \"arm64\" twice"),
        (
            quote!(files = ["../a"]),
            "`files` has \"../a\"; expected a relative path without `..`, such as \"labels.txt\"",
        ),
        (
            quote!(root_certificates = "true"),
            "`root_certificates` takes `true` or `false`, for example `root_certificates = true`",
        ),
        (quote!(registry_ca = ""), "`registry_ca` is \"\"; expected the path of a PEM file"),
        (quote!(plain_http = ["a/b"]), "`plain_http` has \"a/b\"; expected the host alone, \"a\""),
        (
            quote!(on_disconnect = "Stop"),
            "`on_disconnect` is \"Stop\"; expected \"stop\" or \"continue\"; did you mean \"stop\"?",
        ),
        (
            quote!(dry_run = true),
            "`dry_run` is about one launch: set the variable `FAIRING_DRY_RUN=1`, or `LaunchOptions::dry_run`",
        ),
        (
            quote!(detach = true),
            "`detach` is about one launch: set the variable `FAIRING_DETACH=1`, or `LaunchOptions::detach`",
        ),
        (
            quote!(context = "kind"),
            "`context` is about one machine's kubeconfig: set the variable `FAIRING_CONTEXT`, or `LaunchOptions::context`",
        ),
        (
            quote!(namespace = "Team"),
            "`namespace` is \"Team\"; expected the name of a namespace, such as \"team-a\" (at most 63 of `a-z`, `0-9` and `-`)",
        ),
        (
            quote!(launcher = "jobsets"),
            "`launcher` is \"jobsets\"; expected \"jobs\", \"jobset\", \"tfjob\" or \"auto\"; did you mean \"jobset\"?",
        ),
        (quote!(deadline = "0s"), "`deadline` is \"0s\"; expected at least \"1s\""),
        (quote!(ttl = "1500ms"), "`ttl` is \"1500ms\"; expected whole seconds"),
        (quote!(labels = ["a"]), "`labels` has \"a\"; expected a label, such as \"team=vision\""),
        (quote!(worker(gpu = two)), "`gpu` takes a number or a text in quotes, for example `gpu = 1`"),
        (
            quote!(ps(gpu = "cpu=1")),
            "`gpu` is \"cpu=1\"; expected a number of GPUs such as 1, or with the resource's name \"amd.com/gpu=1\"",
        ),
        (
            quote!(worker(memory = "1Gbb")),
            "`memory` is \"1Gbb\"; expected a size such as \"512Mi\" or \"2GB\"; did you mean \"1GB\"?",
        ),
        (quote!(worker(memory = 1)), "`memory` takes a text in quotes, for example `memory = \"1Gi\"`"),
        (quote!(worker(cpu = "two")), "`cpu` is \"two\"; expected a number of cores such as 2, \"1.5\" or \"500m\""),
        (quote!(worker(cpu = 0.0001)), "`cpu` is 0.0001; expected a number of cores such as 2, \"1.5\" or \"500m\""),
    ];
    for (args, message) in cases {
        assert_eq!(messages(args.clone()), [message], "{args}");
    }
}

#[test]
fn settings_of_the_image_contradict_each_other_or_not() {
    let with_image =
        |key: &str| format!("`{key}` has no meaning with `image`, which is used as it is; leave one of them out");
    let cases = [
        (quote!(base = "a", image = "b"), with_image("base")),
        (quote!(image = "a", dockerfile = "b"), with_image("dockerfile")),
        (quote!(image = "a", builder = "docker"), with_image("builder")),
        (quote!(image = "a", link = "static"), with_image("link")),
        (quote!(image = "a", architectures = ["arm64"]), with_image("architectures")),
        (quote!(image = "a", files = ["b"]), with_image("files")),
        (quote!(image = "a", root_certificates = true), with_image("root_certificates")),
        (
            quote!(base = "a", dockerfile = "b"),
            "`base` has no meaning with `dockerfile`, which names its base itself; leave one of them out".to_owned(),
        ),
        (
            quote!(builder = "append", dockerfile = "b"),
            "`builder = \"append\"` reads no `dockerfile`; leave it out or set `builder = \"docker\"`".to_owned(),
        ),
    ];
    for (args, message) in cases {
        assert_eq!(messages(args.clone()), [message], "{args}");
    }
    for builder in [quote!(builder = "docker"), quote!(dockerfile = "b")] {
        let messages = messages(quote!(architectures = ["amd64", "arm64"], #builder));
        assert!(messages[0].starts_with("several `architectures` need `builder = \"append\"`"), "{messages:?}");
    }
    for target in ["local", "docker"] {
        let messages = messages(quote!(on_disconnect = "continue", target = #target));
        assert!(messages[0].starts_with("`on_disconnect = \"continue\"` needs `target = "), "{messages:?}");
    }
    let stop = messages(quote!(on_disconnect = "stop", target = "kubernetes"));
    assert!(stop[0].starts_with("`on_disconnect = \"stop\"` has no meaning with"), "{stop:?}");
    for args in [
        quote!(
            image = "a",
            builder = "append",
            link = "dynamic",
            architectures = [],
            files = [],
            root_certificates = false
        ),
        quote!(image = "a", repository = "a.b/c", registry_ca = "d", plain_http = ["e"]),
        quote!(dockerfile = "a", builder = "docker", architectures = ["arm64"], link = "static", files = ["b"]),
        // Another layer may name the repository, or another target.
        quote!(architectures = ["amd64", "arm64"], target = "docker", base = "a"),
        quote!(on_disconnect = "continue"),
        quote!(on_disconnect = "continue", target = "kubernetes"),
    ] {
        accepted(args);
    }
}

#[test]
fn all_mistakes_are_found_at_once() {
    let args = quote!(wrokers = 2, ps = -1, seed 3, env = ["A=1", B], worker(memory = "1Gbb", cpus = 2), data = 3);
    assert_eq!(messages(args).len(), 8);
    assert_eq!(
        refused(
            quote!(workers = 0),
            quote!(
                enum Job {}
            )
        )
        .len(),
        2
    );
}

#[test]
fn only_a_concrete_struct_is_accepted() {
    let cases = [
        (
            quote!(
                enum Job {}
            ),
            "put this enum into a field of one",
        ),
        (quote!(union Job { a: u8 }), "a union cannot be sent to the replicas"),
        (
            quote!(
                fn job() {}
            ),
            "what this function does belongs into its `impl Train`",
        ),
        (quote!(impl Job {}), "move it from this `impl` to the `struct` itself"),
        (
            quote!(
                trait Job {}
            ),
            "move it from this trait to a type that implements `Train`",
        ),
        (
            quote!(
                type Job = Other;
            ),
            "an alias adds no type; annotate `struct Job(...)` instead",
        ),
        (
            quote!(
                mod job {}
            ),
            "`distributed_training` goes on a struct",
        ),
        (
            quote!(
                struct Job<T>(T);
            ),
            "such as `struct MyJob(Job<...>)`",
        ),
        (
            quote!(
                struct Job<const N: usize>;
            ),
            "such as `struct MyJob(Job<...>)`",
        ),
    ];
    for (item, end) in cases {
        let messages = refused(quote!(), item);
        assert!(messages.len() == 1 && messages[0].ends_with(end), "{messages:?}");
    }
}

#[test]
fn a_refused_item_stays_and_can_still_be_launched() {
    for item in [
        quote!(
            struct Job;
        ),
        quote!(
            enum Job {}
        ),
        quote!(
            struct Job<T>(T);
        ),
    ] {
        let tokens = expand_or_report(quote!(workers = 0), item.clone()).to_string();
        assert!(tokens.starts_with(&item.to_string()), "{tokens}");
        assert!(tokens.contains("DistributedTraining for Job") && tokens.contains("compile_error"), "{tokens}");
    }
    assert!(
        !expand_or_report(
            quote!(),
            quote!(
                fn job() {}
            )
        )
        .to_string()
        .contains("DistributedTraining")
    );
}

#[test]
fn a_conditional_struct_takes_its_implementation_along() {
    let item = quote!(
        #[cfg(test)]
        struct Job;
    );
    let tokens = try_expand(quote!(), item).unwrap().to_string();
    assert_eq!(tokens.matches("# [cfg (test)]").count(), 2, "{tokens}");
}
