//! Process-level tests: the harness and the fake worker binary.
