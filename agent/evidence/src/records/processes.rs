//! Processes: the first look, which touches no page of any, and the details, which do.

use crate::{root::Hash, text::Text};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The first look at a process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Process {
    /// Process id, in the namespace of the proc file system that was read.
    pub pid: u32,
    /// Parent's process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppid: Option<u32>,
    /// Process group and session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgrp: Option<i64>,
    /// Session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<i64>,
    /// Controlling terminal, as major and minor number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<(u32, u32)>,
    /// `R`, `S`, `D`, `Z`, `T`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<char>,
    /// True for a thread of the kernel (PF_KTHREAD).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel_thread: bool,
    /// Start, in clock ticks since boot: with `pid` the identity of a process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_ticks: Option<u64>,
    /// Start, by the wall clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    /// User and system time in clock ticks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ticks: Option<(u64, u64)>,
    /// Resident memory, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident: Option<u64>,
    /// The name that the kernel has for it; at most 15 bytes on Linux, of the process's own choosing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comm: Option<Text>,
    /// The program file, without the kernel's ` (deleted)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe: Option<Text>,
    /// True when the program file is no longer linked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe_deleted: Option<bool>,
    /// The arguments, split at NUL; read last, in a worker, since they lie in the process's own pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<Vec<Text>>,
    /// The working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<Text>,
    /// The root directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Text>,
    /// Real, effective, saved and file-system user id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uids: Option<[u32; 4]>,
    /// Real, effective, saved and file-system group id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gids: Option<[u32; 4]>,
    /// Supplementary groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
    /// The account, where the platform names rather than numbers it (a SID on Windows).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<Text>,
    /// Capability sets as hexadecimal masks: inheritable, permitted, effective, bounding, ambient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp: Option<u32>,
    /// NoNewPrivs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_new_privs: Option<bool>,
    /// The process that traces it; absent when none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracer: Option<u32>,
    /// Its ids in the nested pid namespaces, outermost first, when there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ns_pids: Vec<u32>,
    /// Inode of each of its namespaces, by kind.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub namespaces: BTreeMap<String, u64>,
    /// /proc/PID/cgroup, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroup: Vec<Text>,
    /// The container, as its cgroup names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// Threads: id and name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub threads: Vec<Thread>,
    /// How many threads there are, as the kernel counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_count: Option<u64>,
    /// Open files: number and target.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<Fd>,
}

impl Process {
    /// Takes off what is beyond `room` bytes of lists; the rest repeats the identity.
    pub(super) fn split_off(&mut self, mut room: usize) -> Option<Self> {
        let mut words = self.cmdline.take();
        let cmdline = words
            .as_mut()
            .map(|words| super::beyond(words, &mut room, |w| w.0.len() + 32));
        self.cmdline = words;
        let threads = super::beyond(&mut self.threads, &mut room, |t| {
            t.comm.as_ref().map_or(0, |c| c.0.len()) + 64
        });
        let fds = super::beyond(&mut self.fds, &mut room, |fd| fd.target.0.len() + 64);
        let cmdline = cmdline.filter(|words| !words.is_empty());
        (cmdline.is_some() || !threads.is_empty() || !fds.is_empty()).then(|| Process {
            pid: self.pid,
            start_ticks: self.start_ticks,
            cmdline,
            threads,
            fds,
            ..Process::default()
        })
    }
}

impl ProcessDetails {
    /// The same.
    pub(super) fn split_off(&mut self, mut room: usize) -> Option<Self> {
        let mut words = self.environ.take();
        let environ = words
            .as_mut()
            .map(|words| super::beyond(words, &mut room, |w| w.0.len() + 32));
        self.environ = words;
        let maps = super::beyond(&mut self.maps, &mut room, |m| {
            m.path.as_ref().map_or(0, |p| p.0.len()) + 192
        });
        let environ = environ.filter(|words| !words.is_empty());
        (environ.is_some() || !maps.is_empty()).then(|| ProcessDetails {
            pid: self.pid,
            start_ticks: self.start_ticks,
            identity: self.identity,
            environ,
            maps,
            ..ProcessDetails::default()
        })
    }
}

/// Capability sets (capabilities(7)), each 16 hexadecimal digits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// CapInh.
    pub inheritable: Text,
    /// CapPrm.
    pub permitted: Text,
    /// CapEff.
    pub effective: Text,
    /// CapBnd.
    pub bounding: Text,
    /// CapAmb.
    pub ambient: Text,
}

/// A container id found in a cgroup path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: String,
    /// What the path calls the runtime: `docker`, `crio`, `cri-containerd`, `libpod`; absent when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
}

/// A thread other than the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread id.
    pub tid: u32,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comm: Option<Text>,
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    /// Its number.
    pub fd: u32,
    /// What the kernel says it is: a path, `socket:[…]`, `pipe:[…]`, `anon_inode:…`.
    pub target: Text,
}

/// The second look at a process: what its pages and its file hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProcessDetails {
    /// Process id.
    pub pid: u32,
    /// Start in clock ticks, read again: another value than in the first look means another process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_ticks: Option<u64>,
    /// How it compares with the first look.
    pub identity: SameProcess,
    /// The running program, read through /proc/PID/exe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// The environment, split at NUL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environ: Option<Vec<Text>>,
    /// The mappings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub maps: Vec<Mapping>,
}

/// Whether the second look saw the process of the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SameProcess {
    /// The same start time.
    Same,
    /// Another process has taken its id.
    Reused,
    /// It was not there at the first look.
    New,
    /// It ended between the looks.
    Gone,
    /// The first look did not learn its start time.
    #[default]
    Unknown,
}

/// The file that a process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its SHA-256; absent when it was too large or could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Hash>,
    /// Bytes.
    pub size: u64,
    /// Device and inode.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Permission bits, set-id bits included.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that are left on it; 0 when it was deleted.
    pub links: u64,
    /// Last change of its content.
    pub modified: Option<Timestamp>,
    /// Last change of its inode.
    pub changed: Option<Timestamp>,
}

/// A line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// `r-xp` and the like.
    pub permissions: Text,
    /// Offset in the file; absent when it is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// Device of the file, `major:minor` in hexadecimal; absent when there is no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Text>,
    /// Inode of the file; absent when there is no file.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub inode: u64,
    /// The file, or the kernel's name for the area; as the kernel prints it, line feeds as `\012`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<Text>,
    /// What makes it interesting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<Mark>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// What makes a mapping interesting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// Executable, and no file behind it.
    AnonymousExecutable,
    /// Writable and executable at once.
    WritableExecutable,
    /// The file behind it was deleted.
    DeletedFile,
    /// The file behind it is a memfd.
    Memfd,
}
