//! The laws of sync training: what the answer is, and what it does not depend on.
//!
//! The reference of the first law is [`Law::plain`]: burn's loop and burn's optimizer in one process. Initial parameters
//! come from a generator of the test's own and not from burn's, which all threads of this process share (see
//! [`fairing_tests::law`]).

use burn::module::Module as _;
use burn::prelude::*;
use fairing_core::data::permutation;
use fairing_core::{DistributedTraining as _, Topology};
use fairing_tests::law::{AnyModel, Kind, Law, Rule};
use fairing_tests::plain::{self, Parameter};

use crate::run::{Laws, SMALL};

/// Largest difference of a parameter, of about 0.2, after eight steps. Sums in another order round differently, and
/// Adam divides by the size of the gradient, so that it magnifies what rounding does to a small one. Measured over all
/// cases: 2.7e-6. Counting the stand-in of an empty part as an example makes 7e-2.
const TOLERANCE: f32 = 1e-5;

/// Models whose examples do not influence each other.
const INDEPENDENT: [Kind; 4] = [Kind::Cnn, Kind::Odd, Kind::Lopsided, Kind::Unused];
const RULES: [Rule; 3] = [Rule::Momentum, Rule::Adam, Rule::AdamW];

fn in_memory(law: &Law, workers: u32, ps: u32) -> AnyModel {
    law.train_in_memory(Topology::new(workers, ps)).unwrap().model
}

/// Every parameter and running statistic; equal if and only if all bits are.
fn bits(model: &AnyModel) -> Vec<u32> {
    plain::flat(model).into_iter().map(f32::to_bits).collect()
}

/// The parameters in the file of a run by processes.
fn by_processes(law: &Law, workers: u32, ps: u32, seed: u64) -> Vec<u32> {
    saved_by(law, Laws::law(law, workers, ps, seed))
}

fn saved_by(law: &Law, program: Laws) -> Vec<u32> {
    let ended = program.run();
    let report = ended.report();
    let model = law.kind.model(u64::MAX, &Device::flex().autodiff()).load_file(&report.model);
    bits(&model)
}

fn largest_difference(left: &[Parameter], right: &[Parameter]) -> (f32, String) {
    assert_eq!(left.len(), right.len());
    let mut largest = (0.0, String::new());
    for (left, right) in left.iter().zip(right) {
        assert_eq!((&left.path, left.values.len()), (&right.path, right.values.len()));
        for (a, b) in left.values.iter().zip(&right.values) {
            assert!(a.is_finite() && b.is_finite(), "{}", left.path);
            if (a - b).abs() > largest.0 {
                largest = ((a - b).abs(), left.path.clone());
            }
        }
    }
    largest
}

#[track_caller]
fn agrees_with_plain(law: &Law, workers: u32) {
    let (plain, losses) = law.plain(0);
    let trained = law.train_in_memory(Topology::new(workers, 1)).unwrap();
    let (largest, path) = largest_difference(&plain::parameters(&plain), &plain::parameters(&trained.model));
    assert!(largest <= TOLERANCE, "{law:?} with {workers} workers: `{path}` differs by {largest:e}");
    let merged: Vec<f64> = trained.metrics.series("loss").map(|metric| metric.value).collect();
    assert_eq!(merged.len(), losses.len());
    for (round, (merged, plain)) in merged.iter().zip(&losses).enumerate() {
        assert!((merged - plain).abs() < 1e-4, "{law:?} with {workers} workers, round {round}: {merged} and {plain}");
    }
}

#[test]
fn n_workers_with_a_share_of_the_batch_equal_one_process_with_the_whole() {
    for kind in INDEPENDENT {
        for rule in RULES {
            for workers in 1..=4 {
                agrees_with_plain(&Law { kind, rule, ..SMALL }, workers);
            }
        }
    }
}

#[test]
fn a_number_of_examples_that_does_not_divide_changes_nothing() {
    // The last batch has 5, 2, 3, 12 and 1, and 7 are less than one batch. Of 2 and 3, four workers have empty parts.
    for (examples, batch_size) in [(41, 12), (38, 12), (39, 12), (12, 12), (25, 24), (7, 12)] {
        for workers in 1..=4 {
            agrees_with_plain(&Law { examples, batch_size, rule: Rule::Adam, ..SMALL }, workers);
        }
    }
}

