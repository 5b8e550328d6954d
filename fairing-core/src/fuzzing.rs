//! What the fuzzer in `fuzz/` calls; compiled for it only.

use crate::protocol::fuzzing::messages;
use crate::runtime::fuzzing::{coordinator, door, session};

/// Feeds bytes of a peer to the part that their first one names.
///
/// # Panics
///
/// If they make that part panic, which is what the fuzzer looks for.
pub fn feed(bytes: &[u8]) {
    let Some((part, bytes)) = bytes.split_first() else { return };
    match part % 4 {
        0 => messages(bytes),
        1 => door(bytes),
        2 => session(bytes),
        _ => coordinator(bytes),
    }
}
