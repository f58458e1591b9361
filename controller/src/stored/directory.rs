//! A directory store, for reading; and the case's folder in it, for writing. Links are not followed, what is no file is not opened.

use super::Place;
use anyhow::{Context as _, Result, bail};
use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};
use stillframe_evidence::layout::Artifact;
use stillframe_store::{private_file, private_folder};

/// A directory.
pub struct Directory(PathBuf);

impl Directory {
    /// Opens it.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).with_context(|| format!("--store {}", path.display()))?;
        if !metadata.is_dir() {
            bail!("--store {}: not a directory", path.display());
        }
        Ok(Directory(path.to_owned()))
    }
}

impl Place for Directory {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let path = self.0.join(prefix);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let name = |e: fs::DirEntry| {
            e.file_type()
                .is_ok_and(|t| t.is_dir())
                .then(|| e.file_name().into_string().ok())?
        };
        Ok(entries.flatten().filter_map(name).collect())
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>, String> {
        let mut found = Vec::new();
        let top = self.0.join(prefix);
        if fs::symlink_metadata(&top).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok(found);
        }
        let mut folders = vec![(top, String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            let mut empty = true;
            for entry in fs::read_dir(&folder).map_err(|e| format!("{prefix}: {e}"))? {
                empty = false;
                let entry = entry.map_err(|e| format!("{prefix}: {e}"))?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let metadata = entry.metadata().map_err(|e| format!("{name}: {e}"))?;
                if metadata.is_dir() {
                    folders.push((entry.path(), name + "/"));
                } else if metadata.is_file() {
                    found.push((name, metadata.len()));
                } else {
                    // No agent makes links, FIFOs or devices: as a name that is no key it is a finding.
                    found.push((name + " (not a regular file)", 0));
                }
            }
            let path = prefix.trim_end_matches('/');
            let known = matches!(path, "" | "progress" | "volatile") || path.parse::<Artifact>().is_ok();
            if empty && !known {
                found.push((prefix, 0));
            }
        }
        Ok(found)
    }

    fn get(&self, key: &str, max: u64) -> Result<Vec<u8>, String> {
        let mut options = File::options();
        options.read(true);
        // What is looked at is what is read, whatever is put in its place meanwhile.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(self.0.join(key)).map_err(|e| e.to_string())?;
        if !file.metadata().map_err(|e| e.to_string())?.is_file() {
            return Err("not a regular file".to_owned());
        }
        let mut bytes = Vec::new();
        let read = file.take(max.saturating_add(1)).read_to_end(&mut bytes);
        match read {
            Err(error) => Err(error.to_string()),
            Ok(n) if n as u64 > max => Err(format!("more than {max} bytes")),
            Ok(_) => Ok(bytes),
        }
    }

    /// A link on the way is refused: it may lead anywhere.
    fn keep(&self, key: &str, object: &[u8]) -> Result<()> {
        let path = self.0.join(key);
        let relative = Path::new(key).parent().unwrap_or(Path::new(""));
        let mut at = self.0.clone();
        for part in relative {
            at.push(part);
            let shown = || at.display().to_string();
            match private_folder().create(&at) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(shown);
                }
                _ => (),
            }
            if !fs::symlink_metadata(&at).with_context(shown)?.is_dir() {
                bail!("{} is no folder: nothing is written behind it", at.display());
            }
        }
        let temporary = path.with_extension(format!("{}", std::process::id()));
        let shown = || temporary.display().to_string();
        let mut file = private_file().open(&temporary).with_context(shown)?;
        let written = file
            .write_all(object)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, &path));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written.with_context(|| path.display().to_string())
    }
}
