//! Where evidence goes: from the agent, and from `stillframe receive` at the other end of a pipe. A store takes whole
//! objects, each once, and answers with a receipt; it knows nothing of kinds, and reads nothing back.

pub mod aws;
mod directory;
pub mod lent;
mod pipe;
pub mod s3;
mod sys;

pub use directory::Directory;
pub use pipe::Pipe;
pub use s3::S3;
pub use sys::{private_file, private_folder};

use std::{fmt, io};
use stillframe_evidence::{
    layout::{CaptureId, Key, Writer},
    segments::Receipt,
};

/// A place for the objects of one capture.
pub trait Store: Send + Sync {
    /// What the chain calls it.
    fn kind(&self) -> &'static str;
    /// Puts that it can have under way at once.
    fn at_once(&self) -> usize {
        1
    }
    /// Puts one object under the capture's prefix. When this returns, the object is as safe as the store can make it;
    /// when it fails, no object of that name is there through this call, unless the error says that the answer was lost.
    /// Afterwards `bytes` holds nothing of meaning: its room is for the next object.
    fn put(&self, key: &Key, bytes: &mut Vec<u8>) -> Result<Receipt, PutError>;
    /// The host's clock minus the store's, in microseconds, as far as the store has told its own.
    fn clock_ahead_us(&self) -> Option<i64> {
        None
    }
    /// The secrets with which it stores, as far as they are known now: what must not be in an image of this host.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }
    /// After the last object.
    fn finish(&self) -> io::Result<()>;
}

/// Why an object is not known to be stored.
#[derive(Debug)]
pub struct PutError {
    /// What went wrong.
    pub error: io::Error,
    /// An attempt may have taken effect although its answer did not come: the object may be there all the same.
    pub lost: bool,
}

impl From<io::Error> for PutError {
    fn from(error: io::Error) -> Self {
        PutError { error, lost: false }
    }
}

impl fmt::Display for PutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = if self.lost {
            "; it may be there all the same"
        } else {
            ""
        };
        write!(f, "{}{lost}", self.error)
    }
}

impl std::error::Error for PutError {}

/// Opens the store that `target` names for one new capture: `-` for standard output, `s3://bucket/prefix`, else a directory. An error is
/// one line for the person who named it.
pub fn open(target: &str, capture: CaptureId, options: s3::Options) -> Result<Box<dyn Store>, String> {
    if target.starts_with("s3://") {
        return S3::open(target, capture, options).map(|s3| Box::new(s3) as Box<dyn Store>);
    }
    if let Some((scheme, _)) = target.split_once("://") {
        return Err(format!(
            "--store {target}: stores of scheme {scheme} are not supported; use a directory, s3://bucket/prefix or -"
        ));
    }
    if target == "-" {
        return Ok(Box::new(Pipe::new(io::stdout(), capture)));
    }
    Directory::create(target.as_ref(), &Writer::local(), capture).map(|d| Box::new(d) as Box<dyn Store>)
}

/// The error of the system, without the ` (os error 13)` that the standard library appends.
fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" (os error ")
        .map_or(text.clone(), |(text, _)| text.to_owned())
}
