//! Captures in a store, for reading: a directory or a bucket. A store may hold anything, and nothing is believed here; proving is for
//! `stillframe_evidence::verdict`.

mod bucket;
mod directory;

use crate::command::At;
use anyhow::{Result, anyhow, bail};
use bucket::Bucket;
use directory::Directory;
use jiff::Timestamp;
use serde::Serialize;
use std::{str::FromStr, sync::Arc};
use stillframe_evidence::{
    chain::{Chain, Closing, Event, MAX_EVENT, Outcome},
    frames::{MAX_SEGMENT, Segment},
    layout::{Artifact, CaptureId, CaseName, Key, Kind, Writer, case_prefix, evidence_prefix},
    manifest::MAX_MANIFEST,
    root::Hash,
    signature::split,
    text::{Text, json_line},
    verdict::{Anchor, Finding, Objects},
};

/// A store.
pub struct Store {
    place: Arc<dyn Place>,
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
    place: Arc<dyn Place>,
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

/// Bytes of an order at most.
const MAX_ORDER: u64 = 1 << 20;

fn order_key(case: &CaseName, capture: CaptureId) -> String {
    format!("{}/order.json", case_prefix(case, capture))
}

/// Where objects are, and what it knows of them.
trait Place: Send + Sync {
    /// As a person names it.
    fn name(&self) -> String;
    /// The names of what lies directly below a prefix and has something below it.
    fn folders(&self, prefix: &str) -> Result<Vec<String>>;
    /// Every name below a prefix, relative to it, and its size.
    fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>, String>;
    /// An object of at most `max` bytes.
    fn get(&self, key: &str, max: u64) -> Result<Vec<u8>, String>;
    /// Writes what the controller itself has to keep, in place of what is there. Never evidence.
    fn keep(&self, key: &str, object: &[u8]) -> Result<()>;
    /// What it says for or against a capture that has been read.
    fn anchor(&self, _prefix: &str, _chain: &Chain) -> Anchor {
        Anchor::None("whoever can write to this store could have made all of it anew".to_owned())
    }
    /// When an object that was read was put, by the store's own clock.
    fn put_at(&self, _key: &str) -> Option<Timestamp> {
        None
    }
    /// What it stated of each object that was read.
    fn statements(&self, _prefix: &str) -> Option<serde_json::Value> {
        None
    }
}

impl Store {
    /// Opens a directory, or `s3://bucket/prefix`.
    pub fn open(at: &At) -> Result<Self> {
        let place: Arc<dyn Place> = match at.store.to_str().filter(|store| store.contains("://")) {
            Some(target) if target.starts_with("s3://") => Arc::new(Bucket::open(target, &at.aws.reach())?),
            Some(target) => bail!(
                "--store {target}: stores of that scheme are not supported; use a directory or s3://bucket/prefix"
            ),
            None => Arc::new(Directory::open(&at.store)?),
        };
        Ok(Store { place })
    }

    /// Every capture, in the order in which they were begun.
    pub fn captures(&self) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        for writer in self.named::<Writer>("evidence")? {
            for id in self.named::<CaptureId>(&format!("evidence/{writer}"))? {
                found.push(Stored {
                    id,
                    writer: writer.clone(),
                    place: self.place.clone(),
                });
            }
        }
        // Ids of our own programs say when they were minted; of others' ids the first event knows. One that cannot be read comes last: `latest` must
        // not pass over it.
        found.sort_by_cached_key(|s| {
            let begun = s.id.minted().or_else(|| s.started());
            (begun.is_none(), begun, s.id, s.writer.clone())
        });
        Ok(found)
    }

