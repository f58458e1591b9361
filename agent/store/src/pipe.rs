//! A pipe: the objects as entries of a tar archive, under their full keys, in the order in which they were made. What
//! `stillframe receive` reads at the other end, and what plain `tar -x` turns into a directory store as well.

use crate::{PutError, Store};
use std::{
    io::{self, Write},
    sync::Mutex,
};
use stillframe_evidence::{
    layout::{CaptureId, Key, Writer, evidence_prefix},
    segments::Receipt,
};

/// A tar stream into `W`.
pub struct Pipe<W: Write> {
    prefix: String,
    archive: Mutex<tar::Builder<W>>,
}

impl<W: Write + Send> Pipe<W> {
    /// A stream of the objects of `capture`.
    pub fn new(out: W, capture: CaptureId) -> Self {
        Pipe {
            prefix: evidence_prefix(&Writer::local(), capture),
            archive: Mutex::new(tar::Builder::new(out)),
        }
    }
}

impl<W: Write + Send> Store for Pipe<W> {
    fn kind(&self) -> &'static str {
        "pipe"
    }

    /// The receipt says only that the pipe took the object: what has landed is known at the other end.
    fn put(&self, key: &Key, bytes: &mut Vec<u8>) -> Result<Receipt, PutError> {
        let mut header = tar::Header::new_ustar();
        header.set_path(format!("{}/{key}", self.prefix))?;
        header.set_size(bytes.len() as u64);
        header.set_mode(0o400);
        header.set_cksum();
        let mut archive = self
            .archive
            .lock()
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        archive.append(&header, bytes.as_slice())?;
        archive.get_mut().flush()?;
        Ok(Receipt::default())
    }

    fn finish(&self) -> io::Result<()> {
        let mut archive = self.archive.lock().map_err(|_| io::ErrorKind::BrokenPipe)?;
        archive.finish()?;
        archive.get_mut().flush()
    }
}
