use super::*;
use crate::philox::Tag;

fn draws(sample: u64) -> Draws {
    Draws::new(9, Tag::Mix, 3, sample)
}

#[test]
fn shares_have_the_moments_of_beta() {
    for a in [0.2, 0.8, 1.0, 2.0] {
        let mixing = Mixing { mixup: a, cutmix: 0.0 };
        let n = 20_000;
        let drawn = (0..n).map(|i| mixing.draw(&draws(i), [8, 8]).unwrap());
        let own: Vec<f64> = drawn.map(|mix| mix.own).collect();
        let mean = own.iter().sum::<f64>() / n as f64;
        let var = own.iter().map(|x| (x - 0.5) * (x - 0.5)).sum::<f64>() / n as f64;
        let want = 1.0 / (4.0 * (2.0 * a + 1.0));
        assert!((mean - 0.5).abs() < 0.01, "{a}: mean {mean}");
        assert!((var - want).abs() < 0.05 * want, "{a}: variance {var}, not {want}");
    }
}

#[test]
fn a_cut_is_inside_and_its_area_is_the_share() {
    let mixing = Mixing { mixup: 0.8, cutmix: 1.0 };
    let (mut cuts, mut mean) = (0, 0.0);
    let n = 4000;
    for i in 0..n {
        let mix = mixing.draw(&draws(i), [24, 32]).unwrap();
        let Some([top, left, h, w]) = mix.cut else { continue };
        assert!(top + h <= 24 && left + w <= 32, "{mix:?}");
        assert!((mix.own - (1.0 - f64::from(h * w) / (24.0 * 32.0))).abs() < 1e-12);
        cuts += 1;
        mean += mix.own;
    }
    assert!((1800..2200).contains(&cuts), "half of the slots: {cuts} of {n}");
    // Cutting off at the edges leaves more than half to the image itself.
    assert!((0.55..0.75).contains(&(mean / f64::from(cuts))), "{}", mean / f64::from(cuts));
    assert_eq!(Mixing { mixup: 0.0, cutmix: 0.0 }.draw(&draws(1), [8, 8]), None);
    let only = Mixing { mixup: 0.0, cutmix: 1.0 };
    assert!((0..50).all(|i| only.draw(&draws(i), [8, 8]).unwrap().cut.is_some()));
}

#[test]
fn targets_are_smoothed_then_mixed() {
    let labels = [Some(0), Some(2), None];
    let plain = soft_targets(&labels, 4, 0.0, &[1.0; 3]);
    assert_eq!(plain, [1., 0., 0., 0., 0., 0., 1., 0., 0., 0., 0., 0.]);
    let smooth = soft_targets(&labels[..2], 4, 0.1, &[1.0; 2]);
    assert_eq!(smooth[..4], [0.925, 0.025, 0.025, 0.025]);
    let mixed = soft_targets(&labels[..2], 4, 0.0, &[0.75; 2]);
    assert_eq!(mixed, [0.75, 0., 0.25, 0., 0.25, 0., 0.75, 0.]);
    assert!(smooth.chunks(4).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
}

#[test]
fn a_partner_of_weight_0_adds_nothing() {
    let mix = Some(Mix { own: 0.6, cut: None });
    assert_eq!(own_shares(mix, &[1.0, 1.0, 0.0]), [1.0, 0.6, 0.6]);
    assert_eq!(own_shares(None, &[1.0, 0.0]), [1.0, 1.0]);
}

#[test]
fn erased_boxes_fit_and_are_as_many_as_wanted() {
    let n = 4000;
    let boxes: Vec<[u32; 4]> = (0..n).filter_map(|i| erase(&draws(i), 0.25, [32, 48])).collect();
    assert!((850..1150).contains(&boxes.len()), "a quarter: {}", boxes.len());
    for [top, left, h, w] in boxes {
        assert!(top + h <= 32 && left + w <= 48 && h > 0 && w > 0);
        let share = f64::from(h * w) / (32.0 * 48.0);
        assert!((0.01..0.40).contains(&share), "{share}");
    }
    assert_eq!(erase(&draws(1), 0.0, [32, 48]), None);
}

#[test]
fn branches_drop_more_with_depth_and_keep_their_mean() {
    assert_eq!(drop_rates(3, 0.2), [0.0, 0.1, 0.2]);
    assert_eq!(drop_rates(1, 0.2), [0.0]);
    let n = 20_000;
    let mean = (0..n).map(|i| f64::from(drop_scale(&draws(i), 5, 1, 0.2))).sum::<f64>() / n as f64;
    assert!((mean - 1.0).abs() < 0.02, "{mean}");
    assert!((0..100).all(|i| drop_scale(&draws(i), 0, 0, 0.0) == 1.0));
}

#[test]
fn learning_rates_by_layer() {
    let text = include_str!("../../../../tests/golden/extra.json");
    let golden: serde_json::Value = serde_json::from_str(text).unwrap();
    let golden = &golden["layer_decay"];
    let of = |list: &str, layer: usize| golden[list][layer].as_f64().unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12 * b, "{a} {b}");
    near(layer_scale("cls_token", 12, 0.65), of("B_0.65", 0));
    near(layer_scale("patch_embed.proj.bias", 12, 0.65), of("B_0.65", 0));
    for block in 0..12 {
        let name = format!("blocks.{block}.mlp.fc1.weight");
        near(layer_scale(&name, 12, 0.65), of("B_0.65", block + 1));
    }
    for name in ["fc_norm.weight", "head.bias", "norm.weight"] {
        assert_eq!(layer_scale(name, 12, 0.65), 1.0, "{name}");
    }
    for layer in 0..3 {
        let name = if layer == 0 { "pos_embed".into() } else { format!("blocks.{}.x", layer - 1) };
        near(layer_scale(&name, 24, 0.75), of("L_0.75_first3", layer));
        near(layer_scale(&name, 32, 0.75), of("H_0.75_first3", layer));
    }
}
