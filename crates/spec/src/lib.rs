//! The run specification: TOML text to raw to validated.
