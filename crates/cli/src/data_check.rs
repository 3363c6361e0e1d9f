//! Whether a data set's images are what a model is for, as far as some of them show.

use std::path::Path;

use lacuna_data::pack::class_names;
use lacuna_data::{Dataset, ImageShape, SampleReader};
use lacuna_recipe::augment::{CropBox, Size};
use lacuna_spec::RunSpec;
use lacuna_types::SampleId;

/// Images that are looked at, spread over the data set.
const LOOKED_AT: u64 = 8;
/// Difference of two channels that is seen, of 255: lossy formats make a little of it.
const COLOUR: u8 = 24;
/// Sides that are so many times smaller than the model's are warned about.
const ENLARGED: u32 = 2;

/// Says what does not fit, in sentences; images that cannot be read say nothing here.
pub fn misfits(dataset: &Dataset, spec: &RunSpec) -> Vec<String> {
    let n = dataset.n_samples();
    let (mut reader, mut seen) = (SampleReader::default(), Vec::new());
    for i in 0..n.min(LOOKED_AT) {
        seen.extend(look(&mut reader, dataset, SampleId(i * n / n.min(LOOKED_AT))));
    }
    let mut out: Vec<String> = spare_classes(dataset, spec).into_iter().collect();
    if seen.is_empty() {
        return out;
    }
    let [height, width] = spec.model.img_size;
    let coloured = seen.iter().filter(|(_, coloured)| *coloured).count();
    match spec.model.channels {
        1 if coloured > 0 => out.push(
            "images are in colour and `model.channels` = 1: they are turned to grey".to_string(),
        ),
        3 if coloured == 0 => out.push(
            "images look grey and `model.channels` = 3: the channels are three times the same"
                .to_string(),
        ),
        _ => {}
    }
    let is_small = |size: &Size| size.height * ENLARGED <= height && size.width * ENLARGED <= width;
    if seen.iter().all(|(size, _)| is_small(size)) {
        let Size { height: h, width: w } = seen[0].0;
        out.push(format!(
            "images are small ({h}x{w}) and `model.img_size` is {height}x{width}: they are enlarged"
        ));
    }
    out
}

/// Tells of classes that no image has: mostly those of another data set's spec.
fn spare_classes(dataset: &Dataset, spec: &RunSpec) -> Option<String> {
    let wanted = spec.task.as_ref()?.classes;
    let names = class_names(Path::new(&spec.data.shards)).len() as u32;
    let known = dataset.index().n_classes().max(names);
    let spare = known > 0 && wanted > known;
    spare.then(|| format!("`task.classes` = {wanted}, and the data has {known}"))
}

/// Returns an image's size, and whether it has colours.
fn look(reader: &mut SampleReader, dataset: &Dataset, id: SampleId) -> Option<(Size, bool)> {
    let shape = ImageShape { height: 32, width: 32, channels: 3 };
    let mut size = None;
    let mut pixels = vec![0u8; shape.bytes()];
    let choose = |found: Size| {
        size = Some(found);
        (CropBox::largest_centered(found, shape.size()), false)
    };
    reader.render(dataset, id, choose, shape, &mut pixels).ok()?;
    let differ = |pixel: &[u8]| {
        let (low, high) = (pixel.iter().min(), pixel.iter().max());
        low.zip(high).is_some_and(|(low, high)| high - low >= COLOUR)
    };
    Some((size?, pixels.chunks_exact(3).any(differ)))
}
