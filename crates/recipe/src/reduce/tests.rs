use super::word::mix;
use super::*;
use crate::model::{Init, ParamSpec};
use crate::state::Counters;
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

/// How a step is shared out: the slots of each rank in the order it computes them, the order in
/// which ranks' parts are added, the largest bucket, and whether parts leave as they complete.
struct Sharing<'a> {
    ranks: &'a [Vec<u32>],
    arrival: &'a [usize],
    bucket: usize,
    overlapped: bool,
}

impl<'a> Sharing<'a> {
    fn whole(ranks: &'a [Vec<u32>], arrival: &'a [usize]) -> Self {
        Sharing { ranks, arrival, bucket: usize::MAX, overlapped: false }
    }
}

fn add_part(sum: &mut Part, part: &Part) {
    match (sum, part) {
        (Part::I64(sum), Part::I64(part)) => sum.iter_mut().zip(part).for_each(|(a, b)| *a += b),
        (Part::I32(sum), Part::I32(part)) => sum.iter_mut().zip(part).for_each(|(a, b)| *a += b),
        (Part::F32(sum), Part::F32(part)) => sum.iter_mut().zip(part).for_each(|(a, b)| *a += b),
        _ => panic!("parts of two kinds"),
    }
}

fn reduce(
    reduction: Reduction,
    layout: &Arc<Layout>,
    sharing: &Sharing<'_>,
    salt: u64,
    e: &[i32],
) -> Done {
    let n_slots = sharing.ranks.iter().map(Vec::len).sum::<usize>() as u32;
    let order: Vec<usize> = (0..layout.n_blocks()).rev().collect();
    let buckets = Arc::new(Buckets::new(layout, &order, sharing.bucket));
    let mut total: Option<(Reducer, Vec<Part>)> = None;
    for &rank in sharing.arrival {
        let mut reducer = Reducer::of(reduction, layout.clone(), buckets.clone(), n_slots);
        reducer.begin(e);
        let mut parts: Vec<Part> = Vec::new();
        for (idx, &slot) in sharing.ranks[rank].iter().enumerate() {
            if sharing.overlapped && idx + 1 == sharing.ranks[rank].len() {
                reducer.begin_last_slot();
            }
            for &block in &order {
                let values = gradient(layout, block, slot, salt);
                reducer.add(SlotGrad { block, values: &values });
                parts.extend(std::iter::from_fn(|| reducer.take_ready()));
            }
            reducer.end_slot(slot, 1.0 + slot as f32 * 0.125);
        }
        if sharing.overlapped && !sharing.ranks[rank].is_empty() {
            assert_eq!(parts.len(), buckets.lengths().len(), "all but the word left early");
        }
        parts.extend(reducer.take_rest());
        total = Some(match total {
            None => (reducer, parts),
            Some((first, mut sums)) => {
                sums.iter_mut().zip(&parts).for_each(|(sum, part)| add_part(sum, part));
                (first, sums)
            }
        });
    }
    let mut mean = vec![0.0; layout.numel()];
    let (mut reducer, sums) = total.unwrap();
    reducer.put(sums);
    let verdict = reducer.finish(sharing.ranks.len(), &mut mean).unwrap();
    Done { mean, verdict }
}

