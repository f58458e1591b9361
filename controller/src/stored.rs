//! Captures in a store, for reading. A store may hold anything: links are not followed, what is no file is not opened, and
//! nothing is believed here; proving is for `stillframe_evidence::verdict`.

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::Timestamp;
use serde::Serialize;
use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};
use stillframe_evidence::{
    chain::{Chain, Closing, MAX_EVENT, Outcome},
    frames::{MAX_SEGMENT, Segment},
    layout::{Artifact, CaptureId, CaseName, Key, Kind, Writer, case_prefix, evidence_prefix},
    manifest::MAX_MANIFEST,
    root::Hash,
    signature::split,
    text::Text,
    verdict::Objects,
};
use stillframe_store::{private_file, private_folder};

/// A directory store.
pub struct Store {
    base: PathBuf,
}

/// How far a capture is, by what it says of itself: nothing is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is a manifest, and it says that every step came to a good end.
    Complete,
    /// There is a manifest, and it says that something is missing.
    Partial,
    /// There is none, but a salvage record.
    Salvaged,
    /// Neither.
    Incomplete,
}

impl State {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Complete => "complete",
            State::Partial => "partial",
            State::Salvaged => "salvaged",
            State::Incomplete => "incomplete",
        }
    }
}

/// One capture of a store.
pub struct Stored {
    /// Its id.
    pub id: CaptureId,
    /// Who wrote it, as the store has it.
    pub writer: Writer,
    base: PathBuf,
    folder: PathBuf,
}

/// What the first event says, for lists.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The id.
    pub id: CaptureId,
    /// The case; absent when the first event cannot be read.
    pub case: Option<CaseName>,
    /// The host's name.
    pub host: Option<Text>,
    /// When it was begun.
    pub started: Option<Timestamp>,
    /// How far it is.
    pub state: State,
}

impl Store {
    /// Opens a directory store.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some((scheme, _)) = path.to_str().and_then(|p| p.split_once("://")) {
            bail!(
                "--store {}: stores of scheme {scheme} are not supported; use a directory",
                path.display()
            );
        }
        let metadata = fs::metadata(path).with_context(|| format!("--store {}", path.display()))?;
        if !metadata.is_dir() {
            bail!("--store {}: not a directory", path.display());
        }
        Ok(Store {
            base: path.to_owned(),
        })
    }

    /// Every capture, in the order in which they were begun.
    pub fn captures(&self) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        let evidence = self.base.join("evidence");
        for writer in folders(&evidence)? {
            let Ok(writer) = writer.parse::<Writer>() else {
                continue;
            };
            for id in folders(&evidence.join(writer.as_str()))? {
                let Ok(id) = id.parse::<CaptureId>() else { continue };
                let folder = self.base.join(evidence_prefix(&writer, id));
                found.push(Stored {
                    id,
                    writer: writer.clone(),
                    base: self.base.clone(),
                    folder,
                });
            }
        }
        // Ids of our own programs sort by time; of others' ids the first event knows.
        found.sort_by_cached_key(|s| (s.started(), s.id));
        Ok(found)
    }

    /// The capture that `name` means: an id, a unique beginning of one, or `latest`.
    pub fn find(&self, name: &str) -> Result<Stored> {
        let mut captures = self.captures()?;
        if name == "latest" {
            return captures
                .pop()
                .ok_or_else(|| anyhow!("no capture in {}", self.base.display()));
        }
        let mut matching: Vec<Stored> = captures
            .into_iter()
            .filter(|s| !name.is_empty() && s.id.to_string().starts_with(name))
            .collect();
        match (matching.pop(), matching.len()) {
            (Some(one), 0) => Ok(one),
            (Some(_), more) => bail!(
                "{name} is the beginning of {} captures; give more of it",
                more + 1
            ),
            (None, _) => bail!(
                "no capture {name} in {}; `stillframe list` shows those there are",
                self.base.display()
            ),
        }
    }
}

fn folders(path: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let name = |e: fs::DirEntry| {
        e.file_type()
            .is_ok_and(|t| t.is_dir())
            .then(|| e.file_name().into_string().ok())?
    };
    Ok(entries.flatten().filter_map(name).collect())
}

