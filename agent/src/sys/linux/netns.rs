//! Every network namespace that can be reached, and how: through a process or thread in it, through a bind mount of it
//! (`ip netns`), or through somebody's open file. Namespaces that only a socket keeps alive cannot be listed; their
//! sockets are found with the processes that hold them.

use super::{
    look::Look,
    proc::{self, bracketed, fields, lines},
};
use crate::collect::Collection;
use rustix::{
    fd::AsFd as _,
    fs::fstatfs,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

const NSFS_MAGIC: i64 = 0x6e73_6673;

/// A file of procfs's `net` folder: its name, where it was read, what was read.
pub type Table = (&'static str, PathBuf, io::Result<Vec<u8>>);

/// A network namespace.
pub struct Netns {
    /// Its inode.
    pub inode: u64,
    /// Processes or threads in it, as folders of procfs.
    pub inhabitants: Vec<PathBuf>,
    /// Files that are it.
    pub files: Vec<PathBuf>,
    /// True for the agent's own.
    pub own: bool,
}

/// The namespaces that the look knows, and those that are mounted in any mount namespace.
pub fn all(c: &Collection, look: &Look) -> Vec<Netns> {
    let own = std::fs::read_link("/proc/self/ns/net").ok();
    let own = own.and_then(|link| bracketed(link.as_os_str().as_encoded_bytes(), "net"));
    let mut found: BTreeMap<u64, Netns> = BTreeMap::new();
    for (inode, who) in &look.netns {
        let netns = entry(&mut found, *inode, own);
        netns.inhabitants = who.iter().map(|who| c.path("proc").join(who)).collect();
    }
    if let Some(inode) = own {
        entry(&mut found, inode, own)
            .inhabitants
            .push(PathBuf::from("/proc/thread-self"));
    }
    for (inode, file) in &look.netns_fds {
        entry(&mut found, *inode, own)
            .files
            .push(c.path("proc").join(file));
    }
    for pids in look.mntns.values() {
        let Some((pid, mountinfo)) = pids
            .iter()
            .find_map(|pid| Some((pid, proc::read(&c.path(format!("proc/{pid}/mountinfo"))).ok()?)))
        else {
            continue;
        };
        for line in lines(&mountinfo) {
            let mut line = fields(line).skip(3);
            let (Some(root), Some(target)) = (line.next(), line.next()) else {
                continue;
            };
            if let Some(inode) = bracketed(root, "net") {
                let target = proc::unescape(target);
                let inside = target.as_bytes().strip_prefix(b"/").unwrap_or(target.as_bytes());
                let file = c.path(format!("proc/{pid}/root")).join(super::os(inside));
                entry(&mut found, inode, own).files.push(file);
            }
        }
    }
    found.into_values().collect()
}

fn entry(found: &mut BTreeMap<u64, Netns>, inode: u64, own: Option<u64>) -> &mut Netns {
    let new = || Netns {
        inode,
        inhabitants: Vec::new(),
        files: Vec::new(),
        own: own == Some(inode),
    };
    found.entry(inode).or_insert_with(new)
}

impl Netns {
    /// Files of procfs's `net` folder for this namespace, with the path that each was read from. Absent ones are left
    /// out: a kernel without IPv6 has no `tcp6`.
    pub fn tables(&self, names: &[&'static str]) -> io::Result<Vec<Table>> {
        for folder in &self.inhabitants {
            let net = folder.join("net");
            // The process may have ended, and its id may now mean one in another namespace.
            let link = proc::link(&folder.join("ns/net"));
            let is_there = |link: Vec<u8>| bracketed(&link, "net") == Some(self.inode);
            if !self.own && !link.is_ok_and(is_there) {
                continue;
            }
            if ["unix", "dev"]
                .iter()
                .any(|name| proc::path_only(&net.join(name)).is_ok())
            {
                return Ok(read_tables(&net, names));
            }
        }
        self.inside(|| read_tables(Path::new("/proc/thread-self/net"), names))
    }

    /// Runs `work` on a thread in the namespace. The thread ends with it: nothing else of the worker is moved.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let door = if self.own { None } else { Some(self.open()?) };
        let run = || {
            if let Some(door) = &door {
                move_into_link_name_space(door.as_fd(), Some(LinkNameSpaceType::Network))?;
            }
            Ok(work())
        };
        let died = || Err(io::Error::other("the thread inside the namespace died"));
        std::thread::scope(|scope| scope.spawn(run).join().unwrap_or_else(|_| died()))
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        let doors = self.inhabitants.iter().map(|folder| folder.join("ns/net"));
        for door in doors.chain(self.files.iter().cloned()) {
            match open_nsfs(&door) {
                Ok((fd, inode)) if inode == self.inode => return Ok(fd),
                Ok(_) => (),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Opens a namespace file, and never anything else that lies in its place.
fn open_nsfs(path: &Path) -> io::Result<(OwnedFd, u64)> {
    let fd = proc::path_only(path)?;
    #[allow(
        clippy::useless_conversion,
        reason = "the width of f_type differs between platforms"
    )]
    if i64::from(fstatfs(&fd)?.f_type) != NSFS_MAGIC {
        return Err(io::Error::other("is no namespace"));
    }
    let fd = proc::reopen(&fd)?;
    let inode = rustix::fs::fstat(&fd)?.st_ino;
    Ok((fd, inode))
}

fn read_tables(net: &Path, names: &[&'static str]) -> Vec<Table> {
    let read = |name: &&'static str| {
        let path = net.join(name);
        match proc::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            result => Some((*name, path, result)),
        }
    };
    names.iter().filter_map(read).collect()
}
