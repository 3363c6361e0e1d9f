//! Generated gRPC code, the mapping between wire and words, and the typed client.
