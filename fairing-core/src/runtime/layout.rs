//! The parameters of a model in a fixed order, so that all replicas mean the same numbers by the same index.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the runtime does with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Has a gradient; lives on the parameter servers.
    Trained,
    /// Never changes; rank 0's is sent to all once, at join.
    Frozen,
    /// Changes without a gradient, for example a running mean; kept local, averaged when an epoch closes.
    State,
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Where it is in the model, for example `layers.0.weight`.
    pub path: String,
    /// Its extents, outermost first.
    pub shape: Vec<usize>,
    /// Element type as the framework spells it, for example `f32`.
    pub dtype: String,
    /// What is done with it.
    pub class: Class,
}

impl TensorSpec {
    /// Number of elements; 1 for a scalar.
    pub fn len(&self) -> usize {
        // Saturating, since a peer's layout may claim anything.
        self.shape.iter().fold(1, |len: usize, extent| len.saturating_mul(*extent))
    }

    /// Whether some extent is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = match self.class {
            Class::Trained => "trained",
            Class::Frozen => "frozen",
            Class::State => "state",
        };
        write!(f, "`{}` {:?} {} {class}", self.path, self.shape, self.dtype)
    }
}

/// All tensors of a model in module-path order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
}

/// A model that cannot be trained. Returned by [`Model::layout`](super::Model::layout).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No tensor has a gradient.
    #[error(
        "the model has no trained parameter (every tensor is frozen or state); `require_grad` on what should learn"
    )]
    NothingToTrain,
    /// Parameters should learn, but the framework records no gradients for them.
    #[error(
        "parameter `{path}` is on a device without gradients; create the model on `worker.device()` or on `device.autodiff()`"
    )]
    NoAutodiff {
        /// The first such parameter.
        path: String,
    },
    /// A trained or state tensor is not `f32`.
    #[error("parameter `{path}` is `{dtype}`, but only `f32` can be trained; cast it, or freeze it with `no_grad()`")]
    NotF32 {
        /// Where it is in the model.
        path: String,
        /// What it is.
        dtype: String,
    },
}

impl Layout {
    /// Checks the tensors and keeps their order.
    ///
    /// # Errors
    ///
    /// - [`LayoutError::NotF32`] for a trained or state tensor of another type.
    /// - [`LayoutError::NothingToTrain`] if the trained tensors have no element.
    pub fn new(tensors: Vec<TensorSpec>) -> Result<Self, LayoutError> {
        for tensor in &tensors {
            if tensor.class != Class::Frozen && tensor.dtype != "f32" {
                return Err(LayoutError::NotF32 { path: tensor.path.clone(), dtype: tensor.dtype.clone() });
            }
        }
        let layout = Self { tensors };
        if layout.trained_len() == 0 {
            return Err(LayoutError::NothingToTrain);
        }
        Ok(layout)
    }

    /// All tensors.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The trained tensors, in flat-vector order.
    pub fn trained(&self) -> impl Iterator<Item = &TensorSpec> {
        self.of(Class::Trained)
    }

    /// Number of trained parameters.
    pub fn trained_len(&self) -> usize {
        total(self.trained())
    }

    /// Number of state elements.
    pub fn state_len(&self) -> usize {
        total(self.of(Class::State))
    }

    /// The tensors of one class.
    pub fn of(&self, class: Class) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.iter().filter(move |tensor| tensor.class == class)
    }

    /// The first thing in which two layouts differ, in words; `None` if they are equal.
    pub fn difference(&self, other: &Layout) -> Option<String> {
        let pair = self.tensors.iter().zip(&other.tensors).find(|(a, b)| a != b);
        if let Some((mine, theirs)) = pair {
            return Some(format!("{mine} against {theirs}"));
        }
        let (mine, theirs) = (self.tensors.len(), other.tensors.len());
        (mine != theirs).then(|| format!("{mine} tensors against {theirs}"))
    }
}

fn total<'a>(tensors: impl Iterator<Item = &'a TensorSpec>) -> usize {
    tensors.fold(0, |total: usize, tensor| total.saturating_add(tensor.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(path: &str, shape: &[usize], dtype: &str, class: Class) -> TensorSpec {
        TensorSpec { path: path.into(), shape: shape.into(), dtype: dtype.into(), class }
    }

    #[test]
    fn classes_are_counted_apart() {
        let layout = Layout::new(vec![
            tensor("a", &[2, 3], "f32", Class::Trained),
            tensor("b", &[5], "f16", Class::Frozen),
            tensor("c", &[4], "f32", Class::State),
            tensor("d", &[], "f32", Class::Trained),
        ])
        .unwrap();
        assert_eq!((layout.trained_len(), layout.state_len()), (7, 4));
    }

    #[test]
    fn what_cannot_be_trained_is_named() {
        let half = vec![tensor("head.weight", &[2], "f16", Class::Trained)];
        let expected = LayoutError::NotF32 { path: "head.weight".into(), dtype: "f16".into() };
        assert_eq!(Layout::new(half).unwrap_err(), expected);
        let frozen = vec![tensor("a", &[2], "f32", Class::Frozen)];
        assert_eq!(Layout::new(frozen).unwrap_err(), LayoutError::NothingToTrain);
        assert_eq!(Layout::new(vec![]).unwrap_err(), LayoutError::NothingToTrain);
    }

    #[test]
    fn a_difference_names_both_sides() {
        let one = Layout::new(vec![tensor("fc", &[2, 3], "f32", Class::Trained)]).unwrap();
        let other = Layout::new(vec![tensor("fc", &[2, 4], "f32", Class::Trained)]).unwrap();
        assert_eq!(one.difference(&one), None);
        let words = one.difference(&other).unwrap();
        assert_eq!(words, "`fc` [2, 3] f32 trained against `fc` [2, 4] f32 trained");
    }
}
