//! A folder whose files are read slowly, as over a link that barely holds: each answer comes, none comes soon.

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, Request,
};
use std::{
    ffi::OsStr,
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

const CONTENT: &[u8] = b"UID=0\n";
const FIRST: u64 = 2;

/// `files` files of one line each, mounted over `folder` for as long as this exists.
pub struct SlowFolder {
    _session: fuser::BackgroundSession,
}

impl SlowFolder {
    /// Reading one file takes `delay`.
    pub fn over(folder: &Path, files: u64, delay: Duration) -> Result<Self> {
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("slow".to_owned()), MountOption::RO];
        let session =
            fuser::spawn_mount(Server { files, delay }, folder, &config).context("mounting FUSE")?;
        Ok(SlowFolder { _session: session })
    }
}

struct Server {
    files: u64,
    delay: Duration,
}

fn attributes(inode: INodeNo) -> FileAttr {
    let folder = inode == INodeNo::ROOT;
    FileAttr {
        ino: inode,
        size: if folder { 0 } else { CONTENT.len() as u64 },
        blocks: 1,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if folder {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

impl Filesystem for Server {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name
            .to_str()
            .and_then(|n| n.parse::<u64>().ok())
            .filter(|n| *n < self.files)
        {
            Some(n) => reply.entry(
                &Duration::from_secs(60),
                &attributes(INodeNo(FIRST + n)),
                Generation(0),
            ),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::from_secs(60), &attributes(inode));
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        for n in offset..self.files {
            if reply.add(INodeNo(FIRST + n), n + 1, FileType::RegularFile, n.to_string()) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        std::thread::sleep(self.delay);
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        _size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(
            CONTENT
                .get(usize::try_from(offset).unwrap_or(usize::MAX)..)
                .unwrap_or_default(),
        );
    }
}
