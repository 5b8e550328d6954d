//! Tells the library how it is compiled: the optimisation level, the compiler's version, and whether for this processor only.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let level = std::env::var("OPT_LEVEL").unwrap_or_default();
    println!("cargo::rustc-env=FAIRING_OPT_LEVEL={level}");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    println!("cargo::rustc-env=FAIRING_RUSTC={}", version.trim());
    println!("cargo::rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");
    let flags = std::env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let is_native = flags.split(['\x1f', ' ']).any(|flag| flag.ends_with("target-cpu=native"));
    println!("cargo::rustc-env=FAIRING_NATIVE_PROCESSOR={is_native}");
}
