//! Linux: read from procfs and sysfs first, from netlink only where that cannot make the kernel load a module (which
//! would run the program that `kernel.modprobe` names). Paths of the host are taken below [`Collection::root`], so that
//! an agent in a privileged container, or a test with a folder of files, reads the same way.
//!
//! [`Collection::root`]: crate::collect::Collection::root

mod clock;
mod details;
mod host;
mod kernel_module;
mod look;
mod modules;
mod mounts;
mod netlink;
mod netns;
mod pages;
mod proc;
mod processes;
mod routes;
mod secrets;
mod sessions;
mod sockdiag;
mod sockets;

pub use clock::clock;
pub use host::identity;
pub use kernel_module::{
    connect_to_module, interrupt, load as load_module, remove as remove_module, stand_alone, this_thread,
};
pub use look::Look;
pub use pages::{KeyPages, LockedBuffer, Vault, read_at};
pub use proc::read_by_own_instance;

use crate::collect::{Collector, Usage};
use std::{
    ffi::OsStr, fs, io, os::unix::process::ExitStatusExt as _, path::PathBuf, process::ExitStatus,
    time::Duration,
};

/// The kinds that this platform can collect.
pub const COLLECTORS: &[Collector] = &[
    collector(
        "host",
        "identity, kernel, clock, taint, lockdown, swap, virtualisation",
        10,
        host::collect,
    ),
    collector(
        "processes",
        "every process by procfs: identity, rights, namespaces, container, open files",
        60,
        processes::collect,
    ),
    collector(
        "process-details",
        "hash of each running program, environments, mappings",
        300,
        details::collect,
    ),
    collector(
        "sockets",
        "every family, every network namespace, with owners",
        60,
        sockets::collect,
    ),
    collector(
        "routes",
        "interfaces, addresses, routes, neighbours, tracked connections",
        30,
        routes::collect,
    ),
    collector(
        "modules",
        "kernel modules by procfs and sysfs",
        10,
        modules::collect,
    ),
    collector("mounts", "mounts of every mount namespace", 30, mounts::collect),
    collector(
        "secret-mappings",
        "memory that processes have the kernel hide (memfd_secret)",
        60,
        secrets::collect,
    ),
    collector(
        "sessions",
        "logins by utmp, sessions by logind",
        10,
        sessions::collect,
    ),
];

const fn collector(
    kind: &'static str,
    about: &'static str,
    deadline_s: u64,
    collect: fn(&mut crate::collect::Collection) -> Result<(), crate::collect::Unsupported>,
) -> Collector {
    Collector {
        kind,
        about,
        deadline: Duration::from_secs(deadline_s),
        collect,
    }
}

/// Whether a host's root is mounted at `root`.
pub fn is_root(root: &std::path::Path) -> bool {
    root.join("proc/stat").exists()
}

/// Takes single pages of memory, for this process and its workers: a huge one overwrites 2 MiB of what may be evidence for a byte.
pub fn spare_memory() {
    // Not known before Linux 3.15; there it is only a larger footprint.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

/// The running program, even when its file was deleted.
pub fn own_program() -> io::Result<PathBuf> {
    Ok(PathBuf::from("/proc/self/exe"))
}

/// Asks every process of this user that captures under that id to end in good order; how many there were. They are known by their command lines, which
/// somebody of the same user could imitate, and gain a signal by it.
pub fn stop(id: &str) -> io::Result<usize> {
    let own = rustix::process::geteuid().as_raw();
    let mut found = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let pid: Option<i32> = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else {
            continue;
        };
        let owner = std::os::unix::fs::MetadataExt::uid(&match entry.metadata() {
            Ok(metadata) => metadata,
            Err(_) => continue,
        });
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        let captures = words.get(1) == Some(&&b"capture"[..])
            && words.windows(2).any(|pair| pair == [&b"--id"[..], id.as_bytes()]);
        if owner == own && captures {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
            found += 1;
        }
    }
    Ok(found)
}

/// Makes this process end when its parent does, and keeps nothing of its parent's open.
pub fn die_with_parent() {
    let _ = rustix::thread::set_name(c"stillframe-work");
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    close_inherited();
}

fn close_inherited() {
    // SAFETY: the worker has opened nothing yet, so no descriptor above 2 belongs to anything in this process.
    #[allow(unsafe_code)]
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
}

/// Gives the calling thread a table of open files of its own: two threads on one table wait for each other at every open
/// and close.
pub fn own_descriptors() {
    // SAFETY: what this thread opens from here on it also closes, and nothing that it opened leaves it; what was open before
    // is open in both tables.
    #[allow(unsafe_code)]
    let _ = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) };
}

/// Gives a pipe a buffer of so many bytes; up to 1 MiB needs no privilege (the default of /proc/sys/fs/pipe-max-size).
pub fn widen_pipe(pipe: &impl std::os::fd::AsFd, bytes: usize) {
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, bytes);
}

/// How a process ended, in words.
pub fn exit_reason(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with code {code}"),
        (None, None) => "ended".to_owned(),
    }
}

/// What this process has cost so far.
pub fn usage() -> Usage {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu_us = u64::try_from(time.tv_sec)
        .ok()
        .zip(u64::try_from(time.tv_nsec / 1000).ok());
    let line = |path: &str, name: &str| {
        let text = fs::read_to_string(path).ok()?;
        text.lines().find_map(|l| {
            l.strip_prefix(name)?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
    };
    Usage {
        cpu_us: cpu_us.map(|(s, us)| s.saturating_mul(1_000_000).saturating_add(us)),
        peak_resident: line("/proc/self/status", "VmHWM:").map(|kib| kib.saturating_mul(1024)),
        read: line("/proc/self/io", "rchar:"),
    }
}

/// Opens a regular file of the host; what has been put in its place (a FIFO, a device) is not opened.
pub fn open_regular(path: &std::path::Path) -> io::Result<fs::File> {
    proc::open_regular(path)
}

/// Whether it is a disk.
pub fn is_block_device(metadata: &fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type())
}

/// Whether `path` lies on a disk of this host, and not on a network file system or in another's hands (FUSE); by the magic
/// numbers of `include/uapi/linux/magic.h`.
pub fn is_own_disk(path: &std::path::Path) -> bool {
    const ELSEWHERE: [u64; 7] = [
        0x6969,
        0xff53_4d42,
        0xfe53_4d42,
        0x0102_1997,
        0x00c3_6400,
        0x6573_5546,
        0x517b,
    ];
    // What is to be made lies where its parent does; a bare name, here.
    let here = std::path::Path::new(".");
    let there = path.ancestors().find(|p| p.exists()).unwrap_or(here);
    match rustix::fs::statfs(there) {
        Ok(statfs) => {
            u64::try_from(statfs.f_type).map_or(true, |magic| !ELSEWHERE.contains(&(magic & 0xffff_ffff)))
        }
        Err(_) => true,
    }
}

/// Bytes of memory that this host has.
pub fn total_memory(root: &std::path::Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

fn os(bytes: &[u8]) -> &OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}
