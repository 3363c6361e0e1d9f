//! TFRecord: the frames that event files are made of.
//!
//! A frame is the length of its content (u64, little-endian), a masked CRC-32C of those eight
//! bytes, the content, and a masked CRC-32C of the content.
//!
//! Source: "TFRecords format details" in TensorFlow's guide, tutorials/load_data/tfrecord.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use prost::Message as _;

use crate::error::{TrackError, at};
use crate::message::Event;

/// Bytes of a length and its checksum.
const HEAD_BYTES: usize = 12;

/// Bytes of a frame beside its content.
const EXTRA_BYTES: u64 = HEAD_BYTES as u64 + 4;

/// Returns a CRC-32C as TFRecord stores it: so that checksums of data that hold checksums are good.
pub(crate) fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = crc_fast::checksum(Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// Appends the frame of an event.
pub(crate) fn push_event(out: &mut Vec<u8>, event: &Event) {
    let length = (event.encoded_len() as u64).to_le_bytes();
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    let begin = out.len();
    event.encode(out).expect("a vector has room");
    let crc = masked_crc(&out[begin..]);
    out.extend(crc.to_le_bytes());
}

/// Reads an event file in order, up to where it ends or is damaged, as TensorBoard does.
#[derive(Debug)]
pub struct EventReader {
    path: PathBuf,
    file: BufReader<File>,
    left: u64,
}

impl EventReader {
    /// Opens a file; what is appended later is not read.
    ///
    /// # Errors
    /// [`TrackError::Io`].
    pub fn open(path: &Path) -> Result<Self, TrackError> {
        let file = File::open(path).map_err(at("open", path))?;
        let left = file.metadata().map_err(at("read", path))?.len();
        Ok(EventReader { path: path.to_path_buf(), file: BufReader::new(file), left })
    }

    /// Returns the next event, or none where no whole and sound one follows.
    ///
    /// # Errors
    /// [`TrackError::Io`].
    pub fn next_event(&mut self) -> Result<Option<Event>, TrackError> {
        let found = self.next_frame().map_err(at("read", &self.path))?;
        let event = found.and_then(|content| Event::decode(content.as_slice()).ok());
        if event.is_none() {
            self.left = 0;
        }
        Ok(event)
    }

    fn next_frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.left < EXTRA_BYTES {
            return Ok(None);
        }
        let length: [u8; 8] = self.read_array()?;
        if self.read_crc()? != masked_crc(&length) {
            return Ok(None);
        }
        let length = u64::from_le_bytes(length);
        // Also what keeps a damaged length from asking for more memory than the file has bytes.
        if length > self.left - EXTRA_BYTES {
            return Ok(None);
        }
        let mut content = vec![0; length as usize];
        self.file.read_exact(&mut content)?;
        self.left -= length + EXTRA_BYTES;
        Ok((self.read_crc()? == masked_crc(&content)).then_some(content))
    }

    fn read_crc(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.read_array()?))
    }

    fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Returns the events of a file up to where it ends or is damaged.
///
/// # Errors
/// [`TrackError::Io`].
pub fn read_events(path: &Path) -> Result<Vec<Event>, TrackError> {
    let mut reader = EventReader::open(path)?;
    let mut events = Vec::new();
    while let Some(event) = reader.next_event()? {
        events.push(event);
    }
    Ok(events)
}
