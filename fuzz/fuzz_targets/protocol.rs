//! Whatever a peer sends, the processes of a run neither panic nor take more memory than has arrived.
//!
//! `cargo fuzz run --sanitizer none protocol`; the first byte says whom the others go to.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fairing_core::fuzzing::feed(bytes));
