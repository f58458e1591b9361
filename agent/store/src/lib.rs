//! Where evidence goes: from the agent, and from `stillframe receive` at the other end of a pipe. A store takes whole
//! objects, each once, and answers with a receipt; it knows nothing of kinds, and reads nothing back.

mod directory;
mod pipe;
mod sys;

pub use directory::Directory;
pub use pipe::Pipe;
pub use sys::{private_file, private_folder};

use std::io;
use stillframe_evidence::{
    layout::{CaptureId, Key, Writer},
    segments::Receipt,
};

/// A place for the objects of one capture.
pub trait Store: Send + Sync {
    /// What the chain calls it.
    fn kind(&self) -> &'static str;
    /// Puts one object under the capture's prefix. When this returns, the object is as safe as the store can make it;
    /// when it fails, no object of that name is there through this call.
    fn put(&self, key: &Key, bytes: &[u8]) -> io::Result<Receipt>;
    /// After the last object.
    fn finish(&self) -> io::Result<()>;
}

/// Opens the store that `target` names for one new capture: `-` for standard output, else a directory. An error is one
/// line for the person who named it.
pub fn open(target: &str, capture: CaptureId) -> Result<Box<dyn Store>, String> {
    if let Some((scheme, _)) = target.split_once("://") {
        return Err(format!(
            "--store {target}: stores of scheme {scheme} are not supported; use a directory or -"
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
