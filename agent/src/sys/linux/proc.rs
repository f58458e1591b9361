//! Reading procfs, sysfs and small files of a host that may be hostile: bounded, byte for byte, never blocking on a FIFO.

use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, openat, readlinkat_raw};
use std::{
    cell::RefCell,
    fs::File,
    io::{self, Read as _},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::OnceLock,
};
use stillframe_evidence::text::Text;

/// Bound for files of procfs and sysfs, in bytes. The longest in practice are maps and socket tables.
pub const MAX_PROC: usize = 64 << 20;

/// An instance of procfs that belongs to this process alone.
static OWN: OnceLock<Option<OwnedFd>> = OnceLock::new();

/// Reads what lies below `/proc` through an instance of procfs of this process's own from here on, if it has the right to
/// (`CAP_SYS_ADMIN`, and Linux 5.8: before, every mount in a namespace is one instance).
///
/// Nothing is mounted anywhere: the instance hangs on a descriptor. What the kernel keeps of each name that is looked up, some
/// kilobytes a process and a place in one page after another of its table of names, goes with it, instead of staying behind in
/// memory that is evidence. And no mount over `/proc/PID` hides that process in it. It costs time: what other
/// programs have looked up is not there, either.
pub fn read_by_own_instance() {
    OWN.get_or_init(own);
}

/// True when it does so.
pub fn reads_by_own_instance() -> bool {
    OWN.get().is_some_and(Option::is_some)
}

/// Where a path is looked up. What is the asking thread's own is looked up in `/proc`: it is there already.
fn place(path: &Path) -> (BorrowedFd<'static>, &Path) {
    let own = OWN.get().and_then(Option::as_ref);
    match own.zip(path.strip_prefix("/proc").ok()) {
        Some((own, inside)) if inside.as_os_str().is_empty() => (own.as_fd(), Path::new(".")),
        Some((own, inside)) if !inside.starts_with("self") && !inside.starts_with("thread-self") => {
            (own.as_fd(), inside)
        }
        _ => (CWD, path),
    }
}

fn own() -> Option<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
    // Where /proc is that of another process id namespace (a container that was given the host's), ours would show less.
    let shown = readlinkat_raw(CWD, "/proc/self", &mut [MaybeUninit::uninit(); 16])
        .map(|(pid, _)| number(pid) == Some(std::process::id()));
    if shown == Ok(false) {
        return None;
    }
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
    fsconfig_create(&context).ok()?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let own = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).ok()?;
    // Before Linux 5.8 it is the same one again; and whoever may make one may still not be allowed to read it.
    let device = |stat: rustix::io::Result<rustix::fs::Stat>| stat.ok().map(|stat| stat.st_dev);
    let same = device(rustix::fs::fstat(&own)) == device(rustix::fs::stat("/proc"));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let stat = drain(openat(&own, "self/stat", flags, Mode::empty()).ok()?, MAX_PROC).ok()?;
    let pid = stat.split(|b| *b == b' ').next().and_then(number);
    (!same && pid == Some(std::process::id())).then_some(own)
}

/// The target of a link below `/proc`.
pub fn link(path: &Path) -> io::Result<Vec<u8>> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let (base, path) = place(path);
    let (target, _) = readlinkat_raw(base, path, &mut buffer)?;
    Ok(target.to_vec())
}

