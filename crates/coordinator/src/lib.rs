//! The coordinator service: drives the control machines over gRPC, SQLite and timers.
