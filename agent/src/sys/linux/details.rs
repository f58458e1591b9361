//! The second look at the processes: what touches their pages and their files. Every such read is announced before it is
//! made, so that a worker that hangs on it costs that one field of that one process.

use super::proc::{ProcDir, hex, lines, number, reopen, strings};
use super::processes::parse_stat;
use crate::collect::{Avoided, Collection, Errors, Unsupported, describe, is_gone};
use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex},
};
use stillframe_evidence::{
    records::{
        Data,
        processes::{Image, Mapping, Mark, Process, ProcessDetails, SameProcess},
    },
    root::Hash,
    text::Text,
};

/// Programs larger than this are not hashed: it is there to bound time, not to leave something out.
const MAX_IMAGE: u64 = 4 << 30;

/// Hashes of files that many processes run, by device, inode, size and change time.
type Hashed = Mutex<HashMap<(u64, u64, u64, i64, u32), Arc<Mutex<Option<Hash>>>>>;

/// Every process with pages of its own, and those of the first look that have gone.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let proc = c.path("proc");
    let listed = match ProcDir::open(&proc).and_then(|dir| dir.numbers()) {
        Ok(pids) => pids,
        Err(error) => return Err(Unsupported(format!("{}: {error}", proc.display()))),
    };
    let mut pids: BTreeSet<u32> = listed.into_iter().collect();
    pids.extend(c.memory.seen.keys());
    let seen = std::mem::take(&mut c.memory.seen);
    let hashed = Hashed::default();
    let lanes = c.in_lanes(|c, lane, lanes| {
        let mut tally = Tally::default();
        for pid in pids.iter().filter(|pid| u64::from(**pid) % lanes == lane) {
            look_at(c, &proc, *pid, &seen, &hashed, &mut tally);
        }
        tally
    });
    c.memory.seen = seen;
    let hashed = hashed.into_inner().map_or(0, |hashed| hashed.len());
    c.note(format!(
        "{} hashed",
        stillframe_evidence::verdict::count(hashed, "program")
    ));
    let sum = |of: fn(&Tally) -> u64| lanes.iter().map(|(tally, _)| of(tally)).sum::<u64>();
    for (n, what) in [
        (sum(|t| t.gone), "ended"),
        (sum(|t| t.new), "started"),
        (sum(|t| t.reused), "replaced"),
    ] {
        if n > 0 {
            c.note(format!("{n} {what} since the first look"));
        }
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    gone: u64,
    new: u64,
    reused: u64,
}

fn look_at(
    c: &mut Collection,
    proc: &Path,
    pid: u32,
    seen: &BTreeMap<u32, u64>,
    hashed: &Hashed,
    tally: &mut Tally,
) {
    let source = proc.join(pid.to_string());
    let name = source.as_os_str().as_encoded_bytes();
    if !c.item(u64::from(pid), name) {
        return;
    }
    let read_at = Timestamp::now();
    let mut errors = Errors::below(&source);
    let mut details = ProcessDetails {
        pid,
        ..ProcessDetails::default()
    };
    let dir = ProcDir::open(&source).ok();
    let (mut kernel_thread, mut blocked) = (false, false);
    if let Some(stat) = dir.as_ref().and_then(|dir| dir.read("stat").ok()) {
        let mut process = Process::default();
        parse_stat(&stat, None, &mut process);
        details.start_ticks = process.start_ticks;
        kernel_thread = process.kernel_thread;
        blocked = process.state == Some('D');
    }
    details.identity = match (seen.get(&pid).copied(), details.start_ticks) {
        (Some(before), Some(now)) if before == now => SameProcess::Same,
        (Some(_), Some(_)) => SameProcess::Reused,
        (Some(_), None) => SameProcess::Gone,
        (None, Some(_)) if seen.is_empty() => SameProcess::Unknown,
        (None, Some(_)) => SameProcess::New,
        // Listed, never seen alive.
        (None, None) => return c.done(),
    };
    tally.gone += u64::from(details.identity == SameProcess::Gone);
    tally.new += u64::from(details.identity == SameProcess::New);
    tally.reused += u64::from(details.identity == SameProcess::Reused);
    if kernel_thread {
        return c.done();
    }
    if let Some(dir) = dir.filter(|_| details.identity != SameProcess::Gone) {
        read(c, &dir, &mut details, &mut errors, hashed, blocked);
    }
    // It may end between two reads; that is the same news as its having gone before the first.
    errors.list.retain(|e| !is_gone(e.errno));
    c.record(
        name,
        read_at,
        Data::ProcessDetails(Box::new(details)),
        errors.list,
    );
    c.done();
}

