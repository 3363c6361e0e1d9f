//! Collectives between workers: the trait, TCP, and the conformance suite.
