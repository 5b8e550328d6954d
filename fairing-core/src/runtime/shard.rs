//! Which server owns which part of the flat parameter vector.

use std::ops::Range;

/// The range of server `index` of `count` servers over `len` parameters: contiguous, in order, equal but for one element.
///
/// # Panics
///
/// If `index` is not below `count`.
pub(crate) fn shard(len: usize, index: usize, count: usize) -> Range<usize> {
    assert!(index < count, "server {index} of {count}");
    split(len, index, count)
}

/// Part `index` of `count` parts of `0..len`; the first `len % count` parts are one longer.
pub(crate) fn split(len: usize, index: usize, count: usize) -> Range<usize> {
    let (base, longer) = (len / count, len % count);
    let start = index * base + index.min(longer);
    start..start + base + usize::from(index < longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_cover_everything_once_and_evenly(len in 0usize..100_000, count in 1usize..40) {
            let shards: Vec<_> = (0..count).map(|index| shard(len, index, count)).collect();
            prop_assert_eq!(shards[0].start, 0);
            prop_assert_eq!(shards[count - 1].end, len);
            prop_assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths: Vec<_> = shards.iter().map(Range::len).collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        }
    }
}
