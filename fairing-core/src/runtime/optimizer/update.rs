//! What a server does with gradients: the weighted mean over ranks, then the optimizer's update.

use std::ops::Range;

use super::Optimizer;
use super::clipping::Clipping;
use super::settings::{AdaGrad, Adam, AdamW, Moments, RmsProp, Sgd};
use super::wide::{self, Loop};

/// The optimizer of one server, with its state for that server's range of the flat vector.
///
/// Every element is treated by itself, so that the numbers do not depend on where shards and chunks begin.
#[derive(Debug)]
pub(crate) struct ShardOptimizer {
    optimizer: Optimizer,
    pieces: Vec<Piece>,
    /// Up to three numbers per element, such as Adam's moments; empty where the optimizer needs fewer.
    state: [Vec<f32>; 3],
}

/// The part of one trained tensor that lies in the shard.
#[derive(Debug)]
struct Piece {
    range: Range<usize>,
    /// Rounds in which the tensor had a gradient. burn counts per tensor, and Adam's bias correction depends on it.
    steps: i32,
}

/// The numbers with which one averaged gradient is applied. Several may be open at a time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Round {
    /// One per piece; `None` if the tensor has no gradient.
    steps: Vec<Option<Step>>,
    /// Whether the scales of a clipping by norm are still to come.
    unscaled: bool,
}

impl Round {
    /// Scales the gradient of each piece, as `Clipping::scales` says of its tensor.
    ///
    /// # Shapes
    ///
    /// - `scales`: one per piece of the shard.
    ///
    /// # Panics
    ///
    /// If there are more or fewer.
    pub(crate) fn scale(&mut self, scales: impl IntoIterator<Item = f32>) {
        let mut scales = scales.into_iter();
        for step in &mut self.steps {
            let scale = scales.next().expect("one scale per piece");
            if let Some(step) = step {
                step.scale = scale;
            }
        }
        assert!(scales.next().is_none(), "more scales than pieces");
        self.unscaled = false;
    }
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
        let used = match optimizer {
            Optimizer::Sgd(sgd) => [sgd.momentum.is_some(), false, false],
            Optimizer::Adam(Adam { moments, .. }) | Optimizer::AdamW(AdamW { moments, .. }) => {
                [true, true, moments.amsgrad]
            }
            Optimizer::RmsProp(rms_prop) => [true, rms_prop.centered, rms_prop.momentum > 0.0],
            Optimizer::AdaGrad(_) => [true, false, false],
        };
        Self {
            optimizer,
            pieces: tensors.into_iter().map(|range| Piece { range, steps: 0 }).collect(),
            state: used.map(|used| vec![0.0; if used { len } else { 0 }]),
        }
    }

    /// Opens a round in which exactly the tensors marked in `present` have a gradient.
    ///
    /// It counts the step of these tensors. Rounds that are open together may be applied in any order, but to one element
    /// not at the same time.
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
        let mut steps = Vec::with_capacity(present.len());
        for (piece, &present) in self.pieces.iter_mut().zip(present) {
            piece.steps += i32::from(present);
            steps.push(present.then(|| Step::new(&self.optimizer, piece.steps, learning_rate)));
        }
        Round { steps, unscaled: self.optimizer.needs_norms() }
    }

    /// Updates the part `range` of the shard; in each round every element belongs to exactly one call.
    ///
    /// A tensor without gradient keeps its parameters and its state.
    ///
    /// # Shapes
    ///
    /// - `round`: of this optimizer's [`begin_round`](ShardOptimizer::begin_round).
    /// - `parameters`, `gradient`: `[range.len()]`, the elements of `range`.
    ///
    /// # Panics
    ///
    /// If a slice has another length, `range` reaches beyond the shard, or the round lacks the scales that the optimizer
    /// [needs](Optimizer::needs_norms).
    pub(crate) fn apply(&mut self, round: &Round, range: Range<usize>, parameters: &mut [f32], gradient: &[f32]) {
        assert_eq!((parameters.len(), gradient.len()), (range.len(), range.len()), "slices of another range");
        assert!(range.end <= self.pieces.last().map_or(0, |piece| piece.range.end), "{range:?} is beyond the shard");
        assert_eq!(round.steps.len(), self.pieces.len(), "a round of another shard");
        assert!(!round.unscaled, "a round whose norms were not clipped");
        let from = self.pieces.partition_point(|piece| piece.range.end <= range.start);
        for (piece, step) in self.pieces.iter().zip(&round.steps).skip(from) {
            if piece.range.start >= range.end {
                break;
            }
            let Some(step) = *step else { continue };
            let part = piece.range.start.max(range.start)..piece.range.end.min(range.end);
            let chunk = part.start - range.start..part.end - range.start;
            let state = self.state.each_mut().map(|state| within(state, part.clone()));
            wide::run(Update { step, parameters: &mut parameters[chunk.clone()], gradient: &gradient[chunk], state });
        }
    }
}

