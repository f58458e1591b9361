//! Captures in a store, for reading. A store may hold anything: links are not followed, what is no file is not opened, and
//! nothing is believed here; proving is for `stillframe_evidence::verdict`.

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::Timestamp;
use serde::Serialize;
use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};
use stillframe_evidence::{
    chain::{Chain, MAX_EVENT},
    frames::{MAX_SEGMENT, Segment},
    layout::{Artifact, CaptureId, CaseName, Key, Kind, Writer, case_prefix, evidence_prefix},
    manifest::MAX_MANIFEST,
    root::Hash,
    text::Text,
    verdict::Objects,
};

/// A directory store.
pub struct Store {
    base: PathBuf,
}

/// How far a capture is, by the names of its objects alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is a manifest.
    Complete,
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

    /// Every capture, in the order of their ids, which is that of their beginning.
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
        found.sort_by_key(|s| s.id);
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
    let metadata = fs::symlink_metadata(path).map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(max.saturating_add(1)).read_to_end(&mut bytes));
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

    /// Where it stands.
    pub fn salvage_path(&self) -> Option<PathBuf> {
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
            .ok_or_else(|| anyhow!("capture {} has no event yet", self.id))
    }

    /// What the first event says.
    pub fn summary(&self) -> Summary {
        let chain = self.first_event();
        let opening = chain.as_ref().and_then(Chain::opening);
        let state = if self.folder.join(Key::Manifest.to_string()).is_file() {
            State::Complete
        } else if self.salvage().is_some() {
            State::Salvaged
        } else {
            State::Incomplete
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

enum Trouble {
    Segment(String),
    Caller(anyhow::Error),
}

impl From<stillframe_evidence::Error> for Trouble {
    fn from(error: stillframe_evidence::Error) -> Self {
        Trouble::Segment(error.to_string())
    }
}
