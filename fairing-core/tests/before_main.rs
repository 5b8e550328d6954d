//! The constructor is linked into a program that uses a single function of fairing.

use fairing_core::lifeline;

fn main() {
    let started_in = std::env::current_dir().unwrap();
    std::env::set_current_dir("/").unwrap();
    assert_ne!(started_in, std::env::current_dir().unwrap(), "this test must not start in the root folder");
    assert_eq!(lifeline::start_directory(), started_in, "the directory was not recorded before `main`");
}
