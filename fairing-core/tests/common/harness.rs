//! What libtest does, for programs that are a test and what it starts at the same time: one test after another, each in a
//! thread of its own.

use std::thread;
use std::time::Instant;

/// Tests by name.
pub(crate) type Tests<'a> = &'a [(&'a str, fn())];

/// The table of the named tests.
macro_rules! tests {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}
pub(crate) use tests;

/// What libtest understands of its arguments: filters, `--skip TEXT`, `--exact` and `--list`.
struct Choice<'a> {
    filters: Vec<&'a str>,
    skipped: Vec<&'a str>,
    is_exact: bool,
}

impl<'a> Choice<'a> {
    fn read(arguments: &'a [String]) -> Self {
        let mut choice = Self { filters: Vec::new(), skipped: Vec::new(), is_exact: false };
        let mut arguments = arguments.iter().map(String::as_str);
        while let Some(argument) = arguments.next() {
            match argument {
                "--skip" => choice.skipped.extend(arguments.next()),
                "--exact" => choice.is_exact = true,
                option if option.starts_with('-') => {}
                filter => choice.filters.push(filter),
            }
        }
        choice
    }

    fn takes(&self, name: &str) -> bool {
        let fits = |text: &&str| if self.is_exact { name == *text } else { name.contains(*text) };
        (self.filters.is_empty() || self.filters.iter().any(fits)) && !self.skipped.iter().any(fits)
    }
}

/// Runs the chosen ones of `tests` and prints what libtest would. `missing` says why none can run here, and what to do.
///
/// # Panics
///
/// If a test failed; or if something is missing and CI=true.
pub(crate) fn run(tests: Tests<'_>, arguments: &[String], missing: Option<String>) {
    let choice = Choice::read(arguments);
    let chosen: Vec<_> = tests.iter().filter(|(name, _)| choice.takes(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    println!("\nrunning {} tests", chosen.len());
    if let Some(reason) = missing.filter(|_| !chosen.is_empty()) {
        println!("skipped: {} tests: {reason}", chosen.len());
        assert!(std::env::var("CI").as_deref() != Ok("true"), "a skip is a failure in CI");
        return;
    }
    let filtered = tests.len() - chosen.len();
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in chosen {
        let began = Instant::now();
        let good = thread::Builder::new().name((*name).to_owned()).spawn(*test).unwrap().join().is_ok();
        println!("test {name} ... {} ({:.1} s)", if good { "ok" } else { "FAILED" }, began.elapsed().as_secs_f64());
        if good { passed += 1 } else { failed += 1 }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {filtered} filtered out");
    assert_eq!(failed, 0, "tests failed");
}
