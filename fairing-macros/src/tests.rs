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
        worker(cpu = 2, memory = "1Gi"), ps(cpu = "500m", memory = "1GB"),
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
        "runs : :: core :: option :: Option :: Some (\"runs\")",
        "worker_cpu : :: core :: option :: Option :: Some (:: fairing_core :: __private :: AttributeCpu :: Cores (2))",
        "worker_memory : :: core :: option :: Option :: Some (\"1Gi\")",
        "ps_cpu : :: core :: option :: Option :: Some (:: fairing_core :: __private :: AttributeCpu :: Text (\"500m\"))",
        "ps_memory : :: core :: option :: Option :: Some (\"1GB\")",
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
            quote!(gpu = 2),
            "unknown argument `gpu`; there are `workers`, `ps`, `mode`, `staleness`, `rejoin`, `seed`, `env`, `data`, `target`, `runs`, `worker`",
        ),
        (
            quote!(crate = 2),
            "unknown argument `crate`; there are `workers`, `ps`, `mode`, `staleness`, `rejoin`, `seed`, `env`, `data`, `target`, `runs`, `worker`",
        ),
        (quote!(cpu = 2), "`cpu` belongs to a role, for example `worker(cpu = 2)`"),
        (
            quote!(worker = 2),
            "`worker` takes resources, for example `worker(cpu = 2, memory = \"1Gi\")`; the number of workers is `workers = 2`",
        ),
        (quote!(workers = 2, workers = 2), "duplicate argument `workers`"),
        (quote!(ps(cpu = 1), ps(cpu = 1)), "duplicate argument `ps(...)`"),
        (quote!(ps(cpu = 1, cpu = 1)), "duplicate argument `cpu` in `ps(...)`"),
        (quote!(ps(cpus = 1)), "unknown argument `cpus` in `ps(...)`; did you mean `cpu`?"),
        (quote!(worker(disk = 1)), "unknown argument `disk` in `worker(...)`; it takes `cpu` and `memory`"),
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
        (quote!(env = [A]), "`env` lists names in quotes, for example \"HF_HOME\""),
        (quote!(env = ["A=1"]), "`env` has \"A=1\"; expected the name alone, \"A\"; the value is that of the launcher"),
        (
            quote!(env = ["FAIRING_SEED"]),
            "`env` has \"FAIRING_SEED\"; expected a variable of your own (those that start with `FAIRING_` are fairing's)",
        ),
        (quote!(env = ["A", "A"]), "`env` has \"A\" twice"),
        (quote!(target = "docker"), "`target` is \"docker\"; expected \"local\" (`docker` comes with a later version)"),
        (quote!(target = "moon"), "`target` is \"moon\"; expected \"local\", the only target of this version"),
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