#[test]
fn a_rank_whose_part_is_empty_weighs_nothing() {
    let trained = SMALL.train_in_memory(Topology::new(4, 1)).unwrap();
    let shares: Vec<_> = trained.metrics.series("examples").map(|metric| metric.ranks.clone()).collect();
    let last = [Some(1.0), Some(0.0), Some(0.0), Some(0.0)];
    let mut sorted = shares[3].clone();
    sorted.sort_by(|left, right| right.partial_cmp(left).unwrap());
    assert_eq!(sorted, last);
}

/// With batch norm the examples of a batch influence each other through its mean and variance, so several workers are
/// another training than one process. For one worker the law is as for all models, running statistics included.
#[test]
fn one_worker_with_batch_norm_equals_the_plain_loop() {
    for rule in RULES {
        agrees_with_plain(&Law { kind: Kind::Normalised, rule, ..SMALL }, 1);
    }
}

/// For several workers the law is: parameters follow the mean gradient, and running statistics are each rank's own,
/// averaged by the examples of the epoch when it closes. At learning rate 0 they depend on nothing else, so that a loop
/// over the ranks' parts of each batch is a reference without fairing. The example that stands in for an empty part
/// passes through the model like any other, and its rank counts with the examples that it really had.
#[test]
fn running_statistics_are_averaged_by_examples() {
    let device = Device::flex().autodiff();
    for (examples, workers) in [(37, 2), (41, 3), (24, 2), (37, 4)] {
        let law = Law { kind: Kind::Normalised, examples, epochs: 1, learning_rate: 0.0, ..SMALL };
        let trained = plain::parameters(&in_memory(&law, workers, 2));

        let samples = law.kind.samples(examples, &device);
        let order = permutation(0, 0, examples);
        let workers = workers as usize;
        let mut mean: Vec<Parameter> = Vec::new();
        for rank in 0..workers {
            let model = law.kind.model(0, &device);
            let mut seen = 0;
            for batch in order.chunks(law.batch_size) {
                // As even as possible, the first ranks one more.
                let share = |rank: usize| batch.len() / workers + usize::from(rank < batch.len() % workers);
                let start: usize = (0..rank).map(share).sum();
                let part = &batch[start..start + share(rank)];
                seen += part.len();
                let stand_in = &batch[..1];
                model.loss(&samples.select(if part.is_empty() { stand_in } else { part }));
            }
            let weight = seen as f32 / examples as f32;
            let own = plain::parameters(&model);
            if mean.is_empty() {
                mean =
                    own.iter().map(|p| Parameter { path: p.path.clone(), values: vec![0.0; p.values.len()] }).collect();
            }
            for (mean, own) in mean.iter_mut().zip(own) {
                mean.values.iter_mut().zip(own.values).for_each(|(mean, value)| *mean += weight * value);
            }
        }
        let (largest, path) = largest_difference(&mean, &trained);
        assert!(largest < 1e-6, "{examples} examples, {workers} workers: `{path}` differs by {largest:e}");
    }
}

#[test]
fn all_ranks_end_with_the_same_bits() {
    for kind in INDEPENDENT.into_iter().chain([Kind::Normalised]) {
        let trained = Law { kind, ..SMALL }.train_in_memory(Topology::new(3, 2)).unwrap();
        let metric = trained.metrics.series("fingerprint").last().unwrap();
        assert_eq!(metric.ranks, vec![Some(trained.model.fingerprint()); 3], "{kind:?}");
    }
}

#[test]
fn a_tensor_without_gradient_keeps_its_bits() {
    for rule in RULES {
        let law = Law { kind: Kind::Unused, rule, ..SMALL };
        let before = plain::parameters(&law.kind.model(0, &Device::flex().autodiff()));
        let after = plain::parameters(&in_memory(&law, 2, 2));
        for (before, after) in before.iter().zip(&after) {
            let unused = before.path.contains("unused");
            assert_eq!(before.values == after.values, unused, "{} by {rule:?}", before.path);
        }
    }
}

