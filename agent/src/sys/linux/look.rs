//! What the first look at the processes leaves for the kinds behind it: who holds which socket, who is in which
//! namespace. A worker that took over in the middle has not seen all of it and makes it anew.

use super::proc::{ProcDir, bracketed, fields, number};
use crate::collect::Collection;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
};
use stillframe_evidence::records::sockets::Owner;

/// See the module.
#[derive(Default)]
pub struct Look {
    /// Holders of each socket, by its inode.
    pub owners: HashMap<u64, Vec<Owner>>,
    /// Network namespaces, with processes (or threads, as `pid/task/tid`) that are in them.
    pub netns: BTreeMap<u64, Vec<String>>,
    /// Mount namespaces, with processes that are in them.
    pub mntns: BTreeMap<u64, Vec<u32>>,
    /// Open files that are network namespaces: `PID/fd/N` by inode.
    pub netns_fds: BTreeMap<u64, String>,
    /// Processes whose open files could not be read: who holds a socket cannot be denied then.
    pub closed: BTreeSet<u32>,
    /// Processes whose namespaces could not be read: there may be namespaces that are not known.
    pub hidden: BTreeMap<u32, Option<i32>>,
    /// True when there are processes that this procfs does not show: a scan that failed, or a pid namespace below the first.
    pub blind: bool,
    /// True when every process was looked at by this worker.
    pub whole: bool,
}

/// include/linux/proc_ns.h, PROC_PID_INIT_INO
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// How many processes are kept for one namespace; any that lives will do.
const ENOUGH: usize = 8;

impl Look {
    /// Takes note of an open file.
    pub fn fd(&mut self, pid: u32, fd: u32, target: &[u8]) {
        if let Some(inode) = bracketed(target, "socket") {
            self.owners
                .entry(inode)
                .or_default()
                .push(Owner { pid, fd: Some(fd) });
        } else if let Some(inode) = bracketed(target, "net") {
            self.netns_fds
                .entry(inode)
                .or_insert_with(|| format!("{pid}/fd/{fd}"));
        }
    }

    /// Takes note that an open file of a process could not be read, unless it had gone.
    pub fn unread(&mut self, pid: u32, error: &io::Error) {
        if !crate::collect::is_gone(error.raw_os_error()) {
            self.closed.insert(pid);
        }
    }

    /// Takes note of a namespace of a process.
    pub fn namespace(&mut self, pid: u32, kind: &str, inode: u64) {
        match kind {
            "net" => self.in_netns(inode, pid.to_string()),
            "mnt" => {
                let pids = self.mntns.entry(inode).or_default();
                if pids.len() < ENOUGH {
                    pids.push(pid);
                }
            }
            _ => (),
        }
    }

    fn in_netns(&mut self, inode: u64, who: String) {
        let whose = self.netns.entry(inode).or_default();
        if whose.len() < ENOUGH {
            whose.push(who);
        }
    }

    /// Joins what another lane saw.
    pub fn merge(&mut self, other: Look) {
        for (inode, owners) in other.owners {
            self.owners.entry(inode).or_default().extend(owners);
        }
        other
            .netns
            .into_iter()
            .for_each(|(inode, who)| who.into_iter().for_each(|w| self.in_netns(inode, w)));
        for (inode, pids) in other.mntns {
            pids.into_iter().for_each(|pid| self.namespace(pid, "mnt", inode));
        }
        other
            .netns_fds
            .into_iter()
            .for_each(|(inode, file)| _ = self.netns_fds.entry(inode).or_insert(file));
        self.closed.extend(other.closed);
        self.hidden.extend(other.hidden);
    }

    /// Takes note of the threads of a process that sit in another network namespace than it does.
    pub fn threads(&mut self, dir: &ProcDir, pid: u32, tids: &[u32]) {
        for tid in tids {
            if let Ok(link) = dir.link(&format!("task/{tid}/ns/net"))
                && let Some(inode) = bracketed(&link, "net")
                && !self.netns.contains_key(&inode)
            {
                self.in_netns(inode, format!("{pid}/task/{tid}"));
            }
        }
    }

    /// Takes note that a namespace of a process could not be read, unless it had gone.
    pub fn unread_namespace(&mut self, pid: u32, error: &io::Error) {
        if !crate::collect::is_gone(error.raw_os_error()) {
            self.hidden.insert(pid, error.raw_os_error());
        }
    }

    /// Says for a kind that goes by namespaces that there may be more of them.
    pub fn confess_namespaces(&self, c: &mut Collection) {
        for (pid, errno) in &self.hidden {
            let error = "cannot be read: it may be in a namespace that is not known";
            c.problem("namespaces", format!("/proc/{pid}/ns"), *errno, error);
        }
    }

    /// Sees to it that the worker has a look at every process, its own or a new one. Without one it is blind, which is said.
    pub fn ensure(c: &mut Collection) {
        if !c.memory.look.whole {
            match Look::scan(c) {
                Ok(look) => c.memory.look = look,
                Err(error) => {
                    c.memory.look.blind = true;
                    c.unread("processes", c.path("proc").as_os_str().as_encoded_bytes(), &error);
                }
            }
        }
        let own = std::fs::read_link("/proc/self/ns/pid").ok();
        let own = own.and_then(|link| bracketed(link.as_os_str().as_encoded_bytes(), "pid"));
        c.memory.look.blind |= own != Some(INITIAL_PID_NAMESPACE);
    }

    /// A look at what every process holds now, for nothing else.
    pub fn scan(c: &mut Collection) -> io::Result<Self> {
        let root = c.root();
        let mut look = Look {
            whole: true,
            ..Look::default()
        };
        for pid in ProcDir::open(&root.join("proc"))?.numbers()? {
            let Ok(dir) = ProcDir::open(&root.join(format!("proc/{pid}"))) else {
                continue;
            };
            c.alive();
            for kind in ["net", "mnt"] {
                match dir.link(&format!("ns/{kind}")) {
                    Ok(link) => bracketed(&link, kind)
                        .into_iter()
                        .for_each(|inode| look.namespace(pid, kind, inode)),
                    Err(error) => look.unread_namespace(pid, &error),
                }
            }
            match dir
                .folder("fd")
                .and_then(|folder| Ok((folder.numbers()?, folder)))
            {
                Ok((fds, folder)) => fds.into_iter().for_each(|fd| match folder.link(&fd.to_string()) {
                    Ok(target) => look.fd(pid, fd, &target),
                    Err(error) => look.unread(pid, &error),
                }),
                Err(error) => look.unread(pid, &error),
            }
            if thread_count(&dir).is_some_and(|n| n > 1) {
                look.threads(
                    &dir,
                    pid,
                    &dir.folder("task")
                        .and_then(|tasks| tasks.numbers())
                        .unwrap_or_default(),
                );
            }
        }
        Ok(look)
    }
}

fn thread_count(dir: &ProcDir) -> Option<u64> {
    let stat = dir.read("stat").ok()?;
    let behind = stat
        .iter()
        .rposition(|b| *b == b')')
        .and_then(|at| stat.get(at + 1..))?;
    number(fields(behind).nth(17)?)
}
