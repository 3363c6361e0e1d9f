//! One sample at a time, from its place on disk to pixels.

use std::collections::BTreeMap;
#[cfg(feature = "turbo")]
use std::time::Instant;

use lacuna_pixels::{DecodeError, Decoder, ImageShape};
#[cfg(feature = "turbo")]
use lacuna_pixels::{PlaneBuffers, Planes};
use lacuna_recipe::augment::{CropBox, Size};
use lacuna_store::{Pending, Stop};
use lacuna_types::SampleId;

use crate::dataset::{Dataset, ReadSampleError, SamplePlace};
use crate::index::crc32;
use crate::planes::PlaneCache;

/// A sample that gives no pixels.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// Its bytes cannot be had.
    #[error(transparent)]
    Read(#[from] ReadSampleError),
    /// Its bytes are no usable image.
    #[error("failed to decode {place}")]
    Decode {
        /// The sample.
        place: Box<SamplePlace>,
        /// Why.
        #[source]
        source: DecodeError,
    },
}

impl SampleError {
    /// Tells whether the sample itself is bad; otherwise reading failed, or memory was short, which
    /// says nothing about it.
    pub fn is_bad_sample(&self) -> bool {
        !matches!(
            self,
            SampleError::Read(ReadSampleError::Io { .. })
                | SampleError::Decode { source: DecodeError::Memory { .. }, .. }
        )
    }

    /// Tells whether the bytes are not those that were indexed. Other copies of the shard, on other
    /// machines, in caches or another day, may still have them.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, SampleError::Read(ReadSampleError::Corrupt { .. }))
    }

    /// Tells whether every machine finds the sample bad, at any time: it has the bytes that were
    /// indexed, and they are no usable image.
    pub fn is_same_everywhere(&self) -> bool {
        self.is_bad_sample() && !self.is_corrupt()
    }

    /// Returns where the sample lies.
    pub fn place(&self) -> &SamplePlace {
        match self {
            SampleError::Read(ReadSampleError::Io { place, .. })
            | SampleError::Read(ReadSampleError::Corrupt { place, .. })
            | SampleError::Decode { place, .. } => place,
        }
    }
}

/// Reads and decodes samples, reusing its buffers; each thread has its own.
#[derive(Debug, Default)]
pub struct SampleReader {
    bytes: Vec<u8>,
    stop: Stop,
    /// Samples that are on their way from a store.
    coming: BTreeMap<SampleId, Pending<Vec<u8>>>,
    decoder: Decoder,
    #[cfg(feature = "turbo")]
    planes: PlaneBuffers,
}

impl SampleReader {
    /// Builds a reader with empty buffers.
    pub fn new() -> Self {
        SampleReader::default()
    }

    /// Makes it give up what comes from afar once `stop` is raised.
    pub fn set_stop(&mut self, stop: Stop) {
        self.stop = stop;
    }

    /// Starts to fetch samples that will be asked for, where each is a request of its own; whatever
    /// was expected before is forgotten.
    pub fn expect(&mut self, dataset: &Dataset, ids: impl Iterator<Item = SampleId>) {
        self.coming.clear();
        self.coming.extend(ids.filter_map(|id| Some((id, dataset.begin(id)?))));
    }

    /// Reads a sample's bytes.
    fn fetch(&mut self, dataset: &Dataset, id: SampleId) -> Result<(), ReadSampleError> {
        if let Some(pending) = self.coming.remove(&id)
            && let Ok(bytes) = pending.wait(&self.stop)
            && crc32(&bytes) == dataset.index().record(id).crc
        {
            self.bytes = bytes;
            return Ok(());
        }
        // It was not expected, or did not come as indexed: the long way tells what is wrong.
        dataset.read_unless(&self.stop, id, &mut self.bytes)
    }

    /// Reads and decodes a sample and returns the image's size.
    pub fn decode(&mut self, dataset: &Dataset, id: SampleId) -> Result<Size, SampleError> {
        self.fetch(dataset, id)?;
        let decoded = self.decoder.decode(&self.bytes);
        decoded.map_err(|source| SampleError::Decode { place: Box::new(dataset.place(id)), source })
    }

