//! The MAE model on libtorch, the torch engine and the worker binary.
