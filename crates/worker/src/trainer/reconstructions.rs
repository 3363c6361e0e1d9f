//! Pictures of what the model fills in, of the same images each time, for the page and TensorBoard.
//!
//! The member of rank 0 draws, between two steps: a few images cost less than a slot. Pictures are
//! for people: one that cannot be drawn or sent is left out, and nothing waits for it.

use std::sync::{Mutex, PoisonError};

use image::{ExtendedColorType, ImageEncoder as _};
use lacuna_api::{PICTURE_BYTES_MAX, v1};
use lacuna_data::dataset::Dataset;
use lacuna_data::{ImageShape, SampleReader};
use lacuna_recipe::mask::MaskOrder;
use lacuna_spec::ReconstructionsSpec;
use lacuna_types::SampleId;
use tracing::warn;

use super::job::Job;
use crate::engine::{Engine, EngineError, Picture};

/// The images of a run that are drawn.
#[derive(Debug)]
pub struct Gallery {
    every: u64,
    samples: Vec<SampleId>,
    pixels: Vec<u8>,
    ids_shuffle: Vec<u32>,
    /// Newest step that this process drew.
    drawn: Option<u64>,
}

impl Gallery {
    /// Reads the images that the run's spec asks for, if it does.
    pub fn open(job: &Job, dataset: &Dataset) -> Option<Self> {
        let ReconstructionsSpec { every, images } = job.spec.track.reconstructions.as_ref()?;
        let every = every.steps(job.resolved.geometry.steps_per_epoch()).unwrap_or(u64::MAX);
        let model = &job.spec.model;
        let [height, width] = model.img_size;
        let shape = ImageShape { height, width, channels: model.channels };
        let mut gallery = Gallery {
            every: every.max(1),
            samples: Vec::new(),
            pixels: Vec::new(),
            ids_shuffle: Vec::new(),
            drawn: None,
        };
        let (mut reader, mut out) = (SampleReader::default(), vec![0; shape.bytes()]);
        for id in spread(u64::from(*images), dataset.n_samples()) {
            if let Err(err) = reader.plain(dataset, id, shape, &mut out) {
                warn!(sample = %id, error = lacuna_checkpoint::chain(&err), "left out of pictures");
                continue;
            }
            let mask = MaskOrder::draw(job.spec.train.seed, 0, id.0, model.n_patches());
            gallery.samples.push(id);
            gallery.pixels.extend_from_slice(&out);
            gallery.ids_shuffle.extend(mask.ids_shuffle);
        }
        (!gallery.samples.is_empty()).then_some(gallery)
    }

    /// Tells whether the state after `step` steps is to be drawn and was not.
    pub fn is_due(&self, step: u64, last: bool) -> bool {
        (step.is_multiple_of(self.every) || last) && self.drawn != Some(step)
    }

    /// Draws the state after `step` steps.
    pub fn draw(
        &mut self,
        engine: &mut dyn Engine,
        step: u64,
    ) -> Result<Vec<v1::Picture>, DrawError> {
        self.drawn = Some(step);
        let Some(pictures) = engine.draw(&self.pixels, &self.ids_shuffle)? else {
            return Ok(Vec::new());
        };
        let describe = |(index, (sample, picture)): (usize, (&SampleId, &Picture))| {
            let png = encode(picture)?;
            Ok(v1::Picture { step, index: index as u32, sample: sample.0, png })
        };
        let mut drawn: Vec<v1::Picture> = self
            .samples
            .iter()
            .zip(&pictures)
            .enumerate()
            .map(describe)
            .collect::<Result<_, DrawError>>()?;
        let n = drawn.len();
        drawn.retain(|picture| picture.png.len() <= PICTURE_BYTES_MAX);
        if drawn.len() < n {
            warn!(
                step,
                left_out = n - drawn.len(),
                max = PICTURE_BYTES_MAX,
                "pictures too large to send"
            );
        }
        Ok(drawn)
    }
}

/// A picture that could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum DrawError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// What it drew cannot be encoded.
    #[error("failed to encode a picture")]
    Encode(#[from] image::ImageError),
}

/// Lists `n` samples of `n_samples`, spread evenly.
fn spread(n: u64, n_samples: u64) -> impl Iterator<Item = SampleId> {
    let n = n.min(n_samples);
    (0..n).map(move |i| SampleId(n_samples / n * i))
}

fn encode(picture: &Picture) -> Result<Vec<u8>, image::ImageError> {
    let mut png = Vec::new();
    let Picture { width, height, rgb } = picture;
    image::codecs::png::PngEncoder::new(&mut png).write_image(
        rgb,
        *width,
        *height,
        ExtendedColorType::Rgb8,
    )?;
    Ok(png)
}

/// Pictures on their way to the coordinator: those of one step, and newer ones take their place.
#[derive(Debug, Default)]
pub struct PictureQueue {
    inner: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    pictures: Vec<v1::Picture>,
    said: usize,
}

impl PictureQueue {
    fn inner(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the pictures of a step in the place of those before.
    pub fn put(&self, pictures: Vec<v1::Picture>) {
        *self.inner() = Waiting { pictures, said: 0 };
    }

    /// Takes the next picture to send.
    pub fn take(&self) -> Option<v1::Picture> {
        let mut inner = self.inner();
        let picture = inner.pictures.get(inner.said)?.clone();
        inner.said += 1;
        Some(picture)
    }

    /// Says again what may not have arrived: the stream is a new one. The coordinator knows a
    /// picture that it has.
    pub fn say_again(&self) {
        self.inner().said = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_spread_over_the_data() {
        let ids = |n, of| spread(n, of).map(|id| id.0).collect::<Vec<u64>>();
        assert_eq!(ids(4, 100), [0, 25, 50, 75]);
        assert_eq!(ids(8, 3), [0, 1, 2]);
        assert!(ids(8, 0).is_empty());
    }

    #[test]
    fn newer_pictures_take_the_place_of_older_ones() {
        let queue = PictureQueue::default();
        let of = |step| (0..2).map(move |index| v1::Picture { step, index, ..Default::default() });
        let taken = || std::iter::from_fn(|| queue.take()).map(|p| (p.step, p.index));
        queue.put(of(10).collect());
        assert_eq!(queue.take().map(|p| p.index), Some(0));
        queue.put(of(20).collect());
        assert_eq!(taken().collect::<Vec<_>>(), [(20, 0), (20, 1)]);
        queue.say_again();
        assert_eq!(taken().count(), 2, "after a break the newest are said again");
        assert_eq!(taken().count(), 0);
    }

    #[test]
    fn pictures_are_png() {
        let picture = Picture { width: 2, height: 1, rgb: vec![255, 0, 0, 0, 0, 255] };
        let png = encode(&picture).unwrap();
        let read = image::load_from_memory(&png).unwrap().into_rgb8();
        assert_eq!((read.dimensions(), read.into_raw()), ((2, 1), picture.rgb));
    }
}
