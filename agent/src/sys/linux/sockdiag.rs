//! What procfs does not tell of sockets: the other end of a UNIX socket.
//!
//! A dump for a family whose module is not loaded makes the kernel run modprobe, which is whatever program
//! `kernel.modprobe` names: on a hostile host, anything. So it is asked only where the module is loaded or built in, or
//! where the kernel cannot load modules at all. Other families add nothing here that procfs does not have.

use super::{
    netlink::{attributes, dump, u32_of},
    proc::{self, fields, lines},
};
use rustix::net::netlink;
use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader},
    path::Path,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_UNIX: u8 = 1;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;

/// Whether asking is free of consequences. Only what the kernel itself says counts: a file of the host, such as
/// modules.builtin, could be planted. So what is built in is looked up in kallsyms, and only where that file claims it.
pub fn may_ask(root: &Path) -> bool {
    // The running kernel's own, wherever the host's root is.
    match proc::read(Path::new("/proc/modules")) {
        Err(error) => error.kind() == io::ErrorKind::NotFound && Path::new("/proc/self/stat").exists(),
        Ok(modules) => {
            lines(&modules).any(|line| fields(line).next() == Some(b"unix_diag"))
                || (claimed(root) && built_in())
        }
    }
}

/// Cheap, and not to be trusted: saves most hosts the reading of kallsyms.
fn claimed(root: &Path) -> bool {
    let read = || {
        let release = proc::read_line(Path::new("/proc/sys/kernel/osrelease")).ok()?;
        let release = Some(release.as_bytes()).filter(|r| !r.contains(&b'/'))?;
        let folder = root.join("lib/modules").join(super::os(release));
        proc::read_regular(&folder.join("modules.builtin"), 1 << 20).ok()
    };
    read().is_some_and(|list| lines(&list).any(|line| line.ends_with(b"/unix_diag.ko")))
}

/// A function of unix_diag that belongs to no module.
fn built_in() -> bool {
    let Ok(file) = std::fs::File::open("/proc/kallsyms") else {
        return false;
    };
    let is_it = |line: Vec<u8>| {
        let mut fields = fields(&line).skip(2);
        fields.next() == Some(b"unix_diag_handler_dump") && fields.next().is_none()
    };
    BufReader::with_capacity(64 << 10, file)
        .split(b'\n')
        .map_while(Result::ok)
        .any(is_it)
}

/// Inode of each UNIX socket of the calling thread's network namespace, and of its other end.
pub fn unix_peers() -> io::Result<HashMap<u64, u64>> {
    let mut request = [0; 24];
    request[0] = AF_UNIX;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[12..16].copy_from_slice(&UDIAG_SHOW_PEER.to_ne_bytes());
    let mut peers = HashMap::new();
    dump(
        Some(netlink::SOCK_DIAG),
        SOCK_DIAG_BY_FAMILY,
        &request,
        |_, body| {
            let inode = body.get(4..8).and_then(u32_of);
            let peer = body
                .get(16..)
                .and_then(|rest| attributes(rest).find(|(kind, _)| *kind == UNIX_DIAG_PEER));
            if let (Some(inode), Some(peer)) = (inode, peer.and_then(|(_, value)| u32_of(value))) {
                peers.insert(u64::from(inode), u64::from(peer));
            }
        },
    )?;
    Ok(peers)
}
