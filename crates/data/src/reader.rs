//! One sample at a time, from its place on disk to pixels.

use lacuna_recipe::augment::{CropBox, Size};
use lacuna_types::SampleId;

use crate::dataset::{Dataset, ReadSampleError, SamplePlace};
use crate::decode::{DecodeError, Decoder, ImageShape};

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
    /// Tells whether the sample itself is bad; otherwise reading failed and says nothing about it.
    pub fn is_bad_sample(&self) -> bool {
        !matches!(self, SampleError::Read(ReadSampleError::Io { .. }))
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
    decoder: Decoder,
}

impl SampleReader {
    /// Builds a reader with empty buffers.
    pub fn new() -> Self {
        SampleReader::default()
    }

    /// Reads and decodes a sample and returns the image's size.
    pub fn decode(&mut self, dataset: &Dataset, id: SampleId) -> Result<Size, SampleError> {
        dataset.read(id, &mut self.bytes)?;
        let decoded = self.decoder.decode(&self.bytes);
        decoded.map_err(|source| SampleError::Decode { place: Box::new(dataset.place(id)), source })
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
        let (crop, flip) = choose(self.decode(dataset, id)?);
        let rendered = self.decoder.render(crop, flip, shape, out);
        rendered
            .map_err(|source| SampleError::Decode { place: Box::new(dataset.place(id)), source })
    }

    /// Reads a sample as evaluation sees it: the largest centred box, resized, not mirrored.
    pub fn plain(
        &mut self,
        dataset: &Dataset,
        id: SampleId,
        shape: ImageShape,
        out: &mut [u8],
    ) -> Result<(), SampleError> {
        let choose = |size: Size| (CropBox::largest_centered(size, shape.size()), false);
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
