//! A file system that has stopped answering, as a FUSE server that hangs or an NFS server that is gone: everything that asks it
//! waits, uninterruptibly as far as the asker can tell.

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use std::{
    ffi::OsStr,
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

const PROGRAM: INodeNo = INodeNo(2);

/// Dead while it exists; revived and unmounted when it is dropped.
pub struct DeadMount {
    folder: tempfile::TempDir,
    process: Child,
    state: Arc<State>,
    session: Option<fuser::BackgroundSession>,
}

#[derive(Default)]
struct State {
    dead: AtomicBool,
    stuck: AtomicBool,
    revived: Mutex<bool>,
    wake: Condvar,
}

impl State {
    /// Does not return while the file system is dead.
    fn answer(&self) {
        if self.dead.load(Ordering::SeqCst) {
            self.stuck.store(true, Ordering::SeqCst);
            let guard = self.revived.lock().unwrap_or_else(|e| e.into_inner());
            drop(self.wake.wait_while(guard, |revived| !*revived));
        }
    }
}

impl DeadMount {
    /// Mounts a file system with one program in it, starts that program with the mount as its working directory, and then
    /// stops answering.
    pub fn with_process_in_it() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let busybox = std::fs::read("/bin/busybox")
            .or_else(|_| std::fs::read("/usr/bin/busybox"))
            .context("busybox")?;
        let state = Arc::new(State::default());
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("dead".to_owned()), MountOption::Exec];
        let server = Server {
            program: busybox,
            state: state.clone(),
        };
        let session = fuser::spawn_mount(server, folder.path(), &config).context("mounting FUSE")?;
        let mut process = Command::new(folder.path().join("program"))
            .arg0("busybox")
            .args(["sh", "-c", "echo; read nothing"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the program in the file system")?;
        // From here on it needs no more of its program than it has.
        process
            .stdout
            .as_mut()
            .context("no output")?
            .read_exact(&mut [0])?;
        state.dead.store(true, Ordering::SeqCst);
        // The server hangs on this one. What is asked after it is never taken from the kernel's queue, and whoever waits there
        // can be killed; a request that the server has taken cannot be waited for otherwise than to its end.
        let first = folder.path().join("first");
        std::thread::spawn(move || std::fs::metadata(first));
        while !state.stuck.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(DeadMount {
            folder,
            process,
            state,
            session: Some(session),
        })
    }

    /// The process that runs from it.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for DeadMount {
    fn drop(&mut self) {
        self.state.dead.store(false, Ordering::SeqCst);
        *self.state.revived.lock().unwrap_or_else(|e| e.into_inner()) = true;
        self.state.wake.notify_all();
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Somebody may still be waiting in there, and a mount that is in use is not unmounted but lazily.
        let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        drop(self.session.take());
    }
}

struct Server {
    program: Vec<u8>,
    state: Arc<State>,
}

impl Server {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, size) = match inode {
            PROGRAM => (FileType::RegularFile, self.program.len() as u64),
            _ => (FileType::Directory, 0),
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.state.answer();
        if name == "program" {
            reply.entry(&Duration::ZERO, &self.attributes(PROGRAM), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.state.answer();
        reply.attr(&Duration::ZERO, &self.attributes(inode));
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.state.answer();
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.state.answer();
        let from = self.program.len().min(offset as usize);
        let to = self.program.len().min(from + size as usize);
        reply.data(&self.program[from..to]);
    }
}
