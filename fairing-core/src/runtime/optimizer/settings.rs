//! What a user sets of each optimizer.

use serde::{Deserialize, Serialize};

use super::clipping::Clipping;
use super::{Check, Optimizer, OptimizerError};

/// The setters of the gradient's clipping, which every optimizer has.
macro_rules! clips {
    ($($optimizer:ident),+) => {$(
        impl $optimizer {
            /// Brings each element of the averaged gradient into `-value..=value`; by default nothing is clipped.
            ///
            /// Of the three kinds of clipping, the one asked for last holds.
            ///
            /// # Source
            ///
            /// `burn::grad_clipping::GradientClippingConfig::Value`.
            #[must_use]
            pub fn clip_value(self, value: f32) -> Self {
                Self { clipping: Some(Clipping::Value(value)), ..self }
            }

            /// Scales each tensor's averaged gradient down to the Euclidean norm `norm`, each by itself; by default
            /// nothing is clipped.
            ///
            /// Of the three kinds of clipping, the one asked for last holds. The servers have to wait for the whole
            /// gradient before they apply its first element.
            ///
            /// # Source
            ///
            /// `burn::grad_clipping::GradientClippingConfig::Norm`.
            #[must_use]
            pub fn clip_norm_per_tensor(self, norm: f32) -> Self {
                Self { clipping: Some(Clipping::NormPerTensor(norm)), ..self }
            }

            /// Scales the averaged gradient of all trained parameters together down to the Euclidean norm `norm`; by
            /// default nothing is clipped.
            ///
            /// Of the three kinds of clipping, the one asked for last holds. The servers have to wait for the whole
            /// gradient, and for each other, before they apply its first element.
            ///
            /// # Source
            ///
            /// `torch.nn.utils.clip_grad_norm_`.
            #[must_use]
            pub fn clip_global_norm(self, norm: f32) -> Self {
                Self { clipping: Some(Clipping::GlobalNorm(norm)), ..self }
            }
        }

        impl From<$optimizer> for Optimizer {
            fn from(settings: $optimizer) -> Self {
                Self::$optimizer(settings)
            }
        }
    )+};
}

clips!(Sgd, Adam, AdamW, RmsProp, AdaGrad);

/// Stochastic gradient descent, by default without momentum and weight decay.
///
/// # Source
///
/// `burn::optim::SgdConfig`.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{Optimizer, Sgd};
///
/// let optimizer = Optimizer::from(Sgd::new().momentum(0.9).nesterov(true).weight_decay(1e-4));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sgd {
    pub(super) momentum: Option<f64>,
    pub(super) dampening: f64,
    pub(super) nesterov: bool,
    pub(super) weight_decay: f32,
    pub(super) clipping: Option<Clipping>,
}

impl Sgd {
    /// Plain gradient descent.
    pub fn new() -> Self {
        Self { momentum: None, dampening: 0.1, nesterov: false, weight_decay: 0.0, clipping: None }
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

    /// Moves by the gradient plus `momentum` times the velocity, instead of by the velocity; default false.
    ///
    /// It has no effect without [`momentum`](Sgd::momentum).
    ///
    /// # Source
    ///
    /// Sutskever et al., ICML 2013; `burn::optim::momentum::MomentumConfig`.
    #[must_use]
    pub fn nesterov(self, nesterov: bool) -> Self {
        Self { nesterov, ..self }
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }

    pub(super) fn validate(&self) -> Result<(), OptimizerError> {
        let check = Check("Sgd");
        if let Some(momentum) = self.momentum {
            check.fraction("momentum", momentum)?;
        }
        check.fraction("dampening", self.dampening)?;
        check.not_negative("weight_decay", self.weight_decay)?;
        check.clipping(self.clipping)
    }
}

impl Default for Sgd {
    fn default() -> Self {
        Self::new()
    }
}

/// What Adam and AdamW have in common.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Moments {
    pub(super) beta_1: f32,
    pub(super) beta_2: f32,
    pub(super) epsilon: f32,
    /// Whether the update is divided by the largest second moment so far instead of by the last one.
    pub(super) amsgrad: bool,
}

impl Moments {
    fn validate(&self, check: &Check) -> Result<(), OptimizerError> {
        check.share("betas", self.beta_1)?;
        check.share("betas", self.beta_2)?;
        check.above_0("epsilon", self.epsilon)
    }
}

impl Default for Moments {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-5, amsgrad: false }
    }
}

/// Adam, by default without weight decay.
///
/// # Source
///
/// Kingma and Ba, ICLR 2015; `burn::optim::AdamConfig`.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{Adam, Optimizer};
///
/// let optimizer = Optimizer::from(Adam::new().betas(0.9, 0.99).clip_global_norm(1.0));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Adam {
    pub(super) moments: Moments,
    pub(super) weight_decay: f32,
    pub(super) clipping: Option<Clipping>,
}

impl Adam {
    /// Adam with burn's defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }

    pub(super) fn validate(&self) -> Result<(), OptimizerError> {
        let check = Check("Adam");
        self.moments.validate(&check)?;
        check.not_negative("weight_decay", self.weight_decay)?;
        check.clipping(self.clipping)
    }
}

/// Adam with decoupled weight decay.
///
/// # Source
///
/// Loshchilov and Hutter, ICLR 2019; `burn::optim::AdamWConfig`, without cautious decay.
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
    pub(super) moments: Moments,
    pub(super) weight_decay: f32,
    pub(super) clipping: Option<Clipping>,
}