/// What a path below `/proc` stands for, without opening it.
pub fn path_only(path: &Path) -> io::Result<OwnedFd> {
    let (base, path) = place(path);
    Ok(openat(base, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// A folder of procfs, such as that of one process. While it is open its process id cannot come to mean another process.
pub struct ProcDir(OwnedFd);

impl ProcDir {
    /// Opens it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let (base, path) = place(path);
        Ok(ProcDir(openat(base, path, flags, Mode::empty())?))
    }

    /// The content of a file in it.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        drain(openat(&self.0, name, flags, Mode::empty())?, MAX_PROC)
    }

    /// The target of a link in it. The kernel gives at most a page, and an error for what is longer.
    pub fn link(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let (target, _) = readlinkat_raw(&self.0, name, &mut buffer)?;
        Ok(target.to_vec())
    }

    /// A folder in it. Links are looked up in the folder that they stand in: procfs checks every part of a path anew.
    pub fn folder(&self, name: &str) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(ProcDir(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// The names in it that are numbers, rising. To be asked once.
    pub fn numbers(&self) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&self.0, &mut buffer);
        while let Some(entry) = entries.next() {
            numbers.extend(number::<u32>(entry?.file_name().to_bytes()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A file in it without opening what it stands for (`O_PATH`): nothing of its file system is asked.
    pub fn path_only(&self, name: &str) -> io::Result<OwnedFd> {
        Ok(openat(
            &self.0,
            name,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

thread_local! {
    /// What files are read into. Their sizes are not known before, and a buffer grown anew for each of thousands costs the
    /// allocator of musl a system call or two every time.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(64 << 10));
}

fn drain(fd: OwnedFd, max: usize) -> io::Result<Vec<u8>> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        File::from(fd).take(max as u64 + 1).read_to_end(scratch)?;
        if scratch.len() > max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {max} bytes"),
            ));
        }
        let bytes = scratch.to_vec();
        scratch.shrink_to(1 << 20);
        Ok(bytes)
    })
}

/// A file of procfs or sysfs.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let (base, path) = place(path);
    drain(openat(base, path, flags, Mode::empty())?, MAX_PROC)
}

/// A one-line file, without its line feed.
pub fn read_line(path: &Path) -> io::Result<Text> {
    read(path).map(|bytes| Text::from(bytes.trim_ascii_end()))
}

/// A regular file of at most `max` bytes that lies on a disk. What has been put in its place (a FIFO, a device) is not opened.
pub fn read_regular(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    drain(open_regular(path)?.into(), max)
}

/// The same file, open.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let fd = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(io::Error::other(format!(
            "is a {}, not a regular file",
            name_of(kind)
        )));
    }
    Ok(File::from(reopen(&fd)?))
}

/// Opens for reading what a path-only descriptor stands for.
pub fn reopen(fd: &OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    // Not self: a lane has a table of open files of its own.
    let path = format!("/proc/thread-self/fd/{}", fd.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "FIFO",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Socket => "socket",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        _ => "file of another type",
    }
}

/// A decimal number that is all there is.
pub fn number<T: std::str::FromStr>(bytes: &[u8]) -> Option<T> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// A hexadecimal number that is all there is.
pub fn hex(bytes: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(bytes).ok()?, 16).ok()
}

/// The fields between runs of blanks.
pub fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|b| matches!(b, b' ' | b'\t'))
        .filter(|field| !field.is_empty())
}

/// The lines of a file, the last one with or without a line feed.
pub fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty())
}

/// Strings that each end in NUL, as in cmdline and environ. A last one without NUL counts.
pub fn strings(bytes: &[u8]) -> Vec<Text> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        Vec::new()
    } else {
        bytes.split(|b| *b == 0).map(Text::from).collect()
    }
}

/// The inode in `kind:[4026531840]`.
pub fn bracketed(link: &[u8], kind: &str) -> Option<u64> {
    number(
        link.strip_prefix(kind.as_bytes())?
            .strip_prefix(b":[")?
            .strip_suffix(b"]")?,
    )
}

/// Undoes the octal escapes of mountinfo, mounts and swaps (`\040` and the like).
pub fn unescape(field: &[u8]) -> Text {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, tail)) = rest.split_first() {
        let code = tail.first_chunk::<3>().filter(|_| *byte == b'\\');
        let code = code.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match (code, tail.split_at_checked(3)) {
            (Some(code), Some((_, behind))) => {
                out.push(code);
                rest = behind;
            }
            _ => {
                out.push(*byte);
                rest = tail;
            }
        }
    }
    Text(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn octal_escapes_are_undone(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let escaped: Vec<u8> = bytes.iter().flat_map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
                b => vec![*b],
            }).collect();
            prop_assert_eq!(unescape(&escaped).0, bytes);
        }

        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            unescape(&bytes);
            strings(&bytes);
            bracketed(&bytes, "net");
            prop_assert!(fields(&bytes).all(|f| !f.is_empty()));
        }
    }

    #[test]
    fn empty_arguments_are_arguments() {
        assert_eq!(
            strings(b"a\0\0b\0"),
            [Text::from("a"), Text::from(""), Text::from("b")]
        );
        assert_eq!(strings(b""), []);
        assert_eq!(strings(b"title"), [Text::from("title")]);
    }

    #[test]
    fn a_fifo_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        rustix::fs::mkfifoat(CWD, &path, Mode::RUSR).unwrap();
        assert!(
            read_regular(&path, 10)
                .unwrap_err()
                .to_string()
                .contains("is a FIFO")
        );
        std::fs::write(folder.path().join("file"), b"0123456789A").unwrap();
        assert_eq!(
            read_regular(&folder.path().join("file"), 10).unwrap_err().kind(),
            io::ErrorKind::FileTooLarge
        );
    }
}