    /// Renders a sample as [`render`](SampleReader::render) does, out of a cache of planes if they
    /// are there, and adds them if they are not.
    #[cfg(feature = "turbo")]
    pub fn render_cached(
        &mut self,
        cache: &PlaneCache,
        dataset: &Dataset,
        id: SampleId,
        choose: impl Fn(Size) -> (CropBox, bool),
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        let record = dataset.index().record(id);
        if !cache.takes(&record) {
            return self.render(dataset, id, choose, shape, out);
        }
        let size = Size { height: record.height.into(), width: record.width.into() };
        let (crop, flip) = choose(size);
        let failed = |source| SampleError::Decode { place: Box::new(dataset.place(id)), source };
        if let Some((layout, first_band)) = cache.read(id, &record, crop, &mut self.planes) {
            let planes = Planes { layout, first_band, rows: &self.planes };
            return self.decoder.render_planes(planes, crop, flip, shape, out).map_err(failed);
        }
        let began = cache.measures().then(Instant::now);
        let took = |filled| began.iter().for_each(|began| cache.took(filled, began.elapsed()));
        if cache.is_closed_to(id) {
            let rendered = self.render(dataset, id, choose, shape, out);
            took(false);
            return rendered;
        }
        self.fetch(dataset, id)?;
        match self.decoder.planes(&self.bytes, &mut self.planes) {
            Ok(Some(layout)) if layout.size == size => {
                cache.write(id, &record, &layout, &self.planes);
                let planes = Planes { layout, first_band: 0, rows: &self.planes };
                let rendered = self.decoder.render_planes(planes, crop, flip, shape, out);
                took(true);
                rendered.map_err(failed)
            }
            // What is too damaged to decode whole may still give the crop, and that alone decides:
            // a worker without a cache must come to the same end.
            _ => {
                cache.refuse(id);
                let rendered = self.decoder.decode_and_render(&self.bytes, choose, shape, out);
                rendered.map(|_| ()).map_err(failed)
            }
        }
    }

    /// There is no cache without libjpeg-turbo.
    #[cfg(not(feature = "turbo"))]
    pub fn render_cached(
        &mut self,
        _cache: &PlaneCache,
        dataset: &Dataset,
        id: SampleId,
        choose: impl Fn(Size) -> (CropBox, bool),
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        self.render(dataset, id, choose, shape, out)
    }

    /// Reads a sample and renders it into `out` as `choose` decides from the image's size.
    pub fn render(
        &mut self,
        dataset: &Dataset,
        id: SampleId,
        choose: impl FnOnce(Size) -> (CropBox, bool),
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        self.fetch(dataset, id)?;
        match self.decoder.decode_and_render(&self.bytes, choose, shape, out) {
            Ok(_) => Ok(()),
            Err(source) => Err(SampleError::Decode { place: Box::new(dataset.place(id)), source }),
        }
    }

    /// Reads a sample as evaluation sees it: the largest centred box, resized, not mirrored.
    pub fn plain(
        &mut self,
        dataset: &Dataset,
        id: SampleId,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        self.centered(dataset, id, 1.0, shape, out)
    }

    /// The same with a box whose sides are `part` of the largest one's, above 0 and at most 1.
    pub fn centered(
        &mut self,
        dataset: &Dataset,
        id: SampleId,
        part: f64,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        let choose = |size: Size| (CropBox::centered_part(size, shape.size(), part), false);
        self.render(dataset, id, choose, shape, out)
    }

    /// Reads a sample's whole image in its own size, with 1 or 3 channels.
    pub fn whole(
        &mut self,
        dataset: &Dataset,
        id: SampleId,
        channels: u32,
    ) -> Result<&[u8], SampleError> {
        self.decode(dataset, id)?;
        Ok(self.decoder.whole(channels))
    }
}
