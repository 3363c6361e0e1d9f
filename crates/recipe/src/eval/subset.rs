//! A part of a labelled data set that has every class.

use std::collections::BTreeMap;

use crate::philox::{Draws, Tag};

/// Keeps these draws apart from those of other purposes: no run trains in this epoch.
const EPOCH: u32 = u32::MAX;

/// Chooses `fraction` (above 0, at most 1) of each class's samples, and at least one.
///
/// `labels` has the class of each sample by its number; samples without one are left out. Returns
/// numbers, ascending. The choice depends on (seed, number) and the class alone: a larger fraction
/// has all samples of a smaller one, and other classes change nothing.
///
/// # Panics
/// If `fraction` is out of range.
pub fn stratified(
    labels: impl IntoIterator<Item = Option<u32>>,
    fraction: f64,
    seed: u64,
) -> Vec<u64> {
    assert!(fraction > 0.0 && fraction <= 1.0, "a fraction in (0, 1], not {fraction}");
    let mut classes: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
    for (sample, label) in (0u64..).zip(labels) {
        if let Some(label) = label {
            classes.entry(label).or_default().push((key(seed, sample), sample));
        }
    }
    let mut chosen: Vec<u64> = Vec::new();
    for mut samples in classes.into_values() {
        samples.sort_unstable();
        samples.truncate(share(samples.len(), fraction));
        chosen.extend(samples.into_iter().map(|(_, sample)| sample));
    }
    chosen.sort_unstable();
    chosen
}

/// Returns how many of `n` samples are chosen: rounded to nearest, halves up, at least one.
fn share(n: usize, fraction: f64) -> usize {
    ((n as f64 * fraction + 0.5).floor() as usize).clamp(1, n)
}

fn key(seed: u64, sample: u64) -> u64 {
    let words = Draws::new(seed, Tag::User, EPOCH, sample).block(0);
    u64::from(words[0]) << 32 | u64::from(words[1])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_class_has_its_share() {
        // 100 of class 0, 30 of class 3, 1 of class 7, some without.
        let label = |i: u32| match i {
            0..100 => Some(0),
            100..130 => Some(3),
            130 => Some(7),
            _ => None,
        };
        let chosen = stratified((0..150).map(label), 0.1, 1);
        let of = |class| chosen.iter().filter(|&&i| label(i as u32) == Some(class)).count();
        assert_eq!((of(0), of(3), of(7), chosen.len()), (10, 3, 1, 14));
        assert_ne!(chosen, stratified((0..150).map(label), 0.1, 2));
        assert_eq!(stratified((0..150).map(label), 1.0, 2).len(), 131);
    }

    /// The choice is part of published results, so its bits are pinned.
    #[test]
    fn the_choice_is_pinned() {
        let chosen = stratified((0..40).map(|i| Some(i % 2)), 0.1, 0);
        assert_eq!(chosen, PINNED);
    }

    const PINNED: [u64; 4] = [7, 22, 23, 30];

    #[test]
    fn shares_are_rounded() {
        assert_eq!([share(600, 0.01), share(10, 0.25), share(10, 0.24)], [6, 3, 2]);
        assert_eq!([share(1, 0.001), share(7, 1.0)], [1, 7]);
    }

    proptest! {
        #[test]
        fn larger_fractions_have_the_smaller_ones(
            labels in proptest::collection::vec(proptest::option::of(0u32..5), 1..200),
            a in 0.01f64..1.0, b in 0.01f64..1.0, seed in any::<u64>(),
        ) {
            let (low, high) = (a.min(b), a.max(b));
            let few = stratified(labels.iter().copied(), low, seed);
            let many = stratified(labels.iter().copied(), high, seed);
            prop_assert!(few.iter().all(|sample| many.contains(sample)));
            prop_assert!(few.windows(2).all(|pair| pair[0] < pair[1]));
            for class in 0..5 {
                let n = labels.iter().filter(|&&label| label == Some(class)).count();
                let got = few.iter().filter(|&&i| labels[i as usize] == Some(class)).count();
                prop_assert_eq!(got, if n == 0 { 0 } else { share(n, low) });
            }
        }

        #[test]
        fn other_classes_change_nothing(
            labels in proptest::collection::vec(0u32..4, 1..100), seed in any::<u64>(),
        ) {
            let all = stratified(labels.iter().map(|&label| Some(label)), 0.3, seed);
            let only = |class: u32| labels.iter().map(move |&l| (l == class).then_some(l));
            for class in 0..4 {
                let of_class: Vec<u64> =
                    all.iter().copied().filter(|&i| labels[i as usize] == class).collect();
                prop_assert_eq!(stratified(only(class), 0.3, seed), of_class);
            }
        }
    }
}
