//! What the attribute accepts and what it says to a mistake, as a user sees it from the compiler.
//!
//! After a deliberate change of a message, `TRYBUILD=overwrite cargo test -p fairing-macros --test ui` writes it down.

#[test]
fn the_attribute_accepts_what_is_right_and_points_at_what_is_wrong() {
    let cases = trybuild::TestCases::new();
    cases.pass("../tests/ui/pass/*.rs");
    cases.compile_fail("../tests/ui/fail/*.rs");
}
