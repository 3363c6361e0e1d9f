use expect_test::expect;

use super::*;

fn spec(channels: u32) -> SyntheticSpec {
    SyntheticSpec { n_images: 100, shape: ImageShape { height: 32, width: 40, channels }, seed: 1 }
}

#[test]
fn images_differ_and_classes_are_even() {
    let mut counts = [0; N_CLASSES as usize];
    let mut spread = 0.0;
    for i in 0..400 {
        let one = image(&spec(1), i);
        assert_eq!(one.pixels.len(), 32 * 40);
        assert_ne!(one, image(&spec(1), i + 1));
        counts[one.label as usize] += 1;
        let low = one.pixels.iter().min().unwrap();
        let high = one.pixels.iter().max().unwrap();
        spread += f64::from(high - low);
    }
    assert!(counts.iter().all(|&n| n > 60), "{counts:?}");
    assert!(spread / 400.0 > 80.0, "mean contrast {}", spread / 400.0);
}

#[test]
fn golden_bytes() {
    let digest = |channels: u32, i: u64| {
        let image = image(&spec(channels), i);
        let hash = blake3::hash(&image.pixels).to_hex();
        format!("{channels} {i} {} {}\n", image.label, &hash[..16])
    };
    let text = [digest(1, 0), digest(1, 99), digest(3, 0), digest(3, 7)].concat();
    expect![[r#"
        1 0 1 dba3326f5ea0d0c3
        1 99 2 1cb7cc86a9c3c5b3
        3 0 1 c081ce0c13553066
        3 7 2 74c9d9f16f95a01b
    "#]]
    .assert_eq(&text);
}