fn read(
    c: &mut Collection,
    dir: &ProcDir,
    details: &mut ProcessDetails,
    errors: &mut Errors,
    hashed: &Hashed,
    blocked: bool,
) {
    let may = |c: &mut Collection, field: &'static str| {
        let blocked = blocked && c.hung_on(field);
        if blocked {
            Err(Avoided)
        } else {
            c.touching(field, None)
        }
    };
    // Both lie behind the same lock of the process's memory.
    match may(c, "pages") {
        Ok(()) => {
            details.environ = errors
                .keep("environ", "environ", dir.read("environ"))
                .map(|b| strings(&b));
            let maps = errors.keep("maps", "maps", dir.read("maps"));
            details.maps = maps
                .iter()
                .flat_map(|maps| lines(maps))
                .filter_map(mapping)
                .collect();
        }
        Err(_) => {
            errors.avoided("environ", "environ");
            errors.avoided("maps", "maps");
        }
    }
    // A process whose image is gone (a zombie) answers ENOENT.
    let Some(path) = errors.keep_present("image", "exe", dir.path_only("exe")) else {
        return;
    };
    // What the kernel has cached, without asking the file system, which may not answer.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(&path, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID);
    let Some(stat) = errors.keep("image", "exe", stat.map_err(io::Error::from)) else {
        return;
    };
    let known = hashed
        .lock()
        .ok()
        .and_then(|all| all.get(&identity(&stat)).cloned());
    let known = known.and_then(|slot| slot.try_lock().ok().and_then(|hash| *hash));
    let mount = Some(stat.stx_mnt_id).filter(|_| stat.stx_mask & StatxFlags::MNT_ID.bits() != 0);
    match known.map_or_else(|| c.touching("image", mount), |_| Ok(())) {
        Ok(()) => details.image = errors.keep("image", "exe", read_image(c, &path, &stat, hashed)),
        Err(_) => errors.avoided("image", "exe"),
    }
}

fn identity(stat: &Statx) -> (u64, u64, u64, i64, u32) {
    let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    (
        device,
        stat.stx_ino,
        stat.stx_size,
        stat.stx_ctime.tv_sec,
        stat.stx_ctime.tv_nsec,
    )
}

fn read_image(c: &mut Collection, path: &OwnedFd, stat: &Statx, hashed: &Hashed) -> io::Result<Image> {
    if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    let identity = identity(stat);
    let sha256 = if stat.stx_size > MAX_IMAGE {
        None
    } else {
        // Another lane may be at the same file: it is waited for rather than read twice.
        let slot = hashed
            .lock()
            .map(|mut all| all.entry(identity).or_default().clone());
        let slot = slot.map_err(|_| io::Error::other("another lane failed"))?;
        let mut slot = slot
            .lock()
            .map_err(|_| io::Error::other("another lane failed at it"))?;
        if slot.is_none() {
            // Not to be taken for a process that has ended, which ENOENT means elsewhere.
            let file = reopen(path)
                .map_err(|e| io::Error::other(format!("its program cannot be opened: {}", describe(&e))))?;
            *slot = Some(hash(c, File::from(file), stat.stx_size)?);
        }
        *slot
    };
    let time = |t: rustix::fs::StatxTimestamp| Timestamp::new(t.tv_sec, i32::try_from(t.tv_nsec).ok()?).ok();
    Ok(Image {
        sha256,
        size: stat.stx_size,
        device: identity.0,
        inode: stat.stx_ino,
        mode: u32::from(stat.stx_mode & 0o7777),
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        links: u64::from(stat.stx_nlink),
        modified: time(stat.stx_mtime),
        changed: time(stat.stx_ctime),
    })
}

fn hash(c: &mut Collection, mut file: File, size: u64) -> io::Result<Hash> {
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut left = size;
    loop {
        let n = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..n).filter(|b| !b.is_empty()) else {
            break;
        };
        // A file that grows while it is read would never end.
        left = left
            .checked_sub(n as u64)
            .ok_or_else(|| io::Error::other("it grew while it was read"))?;
        sha256.update(bytes);
        c.alive();
    }
    if left > 0 {
        return Err(io::Error::other("it shrank while it was read"));
    }
    Ok(Hash(sha256.finalize().into()))
}

/// One line of proc_pid_maps(5). The path begins at its first byte that is no blank and may hold blanks itself.
fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|b| *b != b' ')?;
        rest = rest.get(start..)?;
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (field, tail) = rest.split_at_checked(end)?;
        rest = tail;
        Some(field)
    };
    let range = field()?;
    let dash = range.iter().position(|b| *b == b'-')?;
    let (start, end) = (hex(range.get(..dash)?)?, hex(range.get(dash + 1..)?)?);
    let (permissions, offset, device, inode) = (field()?, hex(field()?)?, field()?, number(field()?)?);
    let path = rest.trim_ascii_start();
    let path = (!path.is_empty()).then_some(path);
    Some(Mapping {
        start,
        end,
        permissions: Text::from(permissions),
        offset,
        device: (device != b"00:00").then(|| Text::from(device)),
        inode,
        path: path.map(Text::from),
        marks: marks(permissions, inode, path.unwrap_or_default()),
    })
}