proptest! {
    /// The claim: any partition of the slots over any number of ranks, in any order of computation
    /// and arrival, in buckets of any size, as they complete or at the end, gives the same bytes.
    #[test]
    fn any_partition_gives_the_same_bytes(
        n_slots in 1u32..24,
        owners in prop::collection::vec(0usize..7, 24),
        keys in prop::collection::vec(any::<u32>(), 24),
        arrival_keys in prop::collection::vec(any::<u32>(), 7),
        salt in any::<u64>(),
        bucket in 1usize..9000,
        overlapped in any::<bool>(),
        reduction in prop::sample::select(vec![Reduction::Exact, Reduction::Exact32]),
    ) {
        let layout = layout(&[1, 7, 5000, 64]);
        let e = match reduction {
            Reduction::Exact32 => vec![24, 27, 20, 21, 22, 26],
            _ => vec![30, 44, 20, 35],
        };
        let alone: Vec<u32> = (0..n_slots).collect();
        let whole = [alone];
        let reference = reduce(reduction, &layout, &Sharing::whole(&whole, &[0]), salt, &e);
        prop_assert!(matches!(reference.verdict, Verdict::Apply(_)), "{:?}", reference.verdict);

        let mut slots: Vec<u32> = (0..n_slots).collect();
        slots.sort_by_key(|&s| keys[s as usize]);
        let mut ranks: Vec<Vec<u32>> = vec![Vec::new(); 7];
        for slot in slots {
            ranks[owners[slot as usize]].push(slot);
        }
        let mut arrival: Vec<usize> = (0..7).collect();
        arrival.sort_by_key(|&r| arrival_keys[r]);
        let sharing = Sharing { ranks: &ranks, arrival: &arrival, bucket, overlapped };
        let split = reduce(reduction, &layout, &sharing, salt, &e);

        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        prop_assert_eq!(bits(&split.mean), bits(&reference.mean));
        prop_assert_eq!(split.verdict, reference.verdict);
    }

    /// The 32-bit quantiser equals its definition, chunk by chunk.
    #[test]
    fn the_32_bit_quantiser_equals_its_definition(
        values in prop::collection::vec(-1f32..1.0, 1..3 * CHUNK_32),
        exponents in prop::collection::vec(20i32..34, 3),
        n_slots in 1u32..9,
    ) {
        let limit = fixed32::slot_limit(n_slots);
        let (mut sums, mut peaks) = (vec![5i32; values.len()], vec![0i64; 3]);
        let got = fixed32::add(&values, &exponents, limit, &mut sums, &mut peaks);
        let q = |i: usize| (f64::from(values[i]) * exp2(exponents[i / CHUNK_32])).round_ties_even();
        let mut overflow = false;
        for (chunk, exponent) in (0..values.len().div_ceil(CHUNK_32)).zip(&exponents) {
            let range = chunk * CHUNK_32..values.len().min((chunk + 1) * CHUNK_32);
            let max = values[range.clone()].iter().fold(0f32, |m, v| m.max(v.abs()));
            let fits = range.clone().all(|i| q(i).abs() <= f64::from(limit));
            overflow |= !fits;
            for i in range {
                let want = if fits { 5 + q(i) as i64 } else { 5 };
                prop_assert_eq!(i64::from(sums[i]), want, "element {}", i);
            }
            let peak = (f64::from(max) * exp2(exponent + 16)).round_ties_even() as i64;
            prop_assert_eq!(fixed32::is_marked(peaks[chunk]), !fits);
            let magnitude = if fits { peak as f64 } else { 0.0 };
            prop_assert_eq!(fixed32::magnitude(peaks[chunk]), magnitude);
        }
        prop_assert_eq!(got == Quantised::Overflow, overflow);
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
        let got = fixed64::add(&grad, exponent, limit, &mut sums);
        let exact = |&g: &f32| (f64::from(g) * exp2(exponent)).round_ties_even();
        let want: Vec<f64> = grad.iter().map(exact).collect();
        let overflow = want.iter().any(|q| q.abs() > limit);
        prop_assert_eq!(got == Quantised::Overflow, overflow);
        if !overflow {
            prop_assert_eq!(sums, want.iter().map(|&q| q as i64).collect::<Vec<i64>>());
        }
    }
}

/// The mean's error, as a part of each element's slots' root mean square.
fn worst_error(reduction: Reduction, e: &[i32]) -> f64 {
    let layout = layout(&[4096]);
    let ranks = vec![vec![0, 1, 2], vec![3, 4], vec![5, 6, 7]];
    let done = reduce(reduction, &layout, &Sharing::whole(&ranks, &[2, 0, 1]), 9, e);
    let Verdict::Apply(summary) = done.verdict else { panic!("{:?}", done.verdict) };
    assert_eq!(summary.loss, 1.0 + 0.125 * 3.5);
    assert!(summary.grad_norm > 0.0);
    let slots: Vec<Vec<f32>> = (0..8).map(|s| gradient(&layout, 0, s, 9)).collect();
    let error = |i: usize| {
        let values = slots.iter().map(|slot| f64::from(slot[i]));
        (f64::from(done.mean[i]) - values.sum::<f64>() / 8.0).abs()
    };
    (0..4096).map(error).fold(0.0, f64::max)
}

