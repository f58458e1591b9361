//! What is needed to read the image and is gone with the boot: types (BTF of the kernel and of its modules), symbols
//! (kallsyms), VMCOREINFO, the map of memory, the banner, the configuration. All of it is read from the running kernel, but
//! for the configuration, which most distributions keep as a file.

use super::{Held, Source as _, kcore::Kcore};
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
    list.push(vmcoreinfo(root, kcore));
    list
}

/// The note of /proc/kcore; kernels before 4.19 have none there, and say where in memory it is.
fn vmcoreinfo(root: &Path, kcore: Option<&Kcore>) -> Result<Found, Missing> {
    let name = "vmcoreinfo";
    let source = root.join("proc/kcore");
    let missing = |source, error| Err(Missing { name, source, error });
    let found = |source, note| {
        let bytes = Box::new(io::Cursor::new(note));
        Ok(Found { name, source, bytes })
    };
    let Some(kcore) = kcore else {
        let error = io::Error::new(io::ErrorKind::NotFound, "no /proc/kcore");
        return missing(source, error);
    };
    if let Some(note) = kcore.vmcoreinfo() {
        return found(source, note);
    }
    let place = root.join("sys/kernel/vmcoreinfo");
    let text = match fs::read_to_string(&place) {
        Ok(text) => text,
        Err(error) => return missing(place, error),
    };
    match place_of_note(&text).map(|(address, size)| {
        let mut note = vec![0; size];
        (kcore.read(&Held::default(), address, &mut note), note)
    }) {
        Some((Ok(gaps), note)) if gaps.is_empty() => match content_of_note(&note) {
            Some(content) => found(place, content.to_vec()),
            None => missing(
                place,
                io::Error::other("what lies at its address is no such note"),
            ),
        },
        _ => missing(place, io::Error::other("its address could not be read")),
    }
}

/// `0x<physical address> 0x<bytes>`; the kernel writes the second without its `0x` (`kernel/ksysfs.c`).
fn place_of_note(text: &str) -> Option<(u64, usize)> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let (address, size) = text.trim().split_once(' ')?;
    let size = usize::try_from(number(size)?).ok()?;
    Some((number(address)?, size)).filter(|_| (12..=64 << 10).contains(&size))
}

/// The content of an ELF note of that name.
fn content_of_note(note: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = note.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let (name, size) = (word(0)?, word(4)?);
    if note.get(12..12usize.checked_add(name)?)?.trim_ascii_end() != b"VMCOREINFO\0" {
        return None;
    }
    let start = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
    note.get(start..start.checked_add(size)?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_note_that_the_kernel_points_at() {
        assert_eq!(place_of_note("0x100a4e000 1024\n"), Some((0x1_00a4_e000, 0x1024)));
        assert_eq!(place_of_note("0x100a4e000 ffffffff\n"), None);
        let note = [
            &[11, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0][..],
            b"VMCOREINFO\0\0OSR=6\n\0\0",
        ]
        .concat();
        assert_eq!(content_of_note(&note), Some(&b"OSR=6\n"[..]));
    }

    proptest! {
        #[test]
        fn any_note_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = content_of_note(&bytes);
        }
    }
}
