use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};
use proptest::prelude::*;

use super::*;

fn check_cover(layout: &Layout, world: u32) {
    let partition = Partition::new(layout, world);
    let mut seen: Vec<usize> = vec![0; layout.n_blocks()];
    for rank in 0..world {
        let mut blocks: Vec<usize> = Vec::new();
        for slice in partition.rank_slices(rank) {
            assert_eq!(slice.range.start, seen[slice.block], "slices follow one another");
            seen[slice.block] = slice.range.end;
            blocks.push(slice.block);
        }
        assert!(blocks.windows(2).all(|pair| pair[0] < pair[1]), "one slice of a tensor per rank");
        let range = partition.range(rank);
        assert!(range.end == layout.numel() || range.end.is_multiple_of(GRAIN));
        let n: usize = partition.rank_slices(rank).iter().map(|s| s.range.len()).sum();
        assert_eq!(n, range.len());
    }
    let sizes: Vec<usize> = (0..layout.n_blocks()).map(|b| layout.range(b).len()).collect();
    assert_eq!(seen, sizes);
}

#[test]
fn the_base_model_is_cut_evenly() {
    let layout = Layout::new(ModelConfig::preset("base").unwrap().params());
    check_cover(&layout, 8);
    let partition = Partition::new(&layout, 8);
    let even = layout.numel() / 8;
    assert!((0..8).all(|rank| partition.range(rank).len().abs_diff(even) <= GRAIN));
}

#[test]
fn leftovers_spread_by_bytes() {
    assert_eq!(assign_leftovers(&[10, 500, 300, 100], 2), [1, 0, 1, 1]);
    assert_eq!(assign_leftovers(&[1, 1, 1], 1), [0, 0, 0]);
}

proptest! {
    #[test]
    fn every_element_has_one_writer(
        sizes in proptest::collection::vec(0usize..5000, 1..12),
        world in 1u32..17,
    ) {
        let param = |(i, n): (usize, &usize)| ParamSpec {
            name: format!("p{i:02}"),
            shape: vec![*n],
            init: Init::Zeros,
        };
        check_cover(&Layout::new(sizes.iter().enumerate().map(param).collect()), world);
    }
}