#[test]
fn means_are_close_to_the_real_mean() {
    // Largest magnitude 0.05: units of 2^-47, and of 2^-28 in sums of 32 bits.
    assert!(worst_error(Reduction::Exact, &[47]) < 0.05 * 6e-8 + 1e-13);
    assert!(worst_error(Reduction::Exact32, &[28; 2]) < 0.05 * 6e-8 + exp2(-29));
    assert!(worst_error(Reduction::Fast, &[30]) < 0.05 * 3e-7);
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
        reducer.finish(1, &mut mean).unwrap()
    };
    assert!(matches!(verdict(&[1.0, -2.0], 1.0), Verdict::Apply(_)));
    assert_eq!(verdict(&[1.0, 4e9], 1.0), Verdict::Redo);
    assert!(matches!(verdict(&[1.0, f32::NAN], 1.0), Verdict::Skip(_)));
    assert!(matches!(verdict(&[f32::NEG_INFINITY], 1.0), Verdict::Skip(_)));
    assert!(matches!(verdict(&[1.0], f32::NAN), Verdict::Skip(_)));
    let both = verdict(&[4e9], f32::NAN);
    assert!(matches!(both, Verdict::Skip(_)), "other exponents do not help: {both:?}");
}

#[test]
fn wrong_slots_and_ranks_are_caught() {
    let (mut reducer, mut mean) = one_rank(&[1.0], 1.0);
    assert_eq!(reducer.finish(2, &mut mean), Err(ReduceError::Ranks { got: 1, want: 2 }));
    reducer.end_slot(0, 1.0);
    let twice = reducer.finish(1, &mut mean).unwrap_err();
    assert!(twice.to_string().contains("holds 2 slots"), "{twice}");

    let mut reducer = Reducer::new(layout(&[1]), 2);
    reducer.begin(&[30]);
    reducer.end_slot(1, 0.0);
    reducer.end_slot(1, 0.0);
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
    let exact = Reduction::Exact;
    let mut counters = Counters::fresh(3, 8);
    exact.advance(&mut counters, &[1.0, 0.0, 3e-3], 8);
    assert_eq!(counters.exponents, [47, 30, 56]);
    assert_eq!(counters.exponent_version, 1);
    exact.advance(&mut counters, &[1.5, 0.0, 3e-3], 8);
    assert_eq!(counters.exponent_version, 1, "nothing changed");
    exact.back_off(&mut counters, &[]);
    assert_eq!((counters.exponents.as_slice(), counters.exponent_version), (&[35, 18, 44][..], 2));
    exact.advance(&mut counters, &[1e-38, 1e38, 1.0], 9);
    assert_eq!(counters.exponents, [90, -60, 46]);
    assert_eq!(exponents::exponent_of(f32::from_bits(1)), -149, "subnormal numbers too");
}

#[test]
fn sums_of_32_bits_measure_before_the_first_step() {
    let layout = layout(&[CHUNK_32 + 1, 1]);
    let exact32 = Reduction::Exact32;
    let mut counters = exact32.fresh(&layout, 8);
    assert_eq!(counters.exponents, [20; 3], "two chunks and one");
    assert!(exact32.measures_first(&counters));
    exact32.back_off(&mut counters, &[]);
    assert_eq!(counters.exponents, [15; 3]);
    assert!(exact32.measures_first(&counters), "it still has to");
    // A gradient of 2^-10 takes 25 bits less those of 8 slots.
    exact32.advance(&mut counters, &[0.0, exp2(-10) as f32, 1.0], 8);
    assert_eq!((counters.exponents.as_slice(), counters.exponent_version), (&[44, 32, 22][..], 1));
    assert!(!exact32.measures_first(&counters));
    counters.step = 1;
    exact32.fit(&layout, &mut counters);
    assert_eq!(counters.exponents, [44, 32, 22], "a state that was resumed keeps its own");
    // Weights that were imported know no reduction.
    let mut start = Counters::fresh(layout.n_blocks(), 8);
    exact32.fit(&layout, &mut start);
    assert_eq!((start.exponents.as_slice(), start.exponent_version), (&[20; 3][..], 0));

    let mut zeros = exact32.fresh(&layout, 8);
    exact32.advance(&mut zeros, &[0.0; 3], 8);
    assert!(!exact32.measures_first(&zeros), "measured once is enough");
}

/// Exponents of 32-bit sums fall at once, each for itself, and rise by a bit in 64 steps.
#[test]
fn exponents_of_32_bits_rise_slowly() {
    let layout = layout(&[8, 8]);
    let exact32 = Reduction::Exact32;
    let mut counters = exact32.fresh(&layout, 8);
    exact32.advance(&mut counters, &[1.0, 1.0], 8);
    assert_eq!(counters.exponents, [22, 22]);
    for step in 1..=64 {
        counters.step = step;
        exact32.advance(&mut counters, &[exp2(-9) as f32, 8.0], 8);
        assert_eq!(counters.exponents, [if step < 64 { 22 } else { 23 }, 19], "step {step}");
    }
    for step in 65..=64 * 30 {
        counters.step = step;
        exact32.advance(&mut counters, &[0.0, 8.0], 8);
    }
    assert_eq!(counters.exponents, [44, 19], "what has no gradient is looked at more closely");
    exact32.back_off(&mut counters, &[1]);
    assert_eq!(counters.exponents, [44, 14]);
    (0..26).for_each(|_| exact32.back_off(&mut counters, &[1]));
    assert!(!exact32.at_floor(&counters, &[0]) && exact32.at_floor(&counters, &[1]));
    assert!(!exact32.at_floor(&counters, &[]));
}

