//! Which rank trains on which examples: pure functions of seed, epoch and sizes.

use std::ops::{Deref, Range};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::shard::split;

/// Examples that can be drawn by index.
///
/// Slices and vectors of cloneable examples are data sets already; their batches are vectors.
pub trait Dataset {
    /// What a batch of examples is made into, for example a pair of tensors.
    type Batch;

    /// Number of examples.
    fn len(&self) -> usize;

    /// Whether there is no example.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The examples at `indices`, in that order. `indices` is never empty.
    fn batch(&self, indices: &[usize]) -> Self::Batch;
}

impl<T: Clone> Dataset for [T] {
    type Batch = Vec<T>;

    fn len(&self) -> usize {
        <[T]>::len(self)
    }

    fn batch(&self, indices: &[usize]) -> Vec<T> {
        indices.iter().map(|index| self[*index].clone()).collect()
    }
}

impl<T: Clone> Dataset for Vec<T> {
    type Batch = Vec<T>;

    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn batch(&self, indices: &[usize]) -> Vec<T> {
        self.as_slice().batch(indices)
    }
}

/// A rank's part of one global batch. Dereferences to what [`Dataset::batch`] made of it.
#[derive(Debug)]
pub struct Batch<B> {
    items: B,
    len: usize,
}

impl<B> Batch<B> {
    pub(crate) fn new(items: B, len: usize) -> Self {
        Self { items, len }
    }

    /// Number of examples that count.
    ///
    /// It is 0 for a rank whose part of the last batch is empty: such a batch still holds one example, so that `train`
    /// needs no special case, but its gradient and metrics weigh nothing.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether this rank's part is empty, so that nothing computed from it counts.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<B> Deref for Batch<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.items
    }
}

/// The order in which the examples `0..len` are visited in `epoch`: the same on every rank and every machine.
///
/// # Source
///
/// Fisher-Yates over ChaCha8; seed and epoch are its key and stream, so that neighbouring seeds share nothing.
pub fn permutation(seed: u64, epoch: u64, len: usize) -> Vec<usize> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(epoch);
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut generator);
    order
}

/// How an epoch of `examples` examples is cut for `workers` ranks that take `batch_size` examples each per step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    examples: usize,
    global: usize,
    workers: usize,
}

impl Cut {
    pub(crate) fn new(examples: usize, batch_size: usize, workers: usize) -> Self {
        Self { examples, global: batch_size.saturating_mul(workers), workers }
    }

    /// Steps per epoch, the same on all ranks.
    pub(crate) fn batches(&self) -> usize {
        self.examples.div_ceil(self.global)
    }

    /// The positions in the permutation that `rank` trains on in step `batch`; may be empty in the last one.
    pub(crate) fn part(&self, batch: usize, rank: usize) -> Range<usize> {
        let start = batch * self.global;
        let len = self.global.min(self.examples - start);
        let part = split(len, rank, self.workers);
        start + part.start..start + part.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_example_is_used_once_per_epoch(examples in 1usize..500, batch_size in 1usize..40, workers in 1usize..7) {
            let cut = Cut::new(examples, batch_size, workers);
            let mut next = 0;
            for batch in 0..cut.batches() {
                let parts: Vec<_> = (0..workers).map(|rank| cut.part(batch, rank)).collect();
                for part in &parts {
                    prop_assert_eq!(part.start, next);
                    prop_assert!(part.len() <= batch_size);
                    next = part.end;
                }
                let lengths: Vec<_> = parts.iter().map(ExactSizeIterator::len).collect();
                prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
            }
            prop_assert_eq!(next, examples);
        }

        #[test]
        fn a_permutation_visits_everything_once(seed: u64, epoch: u64, len in 0usize..300) {
            let mut order = permutation(seed, epoch, len);
            prop_assert_eq!(&order, &permutation(seed, epoch, len));
            order.sort_unstable();
            prop_assert_eq!(order, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_order_is_the_same_in_every_build() {
        assert_eq!(permutation(0, 0, 8), permutation(0, 0, 8));
        assert_ne!(permutation(0, 0, 100), permutation(0, 1, 100));
        assert_ne!(permutation(0, 1, 100), permutation(1, 0, 100));
    }
}
