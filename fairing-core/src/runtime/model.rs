//! What the runtime asks of a model, so that it needs to know no framework.

use std::path::Path;

use super::layout::{Layout, LayoutError};

/// A model that can be trained: burn's modules are (feature `burn`), and anything else that implements this.
///
/// The runtime sees three classes of parameters (see [`Layout`]): *trained* ones as one flat `f32` vector, *frozen* ones
/// as bytes that are sent once, and *state* (for example running means) as a second flat `f32` vector.
pub trait Model: Clone + Send + 'static {
    /// What a backward pass gives.
    type Gradients;

    /// The parameters in module-path order; materialises what is lazy.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if there is nothing to train, or a trained or state tensor is not `f32` (named by its path).
    fn layout(&self) -> Result<Layout, LayoutError>;

    /// Copies the trained parameters into `out`.
    ///
    /// # Shapes
    ///
    /// - `out`: `[layout.trained_len()]`.
    fn read_trained(&self, out: &mut [f32]);

    /// The model with its trained parameters replaced by `values`, everything else as it was.
    ///
    /// # Shapes
    ///
    /// - `values`: `[layout.trained_len()]`.
    #[must_use]
    fn write_trained(self, values: &[f32]) -> Self;

    /// The frozen parameters as bytes, in layout order.
    fn read_frozen(&self) -> Vec<u8>;

    /// The model with its frozen parameters replaced.
    #[must_use]
    fn write_frozen(self, bytes: &[u8]) -> Self;

    /// Copies the state into `out`, pending updates included.
    ///
    /// # Shapes
    ///
    /// - `out`: `[layout.state_len()]`.
    fn read_state(&self, out: &mut [f32]);

    /// The model with its state replaced.
    #[must_use]
    fn write_state(self, values: &[f32]) -> Self;

    /// Copies `gradients` into `out`, zeros where a tensor has none, and sets `present[t]` for each trained tensor `t`
    /// (in layout order) that has one.
    ///
    /// # Shapes
    ///
    /// - `out`: `[layout.trained_len()]`.
    /// - `present`: `[layout.trained().count()]`.
    fn read_gradients(&self, gradients: Self::Gradients, out: &mut [f32], present: &mut [bool]);

    /// The whole model as the bytes of a file.
    ///
    /// # Errors
    ///
    /// The framework's own, as text.
    fn to_bytes(&self) -> Result<Vec<u8>, String>;

    /// The model with everything replaced by what `path` holds, the inverse of [`Model::to_bytes`].
    ///
    /// # Errors
    ///
    /// The framework's own, as text: the file is missing, damaged, or of another model.
    fn load(self, path: &Path) -> Result<Self, String>;

    /// The file name extension of what [`Model::to_bytes`] gives.
    const EXTENSION: &'static str;

    /// Seeds the framework's process-wide generator.
    fn seed(seed: u64);
}

/// A gradient and the number of examples it stands for.
#[derive(Debug)]
pub struct Gradient<G> {
    pub(crate) inner: G,
    pub(crate) examples: usize,
    pub(crate) scale: Scale,
}

/// What the loss did with its examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Mean,
    Sum,
}

impl<G> Gradient<G> {
    /// The gradient of a loss that is the mean over `examples` examples.
    ///
    /// Pass `batch.len()`: it is 0 for a rank whose part of a batch is empty, and such a gradient weighs nothing.
    pub fn mean(inner: G, examples: usize) -> Self {
        Self { inner, examples, scale: Scale::Mean }
    }

    /// The gradient of a loss that is the sum over `examples` examples. The update is by the mean all the same.
    pub fn sum(inner: G, examples: usize) -> Self {
        Self { inner, examples, scale: Scale::Sum }
    }
}
