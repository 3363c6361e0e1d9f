//! Image shards: pack, index, decode, augment, prefetch.
