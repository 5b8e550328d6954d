//! A launch from a `cargo test` binary: the replica runs that one test again, never all of them.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::RunError;

/// The arguments for the replicas: this process's own, or in a test binary those that select the running test.
pub(super) fn arguments() -> Result<Vec<OsString>, RunError> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let executable = std::env::current_exe().unwrap_or_default();
    if !is_test_binary(&executable) || selects_one_test(&arguments) {
        return Ok(arguments);
    }
    // libtest runs each test in a thread that has the test's name.
    let thread = std::thread::current();
    let test = thread.name().filter(|name| *name != "main").ok_or(RunError::UnknownTest)?;
    Ok([test, "--exact", "--nocapture", "--test-threads=1"].map(OsString::from).to_vec())
}

/// Cargo puts test binaries, and nothing else that it runs, into `deps` with a hash behind their name.
fn is_test_binary(executable: &Path) -> bool {
    let in_deps = executable.parent().and_then(Path::file_name) == Some(OsStr::new("deps"));
    let stem = executable.file_name().unwrap_or_default().to_string_lossy();
    let stem = stem.strip_suffix(" (deleted)").unwrap_or(&stem);
    let hash = stem.rsplit_once('-').map_or("", |(_, hash)| hash);
    in_deps && hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// As nextest calls a test binary: `NAME --exact`.
fn selects_one_test(arguments: &[OsString]) -> bool {
    arguments.iter().any(|argument| argument == "--exact")
        && arguments.iter().filter(|argument| !argument.as_encoded_bytes().starts_with(b"-")).count() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_binaries_of_cargo_test_are_test_binaries() {
        for (path, expected) in [
            ("/t/debug/deps/it-0123456789abcdef", true),
            ("/t/debug/deps/it-0123456789abcdef (deleted)", true),
            ("/t/debug/it", false),
            ("/t/debug/examples/it-0123456789abcdef", false),
            ("/t/debug/deps/it", false),
        ] {
            assert_eq!(is_test_binary(Path::new(path)), expected, "{path}");
        }
    }

    #[test]
    fn a_selected_test_is_recognised() {
        let arguments = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(selects_one_test(&arguments("mod::test --exact --nocapture")));
        assert!(!selects_one_test(&arguments("mod::test --nocapture")));
        assert!(!selects_one_test(&arguments("one two --exact")));
    }

    #[test]
    fn a_test_finds_its_own_name() {
        let arguments = arguments().unwrap();
        assert!(arguments[0].to_string_lossy().contains("a_test_finds_its_own_name"), "{arguments:?}");
    }
}
