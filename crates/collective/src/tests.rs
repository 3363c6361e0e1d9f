//! What the tests of both transports begin with.

use std::net::SocketAddr;

use lacuna_types::Generation;

use crate::{Exposure, Group, TrainerListener};

pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(crate) fn bind(n: usize) -> Vec<TrainerListener> {
    let one = |_| TrainerListener::bind(any_port(), None, Exposure::Loopback).unwrap();
    (0..n).map(one).collect()
}

/// The plan of a generation over `listeners`, for rank 0.
pub(crate) fn plan(listeners: &[TrainerListener], generation: u64) -> Group {
    Group {
        run: "vit-tiny".parse().unwrap(),
        generation: Generation(generation),
        rank: 0,
        members: listeners.iter().map(TrainerListener::advertised).collect(),
        key: [42; 32],
    }
}