/// A slot may have a magnitude 32 times the average of the step before, and no more than 64 times.
#[test]
fn the_room_of_32_bit_sums_is_five_bits() {
    let layout = layout(&[2]);
    let verdict = |magnitude: f32| {
        let mut counters = Reduction::Exact32.fresh(&layout, 1);
        Reduction::Exact32.advance(&mut counters, &[1.99], 4);
        let buckets = Arc::new(Buckets::new(&layout, &[0], 1));
        let mut reducer = Reducer::of(Reduction::Exact32, layout.clone(), buckets, 4);
        reducer.begin(&counters.exponents);
        for slot in 0..4 {
            reducer.add(SlotGrad { block: 0, values: &[magnitude, -magnitude] });
            reducer.end_slot(slot, 1.0);
        }
        let mut mean = [0.0; 2];
        (reducer.finish(1, &mut mean).unwrap(), mean)
    };
    let (fits, mean) = verdict(63.5);
    let Verdict::Apply(summary) = fits else { panic!("{fits:?}") };
    assert_eq!((summary.max_abs[0], mean), (63.5, [63.5, -63.5]));
    assert_eq!(verdict(64.5).0, Verdict::Redo);
}

/// Whoever has an overflow marks where, in sums over any ranks.
#[test]
fn an_overflow_says_where() {
    let layout = layout(&[1, CHUNK_32 + 1]);
    let buckets = Arc::new(Buckets::new(&layout, &[1, 0], 1));
    let mut reducer = Reducer::of(Reduction::Exact32, layout, buckets, 4);
    reducer.begin(&[24; 3]);
    for slot in 0..4 {
        reducer.add(SlotGrad { block: 0, values: &[1.0] });
        let mut values = vec![1.0; CHUNK_32 + 1];
        values[CHUNK_32] = if slot % 2 == 0 { 1e4 } else { -1.0 };
        reducer.add(SlotGrad { block: 1, values: &values });
        reducer.end_slot(slot, 1.0);
    }
    assert_eq!(reducer.finish(1, &mut vec![0.0; CHUNK_32 + 2]).unwrap(), Verdict::Redo);
    assert_eq!(reducer.overflows(), [2]);
}

#[test]
fn floats_are_summed_as_they_come() {
    let layout = layout(&[3]);
    let buckets = Arc::new(Buckets::new(&layout, &[0], 1));
    let mut reducer = Reducer::of(Reduction::Fast, layout.clone(), buckets, 2);
    let mut counters = Reduction::Fast.fresh(&layout, 2);
    reducer.begin(&counters.exponents);
    for (slot, values) in [[1e30f32, 1.0, -2.0], [1e30, 3.0, -2.0]].iter().enumerate() {
        reducer.add(SlotGrad { block: 0, values });
        reducer.end_slot(slot as u32, 1.0);
    }
    let mut mean = [0.0; 3];
    let Verdict::Apply(summary) = reducer.finish(1, &mut mean).unwrap() else { panic!() };
    assert_eq!(mean, [1e30, 2.0, -2.0]);
    let before = counters.clone();
    Reduction::Fast.advance(&mut counters, &summary.max_abs, 2);
    assert_eq!(counters, before, "floats have no exponents");
}

#[test]
fn buckets_keep_the_order_and_hold_each_tensor_once() {
    let layout = layout(&[4, 10, 3, 3]);
    let buckets = Buckets::new(&layout, &[3, 2, 1, 0], 8);
    assert_eq!(buckets.lengths().collect::<Vec<_>>(), [6, 10, 4], "a large one stands alone");
    assert_eq!(buckets.n_tensors(), [2, 1, 1]);
    assert_eq!([buckets.place(3), buckets.place(2)], [(0, 0..3), (0, 3..6)]);
    assert_eq!([buckets.place(1), buckets.place(0)], [(1, 0..10), (2, 0..4)]);
}
