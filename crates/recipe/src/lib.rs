//! The run as arithmetic: order, draws, schedule, exact reduction, AdamW, digests.
