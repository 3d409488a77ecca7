//! The `mlnt` binary.
fn main() {}
