use serde_json::Value;

use super::*;
use crate::philox::Tag;

const GOLDEN: &str = include_str!("../../../../tests/golden/randaugment.json");

fn bytes(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap();
    let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

fn op(name: &str, argument: &Value) -> Op {
    let number = || argument.as_f64().unwrap();
    let whole = || argument.as_u64().unwrap() as u32;
    match name {
        "AutoContrast" => Op::AutoContrast,
        "Equalize" => Op::Equalize,
        "Invert" => Op::Invert,
        "Rotate" => Op::Rotate(number()),
        "Posterize" => Op::Posterize(whole()),
        "Solarize" => Op::Solarize(whole()),
        "SolarizeAdd" => Op::SolarizeAdd(whole()),
        "Color" => Op::Color(number()),
        "Contrast" => Op::Contrast(number()),
        "Brightness" => Op::Brightness(number()),
        "Sharpness" => Op::Sharpness(number()),
        "ShearX" => Op::ShearX(number()),
        "ShearY" => Op::ShearY(number()),
        "TranslateX" => Op::TranslateX(number()),
        "TranslateY" => Op::TranslateY(number()),
        other => panic!("{other}"),
    }
}

/// Every operation on a grey and on a coloured image equals timm's, byte for byte; where places are
/// computed, a rounding apart.
#[test]
fn operations_are_those_of_timm() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let side = |name: &str| golden[name].as_u64().unwrap() as usize;
    let size = [side("height"), side("width")];
    let mut n_compared = 0;
    for image in golden["images"].as_array().unwrap() {
        let original = bytes(&image["bytes"]);
        for case in image["ops"].as_array().unwrap() {
            let name = case["op"].as_str().unwrap();
            let mut got = original.clone();
            apply(op(name, &case["argument"]), &mut got, size);
            let want = bytes(&case["bytes"]);
            let apart = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            let warps = ["Rotate", "Shear", "Translate"].iter().any(|word| name.starts_with(word));
            let (argument, channels) = (&case["argument"], &image["channels"]);
            assert!(apart <= u8::from(warps), "{name} {argument}, {channels} channels: {apart}");
            n_compared += 1;
        }
    }
    assert_eq!(n_compared, 2 * 37);
}

#[test]
fn a_sample_is_changed_in_the_same_way_each_time_and_others_in_other_ways() {
    let draws = |sample: u64| Draws::new(3, Tag::Augment, 1, sample);
    let image: Vec<u8> = (0..3 * 64).map(|i| (i * 37 % 251) as u8).collect();
    let changed = |sample: u64| {
        let mut out = image.clone();
        augment(&mut out, [8, 8], 9.0, &draws(sample));
        out
    };
    assert_eq!(changed(5), changed(5));
    let n = 2000;
    let untouched = (0..n).filter(|sample| changed(*sample) == image).count() as f64 / n as f64;
    // One half of one half, and changes that change nothing.
    assert!((0.2..0.35).contains(&untouched), "{untouched}");
    let drawn: Vec<Op> = (0..n).filter_map(|s| Op::draw(&draws(s), 0, 9.0)).collect();
    let share = drawn.len() as f64 / n as f64;
    assert!((share - 0.5).abs() < 0.05, "{share}");
    let kinds: std::collections::BTreeSet<String> =
        drawn.iter().map(|op| format!("{op:?}").split('(').next().unwrap().to_string()).collect();
    assert_eq!(kinds.len(), 15, "{kinds:?}");
    let angles = drawn.iter().filter_map(|op| match op {
        Op::Rotate(degrees) => Some(*degrees),
        _ => None,
    });
    let (low, high) = angles.fold((0f64, 0f64), |(l, h), a| (l.min(a), h.max(a)));
    assert!((-30.0..-24.0).contains(&low) && (24.0..=30.0).contains(&high), "{low} {high}");
}

#[test]
fn images_of_one_pixel_and_of_one_value_survive() {
    for draws in (0..500).map(|sample| Draws::new(1, Tag::Augment, 0, sample)) {
        for (mut image, size) in [(vec![7u8; 3], [1, 1]), (vec![200; 12], [2, 6])] {
            augment(&mut image, size, 10.0, &draws);
        }
    }
}

/// What timm makes of a magnitude (`rand-m9-mstd0.5-inc1` draws up to 10).
#[test]
fn magnitudes_are_those_of_timm() {
    let of = |share: f64, kind: u32| Op::of(kind, share, 1.0);
    for (kind, at_9, at_10) in [
        (3, Op::Rotate(27.0), Op::Rotate(30.0)),
        (4, Op::Posterize(1), Op::Posterize(0)),
        (5, Op::Solarize(26), Op::Solarize(0)),
        (6, Op::SolarizeAdd(99), Op::SolarizeAdd(110)),
    ] {
        assert_eq!((of(0.9, kind), of(1.0, kind)), (at_9, at_10));
    }
    let mut grey = [0, 77, 255];
    apply(Op::Posterize(0), &mut grey, [1, 3]);
    assert_eq!(grey, [0; 3], "no bit is kept");
}