#[test]
fn bits_depend_neither_on_servers_nor_on_arrival() {
    for kind in INDEPENDENT.into_iter().chain([Kind::Normalised]) {
        for (rule, workers) in [(Rule::Momentum, 1), (Rule::Adam, 2), (Rule::AdamW, 3), (Rule::Adam, 4)] {
            let law = Law { kind, rule, ..SMALL };
            let one = bits(&in_memory(&law, workers, 1));
            for ps in 1..=3 {
                assert!(bits(&in_memory(&law, workers, ps)) == one, "{law:?} with {workers} workers, {ps} servers");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_transport() {
    for (kind, rule, workers, ps) in [
        (Kind::Cnn, Rule::Adam, 2, 1),
        (Kind::Cnn, Rule::Momentum, 4, 2),
        (Kind::Odd, Rule::AdamW, 4, 3),
        (Kind::Odd, Rule::Momentum, 1, 2),
        (Kind::Lopsided, Rule::Adam, 3, 2),
        (Kind::Normalised, Rule::Momentum, 2, 3),
        (Kind::Normalised, Rule::Adam, 4, 1),
        (Kind::Unused, Rule::AdamW, 3, 1),
    ] {
        let law = Law { kind, rule, ..SMALL };
        let memory = bits(&in_memory(&law, workers, ps));
        assert!(by_processes(&law, workers, ps, 0) == memory, "{law:?} with {workers} workers, {ps} servers");
    }
}

#[test]
fn workers_that_host_the_parameters_compute_the_bits_of_servers() {
    for (kind, rule, workers) in [
        (Kind::Cnn, Rule::Adam, 2),
        (Kind::Odd, Rule::Momentum, 3),
        (Kind::Normalised, Rule::AdamW, 2),
        (Kind::Normalised, Rule::Momentum, 3),
    ] {
        let law = Law { kind, rule, ..SMALL };
        let hosted = by_processes(&law, workers, 0, 0);
        for ps in 1..=3 {
            assert!(by_processes(&law, workers, ps, 0) == hosted, "{law:?} with {workers} workers, {ps} servers");
        }
    }
}

#[test]
fn one_async_worker_computes_the_bits_of_sync() {
    for (kind, rule, ps) in
        [(Kind::Cnn, Rule::Adam, 1), (Kind::Lopsided, Rule::Momentum, 3), (Kind::Odd, Rule::AdamW, 2)]
    {
        let law = Law { kind, rule, ..SMALL };
        let sync = by_processes(&law, 1, ps, 0);
        for (variable, value) in [("FAIRING_MODE", "async"), ("FAIRING_STALENESS", "0"), ("FAIRING_STALENESS", "4")] {
            let other = saved_by(&law, Laws::law(&law, 1, ps, 0).env(variable, value));
            assert!(other == sync, "{law:?} with {variable}={value}, {ps} servers");
        }
    }
}

#[test]
fn two_runs_with_one_seed_are_one_for_any_number_of_workers() {
    let law = Law { kind: Kind::Cnn, rule: Rule::Adam, ..SMALL };
    for workers in [1, 2, 4] {
        for ps in [0, 2] {
            let first = by_processes(&law, workers, ps, 3);
            assert!(by_processes(&law, workers, ps, 3) == first, "{workers} workers, {ps} servers");
        }
    }
}

#[test]
fn same_seed_same_bits_and_another_seed_others() {
    let law = Law { kind: Kind::Cnn, rule: Rule::Adam, ..SMALL };
    let first = by_processes(&law, 2, 2, 7);
    assert!(by_processes(&law, 2, 2, 7) == first, "two runs with seed 7");
    assert!(by_processes(&law, 2, 2, 8) != first, "seeds 7 and 8");
    let (plain, _) = law.plain(7);
    let plain = plain::flat(&plain);
    let largest =
        plain.iter().zip(&first).map(|(plain, bits)| (plain - f32::from_bits(*bits)).abs()).fold(0.0, f32::max);
    assert!(largest <= TOLERANCE, "seed 7 differs from the plain loop with seed 7 by {largest:e}");
}

/// Here initial parameters and masks come from burn's generator, which each process seeds: with the seed before `train`,
/// and with (seed, rank) in `join`.
#[test]
fn random_layers_repeat_with_the_seed() {
    let law = Law { kind: Kind::Dropout, rule: Rule::Adam, ..SMALL };
    let first = by_processes(&law, 3, 2, 1);
    assert!(by_processes(&law, 3, 2, 1) == first, "two runs with seed 1");
    assert!(by_processes(&law, 3, 1, 1) == first, "one server and two");
    assert!(by_processes(&law, 3, 2, 2) != first, "seeds 1 and 2");
}