impl Objects for Stored {
    fn list(&self) -> Result<Vec<(String, u64)>, String> {
        let mut found = Vec::new();
        let mut folders = vec![(self.folder.clone(), String::new())];
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

    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>, String> {
        read_bounded(&self.folder.join(name), max)
    }
}

/// A regular file of at most `max` bytes; links are not followed.
fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, String> {
    let mut options = File::options();
    options.read(true);
    // What is looked at is what is read, whatever is put in its place meanwhile.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(|e| e.to_string())?;
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

impl Stored {
    /// The salvage record, where there is one. It stands under the case that the first event names.
    pub fn salvage(&self) -> Option<Vec<u8>> {
        read_bounded(&self.salvage_path()?, MAX_MANIFEST).ok()
    }

    /// Writes the salvage record, in place of an older one. A link on the way is refused: it may lead anywhere.
    pub fn keep_salvage(&self, object: &[u8]) -> Result<()> {
        let path = self.salvage_path().ok_or(NoEvent(self.id))?;
        let folder = path.parent().unwrap_or(&path);
        let relative = folder.strip_prefix(&self.base).unwrap_or(folder);
        let mut at = self.base.clone();
        for part in relative {
            at.push(part);
            let shown = || at.display().to_string();
            match private_folder().create(&at) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(shown);
                }
                _ => (),
            }
            if !fs::symlink_metadata(&at).with_context(shown)?.is_dir() {
                bail!(
                    "{} is no folder: the salvage record is not written behind it",
                    at.display()
                );
            }
        }
        let temporary = folder.join(format!("salvage.json.{}", std::process::id()));
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

    /// Where it stands.
    fn salvage_path(&self) -> Option<PathBuf> {
        let chain = self.first_event()?;
        let case = &chain.opening()?.order.case;
        Some(self.base.join(case_prefix(case, self.id)).join("salvage.json"))
    }

    fn events(&self) -> Result<Vec<(u64, Key)>, String> {
        let mut events: Vec<(u64, Key)> = self
            .list()?
            .into_iter()
            .filter_map(|(name, _)| match name.parse() {
                Ok(key @ Key::Event { sequence, .. }) => Some((sequence, key)),
                _ => None,
            })
            .collect();
        events.sort_by_key(|(sequence, _)| *sequence);
        Ok(events)
    }

    fn first_event(&self) -> Option<Chain> {
        let (_, key) = self.events().ok()?.into_iter().next()?;
        Chain::open(self.id, &self.get(&key.to_string(), MAX_EVENT).ok()?).ok()
    }

    /// The chain as far as it holds, and what ended it.
    pub fn chain(&self) -> Result<(Chain, Option<String>)> {
        let mut chain: Option<Chain> = None;
        for (_, key) in self.events().map_err(|e| anyhow!(e))? {
            let object = self
                .get(&key.to_string(), MAX_EVENT)
                .map_err(|e| anyhow!("{key}: {e}"))?;
            let result = match &mut chain {
                Some(chain) => chain.push(&object),
                None => Chain::open(self.id, &object).map(|opened| chain = Some(opened)),
            };
            if let Err(error) = result {
                let why = format!("{key}: {error}");
                return Ok((chain.ok_or_else(|| anyhow!(why.clone()))?, Some(why)));
            }
        }
        chain
            .map(|chain| (chain, None))
            .ok_or_else(|| NoEvent(self.id).into())
    }

    /// When its first event was made.
    fn started(&self) -> Option<Timestamp> {
        let chain = self.first_event()?;
        chain.events().first().map(|(_, event)| event.at)
    }

    /// Whether its manifest, where there is one, says that nothing is missing.
    fn ending(&self) -> Option<bool> {
        #[derive(serde::Deserialize)]
        struct Ending {
            outcomes: Vec<Outcome>,
            closing: Closing,
        }
        let object = self.get(&Key::Manifest.to_string(), MAX_MANIFEST).ok()?;
        let ending = split(&object)
            .ok()
            .and_then(|(payload, _)| serde_json::from_str::<Ending>(payload).ok());
        Some(ending.is_some_and(|e| e.closing.stopped.is_none() && e.outcomes.iter().all(Outcome::is_good)))
    }

    /// What the first event says.
    pub fn summary(&self) -> Summary {
        let chain = self.first_event();
        let opening = chain.as_ref().and_then(Chain::opening);
        let state = match self.ending() {
            Some(true) => State::Complete,
            Some(false) => State::Partial,
            None if self.salvage().is_some() => State::Salvaged,
            None => State::Incomplete,
        };
        Summary {
            id: self.id,
            case: opening.map(|o| o.order.case.clone()),
            host: opening.map(|o| o.host.hostname.clone()),
            started: chain.as_ref().and_then(|c| c.events().first()).map(|(_, e)| e.at),
            state,
        }
    }

    /// Hands each line of the records of `kind` to `each`, from the segments that `chain` acknowledges, each checked against it.
    /// What cannot be read goes to `wrong`, and the segments behind it are read all the same.
    pub fn lines(
        &self,
        chain: &Chain,
        kind: &Kind,
        mut each: impl FnMut(&str) -> Result<()>,
        mut wrong: impl FnMut(String),
    ) -> Result<()> {
        let artifact = Artifact::Volatile(kind.clone());
        for entry in chain.segments().filter(|s| s.artifact == artifact) {
            let key = entry.key();
            let mut read = || -> Result<(), Trouble> {
                let bytes = self
                    .get(&key.to_string(), MAX_SEGMENT as u64)
                    .map_err(Trouble::Segment)?;
                if Hash::of(&bytes) != entry.sha256 {
                    return Err(Trouble::Segment(
                        "its content is not what its name promises".to_owned(),
                    ));
                }
                // A frame at a time: a hostile segment may expand to any size.
                Segment::open(&bytes)?.read(|_, plain| {
                    let text = std::str::from_utf8(plain).map_err(|e| Trouble::Segment(e.to_string()))?;
                    text.lines().try_for_each(&mut each).map_err(Trouble::Caller)
                })
            };
            match read() {
                Ok(()) => (),
                Err(Trouble::Segment(why)) => wrong(format!("{key}: {why}")),
                Err(Trouble::Caller(error)) => return Err(error),
            }
        }
        Ok(())
    }
}

/// There is a folder of that capture, and nothing yet, or any more, that says what it is.
#[derive(Debug)]
pub struct NoEvent(pub CaptureId);

impl std::fmt::Display for NoEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "capture {} has no event: it was killed at once, or its beginning was deleted",
            self.0
        )
    }
}

impl std::error::Error for NoEvent {}

enum Trouble {
    Segment(String),
    Caller(anyhow::Error),
}

impl From<stillframe_evidence::Error> for Trouble {
    fn from(error: stillframe_evidence::Error) -> Self {
        Trouble::Segment(error.to_string())
    }
}
