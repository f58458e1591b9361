//! A directory. An object is written under a temporary name outside the capture's folder, synced, and then linked to
//! its own name, which fails if that is taken: whatever stands in the folder is whole. Nothing stays in the page cache,
//! since on a small guest that would push out what is being investigated.

use crate::{
    PutError, Store, describe,
    sys::{private_file, private_folder},
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use stillframe_evidence::{
    layout::{CaptureId, Key, Writer, evidence_prefix},
    segments::Receipt,
};

/// What the events, `SHA256SUMS` and the manifest of a capture take, with room to spare.
const RESERVE: usize = 256 << 10;
/// ENOSPC, ERROR_DISK_FULL.
const NO_SPACE: i32 = if cfg!(windows) { 112 } else { 28 };

/// A directory store, open for one capture.
pub struct Directory {
    capture: PathBuf,
    partial: PathBuf,
    id: CaptureId,
    next: AtomicU64,
    /// Room that is given back when the disk is full.
    reserve: PathBuf,
    full: AtomicBool,
    folders: Mutex<BTreeSet<PathBuf>>,
}

impl Directory {
    /// Prepares the folder of `id` below `base`, which is made if it is missing, but not its parents. An error is one
    /// line for the person who named the directory.
    pub fn create(base: &Path, writer: &Writer, id: CaptureId) -> Result<Self, String> {
        let wrong = |what: &str, error: io::Error| {
            format!("--store {}: {what}: {}", base.display(), describe(&error))
        };
        match private_folder().create(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(format!(
                    "--store {}: its parent directory does not exist",
                    base.display()
                ));
            }
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(wrong("cannot be made", error));
            }
            _ => (),
        }
        if !fs::metadata(base)
            .map_err(|e| wrong("cannot be read", e))?
            .is_dir()
        {
            return Err(format!("--store {}: not a directory", base.display()));
        }
        let base = fs::canonicalize(base).map_err(|e| wrong("cannot be resolved", e))?;
        let capture = base.join(evidence_prefix(writer, id));
        let partial = base.join(".partial");
        if let Some(parent) = capture.parent() {
            private_folder()
                .recursive(true)
                .create(parent)
                .map_err(|e| wrong("cannot be written to", e))?;
        }
        private_folder()
            .create(&capture)
            .map_err(|e| wrong("a capture of this id cannot be begun", e))?;
        for folder in capture.ancestors().take_while(|folder| folder.starts_with(&base)) {
            crate::sys::sync_folder(folder).map_err(|e| wrong("cannot be synced", e))?;
        }
        let reserve = partial.join(format!("{id}-reserve"));
        let keep = |mut file: File| {
            file.write_all(&vec![0; RESERVE])?;
            file.sync_all()?;
            crate::sys::drop_cache(&file);
            Ok(())
        };
        if let Err(error) = make(&reserve).and_then(keep) {
            let _ = fs::remove_file(&reserve);
            let _ = fs::remove_dir(&capture);
            return Err(wrong("has no room", error));
        }
        Ok(Directory {
            reserve,
            full: AtomicBool::new(false),
            capture,
            partial,
            id,
            next: AtomicU64::new(0),
            folders: Mutex::default(),
        })
    }

    fn write(&self, temporary: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = make(temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crate::sys::drop_cache(&file);
        Ok(())
    }
}

/// Makes a file in the folder of what is partial. A capture that ends removes that folder when it is empty, which it is until another has
/// its first file in it.
fn make(path: &Path) -> io::Result<File> {
    let mut result = private_file().open(path);
    for _ in 0..100 {
        match (&result, path.parent()) {
            (Err(error), Some(folder)) if error.kind() == io::ErrorKind::NotFound => {
                match private_folder().create(folder) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => result = private_file().open(path),
                }
            }
            _ => break,
        }
    }
    result
}

