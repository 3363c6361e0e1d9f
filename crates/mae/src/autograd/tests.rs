use super::*;
use crate::weights::values;
use tch::{Device, Kind};

/// Weights of three layers, and an input.
fn layers() -> Vec<Tensor> {
    tch::manual_seed(7);
    let layer = |_| Tensor::randn([16, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    (0..4).map(layer).collect()
}

fn chain(layers: &[Tensor], border: fn(Tensor) -> Tensor) -> Tensor {
    let x = border(layers[0].gelu("none"));
    let x = border(&x + x.matmul(&layers[1]).gelu("none"));
    let x = border(&x + x.matmul(&layers[2]).gelu("none"));
    (x.matmul(&layers[3])).square().mean(None::<Kind>)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values::<f32>(&tensor.contiguous()).iter().map(|value| value.to_bits()).collect()
}

fn whole(loss: &Tensor, leaves: &[&Tensor]) -> Vec<Vec<u32>> {
    Tensor::run_backward(&[loss], leaves, false, false).iter().map(bits).collect()
}

#[test]
fn pieces_have_the_bits_of_one_pass_and_come_last_first() {
    let layers = layers();
    let leaves: Vec<&Tensor> = layers.iter().collect();
    let want = whole(&chain(&layers, |x| x), &leaves);
    let recorded = record(|| chain(&layers, border));
    let pieces = Pieces::find(&recorded, &leaves).unwrap().expect("each layer is in one piece");
    assert_eq!(pieces.0.len(), 4);
    for recorded in [recorded, record(|| chain(&layers, border))] {
        let mut order: Vec<usize> = Vec::new();
        let mut sink = |leaf: usize, grad: Tensor| {
            order.push(leaf);
            assert_eq!(bits(&grad), want[leaf], "layer {leaf}");
        };
        pieces.backward(recorded, &leaves, &mut sink).unwrap();
        assert_eq!(order, [3, 2, 1, 0]);
    }
}

#[test]
fn a_border_that_several_pieces_read_gets_the_sum() {
    let layers = layers();
    let leaves: Vec<&Tensor> = layers[..3].iter().collect();
    // The second layer's output and the first's both reach the loss.
    let forked = |border: fn(Tensor) -> Tensor| {
        let first = border(layers[0].gelu("none"));
        let second = border(first.matmul(&layers[1]).gelu("none"));
        (second.matmul(&layers[2]) + first).square().mean(None::<Kind>)
    };
    let want = whole(&forked(|x| x), &leaves);
    let recorded = record(|| forked(border));
    let pieces = Pieces::find(&recorded, &leaves).unwrap().unwrap();
    let mut n = 0;
    let mut sink = |leaf: usize, grad: Tensor| {
        n += 1;
        assert_eq!(bits(&grad), want[leaf], "layer {leaf}");
    };
    pieces.backward(recorded, &leaves, &mut sink).unwrap();
    assert_eq!(n, 3);
}

#[test]
fn a_shared_weight_cannot_be_cut() {
    let layers = layers();
    let leaves: Vec<&Tensor> = layers.iter().take(1).collect();
    let both: Vec<&Tensor> = layers.iter().take(2).collect();
    let unused = record(|| border(layers[0].gelu("none")).square().mean(None::<Kind>));
    assert_eq!(Pieces::find(&unused, &both).unwrap(), None, "nor where one is not used");
    let recorded = record(|| {
        let x = border(layers[0].gelu("none"));
        x.matmul(&layers[0]).square().mean(None::<Kind>)
    });
    assert_eq!(Pieces::find(&recorded, &leaves).unwrap(), None);
}

#[test]
fn outside_of_a_recorded_pass_a_border_is_nothing() {
    let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
    let same = border(x.shallow_clone());
    assert_eq!(same.data_ptr(), x.data_ptr());
    assert!(same.is_leaf() && same.requires_grad());
    // A pass that failed leaves nothing behind.
    let failed = std::panic::catch_unwind(|| record(|| panic!("in the middle")));
    assert!(failed.is_err());
    assert!(RECORD.with_borrow(Option::is_none));
    // Nor is there a border where nothing is learned.
    let frozen = record(|| border(Tensor::from_slice(&[1f32])));
    assert!(frozen.borders.is_empty());
}

#[test]
fn what_libtorch_says_comes_back() {
    let x = Tensor::from_slice(&[1f32]);
    let error = grad(&x, None, &[&x], 0).unwrap_err().to_string();
    assert!(error.contains("does not require grad"), "{error}");
}
