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
use std::{collections::HashMap, io, path::Path};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_UNIX: u8 = 1;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;

/// Whether asking is free of consequences.
pub fn may_ask(root: &Path) -> bool {
    match proc::read(&root.join("proc/modules")) {
        Err(error) => error.kind() == io::ErrorKind::NotFound,
        Ok(modules) => {
            lines(&modules).any(|line| fields(line).next() == Some(b"unix_diag"))
                || built_in(root).unwrap_or(false)
        }
    }
}

fn built_in(root: &Path) -> Option<bool> {
    let release = proc::read_line(&root.join("proc/sys/kernel/osrelease")).ok()?;
    if release.as_bytes().contains(&b'/') {
        return None;
    }
    let folder = root.join("lib/modules").join(super::os(release.as_bytes()));
    let list = proc::read_regular(&folder.join("modules.builtin"), 1 << 20).ok()?;
    Some(lines(&list).any(|line| line.ends_with(b"/unix_diag.ko")))
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
