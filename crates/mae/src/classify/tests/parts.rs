//! The parts of a loss by themselves, against their definitions or libtorch's own.

use super::*;

/// Images `[b, 3, 8, 8]` of which every value is another one.
fn images(b: i64) -> Tensor {
    Tensor::arange(b * 3 * 64, (Kind::Float, Device::Cpu)).view([b, 3, 8, 8])
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

fn draws(n: u64) -> Vec<Draws> {
    (0..n).map(|i| Draws::new(3, Tag::User, 7, i)).collect()
}

/// A sample keeps as much of its image as of its target.
#[test]
fn a_blend_has_the_shares_of_its_targets() {
    let (images, weights) = (images(4), [1.0, 1.0, 1.0, 0.0]);
    let mix = Some(Mix { own: 0.3, cut: None });
    let got = mixed(&images, mix, &Tensor::from_slice(&weights));
    let own = own_shares(mix, &weights);
    assert_eq!(own, [1.0, 0.3, 0.3, 0.3], "the partner of the first does not count");
    for (i, share) in own.into_iter().enumerate() {
        let of = |i: usize| images.select(0, i as i64);
        let want = of(i) * share + of(3 - i) * (1.0 - share);
        let found = got.select(0, i as i64);
        assert!(distance(&found, &want) < 1e-4, "sample {i}");
    }
}

#[test]
fn a_cut_is_the_partners_box_and_nothing_else() {
    let (images, weights) = (images(4), [1.0, 1.0, 1.0, 0.0]);
    let [top, left, height, width] = [2, 1, 3, 5];
    let own = 1.0 - 15.0 / 64.0;
    let mix = Some(Mix { own, cut: Some([top, left, height, width]) });
    let got = mixed(&images, mix, &Tensor::from_slice(&weights));
    assert_eq!(own_shares(mix, &weights), [1.0, own, own, own]);
    let value = |x: &Tensor, at: [i64; 4]| x.double_value(&at);
    for (i, y, x) in (0..4).flat_map(|i| (0..8).flat_map(move |y| (0..8).map(move |x| (i, y, x)))) {
        let rows = i64::from(top)..i64::from(top + height);
        let columns = i64::from(left)..i64::from(left + width);
        let is_inside = i > 0 && rows.contains(&y) && columns.contains(&x);
        let from = if is_inside { 3 - i } else { i };
        for channel in 0..3 {
            let (found, want) =
                (value(&got, [i, channel, y, x]), value(&images, [from, channel, y, x]));
            assert_eq!(found, want, "sample {i}, row {y}, column {x}");
        }
    }
}

/// Boxes are filled with standard normal noise, after the image was normalised; the rest stays.
#[test]
fn what_is_erased_is_noise_and_the_rest_stays() {
    let (n, model) = (64, micro());
    let task = TaskSpec { random_erasing: 1.0, ..task(TaskKind::Finetune, Pool::Avg) };
    let [height, width] = model.img_size;
    let size = [n as i64, 3, i64::from(height), i64::from(width)];
    let images_bchw = Tensor::full(size, 7.0, (Kind::Float, Device::Cpu));
    let draws = draws(n as u64);
    let slot = Slot {
        images_bchw: images_bchw.shallow_clone(),
        weights_b: Tensor::ones([n as i64], (Kind::Float, Device::Cpu)),
        weights: &vec![1.0; n],
        ids_shuffle: &[],
        draws: &draws,
        labels: &vec![Some(0); n],
    };
    let got = FinetuneLoss { model: model.clone(), task }.erased(&slot);
    assert_eq!(distance(&images_bchw, &slot.images_bchw), 0.0, "the slot's own images stay");
    let mut noise: Vec<f64> = Vec::new();
    for (i, draws) in draws.iter().enumerate() {
        let erased = erase(&draws.tagged(Tag::Erase), 1.0, model.img_size);
        let [top, left, h, w] = erased.expect("there is room").map(i64::from);
        let image = got.select(0, i as i64);
        let inside = image.narrow(1, top, h).narrow(2, left, w).contiguous();
        let inside: Vec<f32> = Vec::try_from(inside.view([-1])).expect("numbers");
        noise.extend(inside.iter().map(|x| f64::from(*x)));
        let n_kept = i64::from(3 * height * width) - inside.len() as i64;
        let n_sevens = image.eq(7.0).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(n_sevens, n_kept, "image {i} is as it was outside of its box");
    }
    let n = noise.len() as f64;
    let mean = noise.iter().sum::<f64>() / n;
    let variance = noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    // Five standard errors.
    assert!(mean.abs() < 5.0 / n.sqrt(), "{mean} of {n}");
    assert!((variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{variance} of {n}");
}

/// The first scale is that of attention, the second that of the MLP; both 1 are the plain block.
#[test]
fn a_dropped_branch_is_left_out_of_its_sample_alone() {
    let model = micro();
    let encoder = EncoderWeights::fresh(&model, 5);
    let table = encoder.table(&model);
    let encoder = Encoder::new(&model, &encoder.weights(), table);
    let blocks = &encoder.blocks[..1];
    let x_bnd = Tensor::arange(3 * 5 * 8, (Kind::Float, Device::Cpu)).sin().view([3, 5, 8]);
    let scales = |of: [f32; 3]| Tensor::from_slice(&of).view([3, 1, 1]);
    let with = |a, mlp| run_dropped(blocks, x_bnd.shallow_clone(), &[[scales(a), scales(mlp)]]);
    let plain = run(blocks, x_bnd.shallow_clone());
    assert_eq!(distance(&with([1.0; 3], [1.0; 3]), &plain), 0.0);
    assert_eq!(distance(&with([0.0; 3], [0.0; 3]), &x_bnd), 0.0);
    let attention = with([1.0; 3], [0.0; 3]) - &x_bnd;
    let mlp = &plain - with([1.0; 3], [0.0; 3]);
    assert!(distance(&attention, &mlp) > 1e-3, "they are two branches");
    // Twice the attention and no MLP; nothing; both.
    let got = with([2.0, 0.0, 1.0], [0.0, 0.0, 1.0]);
    let want = [&x_bnd + &attention * 2.0, x_bnd.shallow_clone(), plain];
    for (i, want) in want.iter().enumerate() {
        let i = i as i64;
        assert!(distance(&got.select(0, i), &want.select(0, i)) < 1e-5, "sample {i}");
    }
}

/// That of libtorch over the samples that count.
#[test]
fn features_are_normalised_as_by_a_batch_norm() {
    let features_bd = Tensor::arange(6 * 4, (Kind::Float, Device::Cpu)).sin().view([6, 4]) * 3.0;
    let of_torch = |x: &Tensor| {
        let none = None::<&Tensor>;
        x.batch_norm(none, none, none, none, true, 0.1, BATCH_NORM_EPS, false)
    };
    let ones = Tensor::ones([6], (Kind::Float, Device::Cpu));
    let got = batch_normed(&features_bd, &moments(&features_bd, &ones));
    assert!(distance(&got, &of_torch(&features_bd)) < 1e-5);
    let weights = Tensor::from_slice(&[1.0f32, 1.0, 1.0, 1.0, 0.0, 0.0]);
    let got = batch_normed(&features_bd, &moments(&features_bd, &weights));
    let want = of_torch(&features_bd.narrow(0, 0, 4));
    assert!(distance(&got.narrow(0, 0, 4), &want) < 1e-5, "samples of weight 0 do not count");
}

/// That of libtorch with soft targets; a sample of weight 0 adds nothing and is still divided by.
#[test]
fn the_loss_is_the_mean_cross_entropy() {
    let logits_bk = Tensor::arange(4 * 5, (Kind::Float, Device::Cpu)).sin().view([4, 5]) * 2.0;
    let labels = [Some(1), Some(4), Some(0), Some(2)];
    let mix = Some(Mix { own: 0.6, cut: None });
    let targets = soft_targets(&labels, 5, 0.1, &own_shares(mix, &[1.0; 4]));
    let targets_bk = Tensor::from_slice(&targets).view([4, 5]);
    let of_torch = |n: i64| {
        let (logits, targets) = (logits_bk.narrow(0, 0, n), targets_bk.narrow(0, 0, n));
        logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0)
    };
    let ones = Tensor::ones([4], (Kind::Float, Device::Cpu));
    let got = cross_entropy(&logits_bk, &targets, &ones);
    assert!(distance(&got, &(of_torch(4) / 4.0)) < 1e-6);
    let weights = Tensor::from_slice(&[1.0f32, 1.0, 1.0, 0.0]);
    let got = cross_entropy(&logits_bk, &targets, &weights);
    assert!(distance(&got, &(of_torch(3) / 4.0)) < 1e-6);
}
