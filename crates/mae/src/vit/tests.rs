use lacuna_recipe::init;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use tch::Device;

use super::*;

/// What the last block leaves out changes nothing that is read: tokens and gradients are those of
/// the whole stack, to rounding (a sum over fewer rows is grouped differently).
#[test]
fn the_last_block_may_leave_tokens_out() {
    let model = ModelConfig::preset("demo").unwrap();
    let layout = Layout::new(model.params());
    let mut flat: Vec<f32> = vec![0.0; layout.numel()];
    for (block, spec) in layout.params().iter().enumerate() {
        init::fill(spec, 3, &mut flat[layout.range(block)]);
    }
    let weights = Weights::copy_of(&layout, &flat).trainable();
    let block = |i| Block::new(&weights, &format!("decoder_blocks.{i}"), 3);
    let blocks: Vec<Block> = (0..model.decoder_depth).map(block).collect();
    tch::manual_seed(1);
    let x_bnd = Tensor::randn([4, 50, 96], (Kind::Float, Device::Cpu));
    let ids_bi = Tensor::stack(
        &[0i64, 1, 2, 3].map(|b| Tensor::randperm(49, (Kind::Int64, Device::Cpu)) + (b % 2)),
        0,
    )
    .narrow(1, 0, 37);
    let ends =
        [run_to(&blocks, x_bnd.shallow_clone(), &ids_bi), pick(&run(&blocks, x_bnd), &ids_bi)];
    let near = |a: &Tensor, b: &Tensor| {
        let scale = b.abs().max().double_value(&[]).max(1e-6);
        ((a - b).abs().max().double_value(&[])) / scale
    };
    assert_eq!(ends[0].size(), [4, 37, 96]);
    assert!(near(&ends[0], &ends[1]) < 1e-6, "{}", near(&ends[0], &ends[1]));
    let leaves: Vec<Tensor> = weights
        .layout()
        .params()
        .iter()
        .filter(|spec| spec.name.starts_with("decoder_blocks"))
        .map(|spec| weights.get(&spec.name))
        .collect();
    let grads = ends
        .map(|end| Tensor::run_backward(&[end.square().sum(None::<Kind>)], &leaves, false, false));
    for ((some, all), leaf) in grads[0].iter().zip(&grads[1]).zip(&leaves) {
        assert!(near(some, all) < 1e-5, "{:?}: {}", leaf.size(), near(some, all));
    }
}

#[test]
fn rows_are_picked_from_their_own_sample() {
    let x_bnd = Tensor::from_slice(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).view([2, 3, 1]);
    let picked = pick(&x_bnd, &Tensor::from_slice(&[2i64, 0, 1, 1]).view([2, 2]));
    assert_eq!(Vec::<f32>::try_from(picked.reshape(-1)).unwrap(), [2.0, 0.0, 4.0, 4.0]);
}