/// The elements `range` of a state, of which an optimizer without it has none.
#[inline(always)]
fn within(state: &mut [f32], range: Range<usize>) -> &mut [f32] {
    state.get_mut(range).unwrap_or_default()
}

/// The weighted sum of one gradient per rank, added in the order of `parts`.
///
/// # Shapes
///
/// - each part: a weight and `[out.len()]` values. Without parts, `out` becomes 0.
///
/// # Panics
///
/// If a part has another length.
pub(crate) fn mean<'a>(out: &mut [f32], parts: impl IntoIterator<Item = (f32, &'a [f32])>) {
    let len = out.len();
    let mut parts = parts.into_iter().inspect(|(_, part)| assert_eq!(part.len(), len, "a part of another length"));
    // Two at a time: the sum is read and written half as often, and each element's additions stay in order.
    match (parts.next(), parts.next()) {
        (None, _) => out.fill(0.0),
        (Some((weight, part)), None) => {
            out.iter_mut().zip(part).for_each(|(out, value)| *out = weight * value);
        }
        (Some((weight, part)), Some((next_weight, next))) => {
            for ((out, value), next) in out.iter_mut().zip(part).zip(next) {
                *out = weight * value + next_weight * next;
            }
        }
    }
    while let Some((weight, part)) = parts.next() {
        match parts.next() {
            None => out.iter_mut().zip(part).for_each(|(out, value)| *out += weight * value),
            Some((next_weight, next)) => {
                for ((out, value), next) in out.iter_mut().zip(part).zip(next) {
                    *out = *out + weight * value + next_weight * next;
                }
            }
        }
    }
}

/// The numbers of one round and tensor, computed once in burn's precision.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// What clipping multiplies the gradient by.
    scale: f32,
    /// The largest size of an element that clipping leaves.
    limit: f32,
    /// What of the parameter is added to its gradient.
    weight_decay: f32,
    rule: Rule,
}

/// How a parameter moves, given its clipped and decayed gradient.
#[derive(Debug, Clone, Copy)]
enum Rule {
    Sgd {
        learning_rate: f32,
    },
    Momentum {
        learning_rate: f32,
        keep: f32,
        add: f32,
    },
    Nesterov {
        learning_rate: f32,
        keep: f32,
        add: f32,
        momentum: f32,
    },
    Adam {
        learning_rate: f32,
        beta_1: f32,
        beta_2: f32,
        amsgrad: bool,
        /// Both bias corrections in one factor, and epsilon scaled to match.
        factor: f32,
        epsilon: f32,
    },
    AdamW {
        learning_rate: f32,
        shrink: f32,
        beta_1: f32,
        beta_2: f32,
        amsgrad: bool,
        correction_1: f32,
        correction_2: f32,
        epsilon: f32,
    },
    RmsProp {
        learning_rate: f32,
        alpha: f32,
        epsilon: f32,
        centered: bool,
        momentum: f32,
    },
    AdaGrad {
        learning_rate: f32,
        epsilon: f32,
    },
}