impl AdamW {
    /// AdamW with burn's defaults.
    pub fn new() -> Self {
        Self { moments: Moments::default(), weight_decay: 1e-4, clipping: None }
    }

    /// Shrinks the parameter by `weight_decay` times the learning rate in each step; default 1e-4 as in burn (PyTorch: 1e-2).
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }

    pub(super) fn validate(&self) -> Result<(), OptimizerError> {
        let check = Check("AdamW");
        self.moments.validate(&check)?;
        check.not_negative("weight_decay", self.weight_decay)?;
        check.clipping(self.clipping)
    }
}

impl Default for AdamW {
    fn default() -> Self {
        Self::new()
    }
}

/// The setters of the moments, which Adam and AdamW have.
macro_rules! adapts {
    ($($optimizer:ident),+) => {$(
        impl $optimizer {
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

            /// Divides by the largest second moment so far instead of by the last one; default false.
            ///
            /// It costs the servers one more number per parameter.
            ///
            /// # Source
            ///
            /// Reddi et al., ICLR 2018; `amsgrad` of burn's configurations.
            #[must_use]
            pub fn amsgrad(self, amsgrad: bool) -> Self {
                Self { moments: Moments { amsgrad, ..self.moments }, ..self }
            }
        }
    )+};
}

adapts!(Adam, AdamW);

/// Divides the gradient by the root of its mean square, by default with momentum and without weight decay.
///
/// # Source
///
/// Tieleman and Hinton, Coursera lecture 6.5, 2012; `burn::optim::RmsPropConfig`.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{Optimizer, RmsProp};
///
/// let optimizer = Optimizer::from(RmsProp::new().alpha(0.9).momentum(0.0).centered(true));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RmsProp {
    pub(super) alpha: f32,
    pub(super) momentum: f32,
    pub(super) epsilon: f32,
    pub(super) centered: bool,
    pub(super) weight_decay: f32,
    pub(super) clipping: Option<Clipping>,
}

impl RmsProp {
    /// RMSprop with burn's defaults.
    pub fn new() -> Self {
        Self { alpha: 0.99, momentum: 0.9, epsilon: 1e-5, centered: false, weight_decay: 0.0, clipping: None }
    }

    /// Share of the mean square that a step keeps; default 0.99.
    #[must_use]
    pub fn alpha(self, alpha: f32) -> Self {
        Self { alpha, ..self }
    }

    /// Share of the velocity that a step keeps, from 0 to 1; default 0.9 as in burn (PyTorch: 0).
    #[must_use]
    pub fn momentum(self, momentum: f32) -> Self {
        Self { momentum, ..self }
    }

    /// Keeps the division by the mean square finite; default 1e-5 as in burn (PyTorch: 1e-8).
    #[must_use]
    pub fn epsilon(self, epsilon: f32) -> Self {
        Self { epsilon, ..self }
    }

    /// Divides by the root of the gradient's variance instead of its mean square; default false.
    ///
    /// Where rounding makes the variance negative it counts as 0; burn makes a NaN of it.
    #[must_use]
    pub fn centered(self, centered: bool) -> Self {
        Self { centered, ..self }
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }

    pub(super) fn validate(&self) -> Result<(), OptimizerError> {
        let check = Check("RmsProp");
        check.share("alpha", self.alpha)?;
        check.fraction("momentum", self.momentum)?;
        check.above_0("epsilon", self.epsilon)?;
        check.not_negative("weight_decay", self.weight_decay)?;
        check.clipping(self.clipping)
    }
}

impl Default for RmsProp {
    fn default() -> Self {
        Self::new()
    }
}

/// Divides the gradient by the root of the sum of all its squares so far, by default without weight decay.
///
/// # Source
///
/// Duchi et al., JMLR 2011; `burn::optim::AdaGradConfig`.
///
/// # Example
///
/// ```
/// use fairing_core::runtime::optimizer::{AdaGrad, Optimizer};
///
/// let optimizer = Optimizer::from(AdaGrad::new().lr_decay(1e-3));
/// assert!(optimizer.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdaGrad {
    pub(super) lr_decay: f64,
    pub(super) epsilon: f32,
    pub(super) weight_decay: f32,
    pub(super) clipping: Option<Clipping>,
}

impl AdaGrad {
    /// Adagrad with burn's defaults.
    pub fn new() -> Self {
        Self { lr_decay: 0.0, epsilon: 1e-5, weight_decay: 0.0, clipping: None }
    }

    /// Divides the learning rate by 1 + `lr_decay` times the tensor's gradients before this one; default 0.
    #[must_use]
    pub fn lr_decay(self, lr_decay: f64) -> Self {
        Self { lr_decay, ..self }
    }

    /// Keeps the division by the sum finite; default 1e-5 as in burn (PyTorch: 1e-10).
    #[must_use]
    pub fn epsilon(self, epsilon: f32) -> Self {
        Self { epsilon, ..self }
    }

    /// Adds `weight_decay` times the parameter to its gradient; default 0.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f32) -> Self {
        Self { weight_decay, ..self }
    }

    pub(super) fn validate(&self) -> Result<(), OptimizerError> {
        let check = Check("AdaGrad");
        check.not_negative("lr_decay", self.lr_decay)?;
        check.above_0("epsilon", self.epsilon)?;
        check.not_negative("weight_decay", self.weight_decay)?;
        check.clipping(self.clipping)
    }
}

impl Default for AdaGrad {
    fn default() -> Self {
        Self::new()
    }
}
