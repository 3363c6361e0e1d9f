use expect_test::expect;
use proptest::prelude::{ProptestConfig, any};
use proptest::{prop_assert, proptest};

use super::*;
use crate::philox::Tag;

fn prp(seed: u64, n: u64) -> Prp {
    Prp::new(&Draws::new(seed, Tag::Order, 3, 7), n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn is_a_bijection(seed in any::<u64>(), n in 1u64..3000) {
        let p = prp(seed, n);
        let mut seen = vec![false; n as usize];
        for i in 0..n {
            let image = p.at(i) as usize;
            prop_assert!(!std::mem::replace(&mut seen[image], true), "{image} twice");
        }
    }

    #[test]
    fn large_domains_stay_inside(seed in any::<u64>(), n in TABLE_MAX..=N_MAX, i in any::<u64>()) {
        let p = prp(seed, n);
        prop_assert!(p.at(i % n) < n);
    }
}

/// χ² per degree of freedom of the pair (image of `a`, image of `b`) over many keys.
fn pair_chi_square(n: u64, a: u64, b: u64) -> f64 {
    let cells = (n * (n - 1)) as usize;
    let per_cell = 8;
    let mut counts: Vec<u32> = vec![0; (n * n) as usize];
    for seed in 0..(cells * per_cell) as u64 {
        let p = prp(seed, n);
        counts[(p.at(a) * n + p.at(b)) as usize] += 1;
    }
    let off_diagonal = |i: &usize| i / n as usize != i % n as usize;
    let sum: f64 = (0..counts.len())
        .filter(off_diagonal)
        .map(|i| {
            let difference = f64::from(counts[i]) - per_cell as f64;
            difference * difference / per_cell as f64
        })
        .sum();
    sum / (cells - 1) as f64
}

/// The deviation of χ²/df is √(2/df), 0.014 at 100 elements: 1.06 is four of them.
#[test]
fn pairs_are_uniform() {
    for (n, a, b) in [(16, 0, 1), (100, 0, 1), (100, 3, 67), (128, 0, 64), (130, 0, 129)] {
        let ratio = pair_chi_square(n, a, b);
        let deviation = (2.0 / (n * (n - 1)) as f64).sqrt();
        assert!((ratio - 1.0).abs() < 5.0 * deviation, "n = {n}: χ²/df = {ratio}");
    }
}

#[test]
fn golden_images() {
    let line = |n: u64| {
        let p = prp(42, n);
        let images: Vec<String> = (0..5.min(n)).map(|i| p.at(i).to_string()).collect();
        format!("{n}: {}\n", images.join(" "))
    };
    let text: String = [1, 2, 10, 99, 100, 60_000, 1_281_167, N_MAX].map(line).concat();
    expect![[r#"
        1: 0
        2: 0 1
        10: 3 1 7 2 6
        99: 44 1 74 2 27
        100: 85 83 44 92 71
        60000: 45228 41423 53602 24626 39061
        1281167: 775788 123314 1112285 755832 893597
        281474976710656: 118302493978419 42922133861840 36772586897808 63736088189817 217859560738111
    "#]].assert_eq(&text);
}

#[test]
#[should_panic(expected = "outside a permutation of 10")]
fn images_of_strangers_are_a_bug() {
    prp(1, 10).at(10);
}