impl Step {
    /// `steps` is the number of the tensor's gradients so far, this one included.
    fn new(optimizer: &Optimizer, steps: i32, learning_rate: f64) -> Self {
        let rate = learning_rate as f32;
        let (weight_decay, rule) = match *optimizer {
            Optimizer::Sgd(Sgd { momentum: None, weight_decay, .. }) => {
                (weight_decay, Rule::Sgd { learning_rate: rate })
            }
            Optimizer::Sgd(Sgd { momentum: Some(momentum), dampening, nesterov, weight_decay, .. }) => {
                let momentum = momentum as f32;
                // The first gradient is the velocity, undampened.
                let (keep, add) = if steps == 1 { (0.0, 1.0) } else { (momentum, (1.0 - dampening) as f32) };
                let rule = match nesterov {
                    false => Rule::Momentum { learning_rate: rate, keep, add },
                    true => Rule::Nesterov { learning_rate: rate, keep, add, momentum },
                };
                (weight_decay, rule)
            }
            Optimizer::Adam(Adam { moments, weight_decay, .. }) => {
                let Moments { beta_1, beta_2, epsilon, amsgrad } = moments;
                let correction_2 = (1.0 - beta_2.powi(steps)).sqrt();
                let rule = Rule::Adam {
                    learning_rate: rate,
                    beta_1,
                    beta_2,
                    amsgrad,
                    factor: correction_2 / (1.0 - beta_1.powi(steps)),
                    epsilon: epsilon * correction_2,
                };
                (weight_decay, rule)
            }
            Optimizer::AdamW(AdamW { moments, weight_decay, .. }) => {
                let Moments { beta_1, beta_2, epsilon, amsgrad } = moments;
                let rule = Rule::AdamW {
                    learning_rate: rate,
                    shrink: (1.0 - learning_rate * f64::from(weight_decay)) as f32,
                    beta_1,
                    beta_2,
                    amsgrad,
                    correction_1: 1.0 - beta_1.powi(steps),
                    correction_2: 1.0 - beta_2.powi(steps),
                    epsilon,
                };
                (0.0, rule)
            }
            Optimizer::RmsProp(RmsProp { alpha, momentum, epsilon, centered, weight_decay, .. }) => {
                (weight_decay, Rule::RmsProp { learning_rate: rate, alpha, epsilon, centered, momentum })
            }
            Optimizer::AdaGrad(AdaGrad { lr_decay, epsilon, weight_decay, .. }) => {
                let learning_rate = (learning_rate / (1.0 + f64::from(steps - 1) * lr_decay)) as f32;
                (weight_decay, Rule::AdaGrad { learning_rate, epsilon })
            }
        };
        let limit = match optimizer.clipping() {
            Some(Clipping::Value(value)) => value,
            _ => f32::INFINITY,
        };
        Self { scale: 1.0, limit, weight_decay, rule }
    }

    /// Whether the rule wants another gradient than the averaged one.
    #[inline(always)]
    fn prepares(&self) -> bool {
        self.scale != 1.0 || self.limit != f32::INFINITY || self.weight_decay != 0.0
    }

    /// Writes the clipped and decayed gradient to `out`.
    #[inline(always)]
    fn prepare(&self, parameters: &[f32], gradient: &[f32], out: &mut [f32]) {
        let Self { scale, limit, weight_decay, .. } = *self;
        for (out, gradient) in out.iter_mut().zip(gradient) {
            let scaled = gradient * scale;
            let above = if scaled > limit { limit } else { scaled };
            *out = if above < -limit { -limit } else { above };
        }
        // Without a penalty parameters are left alone, so that an infinite one makes no NaN.
        if weight_decay != 0.0 {
            out.iter_mut().zip(parameters).for_each(|(out, parameter)| *out += parameter * weight_decay);
        }
    }
}

/// One step of one piece.
struct Update<'a> {
    step: Step,
    parameters: &'a mut [f32],
    gradient: &'a [f32],
    state: [&'a mut [f32]; 3],
}

/// Elements prepared at a time; 2 KiB stay in the first-level cache.
const PREPARED: usize = 512;

impl Loop for Update<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { step, parameters, gradient, state } = self;
        let prepares = step.prepares();
        let mut prepared = [0.0; PREPARED];
        let stride = if prepares { PREPARED } else { parameters.len() };
        let mut start = 0;
        let [first, second, third] = state;
        while start < parameters.len() {
            let part = start..(start + stride).min(parameters.len());
            start = part.end;
            let parameters = &mut parameters[part.clone()];
            let mut gradient = &gradient[part.clone()];
            if prepares {
                let prepared = &mut prepared[..part.len()];
                step.prepare(parameters, gradient, prepared);
                gradient = prepared;
            }
            let (first, second) = (within(first, part.clone()), within(second, part.clone()));
            step.rule.update(parameters, gradient, first, second, within(third, part));
        }
    }
}

