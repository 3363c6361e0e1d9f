//! What recovering from faults costs.
