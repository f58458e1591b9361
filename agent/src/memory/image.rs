//! An image that somebody else took (LiME, AVML, ELF core, raw): brought into a capture with the same frames, hashes and chain.

use super::{Cutter, Held, Share, Source};
use crate::collect::describe;
use std::{
    fs::File,
    path::Path,
    sync::{Mutex, PoisonError},
};
use stillframe_evidence::{
    image::Image,
    records::memory::{Gap, MemoryGap},
};

/// Opens the file; the error is one line.
pub fn open(path: &Path) -> Result<File, String> {
    let wrong = |why: String| format!("--image {}: {why}", path.display());
    let metadata = std::fs::metadata(path).map_err(|error| wrong(describe(&error)))?;
    if !metadata.is_file() && !crate::sys::is_block_device(&metadata) {
        return Err(wrong("is neither a file nor a disk".to_owned()));
    }
    File::open(path).map_err(|error| wrong(describe(&error)))
}

/// The image as a source.
pub struct ImageFile<'a> {
    image: Image<'a>,
    expected: Vec<(u64, u64)>,
    cutter: Mutex<Cutter>,
}

impl<'a> ImageFile<'a> {
    /// Of an open image, in segments of this size.
    pub fn new(image: Image<'a>, segment: u64) -> Self {
        let expected = image.ranges();
        ImageFile {
            image,
            cutter: Mutex::new(Cutter::new(&expected, segment)),
            expected,
        }
    }
}

impl Source for ImageFile<'_> {
    fn expected(&self) -> Vec<(u64, u64)> {
        self.expected.clone()
    }

    fn next(&self, _held: &mut Held) -> Result<Option<Share>, String> {
        Ok(self.cutter.lock().unwrap_or_else(PoisonError::into_inner).next())
    }

    fn read(&self, _held: &Held, address: u64, buffer: &mut [u8]) -> Result<Vec<MemoryGap>, String> {
        let Err(error) = self.image.read(address, buffer) else {
            return Ok(Vec::new());
        };
        buffer.fill(0);
        Ok(vec![MemoryGap {
            start: address,
            end: address.saturating_add((buffer.len() as u64).saturating_sub(1)),
            gap: Gap::Unreadable,
            why: describe(&error),
        }])
    }
}