impl Rule {
    // One loop per rule, without a branch inside, so that each is vectorised.
    #[inline(always)]
    fn update(
        &self,
        parameters: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        third: &mut [f32],
    ) {
        let elements = parameters.iter_mut().zip(gradient);
        match *self {
            Self::Sgd { learning_rate } => {
                elements.for_each(|(parameter, gradient)| *parameter -= gradient * learning_rate);
            }
            Self::Momentum { learning_rate, keep, add } => {
                for ((parameter, gradient), velocity) in elements.zip(first) {
                    *velocity = gradient * add + *velocity * keep;
                    *parameter -= *velocity * learning_rate;
                }
            }
            Self::Nesterov { learning_rate, keep, add, momentum } => {
                for ((parameter, gradient), velocity) in elements.zip(first) {
                    *velocity = gradient * add + *velocity * keep;
                    *parameter -= (*velocity * momentum + gradient) * learning_rate;
                }
            }
            Self::Adam { learning_rate, beta_1, beta_2, amsgrad, factor, epsilon } => {
                let elements = elements.zip(first).zip(second);
                let step = |moment: f32, square: f32| moment * factor / (square.sqrt() + epsilon) * learning_rate;
                if amsgrad {
                    for ((((parameter, &gradient), first), second), largest) in elements.zip(third) {
                        follow(first, second, gradient, beta_1, beta_2);
                        *largest = larger(*largest, *second);
                        *parameter -= step(*first, *largest);
                    }
                } else {
                    for (((parameter, &gradient), first), second) in elements {
                        follow(first, second, gradient, beta_1, beta_2);
                        *parameter -= step(*first, *second);
                    }
                }
            }
            Self::AdamW { learning_rate, shrink, beta_1, beta_2, amsgrad, correction_1, correction_2, epsilon } => {
                let elements = elements.zip(first).zip(second);
                let step = |moment: f32, square: f32| {
                    moment / correction_1 / ((square / correction_2).sqrt() + epsilon) * learning_rate
                };
                if amsgrad {
                    for ((((parameter, &gradient), first), second), largest) in elements.zip(third) {
                        follow(first, second, gradient, beta_1, beta_2);
                        *largest = larger(*largest, *second);
                        *parameter = *parameter * shrink - step(*first, *largest);
                    }
                } else {
                    for (((parameter, &gradient), first), second) in elements {
                        follow(first, second, gradient, beta_1, beta_2);
                        *parameter = *parameter * shrink - step(*first, *second);
                    }
                }
            }
            Self::RmsProp { learning_rate, alpha, epsilon, centered, momentum } => {
                let follow = |mean: &mut f32, value: f32| *mean = *mean * alpha + value * (1.0 - alpha);
                let quotient = |gradient: f32, square: f32| gradient / (square.sqrt() + epsilon);
                // Of the gradient around its mean; rounding may make it negative where they are equal.
                let variance = |square: f32, mean: f32| not_negative(square - mean * mean);
                let elements = elements.zip(first);
                match (centered, momentum > 0.0) {
                    (false, false) => {
                        for ((parameter, &gradient), square) in elements {
                            follow(square, gradient * gradient);
                            *parameter -= quotient(gradient, *square) * learning_rate;
                        }
                    }
                    (false, true) => {
                        for (((parameter, &gradient), square), velocity) in elements.zip(third) {
                            follow(square, gradient * gradient);
                            *velocity = *velocity * momentum + quotient(gradient, *square);
                            *parameter -= *velocity * learning_rate;
                        }
                    }
                    (true, false) => {
                        for (((parameter, &gradient), square), mean) in elements.zip(second) {
                            follow(square, gradient * gradient);
                            follow(mean, gradient);
                            *parameter -= quotient(gradient, variance(*square, *mean)) * learning_rate;
                        }
                    }
                    (true, true) => {
                        for ((((parameter, &gradient), square), mean), velocity) in elements.zip(second).zip(third) {
                            follow(square, gradient * gradient);
                            follow(mean, gradient);
                            *velocity = *velocity * momentum + quotient(gradient, variance(*square, *mean));
                            *parameter -= *velocity * learning_rate;
                        }
                    }
                }
            }
            Self::AdaGrad { learning_rate, epsilon } => {
                for ((parameter, gradient), sum) in elements.zip(first) {
                    *sum += gradient * gradient;
                    *parameter -= gradient / (sum.sqrt() + epsilon) * learning_rate;
                }
            }
        }
    }
}

/// Adam's moments after one more gradient.
#[inline(always)]
fn follow(first: &mut f32, second: &mut f32, gradient: f32, beta_1: f32, beta_2: f32) {
    *first = *first * beta_1 + gradient * (1.0 - beta_1);
    *second = *second * beta_2 + gradient * gradient * (1.0 - beta_2);
}

/// The larger number, or NaN if `value` is; `f32::max` would hide it.
#[inline(always)]
fn larger(largest: f32, value: f32) -> f32 {
    if largest >= value { largest } else { value }
}

/// NaN stays; `f32::max` would hide it.
#[inline(always)]
fn not_negative(value: f32) -> f32 {
    if value < 0.0 { 0.0 } else { value }
}
