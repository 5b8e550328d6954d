//! The laws of the optimizers: what they compare with burn's is beside the adapter.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::runtime::shard::{block_len, shard};

#[track_caller]
fn refuses(optimizer: impl Into<Optimizer>, message: &str) {
    assert_eq!(optimizer.into().validate().unwrap_err().to_string(), message);
}

#[test]
fn impossible_settings_are_named() {
    refuses(Sgd::new().momentum(-0.1), "`momentum` of `Sgd` is -0.1, but must be at least 0 and at most 1");
    refuses(Sgd::new().dampening(f64::NAN), "`dampening` of `Sgd` is NaN, but must be at least 0 and at most 1");
    refuses(Sgd::new().weight_decay(-1.0), "`weight_decay` of `Sgd` is -1, but must be finite and at least 0");
    refuses(Adam::new().betas(0.9, 1.0), "`betas` of `Adam` is 1, but must be at least 0 and below 1");
    refuses(Adam::new().betas(f32::NAN, 0.9), "`betas` of `Adam` is NaN, but must be at least 0 and below 1");
    refuses(Adam::new().epsilon(0.0), "`epsilon` of `Adam` is 0, but must be finite and above 0");
    let infinite = AdamW::new().weight_decay(f32::INFINITY);
    refuses(infinite, "`weight_decay` of `AdamW` is inf, but must be finite and at least 0");
    refuses(RmsProp::new().alpha(1.0), "`alpha` of `RmsProp` is 1, but must be at least 0 and below 1");
    refuses(RmsProp::new().momentum(1.5), "`momentum` of `RmsProp` is 1.5, but must be at least 0 and at most 1");
    refuses(AdaGrad::new().lr_decay(-0.5), "`lr_decay` of `AdaGrad` is -0.5, but must be finite and at least 0");
    refuses(Sgd::new().clip_value(0.0), "`clip_value` of `Sgd` is 0, but must be finite and above 0");
    let not_a_number = AdaGrad::new().clip_norm_per_tensor(f32::NAN);
    refuses(not_a_number, "`clip_norm_per_tensor` of `AdaGrad` is NaN, but must be finite and above 0");
    let infinite = AdamW::new().clip_global_norm(f32::INFINITY);
    refuses(infinite, "`clip_global_norm` of `AdamW` is inf, but must be finite and above 0");
}

#[test]
fn defaults_are_valid() {
    let defaults: [Optimizer; 6] = [
        Sgd::new().into(),
        Sgd::new().momentum(0.9).into(),
        Adam::new().into(),
        AdamW::new().into(),
        RmsProp::new().into(),
        AdaGrad::new().into(),
    ];
    for optimizer in defaults {
        assert_eq!(optimizer.validate(), Ok(()), "{optimizer:?}");
    }
}

#[test]
fn settings_survive_the_join_message() {
    for optimizer in all() {
        let mut bytes = Vec::new();
        ciborium::into_writer(&optimizer, &mut bytes).unwrap();
        assert_eq!(ciborium::from_reader::<Optimizer, _>(bytes.as_slice()).unwrap(), optimizer);
    }
}

#[test]
fn sgd_steps_against_the_gradient() {
    let mut optimizer = ShardOptimizer::new(Sgd::new().into(), vec![0..1, 1..3]);
    let mut parameters = [1.0, 2.0, 3.0];
    let round = optimizer.begin_round(&[false, true], 0.5);
    optimizer.apply(&round, 0..3, &mut parameters, &[1.0, 1.0, 2.0]);
    assert_eq!(parameters, [1.0, 1.5, 2.0]);
}

#[test]
fn a_tensor_without_gradient_keeps_parameters_state_and_count() {
    for optimizer in all() {
        let run = |rounds: &[bool]| {
            let mut server = Server::new(optimizer, &[1, 1], 0..2);
            let mut parameters = [1.0, -2.0];
            for &present in rounds {
                server.step(&[present; 2], 0.1, &mut parameters, &[0.5, 0.25]);
            }
            parameters
        };
        assert_eq!(run(&[true, false, false, true]), run(&[true, true]), "{optimizer:?}");
    }
}

