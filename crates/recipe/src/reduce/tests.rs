use super::word::mix;
use super::*;
use crate::model::{Init, ParamSpec};
use proptest::prelude::*;

fn layout(lengths: &[usize]) -> Arc<Layout> {
    let param = |(i, &n): (usize, &usize)| ParamSpec {
        name: format!("p{i}"),
        shape: vec![n],
        init: Init::Zeros,
    };
    Layout::new(lengths.iter().enumerate().map(param).collect())
}

/// A slot's gradient: any function of (block, slot) will do. Magnitudes span eight decades.
fn gradient(layout: &Layout, block: usize, slot: u32, salt: u64) -> Vec<f32> {
    let draw = |i: usize| {
        let bits = mix((i as u32) << 8 ^ slot << 4 ^ block as u32 ^ (salt as u32) << 20) as u64;
        let unit = (bits >> 8) as f64 / (1u64 << 32) as f64 - 0.5;
        (unit * [1e-7, 1e-5, 1e-3, 1e-1][(bits % 4) as usize]) as f32
    };
    (0..layout.range(block).len()).map(draw).collect()
}

struct Done {
    mean: Vec<f32>,
    verdict: Verdict,
}

/// Reduces one step with `ranks[r]` = the slots of rank r in the order it computes them, adding the
/// ranks' buffers in `arrival` order.
fn reduce(
    layout: &Arc<Layout>,
    ranks: &[Vec<u32>],
    arrival: &[usize],
    salt: u64,
    e: &[i32],
) -> Done {
    let n_slots = ranks.iter().map(Vec::len).sum::<usize>() as u32;
    let mut total: Option<Reducer> = None;
    for &rank in arrival {
        let mut reducer = Reducer::new(layout.clone(), n_slots);
        reducer.begin(e);
        for &slot in &ranks[rank] {
            for block in (0..layout.n_blocks()).rev() {
                let values = gradient(layout, block, slot, salt);
                reducer.add(SlotGrad { block, values: &values });
            }
            reducer.end_slot(slot, 1.0 + slot as f32 * 0.125);
        }
        reducer.buffer();
        total = Some(match total {
            None => reducer,
            Some(mut sum) => {
                sum.sums.iter_mut().zip(&reducer.sums).for_each(|(a, b)| *a += b);
                sum
            }
        });
    }
    let mut mean = vec![0.0; layout.numel()];
    let verdict = total.unwrap().finish(ranks.len(), &mut mean).unwrap();
    Done { mean, verdict }
}

proptest! {
    /// The claim: any partition of the slots over any number of ranks, in any order of computation
    /// and arrival, gives the same bytes.
    #[test]
    fn any_partition_gives_the_same_bytes(
        n_slots in 1u32..24,
        owners in prop::collection::vec(0usize..7, 24),
        keys in prop::collection::vec(any::<u32>(), 24),
        arrival_keys in prop::collection::vec(any::<u32>(), 7),
        salt in any::<u64>(),
    ) {
        let layout = layout(&[1, 7, 1500, 64]);
        let e = vec![30, 44, 20, 35];
        let alone: Vec<u32> = (0..n_slots).collect();
        let reference = reduce(&layout, &[alone], &[0], salt, &e);

        let mut slots: Vec<u32> = (0..n_slots).collect();
        slots.sort_by_key(|&s| keys[s as usize]);
        let mut ranks: Vec<Vec<u32>> = vec![Vec::new(); 7];
        for slot in slots {
            ranks[owners[slot as usize]].push(slot);
        }
        let mut arrival: Vec<usize> = (0..7).collect();
        arrival.sort_by_key(|&r| arrival_keys[r]);
        let split = reduce(&layout, &ranks, &arrival, salt, &e);

        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        prop_assert_eq!(bits(&split.mean), bits(&reference.mean));
        prop_assert_eq!(split.verdict, reference.verdict);
    }

    /// Both quantiser paths equal the definition.
    #[test]
    fn quantiser_equals_its_definition(
        bits in prop::collection::vec(any::<u32>(), 1..2100),
        exponent in -60i32..=90,
    ) {
        let finite = bits.iter().map(|&b| f32::from_bits(b)).filter(|g| g.is_finite());
        let grad: Vec<f32> = finite.collect();
        let limit = SUM_LIMIT / 4.0;
        let mut sums = vec![0i64; grad.len()];
        let got = quantise_into(&grad, exponent, limit, &mut sums);
        let exact = |&g: &f32| (f64::from(g) * exp2(exponent)).round_ties_even();
        let want: Vec<f64> = grad.iter().map(exact).collect();
        let overflow = want.iter().any(|q| q.abs() > limit);
        prop_assert_eq!(got == Quantised::Overflow, overflow);
        if !overflow {
            prop_assert_eq!(sums, want.iter().map(|&q| q as i64).collect::<Vec<i64>>());
        }
    }
}

