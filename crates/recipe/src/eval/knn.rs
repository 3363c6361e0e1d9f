//! Weighted votes of the nearest training samples.
//!
//! Features are scaled to length 1, so that a dot product is the cosine. The k nearest samples vote
//! for their classes with `exp(similarity / temperature)`. All ties are broken: of equally near
//! samples the one with the lower number is nearer, of classes with equal votes the lower one wins.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

/// Vectors shorter than this are not scaled up: they are noise around zero.
const LENGTH_MIN: f64 = 1e-12;

/// Scales each row of `dim` values to length 1, in place; rows of zeros stay.
///
/// # Panics
/// If `rows` does not hold whole rows.
pub fn normalize(rows: &mut [f32], dim: usize) {
    assert!(dim > 0 && rows.len().is_multiple_of(dim), "whole rows of {dim} values");
    for row in rows.chunks_exact_mut(dim) {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let length = squares.sqrt().max(LENGTH_MIN);
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

/// A training sample as a query sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbor {
    /// Cosine of the angle between the two, -1 to 1.
    pub similarity: f32,
    /// Number of the training sample.
    pub sample: u32,
}

impl Neighbor {
    /// Orders neighbours from near to far; no two samples are equal.
    fn nearness(&self, other: &Self) -> Ordering {
        other.similarity.total_cmp(&self.similarity).then(self.sample.cmp(&other.sample))
    }
}

/// A neighbour whose greatest is the furthest, as a heap wants it.
#[derive(Clone, Copy, Debug)]
struct Far(Neighbor);

impl PartialEq for Far {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Far {}

impl PartialOrd for Far {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Far {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.nearness(&other.0)
    }
}

/// The nearest samples seen so far, whatever the order in which they come.
#[derive(Clone, Debug)]
pub struct Nearest {
    k: usize,
    found: BinaryHeap<Far>,
}

impl Nearest {
    /// Keeps the `k` (at least 1) nearest.
    pub fn new(k: usize) -> Self {
        assert!(k > 0, "at least one neighbour");
        Nearest { k, found: BinaryHeap::with_capacity(k) }
    }

    /// Looks at training sample number `sample`; each is offered once.
    pub fn offer(&mut self, similarity: f32, sample: u32) {
        // Both zeros are one similarity.
        let next = Neighbor { similarity: similarity + 0.0, sample };
        if self.found.len() < self.k {
            return self.found.push(Far(next));
        }
        if let Some(mut furthest) = self.found.peek_mut()
            && next.nearness(&furthest.0).is_lt()
        {
            *furthest = Far(next);
        }
    }

    /// Returns them, the nearest first.
    pub fn sorted(self) -> Vec<Neighbor> {
        self.found.into_sorted_vec().into_iter().map(|far| far.0).collect()
    }
}

/// Ranks the classes of the first `k` of `neighbors` (nearest first) by their votes.
///
/// Only classes that got a vote are returned, the winner first. Votes are
/// `exp((similarity − the nearest one's) / temperature)`: the common factor keeps small
/// temperatures from overflowing and changes no rank.
///
/// # Panics
/// If `temperature` is not positive.
pub fn vote(
    neighbors: &[Neighbor],
    k: usize,
    class_of: impl Fn(u32) -> u32,
    temperature: f64,
) -> Vec<u32> {
    assert!(temperature > 0.0, "a positive temperature");
    let mut votes: BTreeMap<u32, f64> = BTreeMap::new();
    let Some(nearest) = neighbors.first() else { return Vec::new() };
    for neighbor in &neighbors[..k.min(neighbors.len())] {
        let below = f64::from(neighbor.similarity) - f64::from(nearest.similarity);
        *votes.entry(class_of(neighbor.sample)).or_default() += libm::exp(below / temperature);
    }
    let mut ranked: Vec<(u32, f64)> = votes.into_iter().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.into_iter().map(|(class, _)| class).collect()
}

#[cfg(test)]
mod tests;