fn all() -> [Optimizer; 15] {
    [
        Sgd::new().weight_decay(1e-2).into(),
        Sgd::new().momentum(0.9).into(),
        Sgd::new().momentum(0.8).dampening(0.0).weight_decay(1e-3).into(),
        Sgd::new().momentum(0.9).nesterov(true).clip_norm_per_tensor(0.7).into(),
        Sgd::new().clip_global_norm(0.3).into(),
        Adam::new().weight_decay(1e-2).into(),
        Adam::new().amsgrad(true).clip_value(0.4).into(),
        Adam::new().clip_global_norm(2.0).weight_decay(1e-3).into(),
        AdamW::new().betas(0.8, 0.99).epsilon(1e-8).into(),
        AdamW::new().amsgrad(true).clip_norm_per_tensor(0.5).into(),
        RmsProp::new().momentum(0.0).weight_decay(1e-2).into(),
        RmsProp::new().clip_value(0.5).into(),
        RmsProp::new().momentum(0.0).centered(true).alpha(0.8).into(),
        RmsProp::new().centered(true).clip_global_norm(5.0).into(),
        AdaGrad::new().lr_decay(0.1).weight_decay(1e-3).clip_norm_per_tensor(1.0).into(),
    ]
}

const ROUNDS: usize = 4;

/// Values that look random, the same for the same element and round wherever the element is stored.
fn noise(element: usize, round: usize) -> f32 {
    let hash = (element * (ROUNDS + 1) + round + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// One server of a training.
struct Server {
    range: Range<usize>,
    /// Which trained tensor each piece belongs to.
    members: Vec<usize>,
    optimizer: ShardOptimizer,
    clipping: Option<Clipping>,
    cells: Cells,
}

impl Server {
    fn new(optimizer: Optimizer, tensors: &[usize], range: Range<usize>) -> Self {
        let (mut pieces, mut members, mut start) = (Vec::new(), Vec::new(), 0);
        for (tensor, &size) in tensors.iter().enumerate() {
            let (from, to) = (start.max(range.start), (start + size).min(range.end));
            if from < to {
                pieces.push(from - range.start..to - range.start);
                members.push(tensor);
            }
            start += size;
        }
        let cells = Cells::new(tensors, range.clone());
        let clipping = optimizer.clipping();
        Self { range, members, optimizer: ShardOptimizer::new(optimizer, pieces), clipping, cells }
    }

    /// One step of a server that has all parameters.
    fn step(&mut self, present: &[bool], learning_rate: f64, parameters: &mut [f32], gradient: &[f32]) {
        let range = 0..gradient.len();
        let bits: Vec<bool> = self.members.iter().map(|tensor| present[*tensor]).collect();
        let mut round = self.optimizer.begin_round(&bits, learning_rate);
        if let Some(clipping) = self.clipping.filter(|clipping| !matches!(clipping, Clipping::Value(_))) {
            let mut squares = vec![f64::NAN; self.cells.len()];
            self.cells.squares(range.clone(), gradient, &mut squares);
            let scales = clipping.scales(&self.cells, &squares, present);
            round.scale(self.members.iter().map(|tensor| scales[*tensor]));
        }
        self.optimizer.apply(&round, range, parameters, gradient);
    }

    /// The parts of the shard that end at `cuts`, each modulo the shard's length, in units of `unit`.
    fn chunks(&self, cuts: &[usize], unit: usize) -> Vec<Range<usize>> {
        let len = self.range.len();
        let mut borders: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1) / unit * unit).collect();
        borders.extend([0, len]);
        borders.sort_unstable();
        borders.windows(2).map(|border| border[0]..border[1]).collect()
    }

    fn gradient(&self, chunk: &Range<usize>, round: usize) -> Vec<f32> {
        chunk.clone().map(|element| noise(self.range.start + element, round + 1)).collect()
    }
}

/// Trains with `count` shards, each taking its gradient in chunks that end at `cuts`; bits of the final parameters.
fn train(optimizer: Optimizer, tensors: &[usize], present: &[bool], count: usize, cuts: &[usize]) -> Vec<u32> {
    let len: usize = tensors.iter().sum();
    let mut parameters: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
    let mut servers: Vec<_> =
        (0..count).map(|index| Server::new(optimizer, tensors, shard(len, index, count))).collect();
    let cells = Cells::new(tensors, 0..len);
    for round in 0..ROUNDS {
        let present: Vec<bool> = (0..tensors.len()).map(|tensor| present[tensor * ROUNDS + round]).collect();
        let mut scales = None;
        if optimizer.needs_norms() {
            let mut all = Vec::new();
            for server in &servers {
                let mut squares = vec![f64::NAN; server.cells.len()];
                for chunk in server.chunks(cuts, block_len(len)) {
                    server.cells.squares(chunk.clone(), &server.gradient(&chunk, round), &mut squares);
                }
                all.extend(squares);
            }
            scales = optimizer.clipping().map(|clipping| clipping.scales(&cells, &all, &present));
        }
        for server in &mut servers {
            let bits: Vec<bool> = server.members.iter().map(|tensor| present[*tensor]).collect();
            let mut open = server.optimizer.begin_round(&bits, 0.01);
            if let Some(scales) = &scales {
                open.scale(server.members.iter().map(|tensor| scales[*tensor]));
            }
            for chunk in server.chunks(cuts, 1) {
                let gradient = server.gradient(&chunk, round);
                let flat = server.range.start + chunk.start..server.range.start + chunk.end;
                server.optimizer.apply(&open, chunk, &mut parameters[flat], &gradient);
            }
        }
    }
    parameters.into_iter().map(f32::to_bits).collect()
}

