//! The first look: every process by the text files and links of procfs. No page of a process and no file system is
//! touched but for the arguments, which lie in the process's own pages and are therefore read last.

use super::{
    clock,
    proc::{self, ProcDir, bracketed, fields, hex, lines, number, strings},
};
use crate::collect::{Avoided, Collection, Errors, Unsupported, is_gone};
use jiff::{SignedDuration, Timestamp};
use std::path::Path;
use stillframe_evidence::{
    records::{
        Data,
        processes::{Capabilities, Container, Fd, Process, Thread},
    },
    text::Text,
};

const PF_KTHREAD: u64 = 0x0020_0000;
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Every process in the order of its id.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let proc = c.path("proc");
    let pids = match ProcDir::open(&proc).and_then(|dir| dir.numbers()) {
        Ok(pids) => pids,
        Err(error) => return Err(Unsupported(format!("{}: {error}", proc.display()))),
    };
    let booted = clock::booted();
    let before = c.memory.seen.len();
    let lanes = c.in_lanes(|c, lane, lanes| {
        let mut tally = Tally {
            whole: true,
            ..Tally::default()
        };
        for pid in pids.iter().filter(|pid| u64::from(**pid) % lanes == lane) {
            look_at(c, &proc, *pid, booted, &mut tally);
        }
        tally
    });
    let mut total = Tally {
        whole: before == 0,
        ..Tally::default()
    };
    for (tally, memory) in lanes {
        total.whole &= tally.whole;
        total.vanished += tally.vanished;
        total.kernel_threads += tally.kernel_threads;
        c.memory.seen.extend(memory.seen);
        c.memory.look.merge(memory.look);
    }
    c.memory.look.whole = total.whole;
    c.note(format!("{} of the kernel", total.kernel_threads));
    if proc::reads_by_own_instance() {
        c.note("read by a procfs of the agent's own".to_owned());
    }
    if total.vanished > 0 {
        c.note(format!("{} ended while they were read", total.vanished));
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    whole: bool,
    vanished: u64,
    kernel_threads: u64,
}

fn look_at(c: &mut Collection, proc: &Path, pid: u32, booted: Option<Timestamp>, tally: &mut Tally) {
    let source = proc.join(pid.to_string());
    let name = source.as_os_str().as_encoded_bytes();
    if !c.item(u64::from(pid), name) {
        tally.whole = false;
        return;
    }
    let read_at = Timestamp::now();
    let mut process = Process {
        pid,
        ..Process::default()
    };
    let mut errors = Errors::below(&source);
    match ProcDir::open(&source) {
        Ok(dir) => read(c, &dir, booted, &mut process, &mut errors),
        Err(error) => _ = errors.keep::<()>("process", "", Err(error)),
    }
    if let Some(ticks) = process.start_ticks {
        c.seen(pid, ticks);
    }
    tally.vanished += u64::from(errors.list.iter().any(|e| is_gone(e.errno)));
    tally.kernel_threads += u64::from(process.kernel_thread);
    c.record(name, read_at, Data::Process(Box::new(process)), errors.list);
    c.done();
}

