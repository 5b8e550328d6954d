//! The optimizers, which live on the parameter servers and know nothing of burn.
//!
//! [`Optimizer`] is what a user asks for and travels in the join message; `ShardOptimizer` is what one server does with
//! it for its part of the flat vector. The formulas, their order of operations and their precision are those of burn 0.22,
//! so that a training can be taken in and out of fairing without a change of its numbers.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// How parameters follow their gradient.
///
/// The learning rate is no part of it: it comes with each step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Optimizer {
    /// Stochastic gradient descent.
    Sgd(Sgd),
    /// Adam, with weight decay as a part of the gradient.
    Adam(Adam),
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
}

/// A setting with which no optimizer can work. Returned by [`Optimizer::validate`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimizerError {
    /// A number is outside its range, or not a number.
    #[error("`{setting}` of `{optimizer}` is {value}, but must be {range}")]
    OutOfRange {
        /// Which optimizer, as its type is spelled.
        optimizer: &'static str,
        /// Which setting, as its setter is spelled.
        setting: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be, in words.
        range: &'static str,
    },
}

impl Optimizer {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::OutOfRange`] names the first setting that is not a number, negative, infinite or otherwise
    /// impossible.
    pub fn validate(&self) -> Result<(), OptimizerError> {
        match self {
            Self::Sgd(sgd) => {
                let check = Check("Sgd");
                if let Some(momentum) = sgd.momentum {
                    check.fraction("momentum", momentum)?;
                }
                check.fraction("dampening", sgd.dampening)?;
                check.not_negative("weight_decay", sgd.weight_decay)
            }
            Self::Adam(Adam { moments, weight_decay }) => Check("Adam").adaptive(moments, *weight_decay),
            Self::AdamW(AdamW { moments, weight_decay }) => Check("AdamW").adaptive(moments, *weight_decay),
        }
    }
}

/// The ranges; holds the optimizer's name for the message.
struct Check(&'static str);

impl Check {
    fn adaptive(&self, moments: &Moments, weight_decay: f32) -> Result<(), OptimizerError> {
        for beta in [moments.beta_1, moments.beta_2] {
            self.that((0.0..1.0).contains(&beta), "betas", beta, "at least 0 and below 1")?;
        }
        // With 0, an element whose gradient was always 0 would become NaN.
        let epsilon = moments.epsilon;
        self.that(epsilon > 0.0 && epsilon.is_finite(), "epsilon", epsilon, "finite and above 0")?;
        self.not_negative("weight_decay", weight_decay)
    }

    fn fraction(&self, setting: &'static str, value: f64) -> Result<(), OptimizerError> {
        self.that((0.0..=1.0).contains(&value), setting, value, "at least 0 and at most 1")
    }

    fn not_negative(&self, setting: &'static str, value: f32) -> Result<(), OptimizerError> {
        self.that(value >= 0.0 && value.is_finite(), setting, value, "finite and at least 0")
    }

    fn that(
        &self,
        holds: bool,
        setting: &'static str,
        value: impl ToString,
        range: &'static str,
    ) -> Result<(), OptimizerError> {
        if holds {
            return Ok(());
        }
        Err(OptimizerError::OutOfRange { optimizer: self.0, setting, value: value.to_string(), range })
    }
}

/// Stochastic gradient descent, by default without momentum and weight decay.
///
/// # Source
///
/// `burn::optim::SgdConfig`, without Nesterov's momentum and gradient clipping.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{Optimizer, Sgd};
///
/// let optimizer = Optimizer::from(Sgd::new().momentum(0.9).weight_decay(1e-4));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sgd {
    momentum: Option<f64>,
    dampening: f64,
    weight_decay: f32,
}

impl Sgd {
    /// Plain gradient descent.
    pub fn new() -> Self {
        Self { momentum: None, dampening: 0.1, weight_decay: 0.0 }
    }

    /// Moves along a velocity, of which each step keeps the share `momentum`, from 0 to 1.
    #[must_use]
    pub fn momentum(self, momentum: f64) -> Self {
        Self { momentum: Some(momentum), ..self }
    }

    /// Adds only `1 - dampening` of a gradient to the velocity, except of a tensor's first; default 0.1 as in burn (PyTorch: 0).
    ///
    /// It has no effect without [`momentum`](Sgd::momentum).
    #[must_use]
    pub fn dampening(self, dampening: f64) -> Self {
        Self { dampening, ..self }
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }
}

impl Default for Sgd {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Sgd> for Optimizer {
    fn from(sgd: Sgd) -> Self {
        Self::Sgd(sgd)
    }
}

/// What Adam and AdamW have in common.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Moments {
    beta_1: f32,
    beta_2: f32,
    epsilon: f32,
}

impl Default for Moments {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-5 }
    }
}

/// Adam, by default without weight decay.
///
/// # Source
///
/// Kingma and Ba, ICLR 2015; `burn::optim::AdamConfig`, without AMSGrad and gradient clipping.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{Adam, Optimizer};
///
/// let optimizer = Optimizer::from(Adam::new().betas(0.9, 0.99));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Adam {
    moments: Moments,
    weight_decay: f32,
}

impl Adam {
    /// Adam with burn's defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shares of the first and second moment that a step keeps; default 0.9 and 0.999.
    #[must_use]
    pub fn betas(self, beta_1: f32, beta_2: f32) -> Self {
        Self { moments: Moments { beta_1, beta_2, ..self.moments }, ..self }
    }

    /// Keeps the division by the second moment finite; default 1e-5 as in burn (PyTorch: 1e-8).
    #[must_use]
    pub fn epsilon(self, epsilon: f32) -> Self {
        Self { moments: Moments { epsilon, ..self.moments }, ..self }
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }
}

impl From<Adam> for Optimizer {
    fn from(adam: Adam) -> Self {
        Self::Adam(adam)
    }
}

/// Adam with decoupled weight decay.
///
/// # Source
///
/// Loshchilov and Hutter, ICLR 2019; `burn::optim::AdamWConfig`, without AMSGrad, cautious decay and gradient clipping.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{AdamW, Optimizer};
///
/// let optimizer = Optimizer::from(AdamW::new().weight_decay(0.01));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    moments: Moments,
    weight_decay: f32,
}

impl AdamW {
    /// AdamW with burn's defaults.
    pub fn new() -> Self {
        Self { moments: Moments::default(), weight_decay: 1e-4 }
    }

    /// Shares of the first and second moment that a step keeps; default 0.9 and 0.999.
    #[must_use]
    pub fn betas(self, beta_1: f32, beta_2: f32) -> Self {
        Self { moments: Moments { beta_1, beta_2, ..self.moments }, ..self }
    }

    /// Keeps the division by the second moment finite; default 1e-5 as in burn (PyTorch: 1e-8).
    #[must_use]
    pub fn epsilon(self, epsilon: f32) -> Self {
        Self { moments: Moments { epsilon, ..self.moments }, ..self }
    }

    /// Shrinks the parameter by `weight_decay` times the learning rate in each step; default 1e-4 as in burn (PyTorch: 1e-2).
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }
}

impl Default for AdamW {
    fn default() -> Self {
        Self::new()
    }
}

impl From<AdamW> for Optimizer {
    fn from(adam_w: AdamW) -> Self {
        Self::AdamW(adam_w)
    }
}

/// The optimizer of one server, with its state for that server's range of the flat vector.
///
/// Every element is treated by itself, so that the numbers do not depend on where shards and chunks begin.
#[derive(Debug)]
pub(crate) struct ShardOptimizer {
    optimizer: Optimizer,
    pieces: Vec<Piece>,
    /// Velocity or first moment; empty where the optimizer has none.
    first: Vec<f32>,
    /// Second moment; empty where the optimizer has none.
    second: Vec<f32>,
}

/// The part of one trained tensor that lies in the shard.
#[derive(Debug)]
struct Piece {
    range: Range<usize>,
    /// Rounds in which the tensor had a gradient. burn counts per tensor, and Adam's bias correction depends on it.
    steps: i32,
}

/// What to do in one round, per piece; `None` if the tensor has no gradient in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Round {
    steps: Vec<Option<Step>>,
}

impl ShardOptimizer {
    /// `tensors` are the parts of the trained tensors that lie in the shard, in order and relative to its start.
    ///
    /// # Panics
    ///
    /// If `tensors` do not follow each other from 0 without a gap.
    pub(crate) fn new(optimizer: Optimizer, tensors: Vec<Range<usize>>) -> Self {
        let mut len = 0;
        for range in &tensors {
            assert!(range.start == len && range.end >= len, "tensors do not tile the shard: {tensors:?}");
            len = range.end;
        }
        let (first, second) = match optimizer {
            Optimizer::Sgd(Sgd { momentum: None, .. }) => (0, 0),
            Optimizer::Sgd(_) => (len, 0),
            Optimizer::Adam(_) | Optimizer::AdamW(_) => (len, len),
        };
        Self {
            optimizer,
            pieces: tensors.into_iter().map(|range| Piece { range, steps: 0 }).collect(),
            first: vec![0.0; first],
            second: vec![0.0; second],
        }
    }

    /// Opens a round in which exactly the tensors marked in `present` have a gradient.
    ///
    /// # Shapes
    ///
    /// - `present`: one per tensor given to [`ShardOptimizer::new`].
    ///
    /// # Panics
    ///
    /// If `present` has another length.
    pub(crate) fn begin_round(&mut self, present: &[bool], learning_rate: f64) -> Round {
        assert_eq!(present.len(), self.pieces.len(), "presence bits of another layout");
        let step = |(piece, &present): (&mut Piece, &bool)| {
            piece.steps += i32::from(present);
            present.then(|| Step::new(&self.optimizer, piece.steps, learning_rate))
        };
        Round { steps: self.pieces.iter_mut().zip(present).map(step).collect() }
    }

    /// Updates the part `range` of the shard; in each round every element belongs to exactly one call.
    ///
    /// A tensor without gradient keeps its parameters and its state.
    ///
    /// # Shapes
    ///
    /// - `parameters`, `gradient`: `[range.len()]`, the elements of `range`.
    ///
    /// # Panics
    ///
    /// If a slice has another length, or `range` reaches beyond the shard.
    pub(crate) fn apply(&mut self, round: &Round, range: Range<usize>, parameters: &mut [f32], gradient: &[f32]) {
        assert_eq!((parameters.len(), gradient.len()), (range.len(), range.len()), "slices of another range");
        assert!(range.end <= self.pieces.last().map_or(0, |piece| piece.range.end), "{range:?} is beyond the shard");
        let from = self.pieces.partition_point(|piece| piece.range.end <= range.start);
        let pieces = self.pieces[from..].iter().zip(&round.steps[from..]);
        for (piece, step) in pieces.take_while(|(piece, _)| piece.range.start < range.end) {
            let Some(step) = step else { continue };
            let part = piece.range.start.max(range.start)..piece.range.end.min(range.end);
            let chunk = part.start - range.start..part.end - range.start;
            let (first, second) = (self.first.get_mut(part.clone()), self.second.get_mut(part));
            let (first, second) = (first.unwrap_or_default(), second.unwrap_or_default());
            step.apply(&mut parameters[chunk.clone()], &gradient[chunk], first, second);
        }
    }
}

/// The numbers of one round and tensor, computed once in burn's precision.
#[derive(Debug, Clone, Copy)]
enum Step {
    Sgd {
        learning_rate: f32,
        weight_decay: f32,
    },
    Momentum {
        learning_rate: f32,
        weight_decay: f32,
        keep: f32,
        add: f32,
    },
    Adam {
        learning_rate: f32,
        weight_decay: f32,
        beta_1: f32,
        beta_2: f32,
        /// Both bias corrections in one factor, and epsilon scaled to match.
        factor: f32,
        epsilon: f32,
    },
    AdamW {
        learning_rate: f32,
        shrink: f32,
        beta_1: f32,
        beta_2: f32,
        correction_1: f32,
        correction_2: f32,
        epsilon: f32,
    },
}

impl Step {
    /// `steps` is the number of the tensor's gradients so far, this one included.
    fn new(optimizer: &Optimizer, steps: i32, learning_rate: f64) -> Self {
        let rate = learning_rate as f32;
        match *optimizer {
            Optimizer::Sgd(Sgd { momentum: None, weight_decay, .. }) => Self::Sgd { learning_rate: rate, weight_decay },
            Optimizer::Sgd(Sgd { momentum: Some(momentum), dampening, weight_decay }) => {
                // The first gradient is the velocity, undampened.
                let (keep, add) = if steps == 1 { (0.0, 1.0) } else { (momentum as f32, (1.0 - dampening) as f32) };
                Self::Momentum { learning_rate: rate, weight_decay, keep, add }
            }
            Optimizer::Adam(Adam { moments: Moments { beta_1, beta_2, epsilon }, weight_decay }) => {
                let correction_2 = (1.0 - beta_2.powi(steps)).sqrt();
                Self::Adam {
                    learning_rate: rate,
                    weight_decay,
                    beta_1,
                    beta_2,
                    factor: correction_2 / (1.0 - beta_1.powi(steps)),
                    epsilon: epsilon * correction_2,
                }
            }
            Optimizer::AdamW(AdamW { moments: Moments { beta_1, beta_2, epsilon }, weight_decay }) => Self::AdamW {
                learning_rate: rate,
                shrink: (1.0 - learning_rate * f64::from(weight_decay)) as f32,
                beta_1,
                beta_2,
                correction_1: 1.0 - beta_1.powi(steps),
                correction_2: 1.0 - beta_2.powi(steps),
                epsilon,
            },
        }
    }

    fn apply(&self, parameters: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let elements = parameters.iter_mut().zip(gradient);
        match *self {
            Self::Sgd { learning_rate, weight_decay } => {
                for (parameter, &gradient) in elements {
                    *parameter -= decayed(gradient, *parameter, weight_decay) * learning_rate;
                }
            }
            Self::Momentum { learning_rate, weight_decay, keep, add } => {
                for ((parameter, &gradient), velocity) in elements.zip(first) {
                    let gradient = decayed(gradient, *parameter, weight_decay);
                    *velocity = gradient * add + *velocity * keep;
                    *parameter -= *velocity * learning_rate;
                }
            }
            Self::Adam { learning_rate, weight_decay, beta_1, beta_2, factor, epsilon } => {
                for (((parameter, &gradient), first), second) in elements.zip(first).zip(second) {
                    let gradient = decayed(gradient, *parameter, weight_decay);
                    *first = *first * beta_1 + gradient * (1.0 - beta_1);
                    *second = *second * beta_2 + gradient * gradient * (1.0 - beta_2);
                    *parameter -= *first * factor / (second.sqrt() + epsilon) * learning_rate;
                }
            }
            Self::AdamW { learning_rate, shrink, beta_1, beta_2, correction_1, correction_2, epsilon } => {
                for (((parameter, &gradient), first), second) in elements.zip(first).zip(second) {
                    *first = *first * beta_1 + gradient * (1.0 - beta_1);
                    *second = *second * beta_2 + gradient * gradient * (1.0 - beta_2);
                    let update = *first / correction_1 / ((*second / correction_2).sqrt() + epsilon);
                    *parameter = *parameter * shrink - update * learning_rate;
                }
            }
        }
    }
}

/// The gradient with the penalty's. Without a penalty it is left alone, so that an infinite parameter makes no NaN.
#[inline(always)]
fn decayed(gradient: f32, parameter: f32, weight_decay: f32) -> f32 {
    if weight_decay == 0.0 { gradient } else { parameter * weight_decay + gradient }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::shard::shard;

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
    }

    #[test]
    fn defaults_are_valid() {
        for optimizer in [Sgd::new().into(), Adam::new().into(), AdamW::new().into(), Sgd::new().momentum(0.9).into()] {
            let optimizer: Optimizer = optimizer;
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
                let mut shard = ShardOptimizer::new(optimizer, vec![0..1, 1..2]);
                let mut parameters = [1.0, -2.0];
                for &present in rounds {
                    let round = shard.begin_round(&[present; 2], 0.1);
                    shard.apply(&round, 0..2, &mut parameters, &[0.5, 0.25]);
                }
                parameters
            };
            assert_eq!(run(&[true, false, false, true]), run(&[true, true]), "{optimizer:?}");
        }
    }

    fn all() -> [Optimizer; 5] {
        [
            Sgd::new().weight_decay(1e-2).into(),
            Sgd::new().momentum(0.9).into(),
            Sgd::new().momentum(0.8).dampening(0.0).weight_decay(1e-3).into(),
            Adam::new().weight_decay(1e-2).into(),
            AdamW::new().betas(0.8, 0.99).epsilon(1e-8).into(),
        ]
    }

    const ROUNDS: usize = 4;

    /// Values that look random, the same for the same element and round wherever the element is stored.
    fn noise(element: usize, round: usize) -> f32 {
        let hash = (element * ROUNDS + round + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (hash >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Trains with `servers` shards, each taking its gradient in chunks that end at `cuts`; bits of the final parameters.
    fn train(optimizer: Optimizer, tensors: &[usize], present: &[bool], servers: usize, cuts: &[usize]) -> Vec<u32> {
        let len: usize = tensors.iter().sum();
        let mut parameters: Vec<f32> = (0..len).map(|element| noise(element, 0)).collect();
        for index in 0..servers {
            let range = shard(len, index, servers);
            let (mut pieces, mut members, mut start) = (Vec::new(), Vec::new(), 0);
            for (tensor, &size) in tensors.iter().enumerate() {
                let (from, to) = (start.max(range.start), (start + size).min(range.end));
                if from < to {
                    pieces.push(from - range.start..to - range.start);
                    members.push(tensor);
                }
                start += size;
            }
            let mut shard = ShardOptimizer::new(optimizer, pieces);
            for round in 0..ROUNDS {
                let bits: Vec<bool> = members.iter().map(|tensor| present[tensor * ROUNDS + round]).collect();
                let round_of_shard = shard.begin_round(&bits, 0.01);
                let mut borders: Vec<usize> = cuts.iter().map(|cut| cut % (range.len() + 1)).collect();
                borders.extend([0, range.len()]);
                borders.sort_unstable();
                for border in borders.windows(2) {
                    let (from, to) = (border[0], border[1]);
                    let flat = range.start + from..range.start + to;
                    let gradient: Vec<f32> = flat.clone().map(|element| noise(element, round + 1)).collect();
                    shard.apply(&round_of_shard, from..to, &mut parameters[flat], &gradient);
                }
            }
        }
        parameters.into_iter().map(f32::to_bits).collect()
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
    }
}