    /// The capture of one host of an order, once it has begun: whose writer the store names by that instance.
    pub fn of_host(&self, capture: CaptureId, instance: &str) -> Result<Option<Stored>> {
        for writer in self.named::<Writer>("evidence")? {
            let is_its = writer
                .as_str()
                .rsplit_once(':')
                .is_some_and(|(_, name)| name == instance);
            let stored = Stored {
                id: capture,
                writer,
                place: self.place.clone(),
            };
            if is_its
                && !self
                    .place
                    .list(&format!("{}/progress", stored.prefix()))
                    .map_err(|why| anyhow!(why))?
                    .is_empty()
            {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// The order that `name` means, as it was written down.
    pub fn order(&self, name: &str) -> Result<Vec<u8>> {
        if name == "latest" {
            return match self.newest_order(|_| true)? {
                Some((.., order)) => Ok(order),
                None => bail!("no order in {}", self.place.name()),
            };
        }
        let mut found = self.orders(|id| !name.is_empty() && id.to_string().starts_with(name))?;
        match (found.pop(), found.len()) {
            (None, _) => bail!("no order {name} in {}", self.place.name()),
            (Some(_), more) if more > 0 => {
                bail!("{name} is the beginning of {} orders; give more of it", more + 1)
            }
            (Some((_, id, case)), _) => self
                .place
                .get(&order_key(&case, id), MAX_ORDER)
                .map_err(|why| anyhow!("the order {id}: {why}")),
        }
    }

    /// Folders of cases, in the order in which their captures were minted.
    fn orders(
        &self,
        wanted: impl Fn(CaptureId) -> bool,
    ) -> Result<Vec<(Option<Timestamp>, CaptureId, CaseName)>> {
        let mut found = Vec::new();
        for case in self.named::<CaseName>("cases")? {
            let ids = self.named::<CaptureId>(&format!("cases/{case}"))?;
            let ids = ids.into_iter().filter(|id| wanted(*id));
            found.extend(ids.map(|id| (id.minted(), id, case.clone())));
        }
        found.sort();
        Ok(found)
    }

    /// The order that was minted last: cases hold salvage records of captures that nobody ordered from here, too.
    fn newest_order(
        &self,
        wanted: impl Fn(CaptureId) -> bool,
    ) -> Result<Option<(CaptureId, CaseName, Vec<u8>)>> {
        let read = |(_, id, case): (_, CaptureId, CaseName)| {
            let order = self.place.get(&order_key(&case, id), MAX_ORDER).ok()?;
            Some((id, case, order))
        };
        Ok(self.orders(wanted)?.into_iter().rev().find_map(read))
    }

    /// What lies directly below a prefix, as far as it has a name of that kind.
    fn named<T: FromStr>(&self, prefix: &str) -> Result<Vec<T>> {
        let folders = self.place.folders(prefix)?;
        Ok(folders.iter().filter_map(|folder| folder.parse().ok()).collect())
    }

    /// Writes an order down.
    pub fn keep_order(&self, case: &CaseName, capture: CaptureId, order: &[u8]) -> Result<()> {
        self.place.keep(&order_key(case, capture), order)
    }

    /// The capture that `name` means: an id, a unique beginning of one, or `latest`.
    pub fn find(&self, name: &str) -> Result<Stored> {
        let mut captures = self.captures()?;
        if name == "latest" {
            let latest = captures.pop();
            // Another capture must not answer for the one that was ordered last. Of an id that does not say when it was minted, nobody knows.
            let newer = |id: CaptureId| match &latest {
                Some(latest) => latest
                    .id
                    .minted()
                    .is_some_and(|minted| id.minted() > Some(minted)),
                None => true,
            };
            if let Some((id, case, _)) = self.newest_order(newer)? {
                bail!(
                    "the latest order is {id} of case {case}, and no host has stored anything of it; name an older capture by its id: `stillframe list` shows those there are"
                );
            }
            return latest.ok_or_else(|| anyhow!("no capture in {}", self.place.name()));
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
                self.place.name()
            ),
        }
    }
}

impl Objects for Stored {
    fn list(&self) -> Result<Vec<(String, u64)>, String> {
        self.place.list(&self.prefix())
    }

    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>, String> {
        self.place.get(&format!("{}/{name}", self.prefix()), max)
    }

    fn anchor(&self, chain: &Chain) -> Anchor {
        // Where an order of this id was written down, the chain must answer that order and no other.
        let opening = chain.opening();
        let order = opening.and_then(|o| {
            let bytes = self
                .place
                .get(&order_key(&o.order.case, self.id), MAX_ORDER)
                .ok()?;
            serde_json::from_slice::<serde_json::Value>(&bytes).ok()
        });
        if let (Some(order), Some(opening)) = (order, opening)
            && order.get("nonce").and_then(|n| n.as_str()) != Some(opening.order.nonce.as_str())
        {
            return Anchor::Contradicted(vec![Finding {
                object: "progress/000001-…".to_owned(),
                why: "does not answer the order of this id: its nonce is another".to_owned(),
            }]);
        }
        self.place.anchor(&self.prefix(), chain)
    }
}

impl Stored {
    fn prefix(&self) -> String {
        evidence_prefix(&self.writer, self.id)
    }

    /// The salvage record, where there is one. It stands under the case that the first event names.
    pub fn salvage(&self) -> Option<Vec<u8>> {
        self.place.get(&self.in_case("salvage.json")?, MAX_MANIFEST).ok()
    }

    /// Writes the salvage record, in place of an older one.
    pub fn keep_salvage(&self, object: &[u8]) -> Result<()> {
        self.place
            .keep(&self.in_case("salvage.json").ok_or(NoEvent(self.id))?, object)
    }

    /// Writes down what the store states of every object that was read, where it states anything. Says under which key.
    pub fn keep_witness(&self) -> Result<Option<String>> {
        let Some(objects) = self.place.statements(&self.prefix()) else {
            return Ok(None);
        };
        let at = Timestamp::now();
        let record = serde_json::json!({
            "schema": stillframe_evidence::SCHEMA, "capture": self.id, "writer": self.writer, "store": self.place.name(), "seen": at, "objects": objects,
        });
        let key = self
            .in_case(&format!("witness-{}.json", at.as_millisecond()))
            .ok_or(NoEvent(self.id))?;
        self.place.keep(&key, (json_line(&record)? + "\n").as_bytes())?;
        Ok(Some(key))
    }

    fn in_case(&self, name: &str) -> Option<String> {
        let chain = self.first_event()?;
        let case = &chain.opening()?.order.case;
        Some(format!("{}/{name}", case_prefix(case, self.id)))
    }

    fn events(&self) -> Result<Vec<(u64, Key)>, String> {
        let mut events: Vec<(u64, Key)> = self
            .place
            .list(&format!("{}/progress", self.prefix()))?
            .into_iter()
            .filter_map(|(name, _)| match format!("progress/{name}").parse() {
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

    /// The newest event, and when it was put, by the store's own clock where it has one. That it belongs to the chain is not looked at.
    pub fn newest(&self) -> Option<(Event, Option<Timestamp>)> {
        let (_, key) = self.events().ok()?.pop()?;
        let object = self.get(&key.to_string(), MAX_EVENT).ok()?;
        let event = serde_json::from_str(split(&object).ok()?.0).ok()?;
        Some((event, self.put_at(&key)))
    }

    fn put_at(&self, key: &Key) -> Option<Timestamp> {
        self.place.put_at(&format!("{}/{key}", self.prefix()))
    }

    /// The chain as far as it holds, and what ended it.
    pub fn chain(&self) -> Result<(Chain, Option<String>)> {
        let mut chain = None;
        let ended = self.follow(&mut chain)?;
        chain
            .map(|chain| (chain, ended))
            .ok_or_else(|| NoEvent(self.id).into())
    }

    /// Reads on where a chain was read before, or from its beginning. Says what ended it, where it does not hold.
    pub fn follow(&self, chain: &mut Option<Chain>) -> Result<Option<String>> {
        let read = chain.as_ref().map_or(0, |chain| chain.events().len() as u64);
        for (_, key) in self
            .events()
            .map_err(|e| anyhow!(e))?
            .into_iter()
            .filter(|(sequence, _)| *sequence > read)
        {
            let object = self
                .get(&key.to_string(), MAX_EVENT)
                .map_err(|e| anyhow!("{key}: {e}"))?;
            let result = match chain {
                Some(chain) => chain.push(&object),
                None => Chain::open(self.id, &object).map(|opened| *chain = Some(opened)),
            };
            if let Err(error) = result {
                let why = format!("{key}: {error}");
                return if chain.is_some() {
                    Ok(Some(why))
                } else {
                    Err(anyhow!(why))
                };
            }
        }
        Ok(None)
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
