//! Ctrl-C while a run goes on is told to the run. Before and after, it ends the program as usual.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, Weak};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Counters of the runs that go on.
static COUNTERS: Mutex<Vec<Weak<AtomicUsize>>> = Mutex::new(Vec::new());
/// Whether no run goes on, so that a signal does what it does without fairing.
static IDLE: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// While it lives, SIGINT and SIGTERM are counted instead of ending the process.
pub(super) struct Interrupts(Arc<AtomicUsize>);

impl Interrupts {
    /// Starts counting. Where signal handling cannot be installed, a signal ends the launcher, and with it the replicas,
    /// as their lifelines see to.
    pub(super) fn count() -> Self {
        static INSTALL: Once = Once::new();
        let idle = IDLE.get_or_init(|| Arc::new(AtomicBool::new(true)));
        INSTALL.call_once(|| install(idle));
        let count = Arc::new(AtomicUsize::new(0));
        counters().push(Arc::downgrade(&count));
        idle.store(false, Ordering::SeqCst);
        Self(count)
    }

    /// How many have come so far.
    pub(super) fn so_far(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

fn install(idle: &Arc<AtomicBool>) {
    for signal in [SIGINT, SIGTERM] {
        // Registered first, so that it acts before the iterator below would swallow the signal.
        let _ = signal_hook::flag::register_conditional_default(signal, idle.clone());
    }
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        for _ in signals.forever() {
            for counter in counters().iter().filter_map(Weak::upgrade) {
                counter.fetch_add(1, Ordering::AcqRel);
            }
        }
    });
}

fn counters() -> MutexGuard<'static, Vec<Weak<AtomicUsize>>> {
    COUNTERS.lock().expect("no holder panics")
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        let mut counters = counters();
        counters.retain(|counter| counter.upgrade().is_some_and(|counter| !Arc::ptr_eq(&counter, &self.0)));
        if counters.is_empty()
            && let Some(idle) = IDLE.get()
        {
            idle.store(true, Ordering::SeqCst);
        }
    }
}