#[test]
#[should_panic = "a round whose norms were not clipped"]
fn a_norm_cannot_be_forgotten() {
    let mut server = Server::new(Sgd::new().clip_global_norm(1.0).into(), &[2], 0..2);
    let round = server.optimizer.begin_round(&[true], 0.1);
    server.optimizer.apply(&round, 0..2, &mut [0.0; 2], &[3.0; 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bits_do_not_depend_on_shards_and_chunks(
        tensors in prop::collection::vec(0usize..40, 1..8),
        present in prop::collection::vec(any::<bool>(), 8 * ROUNDS),
        servers in 1usize..6,
        cuts in prop::collection::vec(0usize..400, 0..6),
    ) {
        for optimizer in all() {
            let whole = train(optimizer, &tensors, &present, 1, &[]);
            let parts = train(optimizer, &tensors, &present, servers, &cuts);
            prop_assert_eq!(whole, parts, "{:?}", optimizer);
        }
    }

    #[test]
    fn bits_of_large_models_do_not_depend_on_shards_and_chunks(
        tensors in prop::collection::vec(0usize..3000, 3..8),
        present in prop::collection::vec(any::<bool>(), 8 * ROUNDS),
        servers in 1usize..6,
        cuts in prop::collection::vec(0usize..20_000, 0..6),
    ) {
        for optimizer in all().into_iter().filter(Optimizer::needs_norms) {
            let whole = train(optimizer, &tensors, &present, 1, &[]);
            let parts = train(optimizer, &tensors, &present, servers, &cuts);
            prop_assert!(whole == parts, "{:?}", optimizer);
        }
    }

    #[test]
    fn squares_are_those_of_the_elements(tensors in prop::collection::vec(0usize..3000, 1..6)) {
        let len: usize = tensors.iter().sum();
        let gradient: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
        let cells = Cells::new(&tensors, 0..len);
        let mut squares = vec![f64::NAN; cells.len()];
        cells.squares(0..len, &gradient, &mut squares);
        let expected: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum();
        let sum: f64 = squares.iter().sum();
        prop_assert!((sum - expected).abs() <= 1e-12 * expected, "{} instead of {}", sum, expected);
    }

    #[test]
    fn the_mean_is_added_in_rank_order(
        parts in prop::collection::vec((0.0f32..1.0, prop::collection::vec(-1e3f32..1e3, 37)), 0..8),
    ) {
        let mut out = vec![f32::NAN; 37];
        mean(&mut out, parts.iter().map(|(weight, part)| (*weight, part.as_slice())));
        for (element, out) in out.iter().enumerate() {
            let products = parts.iter().map(|(weight, part)| weight * part[element]);
            let expected = products.reduce(|sum, product| sum + product).unwrap_or(0.0);
            prop_assert_eq!(out.to_bits(), expected.to_bits());
        }
    }
}

/// A processor with narrower registers, or one without burn's choice of them, must not train to other bits.
#[test]
fn wide_registers_do_not_change_bits() {
    // Compiled once, for the oldest processor: every number by itself.
    let adam = |parameter: &mut f32, gradient: f32, state: &mut [f32; 2], steps: i32| {
        let correction = (1.0 - 0.999f32.powi(steps)).sqrt();
        state[0] = state[0] * 0.9 + gradient * (1.0 - 0.9);
        state[1] = state[1] * 0.999 + gradient * gradient * (1.0 - 0.999);
        let factor = correction / (1.0 - 0.9f32.powi(steps));
        *parameter -= state[0] * factor / (state[1].sqrt() + 1e-5 * correction) * 0.01;
    };
    let len = 1003;
    let mut parameters: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
    let mut expected = parameters.clone();
    let mut state = vec![[0.0; 2]; len];
    let mut server = Server::new(Adam::new().into(), &[len], 0..len);
    for step in 1..=20 {
        let gradient: Vec<f32> = (0..len).map(|element| noise(element, step)).collect();
        server.step(&[true], 0.01, &mut parameters, &gradient);
        for (((parameter, gradient), state), element) in expected.iter_mut().zip(gradient).zip(&mut state).zip(0..) {
            adam(std::hint::black_box(parameter), gradient, state, step as i32);
            assert_eq!(parameters[element].to_bits(), parameter.to_bits(), "element {element}, step {step}");
        }
    }
}

#[test]
fn rounds_may_be_open_together() {
    let run = |together: bool| {
        let mut optimizer = ShardOptimizer::new(Adam::new().into(), vec![0..2, 2..4]);
        let mut parameters = [1.0, 2.0, 3.0, 4.0];
        let pushes = [([true, false], 0.1, [0.5; 4]), ([true, true], 0.2, [-0.25; 4])];
        let mut rounds = Vec::new();
        for (present, learning_rate, gradient) in pushes {
            let round = optimizer.begin_round(&present, learning_rate);
            match together {
                true => rounds.push((round, gradient)),
                false => optimizer.apply(&round, 0..4, &mut parameters, &gradient),
            }
        }
        for (round, gradient) in rounds {
            optimizer.apply(&round, 0..1, &mut parameters[..1], &gradient[..1]);
            optimizer.apply(&round, 1..4, &mut parameters[1..], &gradient[1..]);
        }
        parameters
    };
    assert_eq!(run(true), run(false));
}

/// 60 steps of plain descent in `f64`, with tensors that have no gradient in some rounds.
#[test]
fn the_global_norm_is_clipped_as_its_formula_says() {
    let (tensors, norm, learning_rate) = ([700, 1, 0, 2000, 299], 20.0, 0.05);
    let len: usize = tensors.iter().sum();
    let mut server = Server::new(Sgd::new().clip_global_norm(norm).into(), &tensors, 0..len);
    let mut parameters: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
    let mut expected: Vec<f64> = parameters.iter().map(|parameter| f64::from(*parameter)).collect();
    let mut clipped = 0;
    for step in 0..60usize {
        let present: Vec<bool> = (0..tensors.len()).map(|tensor| (step + tensor) % 4 != 0).collect();
        let size = 0.1 + step as f32 / 60.0;
        let mut gradient: Vec<f32> = (0..len).map(|element| noise(element, step) * size).collect();

        server.step(&present, learning_rate, &mut parameters, &gradient);
        let mut start = 0;
        for (tensor, len) in tensors.into_iter().enumerate() {
            if !present[tensor] {
                gradient[start..start + len].fill(0.0);
            }
            start += len;
        }
        let total = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let scale = (f64::from(norm) / (total + 1e-6)).min(1.0);
        clipped += usize::from(scale < 1.0);
        for (expected, gradient) in expected.iter_mut().zip(&gradient) {
            *expected -= learning_rate * scale * f64::from(*gradient);
        }
    }
    assert!((10..50).contains(&clipped), "{clipped} of 60 steps clipped, which tests too little");
    for (ours, plain) in parameters.iter().zip(expected) {
        assert!((f64::from(*ours) - plain).abs() <= 2e-6, "{ours} instead of {plain}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_stays_visible() {
    for (value, clipping) in [f32::NAN, f32::INFINITY, 1e38]
        .into_iter()
        .flat_map(|value| [Clipping::NormPerTensor(1.0), Clipping::GlobalNorm(1.0)].map(|clipping| (value, clipping)))
    {
        let gradient = [value, value, 3.0];
        let cells = Cells::new(&[2, 1], 0..3);
        let mut squares = vec![0.0; cells.len()];
        cells.squares(0..3, &gradient, &mut squares);
        let scales = clipping.scales(&cells, &squares, &[true, true]);
        let scaled = value * scales[0];
        assert_eq!(scaled.is_finite(), value.is_finite(), "{clipping:?} of {value} gives {scaled}");
        if clipping == Clipping::NormPerTensor(1.0) {
            assert_eq!(scales[1], 1.0 / 3.0);
        }
    }
}

#[test]
fn the_largest_moment_does_not_hide_what_is_not_a_number() {
    for optimizer in all() {
        let mut server = Server::new(optimizer, &[1], 0..1);
        let mut parameters = [1.0];
        for gradient in [0.5, f32::NAN, 0.5] {
            server.step(&[true], 0.1, &mut parameters, &[gradient]);
        }
        assert!(parameters[0].is_nan(), "{optimizer:?}");
    }
}

/// The variance of a constant gradient falls to 0, where rounding may make it negative and its root NaN.
#[test]
fn centred_means_of_a_constant_gradient_stay_finite() {
    let len = 1000;
    let optimizer = RmsProp::new().centered(true).momentum(0.0).alpha(0.5);
    let mut server = Server::new(optimizer.into(), &[len], 0..len);
    let mut parameters = vec![0.0; len];
    let gradient: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
    for _ in 0..200 {
        server.step(&[true], 1e-3, &mut parameters, &gradient);
    }
    assert!(parameters.iter().all(|parameter| parameter.is_finite()));
}
