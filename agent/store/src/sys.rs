//! What the directory store asks of the platform.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    path::Path,
};

/// Gives `temporary` the name `target`, unless that is taken.
#[cfg(target_os = "linux")]
pub fn place(temporary: &Path, target: &Path) -> io::Result<()> {
    use rustix::{
        fs::{CWD, RenameFlags, renameat_with},
        io::Errno,
    };
    let cannot_link = [Errno::PERM, Errno::OPNOTSUPP, Errno::MLINK].map(|e| Some(e.raw_os_error()));
    match fs::hard_link(temporary, target) {
        // File systems without links (FAT, exFAT): a rename that does not replace.
        Err(error) if cannot_link.contains(&error.raw_os_error()) => Ok(renameat_with(
            CWD,
            temporary,
            CWD,
            target,
            RenameFlags::NOREPLACE,
        )?),
        result => result,
    }
}

/// How files are made: for nobody but their owner. Evidence holds environments, and those hold secrets.
#[cfg(target_os = "linux")]
pub fn private_file() -> OpenOptions {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
}

/// How folders are made: the same.
#[cfg(target_os = "linux")]
pub fn private_folder() -> DirBuilder {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

/// Makes the names in a folder last.
#[cfg(target_os = "linux")]
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Gives the pages of a file that was just synced back.
#[cfg(target_os = "linux")]
pub fn drop_cache(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

/// See above; here without a fallback for file systems that have no links.
#[cfg(not(target_os = "linux"))]
pub fn place(temporary: &Path, target: &Path) -> io::Result<()> {
    fs::hard_link(temporary, target)
}

/// Files inherit the rights of their folder here.
#[cfg(not(target_os = "linux"))]
pub fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    options
}

/// See above.
#[cfg(not(target_os = "linux"))]
pub fn private_folder() -> DirBuilder {
    DirBuilder::new()
}

/// Folders cannot be synced here.
#[cfg(not(target_os = "linux"))]
pub fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// The cache cannot be told here.
#[cfg(not(target_os = "linux"))]
pub fn drop_cache(_file: &File) {}
