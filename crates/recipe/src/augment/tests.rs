use expect_test::expect;
use proptest::prelude::ProptestConfig;
use proptest::{prop_assert, proptest};

use super::*;

fn size(height: u32, width: u32) -> Size {
    Size { height, width }
}

fn fits(crop: CropBox, image: Size) -> bool {
    crop.height >= 1
        && crop.width >= 1
        && crop.top + crop.height <= image.height
        && crop.left + crop.width <= image.width
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn crops_lie_inside(
        h in 1u32..3000,
        w in 1u32..3000,
        sample in 0u64..1 << 48,
        epoch in 0u32..9,
    ) {
        let image = size(h, w);
        let (crop, _) = Augment::PRETRAIN.draw(3, epoch, sample, image);
        prop_assert!(fits(crop, image), "{crop:?}");
        let (whole, flip) = Augment::NONE.draw(3, epoch, sample, image);
        prop_assert!(fits(whole, image) && !flip);
        prop_assert!(whole.height == h.min(w) && whole.width == h.min(w));
        let target = size(1 + h % 7, 1 + w % 5);
        prop_assert!(fits(CropBox::largest_centered(image, target), image));
    }
}

/// On a large square nearly no try is refused, so the moments are those of the uniform draws.
#[test]
fn moments_of_crops() {
    let (image, n) = (size(1000, 1000), 20_000);
    let [mut area, mut log_ratio, mut top, mut flips] = [0.0; 4];
    let mut room = 0.0;
    for sample in 0..n {
        let augment = Augment { scale: (0.1, 0.5), ..Augment::PRETRAIN };
        let (crop, flip) = augment.draw(11, 2, sample, image);
        let (h, w) = (f64::from(crop.height), f64::from(crop.width));
        area += h * w / 1e6;
        log_ratio += libm::log(w / h).abs();
        top += f64::from(crop.top);
        room += (1000.0 - h) / 2.0;
        flips += f64::from(u8::from(flip));
    }
    let n = n as f64;
    assert!((area / n - 0.3).abs() < 0.004, "mean area {}", area / n);
    let want = libm::log(4.0 / 3.0) / 2.0;
    assert!((log_ratio / n - want).abs() < 0.003, "mean |log ratio| {}", log_ratio / n);
    assert!((top / room - 1.0).abs() < 0.02, "tops are centred: {}", top / room);
    assert!((flips / n - 0.5).abs() < 0.015, "flips {}", flips / n);
}

#[test]
fn extreme_images_fall_back_to_the_centre() {
    let p = Augment::PRETRAIN;
    for sample in 0..50 {
        let (wide, _) = p.draw(1, 0, sample, size(10, 1000));
        assert_eq!((wide.top, wide.height, wide.width), (0, 10, 13));
        assert_eq!(wide.left, (1000 - 13) / 2);
        let (tall, _) = p.draw(1, 0, sample, size(1000, 10));
        assert_eq!((tall.top, tall.height, tall.width), (493, 13, 10));
    }
    assert_eq!(p.draw(1, 0, 0, size(1, 1)).0, CropBox { top: 0, left: 0, height: 1, width: 1 });
}

#[test]
fn evaluation_takes_the_largest_box() {
    let large = |h, w, th, tw| {
        let c = CropBox::largest_centered(size(h, w), size(th, tw));
        (c.top, c.left, c.height, c.width)
    };
    assert_eq!(large(28, 28, 28, 28), (0, 0, 28, 28));
    assert_eq!(large(300, 500, 224, 224), (0, 100, 300, 300));
    assert_eq!(large(500, 300, 112, 224), (175, 0, 150, 300));
    assert_eq!(large(1, 500, 224, 1), (0, 249, 1, 1));
}

#[test]
fn evaluation_takes_a_part_of_it() {
    let part = |h, w, part| {
        let c = CropBox::centered_part(size(h, w), size(224, 224), part);
        (c.top, c.left, c.height, c.width)
    };
    // An image of 256 x 256 pixels, of which 224 x 224 are cut out.
    assert_eq!(part(256, 256, 0.875), (16, 16, 224, 224));
    assert_eq!(part(375, 500, 0.875), (23, 86, 328, 328));
    assert_eq!(part(300, 500, 1.0), (0, 100, 300, 300));
    assert_eq!(part(1, 1, 0.1), (0, 0, 1, 1));
}

#[test]
fn golden_draws() {
    let line = |sample: u64| {
        let (crop, flip) = Augment::PRETRAIN.draw(42, 5, sample, size(375, 500));
        format!("{sample}: {}+{} {}x{} {flip}\n", crop.top, crop.left, crop.height, crop.width)
    };
    let text: String = [0, 1, 2, 1_281_166, (1 << 48) - 1].map(line).concat();
    expect![[r#"
        0: 9+112 348x284 true
        1: 109+186 258x279 false
        2: 1+37 361x356 false
        1281166: 41+253 230x247 false
        281474976710655: 0+41 375x457 true
    "#]]
    .assert_eq(&text);
}

#[test]
fn wrong_ranges_are_named() {
    let scale = Augment { scale: (0.5, 1.5), ..Augment::PRETRAIN };
    expect!["`scale` = [0.5, 1.5] must be ascending, positive and at most 1"]
        .assert_eq(&scale.check().unwrap_err().to_string());
    let flip = Augment { flip: f64::NAN, ..Augment::NONE };
    assert!(flip.check().is_err());
    assert_eq!(Augment::PRETRAIN.check(), Ok(()));
    let text = serde_json::to_string(&Augment::NONE).unwrap();
    assert_eq!(text, r#"{"scale":[1.0,1.0],"ratio":[1.0,1.0],"flip":0.0}"#);
    assert_eq!(serde_json::from_str::<Augment>(&text).unwrap(), Augment::NONE);
}
