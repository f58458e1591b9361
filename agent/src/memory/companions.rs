//! What is needed to read the image and is gone with the boot: types (BTF of the kernel and of its modules), symbols
//! (kallsyms), VMCOREINFO, the map of memory, the banner, the configuration. All of it is read from the running kernel, but
//! for the configuration, which most distributions keep as a file.

use super::kcore::Kcore;
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// One companion that is there.
pub struct Found {
    /// The name of its artifact.
    pub name: &'static str,
    /// Where it was read.
    pub source: PathBuf,
    /// Its bytes.
    pub bytes: Box<dyn Read>,
}

/// One that could not be had.
pub struct Missing {
    /// The name of its artifact.
    pub name: &'static str,
    /// Where it would have been read.
    pub source: PathBuf,
    /// Why not.
    pub error: io::Error,
}

/// Bytes of a companion that are read at most: the largest known, kallsyms of a kernel with every module, is 30 MiB.
pub const MAX_COMPANION: u64 = 256 << 20;

/// Everything below `root`, in the order in which it is stored.
pub fn all(root: &Path, kcore: Option<&Kcore>) -> Vec<Result<Found, Missing>> {
    let mut list: Vec<Result<Found, Missing>> = [
        ("version", "proc/version"),
        ("iomem", "proc/iomem"),
        ("kallsyms", "proc/kallsyms"),
        ("btf", "sys/kernel/btf/vmlinux"),
    ]
    .into_iter()
    .map(|(name, path)| open(name, root.join(path)))
    .collect();
    list.push(module_types(root));
    list.push(configuration(root));
    let source = root.join("proc/kcore");
    list.push(match kcore.and_then(Kcore::vmcoreinfo) {
        Some(note) => Ok(Found {
            name: "vmcoreinfo",
            source,
            bytes: Box::new(io::Cursor::new(note)),
        }),
        None => Err(Missing {
            name: "vmcoreinfo",
            source,
            error: io::Error::new(io::ErrorKind::NotFound, "no such note"),
        }),
    });
    list
}

fn open(name: &'static str, source: PathBuf) -> Result<Found, Missing> {
    match File::open(&source) {
        Ok(file) => Ok(Found {
            name,
            source,
            bytes: Box::new(file.take(MAX_COMPANION)),
        }),
        Err(error) => Err(Missing { name, source, error }),
    }
}

/// The types of modules, as a tar of `/sys/kernel/btf` without the kernel's own.
fn module_types(root: &Path) -> Result<Found, Missing> {
    let (name, source) = ("btf-modules", root.join("sys/kernel/btf"));
    match fs::read_dir(&source) {
        Ok(entries) => {
            let mut files: Vec<PathBuf> = entries
                .flatten()
                .map(|e| e.path())
                .filter(|p| !p.ends_with("vmlinux"))
                .collect();
            files.sort();
            let files = files.into_iter().map(Some).chain([None]);
            let bytes = Box::new(Tar {
                files: Box::new(files),
                ready: Box::new(io::empty()),
            });
            Ok(Found { name, source, bytes })
        }
        Err(error) => Err(Missing { name, source, error }),
    }
}

/// A tar made file by file as it is read.
struct Tar {
    /// Its files, and then nothing: the end.
    files: Box<dyn Iterator<Item = Option<PathBuf>>>,
    ready: Box<dyn Read>,
}

impl Read for Tar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.ready.read(buffer)?;
            if n > 0 {
                return Ok(n);
            }
            self.ready = match self.files.next() {
                Some(Some(path)) => entry(&path)?,
                Some(None) => Box::new(io::repeat(0).take(1024)),
                None => return Ok(0),
            };
        }
    }
}

/// A whole file at a time: one that ends or fails on the way is none.
fn entry(path: &Path) -> io::Result<Box<dyn Read>> {
    let mut content = Vec::new();
    File::open(path)?.take(MAX_COMPANION).read_to_end(&mut content)?;
    let size = content.len() as u64;
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o400);
    // A name that does not fit is no module of Linux (MODULE_NAME_LEN is 56).
    header.set_path(path.file_name().unwrap_or_default())?;
    header.set_cksum();
    let padding = io::repeat(0).take(size.next_multiple_of(512) - size);
    let header = io::Cursor::new(header.as_bytes().to_vec());
    Ok(Box::new(header.chain(io::Cursor::new(content)).chain(padding)))
}

/// `/proc/config.gz` where the kernel has it, else the distribution's file.
fn configuration(root: &Path) -> Result<Found, Missing> {
    let own = open("config", root.join("proc/config.gz"));
    if own.is_ok() {
        return own;
    }
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    // A name with a slash in it would be another file than the one that is meant.
    if release.is_empty() || release.contains('/') {
        return own;
    }
    let (name, source) = ("config", root.join(format!("boot/config-{release}")));
    match crate::sys::open_regular(&source) {
        Ok(file) => Ok(Found {
            name,
            source,
            bytes: Box::new(file.take(MAX_COMPANION)),
        }),
        Err(error) => Err(Missing { name, source, error }),
    }
}
