//! Repository tasks: tidy checks, generated code.
fn main() {}
