use std::sync::Arc;

use image::ExtendedColorType;
use lacuna_recipe::order::OrderParams;

use super::*;
use crate::fixtures::{damage, grey_png, jpeg, noise, synthetic, write_tar};
use crate::planes::Fill;
use crate::wds::build_index;

fn stages(dataset: &Dataset, planes: Option<&PlaneCache>) -> Result<Stages, SampleError> {
    let params = OrderParams::default_for(dataset.n_samples(), dataset.index().n_chunks(), 1);
    let order = dataset.order_spec(params, 0, 1);
    measure(&StageConfig {
        dataset,
        order: &order,
        augment: Augment::PRETRAIN,
        shape: ImageShape { height: 8, width: 8, channels: 3 },
        planes,
        time: Duration::from_millis(20),
    })
}

#[test]
fn every_part_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = synthetic(folder.path(), 40, 16, 1);
    let found = stages(&dataset, None).unwrap();
    for stage in [found.read, found.decode_whole, found.decode, found.resize] {
        assert!(stage.n > 0 && stage.bytes > stage.n && stage.seconds > 0.0, "{stage:?}");
        assert!((stage.rate() * stage.seconds_each() - 1.0).abs() < 1e-9);
        assert!(stage.bytes_per_second() > stage.rate());
    }
    assert_eq!((found.planes, found.n_jpeg, found.n_bad), (Stage::default(), 0, 0));
    assert_eq!(found.planes.seconds_each(), 0.0);
}

#[test]
fn bad_samples_are_passed_over_and_alone_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let broken = [&grey_png(9, 1)[..33], &noise(90, 2)].concat();
    let photo = jpeg(&noise(40 * 40 * 3, 3), 40, 40, ExtendedColorType::Rgb8);
    let tar = folder.path().join("a.tar");
    write_tar(&tar, &[("0.png", &broken), ("1.jpg", &photo)]);
    build_index(folder.path(), 1, &mut |_| {}).unwrap();
    let dataset = Arc::new(Dataset::open(folder.path()).unwrap());
    let found = stages(&dataset, None).unwrap();
    assert!(found.n_bad > 0 && found.n_jpeg == found.decode.n, "{found:?}");
    if cfg!(feature = "turbo") {
        let dir = tempfile::tempdir().unwrap();
        let cache = PlaneCache::open(dir.path(), 1 << 30, dataset.clone(), Fill::Always).unwrap();
        let found = stages(&dataset, Some(&cache)).unwrap();
        assert!(found.planes.n > 0 && found.planes.seconds > 0.0, "{found:?}");
    }
    damage(&tar, dataset.place(SampleId(1)).offset + 20);
    let error = stages(&dataset, None).unwrap_err();
    assert!(error.is_bad_sample(), "{error}");
}
