//! Who is who in a run: one certificate authority per run, one identity per replica and one for the caller.
