//! What the example programs share: the data set of the demo.
//!
//! The programs themselves are in `examples/`, one file per story; the first line of each says how to run it.

pub mod fashion_mnist;