impl Store for Directory {
    fn kind(&self) -> &'static str {
        "directory"
    }

    fn put(&self, key: &Key, bytes: &mut Vec<u8>) -> Result<Receipt, PutError> {
        let is_segment = matches!(key, Key::Segment { .. });
        if is_segment && self.full.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(NO_SPACE).into());
        }
        match self.put_once(key, bytes) {
            Err(error)
                if error.kind() == io::ErrorKind::StorageFull && !self.full.swap(true, Ordering::Relaxed) =>
            {
                // From here on the room that was kept is for the events and the manifest, which say what is missing.
                fs::remove_file(&self.reserve)?;
                if is_segment {
                    Err(error.into())
                } else {
                    Ok(self.put_once(key, bytes)?)
                }
            }
            result => Ok(result?),
        }
    }

    fn finish(&self) -> io::Result<()> {
        let _ = fs::remove_file(&self.reserve);
        // Fails while another capture writes here, which is right.
        let _ = fs::remove_dir(&self.partial);
        Ok(())
    }
}

impl Directory {
    fn put_once(&self, key: &Key, bytes: &[u8]) -> io::Result<Receipt> {
        let target = self.capture.join(key.to_string());
        let folder = target.parent().unwrap_or(&self.capture);
        if let Ok(mut made) = self.folders.lock()
            && !made.contains(folder)
        {
            private_folder().recursive(true).create(folder)?;
            for parent in folder
                .ancestors()
                .skip(1)
                .take_while(|parent| parent.starts_with(&self.capture))
            {
                crate::sys::sync_folder(parent)?;
            }
            made.insert(folder.to_owned());
        }
        let temporary = self.partial.join(format!(
            "{}-{}",
            self.id,
            self.next.fetch_add(1, Ordering::Relaxed)
        ));
        let placed = self
            .write(&temporary, bytes)
            .and_then(|()| crate::sys::place(&temporary, &target));
        // Gone already where it was renamed; a rest of a failed write gives its space back.
        let _ = fs::remove_file(&temporary);
        placed?;
        if let Err(error) = crate::sys::sync_folder(folder) {
            // Said to be lost, so it must not be there.
            let _ = fs::remove_file(&target);
            return Err(error);
        }
        Ok(Receipt {
            confirmed: true,
            ..Receipt::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillframe_evidence::root::Hash;

    fn key(bytes: &[u8]) -> Key {
        Key::Event {
            sequence: 1,
            sha256: Hash::of(bytes),
        }
    }

    #[test]
    fn an_object_is_there_once_and_whole() {
        let base = tempfile::tempdir().unwrap();
        let id = CaptureId::mint();
        let store = Directory::create(&base.path().join("new"), &Writer::local(), id).unwrap();
        let put = store.put(&key(b"x"), &mut b"x".to_vec());
        assert!(put.is_ok(), "{put:?}");
        let again = store.put(&key(b"x"), &mut b"y".to_vec()).unwrap_err().error;
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let file = base
            .path()
            .join("new")
            .join(evidence_prefix(&Writer::local(), id))
            .join(key(b"x").to_string());
        assert_eq!(fs::read(file).unwrap(), b"x");
        #[cfg(unix)]
        for entry in [base.path().join("new/evidence"), base.path().join("new/.partial")] {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(entry).unwrap().permissions());
            assert_eq!(mode & 0o077, 0, "others may not read evidence");
        }
        store.finish().unwrap();
        assert!(!base.path().join("new/.partial").exists());
        assert!(
            Directory::create(&base.path().join("new"), &Writer::local(), id).is_err(),
            "the same capture twice"
        );
    }

    #[test]
    fn one_ends_while_another_begins() {
        let base = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let store =
                            Directory::create(base.path(), &Writer::local(), CaptureId::mint()).unwrap();
                        let put = store.put(&key(b"x"), &mut b"x".to_vec());
                        assert!(put.is_ok(), "{put:?}");
                        store.finish().unwrap();
                    }
                });
            }
        });
        assert!(!base.path().join(".partial").exists());
    }

    #[test]
    fn a_wrong_path_is_one_clear_line() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("file"), b"").unwrap();
        for (path, says) in [
            ("file", "not a directory"),
            ("no/where", "its parent directory does not exist"),
        ] {
            let error = Directory::create(&base.path().join(path), &Writer::local(), CaptureId::mint())
                .err()
                .unwrap();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }
}
