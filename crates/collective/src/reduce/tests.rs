use proptest::prelude::{Strategy, any, proptest};

use super::sum_in_rank_order;

/// Sums `chunks` (one per rank) as rank `rank` would, with slots longer than the chunks.
fn sum_as(rank: usize, chunks: &[Vec<f32>]) -> Vec<u32> {
    let n = chunks[0].len();
    let stride = (n + 3) * 4;
    let mut slots: Vec<f32> = Vec::new();
    for (_, chunk) in chunks.iter().enumerate().filter(|(idx, _)| *idx != rank) {
        slots.extend(chunk);
        slots.extend([f32::NAN; 3]);
    }
    let mut own: Vec<f32> = chunks[rank].clone();
    sum_in_rank_order::<f32>(
        bytemuck::cast_slice_mut(&mut own),
        bytemuck::cast_slice_mut(&mut slots),
        stride,
        rank,
    );
    own.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #[test]
    fn every_rank_computes_the_left_to_right_sum(
        chunks in (1usize..6, 0usize..9).prop_flat_map(|(world, n)| {
            proptest::collection::vec(proptest::collection::vec(-1e30f32..1e30, n), world)
        })
    ) {
        let n = chunks[0].len();
        let expected: Vec<u32> = (0..n)
            .map(|idx| {
                chunks.iter().skip(1).fold(chunks[0][idx], |sum, chunk| sum + chunk[idx]).to_bits()
            })
            .collect();
        for rank in 0..chunks.len() {
            assert_eq!(sum_as(rank, &chunks), expected, "as rank {rank}");
        }
    }

    #[test]
    fn integers_outside_the_range_do_not_panic(left in any::<i64>(), right in any::<i64>()) {
        let mut own = [left];
        sum_in_rank_order::<i64>(
            bytemuck::cast_slice_mut(&mut own),
            bytemuck::cast_slice_mut(&mut [right]),
            8,
            0,
        );
        assert_eq!(own, [left.wrapping_add(right)]);
    }
}
