//! The membership protocol as two sans-io state machines.