#[test]
fn mean_is_close_to_the_real_mean() {
    let layout = layout(&[4096]);
    let ranks = vec![vec![0, 1, 2], vec![3, 4], vec![5, 6, 7]];
    let done = reduce(&layout, &ranks, &[2, 0, 1], 9, &[47]);
    for i in 0..4096 {
        let exact: f64 =
            (0..8).map(|s| f64::from(gradient(&layout, 0, s, 9)[i])).sum::<f64>() / 8.0;
        assert!((f64::from(done.mean[i]) - exact).abs() <= exact.abs() * 6e-8 + 1e-13);
    }
    let Verdict::Apply(summary) = done.verdict else { panic!("{:?}", done.verdict) };
    assert_eq!(summary.loss, 1.0 + 0.125 * 3.5);
    assert!(summary.grad_norm > 0.0);
}

fn one_rank(values: &[f32], loss: f32) -> (Reducer, Vec<f32>) {
    let layout = layout(&[values.len()]);
    let mut reducer = Reducer::new(layout, 1);
    reducer.begin(&[30]);
    reducer.add(SlotGrad { block: 0, values });
    reducer.end_slot(0, loss);
    let n = values.len();
    (reducer, vec![0.0; n])
}

#[test]
fn flags_decide_the_verdict() {
    let verdict = |values: &[f32], loss: f32| {
        let (mut reducer, mut mean) = one_rank(values, loss);
        reducer.buffer();
        reducer.finish(1, &mut mean).unwrap()
    };
    assert!(matches!(verdict(&[1.0, -2.0], 1.0), Verdict::Apply(_)));
    assert_eq!(verdict(&[1.0, 4e9], 1.0), Verdict::Redo);
    assert!(matches!(verdict(&[1.0, f32::NAN], 1.0), Verdict::Skip(_)));
    assert!(matches!(verdict(&[f32::NEG_INFINITY], 1.0), Verdict::Skip(_)));
    assert!(matches!(verdict(&[1.0], f32::NAN), Verdict::Skip(_)));
}

#[test]
fn wrong_slots_and_ranks_are_caught() {
    let (mut reducer, mut mean) = one_rank(&[1.0], 1.0);
    reducer.buffer();
    assert_eq!(reducer.finish(2, &mut mean), Err(ReduceError::Ranks { got: 1, want: 2 }));
    reducer.end_slot(0, 1.0);
    reducer.buffer();
    let twice = reducer.finish(1, &mut mean).unwrap_err();
    assert!(twice.to_string().contains("holds 2 slots"), "{twice}");

    let mut reducer = Reducer::new(layout(&[1]), 2);
    reducer.begin(&[30]);
    reducer.end_slot(1, 0.0);
    reducer.end_slot(1, 0.0);
    reducer.buffer();
    assert!(reducer.finish(1, &mut [0.0]).is_err(), "slot 1 twice and slot 0 never");
}

#[test]
fn requests_need_every_rank_and_one_id() {
    let agreed = |ids: &[Option<u64>]| {
        let mut total = ControlWord::new(1);
        for id in ids.iter().flatten() {
            total.raise(Request::Checkpoint, *id);
        }
        total.agreed(Request::Checkpoint, ids.len())
    };
    assert!(agreed(&[Some(5), Some(5), Some(5)]));
    assert!(!agreed(&[Some(5), None, Some(5)]));
    assert!(!agreed(&[Some(4), Some(6), Some(5)]), "the mean is right, the ids are not");
    assert!(agreed(&[Some(REQUEST_ID_MAX); 3]));
    assert!(!agreed(&[None]));
}

#[test]
fn exponents_follow_the_gradient() {
    let mut counters = Counters::fresh(3, 8);
    advance_exponents(&mut counters, &[1.0, 0.0, 3e-3], 8);
    assert_eq!(counters.exponents, [47, 30, 56]);
    assert_eq!(counters.exponent_version, 1);
    advance_exponents(&mut counters, &[1.5, 0.0, 3e-3], 8);
    assert_eq!(counters.exponent_version, 1, "nothing changed");
    back_off_exponents(&mut counters);
    assert_eq!((counters.exponents.as_slice(), counters.exponent_version), (&[35, 18, 44][..], 2));
    advance_exponents(&mut counters, &[1e-38, 1e38, 1.0], 9);
    assert_eq!(counters.exponents, [90, -60, 46]);
    assert_eq!(exponent_of(f32::from_bits(1)), -149, "subnormal numbers too");
}
