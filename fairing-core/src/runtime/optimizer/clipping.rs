//! Clipping of the averaged gradient, to the same bits on any number of servers.
//!
//! A norm is a sum over parameters of several servers, and a sum's bits depend on its order. So squares are added within
//! fixed [`Cells`], the overlaps of blocks of the flat vector with tensors, and the cells' sums in flat order. A server
//! owns whole blocks, hence the sums of all servers in rank order are those that a single server would have.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::runtime::shard::block_len;

/// What is done to an averaged gradient that is too large.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Clipping {
    /// Largest size of an element.
    Value(f32),
    /// Largest norm of a tensor's gradient.
    NormPerTensor(f32),
    /// Largest norm of all gradients together.
    GlobalNorm(f32),
}

impl Clipping {
    /// What the gradient of each trained tensor is to be multiplied by.
    ///
    /// A norm that is not finite makes the scale 0 or NaN, and so the gradient NaN, which is what it came from. Tensors
    /// without gradient are left out.
    ///
    /// # Shapes
    ///
    /// - `cells`: those of the whole flat vector; `squares`: `[cells.len()]`.
    /// - `present`: one per trained tensor; returns as many.
    ///
    /// # Panics
    ///
    /// If the lengths do not fit.
    pub(crate) fn scales(&self, cells: &Cells, squares: &[f64], present: &[bool]) -> Vec<f32> {
        assert_eq!(squares.len(), cells.len(), "sums of other cells");
        let mut tensors = vec![0.0; present.len()];
        let mut total = 0.0;
        for (cell, square) in cells.cells.iter().zip(squares).filter(|(cell, _)| present[cell.tensor]) {
            tensors[cell.tensor] += square;
            total += square;
        }
        match *self {
            Self::Value(_) => vec![1.0; present.len()],
            // burn adds the smallest positive number, PyTorch 1e-6.
            Self::NormPerTensor(norm) => tensors.iter().map(|square| scale(norm, *square, f32::MIN_POSITIVE)).collect(),
            Self::GlobalNorm(norm) => vec![scale(norm, total, 1e-6); present.len()],
        }
    }
}

fn scale(norm: f32, square: f64, epsilon: f32) -> f32 {
    let scale = norm / (square.sqrt() as f32 + epsilon);
    // Not `min`, which would make 1 of NaN.
    if scale > 1.0 { 1.0 } else { scale }
}

/// The parts of the flat vector over which squares are added, of a range of whole blocks.
#[derive(Debug, Clone)]
pub(crate) struct Cells {
    cells: Vec<Cell>,
}

#[derive(Debug, Clone)]
struct Cell {
    tensor: usize,
    /// Relative to the start of the range.
    range: Range<usize>,
}

impl Cells {
    /// The cells of `range`, which is a shard or the whole vector, in flat order.
    ///
    /// # Shapes
    ///
    /// - `tensors`: the number of elements of each trained tensor of the whole model.
    pub(crate) fn new(tensors: &[usize], range: Range<usize>) -> Self {
        let block = block_len(tensors.iter().sum());
        let (mut cells, mut start) = (Vec::new(), 0);
        for (tensor, len) in tensors.iter().enumerate() {
            let end = (start + len).min(range.end);
            let mut from = start.max(range.start);
            while from < end {
                let to = ((from / block + 1) * block).min(end);
                cells.push(Cell { tensor, range: from - range.start..to - range.start });
                from = to;
            }
            start += len;
        }
        Self { cells }
    }

    pub(crate) fn len(&self) -> usize {
        self.cells.len()
    }

    /// Writes the sum of squares of each cell in the part `range` of the shard to its place in `squares`.
    ///
    /// A chunk may be given alone if it begins and ends where a block does, counted from the shard's start.
    ///
    /// # Shapes
    ///
    /// - `gradient`: `[range.len()]`, averaged; `squares`: `[self.len()]`.
    ///
    /// # Panics
    ///
    /// If a length differs, or `range` cuts a cell.
    pub(crate) fn squares(&self, range: Range<usize>, gradient: &[f32], squares: &mut [f64]) {
        assert_eq!((gradient.len(), squares.len()), (range.len(), self.len()), "a gradient or sums of another shard");
        let from = self.cells.partition_point(|cell| cell.range.start < range.start);
        let to = self.cells.partition_point(|cell| cell.range.start < range.end);
        for (cell, square) in self.cells[from..to].iter().zip(&mut squares[from..to]) {
            *square = sum_of_squares(&gradient[cell.range.start - range.start..cell.range.end - range.start]);
        }
    }
}

/// Adds in a fixed order that fits registers: eight sums, of every eighth element each, then these. Squares are exact.
fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let eights = values.chunks_exact(LANES);
    let rest = eights.remainder();
    for eight in eights {
        for (sum, value) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*value) * f64::from(*value);
    }
    sums.iter().sum()
}
