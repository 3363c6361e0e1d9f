//! Agent and trainer, generic over the engine; the fake engine.
