//! The lacuna command.
