//! Sharded checkpoints: plan, write, commit, read, export.
