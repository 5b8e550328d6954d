//! Examples made up by a formula: the same numbers in every process, without a file.

use burn::tensor::{Device, Int, Tensor, TensorData};
use fairing_core::prelude::Dataset;

/// Examples with a label each, that a small model can learn.
pub struct Samples {
    inputs: Vec<f32>,
    labels: Vec<i32>,
    features: usize,
    device: Device,
}

/// Some of the examples, ready for a model.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[n, features]`.
    pub inputs: Tensor<2>,
    /// `[n]`, each below the number of classes.
    pub labels: Tensor<1, Int>,
}

impl Samples {
    /// Makes `examples` inputs of `features` numbers each; batches will be tensors on `device`.
    ///
    /// An input is noise in [0, 0.5), plus 0.8 in the stripe of features that belongs to its class.
    ///
    /// # Panics
    ///
    /// Panics if `features` is smaller than `classes`: every class needs a stripe.
    pub fn new(examples: usize, features: usize, classes: usize, device: &Device) -> Self {
        assert!(features >= classes, "{classes} classes need as many features, got {features}");
        let mut noise = SplitMix::new(0);
        let mut inputs = Vec::with_capacity(examples * features);
        let mut labels = Vec::with_capacity(examples);
        for _ in 0..examples {
            let class = (noise.next() % classes as u64) as usize;
            let start = inputs.len();
            inputs.extend((0..features).map(|_| noise.unit() * 0.5));
            for value in &mut inputs[start..][class * features / classes..(class + 1) * features / classes] {
                *value += 0.8;
            }
            labels.push(class as i32);
        }
        Self { inputs, labels, features, device: device.clone() }
    }

    /// The examples of `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Batch {
        let mut inputs = Vec::with_capacity(indices.len() * self.features);
        for &index in indices {
            inputs.extend_from_slice(&self.inputs[index * self.features..][..self.features]);
        }
        let labels: Vec<i32> = indices.iter().map(|&index| self.labels[index]).collect();
        Batch {
            inputs: Tensor::from_data(TensorData::new(inputs, [indices.len(), self.features]), &self.device),
            labels: Tensor::from_data(TensorData::new(labels, [indices.len()]), &self.device),
        }
    }
}

impl Dataset for Samples {
    type Batch = Batch;

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self, indices: &[usize]) -> Batch {
        self.select(indices)
    }
}

/// SplitMix64 (Steele et al., OOPSLA 2014): a generator of three lines, so that no crate's update changes the data.
#[derive(Debug, Clone)]
pub struct SplitMix(u64);

impl SplitMix {
    /// A generator that depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in [0, 1), with the 24 bits that an `f32` holds.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u32 << 24) as f32
    }
}
