//! Memory in small pages while bytes are only passed on.

use std::sync::{Mutex, PoisonError};

/// While one exists, new memory of the process comes in pages of 4 KiB and not of 2 MiB.
///
/// Packing and pushing use a dozen threads for a moment, each of which touches some KiB of a heap of its own. An allocator
/// that asks for huge pages, as mimalloc does, makes 2 MiB of each: two thirds of the peak. Memory that is there keeps its
/// pages, and what is not Linux is left as it is.
#[derive(Debug)]
pub(crate) struct SmallPages(());

/// How many there are, and whether the process had small pages before the first one.
static USERS: Mutex<(usize, bool)> = Mutex::new((0, false));

impl SmallPages {
    pub(crate) fn new() -> Self {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *users;
        if *count == 0 {
            *before = are_small();
            set_small(true);
        }
        *count += 1;
        Self(())
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *users;
        *count -= 1;
        if *count == 0 {
            set_small(*before);
        }
    }
}

#[cfg(target_os = "linux")]
fn are_small() -> bool {
    rustix::thread::transparent_huge_pages_are_disabled().unwrap_or(false)
}

/// A kernel that refuses it costs memory and nothing else.
#[cfg(target_os = "linux")]
fn set_small(small: bool) {
    _ = rustix::thread::disable_transparent_huge_pages(small);
}

#[cfg(not(target_os = "linux"))]
fn are_small() -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn set_small(_small: bool) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn pages_are_small_until_the_last_one_is_done() {
        // Other tests pack at the same time, so only what holds while this one has its own can be said.
        let first = SmallPages::new();
        assert!(are_small());
        let second = SmallPages::new();
        drop(first);
        assert!(are_small());
        drop(second);
    }
}
