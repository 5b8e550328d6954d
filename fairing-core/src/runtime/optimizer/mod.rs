//! The optimizers, which live on the parameter servers and know nothing of burn.
//!
//! [`Optimizer`] is what a user asks for and travels in the join message; `ShardOptimizer` is what one server does with
//! it for its part of the flat vector. The formulas, their order of operations and their precision are those of burn 0.22,
//! so that a training can be taken in and out of fairing without a change of its numbers.
//!
//! Every optimizer can clip the averaged gradient, by one of `clip_value`, `clip_norm_per_tensor` and `clip_global_norm`.
//!
//! # Learning rates
//!
//! The learning rate comes with each step, so a schedule belongs to the training loop, and burn's schedulers serve. Each
//! rank makes its own and steps it once per round; since all of them count the same rounds, they agree. A worker that is
//! started again brings its schedule to the round at which it goes on.
//!
//! ```
//! # #[cfg(feature = "burn")]
//! # fn example<B>(worker: &fairing_core::Worker, batches: Vec<Vec<B>>) -> anyhow::Result<()> {
//! # use burn::nn::{Linear, LinearConfig};
//! # use burn::tensor::Tensor;
//! # use fairing_core::prelude::*;
//! # let loss = |model: &Linear, batch: &[B]| {
//! #     model.forward(Tensor::<2>::ones([batch.len(), 4], worker.device())).mean()
//! # };
//! use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
//!
//! let model = LinearConfig::new(4, 2).init(worker.device());
//! let mut model = worker.join(model, Adam::new().clip_global_norm(1.0))?;
//! let schedule = CosineAnnealingLrSchedulerConfig::new(1e-3, 10_000).with_min_lr(1e-5);
//! let mut schedule = schedule.init().map_err(anyhow::Error::msg)?;
//! for _ in 0..worker.round() {
//!     schedule.step();
//! }
//! for batch in batches {
//!     let gradient = Gradient::mean(loss(&model, &batch).backward(), batch.len());
//!     model = worker.step(model, gradient, schedule.step().base())?;
//! }
//! # Ok(())
//! # }
//! ```

mod clipping;
mod settings;
mod update;
mod wide;

use serde::{Deserialize, Serialize};

pub(crate) use clipping::{Cells, Clipping};
pub use settings::{AdaGrad, Adam, AdamW, RmsProp, Sgd};
pub(crate) use update::{Round, ShardOptimizer, mean};

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
    /// Gradients divided by the root of their mean square.
    RmsProp(RmsProp),
    /// Gradients divided by the root of the sum of their squares.
    AdaGrad(AdaGrad),
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
            Self::Sgd(sgd) => sgd.validate(),
            Self::Adam(adam) => adam.validate(),
            Self::AdamW(adam_w) => adam_w.validate(),
            Self::RmsProp(rms_prop) => rms_prop.validate(),
            Self::AdaGrad(ada_grad) => ada_grad.validate(),
        }
    }

    /// How the averaged gradient is clipped, if it is.
    pub(crate) fn clipping(&self) -> Option<Clipping> {
        match self {
            Self::Sgd(sgd) => sgd.clipping,
            Self::Adam(adam) => adam.clipping,
            Self::AdamW(adam_w) => adam_w.clipping,
            Self::RmsProp(rms_prop) => rms_prop.clipping,
            Self::AdaGrad(ada_grad) => ada_grad.clipping,
        }
    }

    /// Whether the whole averaged gradient is needed before the first of its elements can be applied.
    pub(crate) fn needs_norms(&self) -> bool {
        matches!(self.clipping(), Some(Clipping::NormPerTensor(_) | Clipping::GlobalNorm(_)))
    }
}

/// The ranges; holds the optimizer's name for the message.
struct Check(&'static str);

impl Check {
    fn share(&self, setting: &'static str, value: f32) -> Result<(), OptimizerError> {
        self.that((0.0..1.0).contains(&value), setting, value, "at least 0 and below 1")
    }

    fn fraction<T: Into<f64> + ToString + Copy>(&self, setting: &'static str, value: T) -> Result<(), OptimizerError> {
        self.that((0.0..=1.0).contains(&value.into()), setting, value, "at least 0 and at most 1")
    }

    fn not_negative<T: Into<f64> + ToString + Copy>(
        &self,
        setting: &'static str,
        value: T,
    ) -> Result<(), OptimizerError> {
        let number: f64 = value.into();
        self.that(number >= 0.0 && number.is_finite(), setting, value, "finite and at least 0")
    }

    /// Of an epsilon, because with 0 an element whose gradient was always 0 would become NaN.
    fn above_0(&self, setting: &'static str, value: f32) -> Result<(), OptimizerError> {
        self.that(value > 0.0 && value.is_finite(), setting, value, "finite and above 0")
    }

    fn clipping(&self, clipping: Option<Clipping>) -> Result<(), OptimizerError> {
        match clipping {
            None => Ok(()),
            Some(Clipping::Value(value)) => self.above_0("clip_value", value),
            Some(Clipping::NormPerTensor(norm)) => self.above_0("clip_norm_per_tensor", norm),
            Some(Clipping::GlobalNorm(norm)) => self.above_0("clip_global_norm", norm),
        }
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

#[cfg(test)]
mod tests;
