//! How this library was compiled.

/// Optimisation level: `0`, `1`, `2`, `3`, `s` or `z`.
pub(crate) const OPT_LEVEL: &str = env!("FAIRING_OPT_LEVEL");

/// The compiler's version, for example `rustc 1.95.0 (59807616e 2026-04-14)`.
pub(crate) fn rustc() -> Option<String> {
    let version = env!("FAIRING_RUSTC");
    (!version.is_empty()).then(|| version.to_owned())
}

/// The version of burn that the adapter is written for.
pub(crate) fn burn() -> Option<String> {
    cfg!(feature = "burn").then(|| "0.22.1".to_owned())
}

/// Whether the program is compiled with `target-cpu=native`, so that another machine's processor may not run it.
#[cfg(feature = "image")]
pub(crate) fn is_for_native_processor() -> bool {
    env!("FAIRING_NATIVE_PROCESSOR") == "true"
}