fn marks(permissions: &[u8], inode: u64, path: &[u8]) -> Vec<Mark> {
    let has = |b: u8| permissions.contains(&b);
    // Pages that the kernel itself puts into every process.
    let kernels_own = [
        &b"[vdso]"[..],
        b"[vvar]",
        b"[vsyscall]",
        b"[vvar_vclock]",
        b"[uprobes]",
    ]
    .contains(&path);
    let memfd = path.starts_with(b"/memfd:");
    // Shared anonymous memory, which the kernel shows as a deleted file.
    let shared_anonymous = path == b"/dev/zero (deleted)" || path.starts_with(b"/SYSV");
    let tests = [
        (
            Mark::AnonymousExecutable,
            has(b'x') && !kernels_own && (inode == 0 || shared_anonymous),
        ),
        (Mark::WritableExecutable, has(b'x') && has(b'w')),
        (
            Mark::DeletedFile,
            path.ends_with(b" (deleted)") && !memfd && !shared_anonymous,
        ),
        (Mark::Memfd, memfd),
    ];
    tests
        .into_iter()
        .filter(|(_, true_of_it)| *true_of_it)
        .map(|(mark, _)| mark)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_keep_their_blanks_and_marks_are_right() {
        let cases: [(&str, Option<&str>, &[Mark]); 8] = [
            (
                "00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/a  b c",
                Some("/usr/bin/a  b c"),
                &[],
            ),
            (
                "7f00-7f10 rwxp 00000000 00:00 0 ",
                None,
                &[Mark::AnonymousExecutable, Mark::WritableExecutable],
            ),
            (
                "7f00-7f10 r-xp 00000000 00:00 0                          [vdso]",
                Some("[vdso]"),
                &[],
            ),
            (
                "7f00-7f10 r-xp 00000000 00:01 9 /memfd:x (deleted)",
                Some("/memfd:x (deleted)"),
                &[Mark::Memfd],
            ),
            (
                "7f00-7f10 r--p 00000000 08:01 9 /tmp/x (deleted)",
                Some("/tmp/x (deleted)"),
                &[Mark::DeletedFile],
            ),
            (
                "7f00-7f10 rw-s 00000000 00:01 9 /dev/zero (deleted)",
                Some("/dev/zero (deleted)"),
                &[],
            ),
            (
                "7f00-7f10 r-xs 00000000 00:01 9 /dev/zero (deleted)",
                Some("/dev/zero (deleted)"),
                &[Mark::AnonymousExecutable],
            ),
            ("7f00-7f10 rw-p 00000000 00:00 0 [heap]", Some("[heap]"), &[]),
        ];
        for (line, path, marks) in cases {
            let mapping = mapping(line.as_bytes()).unwrap();
            assert_eq!(mapping.path, path.map(Text::from), "{line}");
            assert_eq!(mapping.marks, marks, "{line}");
        }
    }

    proptest! {
        #[test]
        fn hostile_lines_never_panic(line in proptest::collection::vec(any::<u8>(), 0..120)) {
            mapping(&line);
        }
    }

    /// A host of files, as with `--root`: process 7 has another start than at the first look, 8 is new, 9 has gone, 6 is the same.
    #[test]
    fn a_reused_process_id_is_noticed() {
        use crate::worker::{Job, Resume};
        use std::sync::{Arc, Mutex};
        #[derive(Clone, Default)]
        struct Out(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Out {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let root = tempfile::tempdir().unwrap();
        for (pid, start) in [(6, 60), (7, 71), (8, 80)] {
            let folder = root.path().join(format!("proc/{pid}"));
            std::fs::create_dir_all(&folder).unwrap();
            let stat = format!("{pid} (x) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {start} 0 0");
            std::fs::write(folder.join("stat"), stat).unwrap();
            std::fs::write(folder.join("environ"), b"A=1\0B=\xff\0").unwrap();
            std::fs::write(folder.join("maps"), b"").unwrap();
        }
        let job = Job {
            root: root.path().to_owned(),
            steps: vec![(0, "process-details".to_owned())],
            lanes: 2,
            sparing: false,
            resume: vec![Resume::default(), Resume::default()],
            avoid_mounts: BTreeSet::new(),
            hung: BTreeSet::new(),
            seen: vec![(6, 60), (7, 70), (9, 90)],
        };
        let out = Out::default();
        crate::collect::work(&serde_json::to_vec(&job).unwrap()[..], Box::new(out.clone())).unwrap();
        let said = String::from_utf8_lossy(&out.0.lock().unwrap()).into_owned();
        for (pid, identity) in [(6, "same"), (7, "reused"), (8, "new"), (9, "gone")] {
            let record = said
                .split("{\"source\"")
                .find(|r| r.contains(&format!("\"pid\":{pid},")))
                .unwrap();
            assert!(
                record.contains(&format!("\"identity\":\"{identity}\"")),
                "{record}"
            );
            assert_eq!(
                record.contains("QgA9/w==") || record.contains("Qj3/"),
                identity != "gone",
                "{record}"
            );
        }
        assert!(said.contains("1 replaced since the first look"), "{said}");
    }
}