fn read(
    c: &mut Collection,
    dir: &ProcDir,
    booted: Option<Timestamp>,
    process: &mut Process,
    errors: &mut Errors,
) {
    let pid = process.pid;
    if let Some(stat) = errors.keep("stat", "stat", dir.read("stat")) {
        parse_stat(&stat, booted, process);
    }
    if let Some(status) = errors.keep("status", "status", dir.read("status")) {
        parse_status(&status, process);
    }
    if let Some(cgroup) = errors.keep("cgroup", "cgroup", dir.read("cgroup")) {
        process.cgroup = lines(&cgroup).map(Text::from).collect();
        process.container = lines(&cgroup).find_map(container);
    }
    let folder = dir.folder("ns");
    if let Err(error) = &folder {
        c.memory.look.unread_namespace(pid, error);
    }
    if let Some(folder) = errors.keep("namespaces", "ns", folder) {
        for kind in NAMESPACES {
            let link = folder.link(kind);
            let link = match link {
                Ok(link) => Some(link),
                Err(error) => {
                    c.memory.look.unread_namespace(pid, &error);
                    errors.keep_present("namespaces", format!("ns/{kind}"), Err(error))
                }
            };
            if let Some(inode) = link.and_then(|link| bracketed(&link, kind)) {
                process.namespaces.insert(kind.to_owned(), inode);
                c.memory.look.namespace(pid, kind, inode);
            }
        }
    }
    if !process.kernel_thread {
        // A zombie has none of these, which ENOENT says.
        if let Some(exe) = errors.keep_present("exe", "exe", dir.link("exe")) {
            let deleted = exe.strip_suffix(b" (deleted)");
            process.exe_deleted = Some(deleted.is_some());
            process.exe = Some(Text::from(deleted.unwrap_or(&exe)));
        }
        process.cwd = errors.keep_present("cwd", "cwd", dir.link("cwd")).map(Text);
        process.root = errors.keep_present("root", "root", dir.link("root")).map(Text);
        read_fds(c, dir, process, errors);
    }
    if process.thread_count.is_some_and(|n| n > 1)
        && let Some(tids) = errors.keep(
            "threads",
            "task",
            dir.folder("task").and_then(|tasks| tasks.numbers()),
        )
    {
        c.memory.look.threads(dir, pid, &tids);
        let comm = |tid: &u32| {
            dir.read(&format!("task/{tid}/comm"))
                .ok()
                .map(|b| Text::from(chomp(&b)))
        };
        process.threads = tids
            .iter()
            .filter(|tid| **tid != pid)
            .map(|tid| Thread {
                tid: *tid,
                comm: comm(tid),
            })
            .collect();
    }
    if !process.kernel_thread {
        let blocked = process.state == Some('D') && c.hung_on("cmdline");
        match if blocked {
            Err(Avoided)
        } else {
            c.touching("cmdline", None)
        } {
            Ok(()) => {
                process.cmdline = errors
                    .keep("cmdline", "cmdline", dir.read("cmdline"))
                    .map(|b| strings(&b));
            }
            Err(_) => errors.avoided("cmdline", "cmdline"),
        }
    }
}

fn read_fds(c: &mut Collection, dir: &ProcDir, process: &mut Process, errors: &mut Errors) {
    let listed = dir
        .folder("fd")
        .and_then(|folder| Ok((folder.numbers()?, folder)));
    if let Err(error) = &listed {
        c.memory.look.unread(process.pid, error);
    }
    let Some((fds, folder)) = errors.keep("fds", "fd", listed) else {
        return;
    };
    for fd in fds {
        match folder.link(&fd.to_string()) {
            Ok(target) => {
                c.memory.look.fd(process.pid, fd, &target);
                process.fds.push(Fd {
                    fd,
                    target: Text(target),
                });
            }
            // One that was closed since it was listed is no error.
            Err(error) => {
                c.memory.look.unread(process.pid, &error);
                let _: Option<()> = errors.keep_present("fds", format!("fd/{fd}"), Err(error));
            }
        }
    }
}

fn chomp(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\n").unwrap_or(bytes)
}

/// proc_pid_stat(5). The name stands raw between the first `(` and the last `)`, and may hold either.
pub fn parse_stat(stat: &[u8], booted: Option<Timestamp>, process: &mut Process) {
    let open = stat.iter().position(|b| *b == b'(');
    let close = stat.iter().rposition(|b| *b == b')');
    let (Some(open), Some(close)) = (open, close) else {
        return;
    };
    process.comm = stat.get(open + 1..close).map(Text::from);
    let rest: Vec<&[u8]> = stat
        .get(close + 1..)
        .map(|r| fields(chomp(r)).collect())
        .unwrap_or_default();
    let get = |index: usize| rest.get(index).copied();
    process.state = get(0).and_then(|f| f.first()).map(|b| char::from(*b));
    process.ppid = get(1).and_then(number);
    process.pgrp = get(2).and_then(number);
    process.session = get(3).and_then(number);
    // Documentation/admin-guide/devices: 12 bits of major, 20 of minor, in the encoding of new_encode_dev().
    process.tty = get(4)
        .and_then(number::<i64>)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|n| *n != 0)
        .map(|n| ((n >> 8) & 0xfff, (n & 0xff) | ((n >> 12) & 0xf_ff00)));
    process.kernel_thread = get(6)
        .and_then(number::<u64>)
        .is_some_and(|flags| flags & PF_KTHREAD != 0);
    process.cpu_ticks = get(11).and_then(number).zip(get(12).and_then(number));
    process.thread_count = get(17).and_then(number);
    process.start_ticks = get(19).and_then(number);
    process.resident = get(21)
        .and_then(number::<u64>)
        .and_then(|n| n.checked_mul(page_size()));
    process.started = process
        .start_ticks
        .zip(booted)
        .and_then(|(ticks, booted)| started(ticks, booted));
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

