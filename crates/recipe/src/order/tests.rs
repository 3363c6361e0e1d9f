use expect_test::expect;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::{collection, prop_assert, prop_assert_eq, proptest};

use super::*;

fn spec(mode: OrderMode, lanes: u32, block: u64, batch: u32, bounds: Vec<u64>) -> OrderSpec {
    OrderSpec {
        params: OrderParams { mode, lanes, block },
        seed: 7,
        batch,
        chunk_bounds: bounds.into(),
    }
}

fn even_bounds(n_samples: u64, chunk: u64) -> Vec<u64> {
    let mut bounds: Vec<u64> = (0..n_samples).step_by(chunk as usize).collect();
    bounds.push(n_samples);
    bounds
}

fn any_spec() -> impl Strategy<Value = OrderSpec> {
    let mode = prop_oneof![
        3 => Just(OrderMode::Block),
        1 => Just(OrderMode::Global),
        1 => Just(OrderMode::Sequential)
    ];
    let sizes = collection::vec(1u64..200, 1..30);
    (mode, 1u32..9, 1u32..20, 1u64..600, any::<u64>(), sizes).prop_map(
        |(mode, lanes, per_lane, block, seed, sizes)| {
            let mut bounds: Vec<u64> = vec![0];
            for size in sizes {
                bounds.push(bounds[bounds.len() - 1] + size);
            }
            let params = OrderParams { mode, lanes, block };
            OrderSpec { params, seed, batch: lanes * per_lane, chunk_bounds: bounds.into() }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// All positions, hence also those of an epoch's steps, hold each sample once.
    #[test]
    fn positions_map_one_to_one(spec in any_spec(), epoch in 0u32..5) {
        prop_assert_eq!(spec.check(), Ok(()));
        let n = spec.n_samples();
        let order = EpochOrder::new(&spec, epoch);
        let samples = order.samples(0..n);
        let mut seen = vec![false; n as usize];
        for sample in &samples {
            prop_assert!(!std::mem::replace(&mut seen[sample.0 as usize], true), "{sample} twice");
        }
        // Bulk and single look-ups agree.
        for position in (0..n).step_by(1 + n as usize / 50) {
            prop_assert_eq!(order.sample_at(position), samples[position as usize]);
        }
        prop_assert!(spec.steps_per_epoch() * u64::from(spec.batch) <= n);
    }

    /// Every step reads only chunks whose steps it is among, and chunks are not said to be read
    /// long before or after they are.
    #[test]
    fn chunks_know_their_steps(spec in any_spec(), epoch in 0u32..3) {
        let order = EpochOrder::new(&spec, epoch);
        let steps = ChunkSteps::new(&spec, epoch);
        let batch = u64::from(spec.batch);
        let n_chunks = spec.chunk_bounds.len() - 1;
        let mut used = vec![Vec::new(); n_chunks];
        for step in 0..spec.steps_per_epoch() {
            for sample in order.samples(step * batch..(step + 1) * batch) {
                let chunk = spec.chunk_bounds.partition_point(|&bound| bound <= sample.0) - 1;
                used[chunk].push(step);
            }
        }
        let per_step = batch / u64::from(spec.params.lanes);
        for (chunk, used) in used.iter().enumerate() {
            let ranges = steps.steps(chunk);
            prop_assert!(used.iter().all(|step| ranges.iter().any(|range| range.contains(step))));
            if spec.params.mode == OrderMode::Block {
                // A range is as long as the blocks that the chunk is part of.
                let size = spec.chunk_bounds[chunk + 1] - spec.chunk_bounds[chunk];
                let longest = (size + 4 * spec.params.block).div_ceil(per_step) + 2;
                prop_assert!(ranges.iter().all(|range| range.end - range.start <= longest));
            }
            let first = ranges.iter().map(|range| range.start).min();
            prop_assert_eq!(steps.next(chunk, 0), first);
            prop_assert_eq!(steps.next(chunk, spec.steps_per_epoch()), None);
            for &step in used {
                prop_assert_eq!(steps.next(chunk, step), Some(step));
            }
        }
    }

    #[test]
    fn cuts_are_found_again(length in 1u64..5000, pieces in 1u64..64) {
        let pieces = pieces.min(length);
        for i in (0..length).step_by(1 + length as usize / 97) {
            let piece = cut_of(i, length, pieces);
            prop_assert!(cut(length, piece, pieces) <= i && i < cut(length, piece + 1, pieces));
        }
    }

    #[test]
    fn stand_ins_are_the_rest_of_the_chunk_and_then_of_all(
        seed in any::<u64>(),
        n in 1u64..300,
        at in 0u64..300,
        behind in 0u64..300,
    ) {
        let (chunk, bad) = (100..100 + n, SampleId(100 + at % n));
        let n_samples = chunk.end + behind;
        let mut found: Vec<u64> = (0..)
            .map_while(|attempt| substitute(seed, 2, bad, (chunk.clone(), n_samples), attempt))
            .map(|id| id.0)
            .collect();
        let (inside, beyond) = found.split_at_mut(n as usize - 1);
        inside.sort_unstable();
        beyond.sort_unstable();
        prop_assert!(inside.iter().copied().eq(chunk.clone().filter(|&id| id != bad.0)));
        prop_assert!(beyond.iter().copied().eq((0..n_samples).filter(|id| !chunk.contains(id))));
    }
}

#[test]
fn epochs_and_seeds_differ() {
    for mode in [OrderMode::Block, OrderMode::Global] {
        let base = spec(mode, 4, 64, 32, even_bounds(1000, 50));
        let other = OrderSpec { seed: 8, ..base.clone() };
        let first = EpochOrder::new(&base, 0).samples(0..1000);
        assert_eq!(first, EpochOrder::new(&base, 0).samples(0..1000));
        assert_ne!(first, EpochOrder::new(&base, 1).samples(0..1000));
        assert_ne!(first, EpochOrder::new(&other, 0).samples(0..1000));
    }
    let sequential = spec(OrderMode::Sequential, 1, 64, 32, even_bounds(1000, 50));
    let ids: Vec<u64> = (10..20).collect();
    let got = EpochOrder::new(&sequential, 3).samples(10..20);
    assert_eq!(got, ids.into_iter().map(SampleId).collect::<Vec<SampleId>>());
}

/// Block mode's reason to be: the samples of a lane's block come from few chunks.
#[test]
fn blocks_read_few_chunks() {
    let spec = spec(OrderMode::Block, 4, 200, 40, even_bounds(10_000, 50));
    let order = EpochOrder::new(&spec, 1);
    // Lane 2 has places 20..30 of each batch; its first block lasts 20 steps.
    let mut chunks: Vec<u64> = (0..20)
        .flat_map(|step| order.samples(step * 40 + 20..step * 40 + 30))
        .map(|sample| spec.chunk_of(sample).start)
        .collect();
    chunks.sort_unstable();
    chunks.dedup();
    assert!(chunks.len() <= 5, "{} chunks for 200 samples", chunks.len());
    assert!(chunks.windows(2).any(|pair| pair[1] - pair[0] > 50), "chunks are shuffled");
}

#[test]
fn golden_orders() {
    let line = |spec: &OrderSpec, epoch: u32, positions: Range<u64>| {
        let ids: Vec<String> = EpochOrder::new(spec, epoch)
            .samples(positions.clone())
            .iter()
            .map(|id| id.to_string())
            .collect();
        format!("{:?} {epoch} {positions:?}: {}\n", spec.params.mode, ids.join(" "))
    };
    let global = spec(OrderMode::Global, 1, 1, 256, even_bounds(60_000, 8_000));
    let block = spec(OrderMode::Block, 8, 300, 64, even_bounds(60_000, 250));
    let small = spec(OrderMode::Block, 2, 5, 4, even_bounds(22, 3));
    let text = [
        line(&global, 0, 0..8),
        line(&global, 1, 59_992..60_000),
        line(&block, 0, 0..12),
        line(&block, 3, 59_990..60_000),
        line(&small, 0, 0..22),
    ]
    .concat();
    expect![[r#"
        Global 0 0..8: 44465 5517 49247 33320 57406 55773 24464 32126
        Global 1 59992..60000: 48442 46591 8538 57998 40293 20281 10122 45400
        Block 0 0..12: 17417 17469 17385 17394 17352 17312 17291 17429 52466 52385 52313 52340
        Block 3 59990..60000: 7612 7572 54117 54240 54045 54211 4196 4144 4218 4047
        Block 0 0..22: 16 1 5 4 0 17 20 19 15 9 18 12 11 21 6 8 10 3 13 14 2 7
    "#]]
    .assert_eq(&text);
}

#[test]
fn defaults() {
    assert_eq!([1, 12, 64, 4096, 384].map(default_lanes), [1, 4, 64, 256, 128]);
    assert_eq!(default_mode(99_999_999), OrderMode::Global);
    assert_eq!(default_mode(100_000_000), OrderMode::Block);
    assert_eq!(default_block(1_281_167, 5000, 256), 1028);
    assert_eq!(default_block(1_281_167, 5000, 64), 4096);
    let params = OrderParams::default_for(60_000, 4, 512);
    let text = serde_json::to_string(&params).unwrap();
    assert_eq!(text, r#"{"mode":"global","lanes":256,"block":60000}"#);
    assert_eq!(serde_json::from_str::<OrderParams>(&text).unwrap(), params);
}

#[test]
fn wrong_parameters_are_named() {
    let message = |spec: OrderSpec| spec.check().unwrap_err().to_string();
    let block = OrderMode::Block;
    expect!["`lanes` = 3 must divide `batch` = 32 and be 1 to 65536"].assert_eq(&message(spec(
        block,
        3,
        1,
        32,
        vec![0, 9],
    )));
    expect!["chunk bound 2 is 4: bounds must start at 0 and rise to at most 2^48"]
        .assert_eq(&message(spec(block, 2, 1, 32, vec![0, 4, 4])));
    expect!["0 chunks: the data needs 1 to 67108864"].assert_eq(&message(spec(
        block,
        2,
        1,
        32,
        vec![0],
    )));
    expect!["`block` = 0 gives no block or more than 2^32 blocks in a lane"]
        .assert_eq(&message(spec(block, 2, 0, 32, vec![0, 4])));
}
