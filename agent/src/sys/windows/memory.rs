//! What capturing memory asks of the platform, as far as it goes here: an image that somebody else took is brought in. Physical
//! memory of the host itself is not read here yet, and the key stands on the heap.

use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut},
    path::Path,
};
use stillframe_evidence::signature::{CaptureKey, PublicKey, Signatory};

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The pages of the key are not known here.
#[derive(Clone, Default)]
pub struct KeyPages;

impl KeyPages {
    /// None.
    pub fn inside(&self, _address: u64, _size: u64) -> Vec<(u64, u64)> {
        Vec::new()
    }
}

/// A buffer that is not locked here yet.
pub struct LockedBuffer(Vec<u8>);

impl LockedBuffer {
    /// Of so many bytes, zero.
    pub fn new(size: usize) -> io::Result<Self> {
        Ok(LockedBuffer(vec![0; size]))
    }

    /// Address and length.
    pub fn place(&self) -> (u64, u64) {
        (self.0.as_ptr().addr() as u64, self.0.len() as u64)
    }
}

impl Deref for LockedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Holds the key of a capture.
pub struct Vault(CaptureKey);

impl Vault {
    /// Makes a key.
    pub fn new(_hidden: bool) -> io::Result<Self> {
        let mut seed = [0; 32];
        let result = getrandom::fill(&mut seed);
        let key = CaptureKey::from_seed(&seed);
        seed.fill(0);
        result.map(|()| Vault(key)).map_err(io::Error::other)
    }

    /// Its pages.
    pub fn pages(&self) -> KeyPages {
        KeyPages
    }

    /// Nothing here reads physical memory.
    pub fn seed(&self) -> Option<[u8; 32]> {
        None
    }

    /// Where the key is, in words.
    pub fn kind(&self) -> &'static str {
        "ordinary memory"
    }
}

impl Signatory for Vault {
    fn public(&self) -> PublicKey {
        self.0.public()
    }

    fn sign(&self, message: String) -> (String, [u8; 64]) {
        self.0.sign(message)
    }
}

/// Reads at an offset.
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

/// Opens a file of the host.
pub fn open_regular(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Disks are not files here.
pub fn is_block_device(_metadata: &std::fs::Metadata) -> bool {
    false
}

/// Not told apart here yet.
pub fn is_own_disk(_path: &Path) -> bool {
    true
}

/// Not asked here yet.
pub fn total_memory(_root: &Path) -> Option<u64> {
    None
}

/// Modules of Linux are not for this kernel.
pub fn load_module(_file: &File, _parameters: &str) -> io::Result<()> {
    unsupported()
}

/// See above.
pub fn connect_to_module(_address: std::net::SocketAddr) -> io::Result<std::net::TcpStream> {
    unsupported()
}

/// See above.
pub fn remove_module(_name: &str) -> io::Result<()> {
    unsupported()
}

/// See above.
pub fn stand_alone() {}

/// See above.
pub fn interrupt(_thread: i32) {}

/// See above.
pub fn this_thread() -> i32 {
    0
}