fn started(ticks: u64, booted: Timestamp) -> Option<Timestamp> {
    let micros = ticks
        .checked_mul(1_000_000)?
        .checked_div(rustix::param::clock_ticks_per_second())?;
    booted
        .checked_add(SignedDuration::from_micros(i64::try_from(micros).ok()?))
        .ok()
}

/// proc_pid_status(5).
fn parse_status(status: &[u8], process: &mut Process) {
    let mut capabilities = Capabilities::default();
    for line in lines(status) {
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            continue;
        };
        let (name, value) = (
            line.get(..colon).unwrap_or_default(),
            line.get(colon + 1..).unwrap_or_default(),
        );
        let value = value.trim_ascii();
        let four = || {
            let ids: Vec<u32> = fields(value).filter_map(number).collect();
            <[u32; 4]>::try_from(ids).ok()
        };
        match name {
            b"Uid" => process.uids = four(),
            b"Gid" => process.gids = four(),
            b"Groups" => process.groups = fields(value).filter_map(number).collect(),
            b"TracerPid" => process.tracer = number(value).filter(|pid| *pid != 0),
            b"NSpid" => {
                let pids: Vec<u32> = fields(value).filter_map(number).collect();
                process.ns_pids = if pids.len() > 1 { pids } else { Vec::new() };
            }
            b"Seccomp" => process.seccomp = number(value),
            b"NoNewPrivs" => process.no_new_privs = number::<u8>(value).map(|n| n != 0),
            b"CapInh" => capabilities.inheritable = Text::from(value),
            b"CapPrm" => capabilities.permitted = Text::from(value),
            b"CapEff" => capabilities.effective = Text::from(value),
            b"CapBnd" => capabilities.bounding = Text::from(value),
            b"CapAmb" => capabilities.ambient = Text::from(value),
            _ => (),
        }
    }
    if hex(capabilities.effective.as_bytes()).is_some() {
        process.capabilities = Some(capabilities);
    }
}

/// A container's id in a cgroup path: a part of 64 hexadecimal digits, alone or as `runtime-<id>.scope`.
fn container(line: &[u8]) -> Option<Container> {
    line.rsplit(|b| *b == b'/').find_map(|part| {
        let part = std::str::from_utf8(part).ok()?;
        let name = part.strip_suffix(".scope").unwrap_or(part);
        let (runtime, id) = name
            .rsplit_once(['-', ':'])
            .map_or((None, name), |(r, id)| (Some(r), id));
        let is_id = id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        is_id.then(|| Container {
            id: id.to_owned(),
            runtime: runtime.map(str::to_owned),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_cannot_forge_the_fields_behind_it() {
        let mut process = Process::default();
        let stat =
            b"42 (a) R 1 (\n\x1b\xff) S 7 42 42 34816 -1 4194560 1 2 3 4 50 60 0 0 20 0 3 0 1234 5000 6 7\n";
        parse_stat(stat, Some(Timestamp::UNIX_EPOCH), &mut process);
        assert_eq!(process.comm, Some(Text::from(b"a) R 1 (\n\x1b\xff")));
        assert_eq!((process.state, process.ppid), (Some('S'), Some(7)));
        assert_eq!(process.tty, Some((136, 0)));
        assert_eq!(process.cpu_ticks, Some((50, 60)));
        assert_eq!((process.thread_count, process.start_ticks), (Some(3), Some(1234)));
        assert_eq!(process.started.unwrap().as_millisecond(), 12_340);
    }

    #[test]
    fn container_ids_are_found_in_every_layout() {
        let id = "0123456789abcdef".repeat(4);
        for (line, runtime) in [
            (format!("12:pids:/docker/{id}"), None),
            (format!("0::/system.slice/docker-{id}.scope"), Some("docker")),
            (
                format!("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope"),
                Some("cri-containerd"),
            ),
            (
                format!(
                    "1:name=systemd:/system.slice/x.service/kubepods-besteffort-pod1:cri-containerd:{id}"
                ),
                None,
            ),
        ] {
            let found = container(line.as_bytes()).unwrap();
            assert_eq!(found.id, id);
            if runtime.is_some() {
                assert_eq!(found.runtime.as_deref(), runtime);
            }
        }
        assert_eq!(container(b"0::/user.slice"), None);
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut process = Process::default();
            parse_stat(&bytes, None, &mut process);
            parse_status(&bytes, &mut process);
            container(&bytes);
        }
    }
}
