//! Which server owns which part of the flat parameter vector.

use std::ops::Range;

/// The range of server `index` of `count` servers over `len` parameters: contiguous, in order, of whole blocks, as even as
/// these allow.
///
/// # Panics
///
/// If `index` is not below `count`.
pub(crate) fn shard(len: usize, index: usize, count: usize) -> Range<usize> {
    assert!(index < count, "server {index} of {count}");
    let block = block_len(len);
    let blocks = split(len.div_ceil(block), index, count);
    (blocks.start * block).min(len)..(blocks.end * block).min(len)
}

/// The largest block: the sum of its squares takes a two-thousandth of the bytes of its gradient.
pub(crate) const LARGEST_BLOCK: usize = 4096;

/// Parameters per block, the unit in which `trained_len` of them are dealt out to servers and squares are added.
///
/// A power of two up to [`LARGEST_BLOCK`], and so small that at least five hundred blocks keep the shards even.
pub(crate) fn block_len(trained_len: usize) -> usize {
    (trained_len / 1024).next_power_of_two().min(LARGEST_BLOCK)
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

    #[test]
    fn models_up_to_2047_are_dealt_out_by_the_element() {
        assert_eq!([0, 1, 1024, 2047].map(block_len), [1; 4]);
        assert_eq!([2048, 13_610, 1 << 22, usize::MAX].map(block_len), [2, 16, 4096, 4096]);
    }

    proptest! {
        #[test]
        fn shards_cover_everything_once_and_evenly(len in 0usize..100_000, count in 1usize..40) {
            let shards: Vec<_> = (0..count).map(|index| shard(len, index, count)).collect();
            prop_assert_eq!(shards[0].start, 0);
            prop_assert_eq!(shards[count - 1].end, len);
            prop_assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start));
            let block = block_len(len);
            prop_assert!(shards[1..].iter().all(|shard| shard.start % block == 0 || shard.start == len));
            let lengths: Vec<_> = shards.iter().map(Range::len).collect();
            let difference = lengths.iter().max().unwrap() - lengths.iter().min().unwrap();
            // One block, and the last may be shorter.
            prop_assert!(difference < 2 * block, "{}", difference);
        }

        #[test]
        fn parts_differ_by_at_most_one(len in 0usize..10_000, count in 1usize..40) {
            let lengths: Vec<_> = (0..count).map(|index| split(len, index, count).len()).collect();
            prop_assert_eq!(lengths.iter().sum::<usize>(), len);
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        }
    }
}
