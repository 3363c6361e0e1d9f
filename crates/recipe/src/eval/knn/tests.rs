use proptest::prelude::*;

use super::*;

fn nearest(k: usize, offers: &[(f32, u32)]) -> Vec<(f32, u32)> {
    let mut nearest = Nearest::new(k);
    offers.iter().for_each(|&(similarity, sample)| nearest.offer(similarity, sample));
    nearest.sorted().into_iter().map(|n| (n.similarity, n.sample)).collect()
}

fn neighbors(list: &[(f32, u32)]) -> Vec<Neighbor> {
    list.iter().map(|&(similarity, sample)| Neighbor { similarity, sample }).collect()
}

#[test]
fn rows_get_length_one() {
    let mut rows = [3.0, 4.0, 0.0, 0.0, -1e-20, 0.0];
    normalize(&mut rows, 2);
    assert_eq!(rows[..4], [0.6, 0.8, 0.0, 0.0]);
    // Not scaled up to length 1.
    assert!(rows[4].abs() < 1e-7);
}

#[test]
fn equal_similarities_go_to_the_lower_number() {
    let offers = [(0.5, 7), (0.5, 2), (0.9, 9), (0.5, 4), (-0.0, 1), (0.0, 0)];
    assert_eq!(nearest(3, &offers), [(0.9, 9), (0.5, 2), (0.5, 4)]);
    assert_eq!(nearest(9, &offers)[4..], [(0.0, 0), (0.0, 1)]);
}

#[test]
fn near_votes_weigh_more_than_many() {
    let list = neighbors(&[(0.9, 0), (0.5, 1), (0.5, 2), (0.5, 3)]);
    let class_of = |sample: u32| u32::from(sample > 0);
    // exp(-0.4 / 0.07) = 0.0033 each, against 1.
    assert_eq!(vote(&list, 4, class_of, 0.07), [0, 1]);
    // At a high temperature all weigh alike.
    assert_eq!(vote(&list, 4, class_of, 100.0), [1, 0]);
    assert_eq!(vote(&list, 1, class_of, 100.0), [0]);
}

#[test]
fn equal_votes_go_to_the_lower_class() {
    let list = neighbors(&[(0.5, 0), (0.5, 1), (0.5, 2), (0.5, 3)]);
    assert_eq!(vote(&list, 4, |sample| 9 - sample % 2, 0.07), [8, 9]);
    assert_eq!(vote(&list, 2, |sample| 9 - sample, 0.07), [8, 9]);
}

#[test]
fn small_temperatures_do_not_overflow() {
    let list = neighbors(&[(1.0, 5), (0.999, 6), (-1.0, 7)]);
    assert_eq!(vote(&list, 3, |sample| sample, 1e-9), [5, 6, 7]);
    assert_eq!(vote(&[], 3, |sample| sample, 0.07), [0u32; 0]);
}

/// Similarities with many ties.
fn offers() -> impl Strategy<Value = Vec<(f32, u32)>> {
    proptest::collection::vec(-4i8..5, 1..60).prop_map(|list| {
        list.into_iter().zip(0u32..).map(|(s, sample)| (f32::from(s) / 4.0, sample)).collect()
    })
}

proptest! {
    #[test]
    fn the_order_of_offers_does_not_matter(
        offers in offers(), k in 1usize..20, turn in 0usize..60,
    ) {
        let mut want = offers.clone();
        want.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        want.truncate(k);
        let mut turned = offers.clone();
        turned.rotate_left(turn % offers.len());
        prop_assert_eq!(&nearest(k, &offers), &want);
        turned.reverse();
        prop_assert_eq!(&nearest(k, &turned), &want);
    }

    #[test]
    fn votes_are_those_of_the_definition(offers in offers(), k in 1usize..20) {
        let list = neighbors(&nearest(20, &offers));
        let class_of = |sample: u32| sample % 5;
        let ranked = vote(&list, k, class_of, 0.07);
        let weight = |class: u32| -> f64 {
            let of_class = list.iter().take(k).filter(|n| class_of(n.sample) == class);
            of_class.map(|n| libm::exp(f64::from(n.similarity) / 0.07)).sum()
        };
        // All that voted, once each, and none that weighs more than the one before it.
        let mut classes = ranked.clone();
        classes.sort_unstable();
        let want: Vec<u32> = (0..5).filter(|&class| weight(class) > 0.0).collect();
        prop_assert_eq!(classes, want);
        for pair in ranked.windows(2) {
            prop_assert!(weight(pair[0]) >= weight(pair[1]) * (1.0 - 1e-12));
        }
    }
}
