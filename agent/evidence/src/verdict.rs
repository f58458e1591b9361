//! The verdict on a capture: what is proven, and of every object that is not right, its name and why.
//!
//! It reads everything, through [`Objects`], one object at a time and each once, and needs nothing but the capture. It does not say
//! that the guest told the truth. It says that what is here is what the process that opened the chain sent, with nothing
//! taken out, changed or added; and, given an anchor, whose chain it is.

use crate::{
    Error,
    chain::{Chain, MAX_EVENT},
    frames::{MAX_SEGMENT, Segment},
    layout::{CaptureId, Key},
    manifest::{ArtifactEntry, MAX_MANIFEST, Manifest, artifacts, sums},
    root::{Hash, root},
    segments::SegmentEntry,
    signature::PublicKey,
    text::{json_line, printable},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// The objects of one capture, wherever they are.
pub trait Objects {
    /// Every name under the capture's prefix, relative to it, with its size in bytes, in any order.
    fn list(&self) -> Result<Vec<(String, u64)>, String>;
    /// The bytes of one object; an error when it holds more than `max`.
    fn get(&self, name: &str, max: u64) -> Result<Vec<u8>, String>;
    /// What the place where they are says for or against the capture, once everything was read.
    fn anchor(&self, _chain: &Chain) -> Anchor {
        Anchor::None("whoever can write to this store could have made all of it anew".to_owned())
    }
}

/// What a store says of a capture as a whole.
pub enum Anchor {
    /// Nothing that would anchor it, and why.
    None(String),
    /// That every object has been what it is since it was put, and how the store says so.
    WriteOnce(String),
    /// What cannot be of a capture that nobody touched.
    Contradicted(Vec<Finding>),
}

/// What is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything was read, everything is right, and it is anchored: the key is the expected one, or the store states that nothing was
    /// written twice.
    Verified,
    /// The same without an anchor: whoever can write here could have made all of it anew.
    SelfConsistent,
    /// No manifest; what the chain acknowledged is right, and a salvage record says how far it goes.
    Salvaged,
    /// No manifest, or something that could not be read. Not harmless: the end may have been deleted.
    Incomplete,
    /// Something is not what was sent.
    Tampered,
}

impl Verdict {
    /// The exit code of `stillframe verify`.
    pub fn exit_code(self) -> u8 {
        match self {
            Verdict::Verified | Verdict::SelfConsistent => 0,
            Verdict::Tampered => 1,
            Verdict::Incomplete => 3,
            Verdict::Salvaged => 4,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Verified => "verified",
            Verdict::SelfConsistent => "self-consistent",
            Verdict::Salvaged => "salvaged",
            Verdict::Incomplete => "incomplete",
            Verdict::Tampered => "tampered",
        })
    }
}

/// One object that is not right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its name, escaped for a terminal.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The capture.
    pub capture: CaptureId,
    /// The verdict.
    pub verdict: Verdict,
    /// Why it is no better, or what anchors it.
    pub because: String,
    /// Objects that are not what was sent.
    pub findings: Vec<Finding>,
    /// Objects that could not be read, or that nothing vouches for.
    pub unproven: Vec<Finding>,
    /// Objects listed.
    pub objects: u64,
    /// Bytes of the segments found right, as stored.
    pub stored: u64,
    /// Bytes of their plaintext.
    pub plain: u64,
    /// Events of the chain that hold.
    pub events: u64,
    /// The chain's key.
    pub key: Option<PublicKey>,
    /// The root of the capture, when there is a manifest.
    pub root: Option<Hash>,
    /// The chain as far as it holds.
    #[serde(skip)]
    pub chain: Option<Chain>,
    /// Segments of the chain that are there and right.
    #[serde(skip)]
    pub sound: Vec<SegmentEntry>,
}

/// What `salvage` writes beside a capture that has no manifest. It is not signed: it repeats what the signed chain says
/// and what is there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Salvage {
    /// [`crate::SCHEMA`].
    pub schema: String,
    /// The capture.
    pub capture: CaptureId,
    /// The chain's key.
    pub key: PublicKey,
    /// SHA-256 of every progress object that holds, in order.
    pub events: Vec<Hash>,
    /// When the last of them was made: what the host held after that is not here.
    pub last_event: Timestamp,
    /// The acknowledged segments.
    pub artifacts: Vec<ArtifactEntry>,
    /// Steps of the plan without an outcome.
    pub unfinished: Vec<String>,
    /// Segments that are there and that no event vouches for.
    pub unproven: Vec<String>,
    /// Root over the roots of the artifacts.
    pub root: Hash,
}

impl Salvage {
    /// The salvage record that follows from a report without a manifest, if the chain holds at all.
    pub fn of(report: &Report) -> Option<Self> {
        let chain = report.chain.as_ref()?;
        let (_, last) = chain.events().last()?;
        let done = chain.outcomes().count();
        let artifacts: Vec<ArtifactEntry> = artifacts(chain).into_iter().map(ArtifactEntry::cloned).collect();
        Some(Salvage {
            schema: crate::SCHEMA.to_owned(),
            capture: chain.capture(),
            key: chain.key(),
            events: chain.events().iter().map(|(hash, _)| *hash).collect(),
            last_event: last.at,
            unfinished: chain
                .opening()?
                .plan
                .iter()
                .skip(done)
                .map(|s| s.kind.to_string())
                .collect(),
            unproven: report.unproven.iter().map(|f| f.object.clone()).collect(),
            root: root(&artifacts.iter().map(|a| a.root).collect::<Vec<_>>()),
            artifacts,
        })
    }

    /// True when nothing that `old` relied on is missing here.
    pub fn continues(&self, old: &Salvage) -> bool {
        let segments = |s: &Salvage| {
            s.artifacts
                .iter()
                .flat_map(|a| &a.segments)
                .map(SegmentEntry::key)
                .collect()
        };
        let (ours, theirs): (BTreeSet<Key>, BTreeSet<Key>) = (segments(self), segments(old));
        self.key == old.key && self.events.starts_with(&old.events) && ours.is_superset(&theirs)
    }

    /// The file.
    pub fn object(&self) -> Result<Vec<u8>, Error> {
        Ok((json_line(self)? + "\n").into_bytes())
    }
}

/// Reads the whole capture and judges it. `expect_key` anchors it; `salvage` is the salvage record, where there is one.
pub fn verify(
    objects: &dyn Objects,
    capture: CaptureId,
    expect_key: Option<PublicKey>,
    salvage: Option<&[u8]>,
) -> Report {
    let mut audit = Audit {
        objects,
        report: Report {
            capture,
            verdict: Verdict::Tampered,
            because: String::new(),
            findings: Vec::new(),
            unproven: Vec::new(),
            objects: 0,
            stored: 0,
            plain: 0,
            events: 0,
            key: None,
            root: None,
            chain: None,
            sound: Vec::new(),
        },
        unread: false,
        broken: false,
        unread_event: false,
        lost: false,
    };
    let manifest = audit.run();
    audit.judge(manifest, expect_key, salvage);
    audit.report
}

struct Audit<'a> {
    objects: &'a dyn Objects,
    report: Report,
    /// Something that should be read could not be.
    unread: bool,
    /// The chain is broken: what lies behind the break cannot be judged.
    broken: bool,
    /// The break is an event that could not be read.
    unread_event: bool,
    /// A segment of which the agent did not know whether it was stored is not there.
    lost: bool,
}

/// Both may hold what a store called its objects.
fn finding(object: impl fmt::Display, why: impl fmt::Display) -> Finding {
    let safe = |text: String| printable(text.as_bytes());
    Finding {
        object: safe(object.to_string()),
        why: safe(why.to_string()),
    }
}

impl Audit<'_> {
    fn wrong(&mut self, object: impl fmt::Display, why: impl fmt::Display) {
        self.report.findings.push(finding(object, why));
    }

    fn unproven(&mut self, object: impl fmt::Display, why: impl fmt::Display) {
        self.report.unproven.push(finding(object, why));
    }

    /// The bytes of an object, when they are what its name promises.
    fn read(&mut self, key: &Key, size: u64, max: u64) -> Option<Vec<u8>> {
        if size > max {
            self.wrong(key, format!("{size} bytes, more than the format allows"));
            return None;
        }
        let bytes = match self.objects.get(&key.to_string(), max) {
            Ok(bytes) => bytes,
            Err(why) => {
                self.unread = true;
                self.unproven(key, format!("could not be read: {why}"));
                return None;
            }
        };
        if key.sha256().is_some_and(|promised| Hash::of(&bytes) != promised) {
            self.wrong(key, "its content is not what its name promises");
            return None;
        }
        Some(bytes)
    }

    /// Reads everything; true when there is a manifest.
    fn run(&mut self) -> bool {
        let listed = match self.objects.list() {
            Ok(listed) => listed,
            Err(why) => {
                self.unread = true;
                self.unproven("the capture", format!("could not be listed: {why}"));
                return false;
            }
        };
        self.report.objects = listed.len() as u64;
        let mut events: BTreeMap<u64, Vec<(Key, u64)>> = BTreeMap::new();
        let mut segments: BTreeMap<Key, u64> = BTreeMap::new();
        let (mut sums_size, mut manifest_size) = (None, None);
        for (name, size) in listed {
            match name.parse::<Key>() {
                Ok(key @ Key::Event { sequence, .. }) => {
                    events.entry(sequence).or_default().push((key, size))
                }
                Ok(key @ Key::Segment { .. }) => {
                    segments.insert(key, size);
                }
                Ok(Key::Sums) => sums_size = Some(size),
                Ok(Key::Manifest) => manifest_size = Some(size),
                Err(_) => self.wrong(name, "no object of a capture has that name"),
            }
        }
        self.chain(events);
        self.segments(segments, manifest_size.is_some());
        self.summary(sums_size, manifest_size);
        manifest_size.is_some()
    }

    fn chain(&mut self, events: BTreeMap<u64, Vec<(Key, u64)>>) {
        let mut chain: Option<Chain> = None;
        let mut broken = false;
        let mut expected = 1;
        for (sequence, candidates) in events {
            if !broken && sequence != expected {
                broken = true;
                let next = candidates
                    .first()
                    .map(|(key, _)| key.to_string())
                    .unwrap_or_default();
                let gone = format!("progress/{expected:06}-…");
                self.wrong(
                    gone,
                    format!("is missing, although {} is there", printable(next.as_bytes())),
                );
            }
            expected = sequence.saturating_add(1);
            let mut placed = false;
            for (key, size) in candidates {
                let findings = self.report.findings.len();
                let Some(object) = self.read(&key, size, MAX_EVENT) else {
                    self.unread_event |= findings == self.report.findings.len();
                    continue;
                };
                if placed {
                    self.wrong(&key, "a second event of this number");
                    continue;
                }
                if broken {
                    self.unproven(&key, "lies behind the break in the chain: nothing vouches for it");
                    continue;
                }
                let result = match &mut chain {
                    Some(chain) => chain.push(&object),
                    None => Chain::open(self.report.capture, &object).map(|opened| chain = Some(opened)),
                };
                match result {
                    Ok(()) => placed = true,
                    Err(error) => self.wrong(&key, error),
                }
            }
            broken |= !placed;
        }
        self.broken = broken;
        self.report.events = chain.as_ref().map_or(0, |c| c.events().len() as u64);
        self.report.key = chain.as_ref().map(Chain::key);
        self.report.chain = chain;
    }

    fn segments(&mut self, mut present: BTreeMap<Key, u64>, ended: bool) {
        let chain = self.report.chain.take();
        let lossy = chain
            .as_ref()
            .and_then(Chain::opening)
            .is_some_and(|o| o.store == "s3");
        let ended = ended || chain.as_ref().is_some_and(|c| c.closing().is_some());
        for entry in chain.iter().flat_map(Chain::segments) {
            let key = entry.key();
            let Some(size) = present.remove(&key) else {
                if lossy && !entry.receipt.confirmed {
                    // The agent never said that it is there.
                    self.lost = true;
                    self.unproven(&key, "is not there; the store's answer to it was lost");
                } else {
                    self.wrong(&key, "acknowledged by the chain, and not there");
                }
                continue;
            };
            if size != entry.stored {
                self.wrong(
                    &key,
                    format!("{size} bytes, where the chain has {}", entry.stored),
                );
                continue;
            }
            let Some(bytes) = self.read(&key, size, MAX_SEGMENT as u64) else {
                continue;
            };
            match check_segment(&bytes, entry) {
                Ok(()) => {
                    self.report.stored = self.report.stored.saturating_add(entry.stored);
                    self.report.plain = self.report.plain.saturating_add(entry.plain);
                    self.report.sound.push(entry.clone());
                }
                Err(error) => self.wrong(&key, error),
            }
        }
        for (key, size) in present {
            if self.broken {
                if self.read(&key, size, MAX_SEGMENT as u64).is_some() {
                    self.unproven(
                        &key,
                        "may lie behind the break in the chain: nothing vouches for it",
                    );
                }
            } else if ended {
                self.wrong(&key, "added: the chain does not know it");
            } else if self.read(&key, size, MAX_SEGMENT as u64).is_some() {
                self.unproven(&key, "landed after the last event: nothing vouches for it");
            }
        }
        self.report.chain = chain;
    }

    fn summary(&mut self, sums_size: Option<u64>, manifest_size: Option<u64>) {
        let chain = self.report.chain.take();
        let closed = chain.as_ref().filter(|chain| chain.closing().is_some());
        if let (Some(chain), None, true) = (&chain, closed, sums_size.or(manifest_size).is_some()) {
            let next = chain.events().len() + 1;
            let gone = format!("progress/{next:06}-…");
            if !self.broken {
                self.wrong(
                    gone,
                    "is missing: the chain was never closed, although what follows its end is there",
                );
            }
        }
        if let Some(size) = sums_size
            && let Some(bytes) = self.read(&Key::Sums, size, MAX_MANIFEST)
        {
            match closed {
                Some(chain) if sums(chain).as_bytes() == bytes => (),
                // What it follows from could not be read.
                None if self.unread_event => {
                    self.unproven(Key::Sums, "the chain could not be read to its end")
                }
                Some(_) => self.wrong(Key::Sums, "is not what follows from the chain"),
                None => self.wrong(Key::Sums, "is there, although the chain was never closed"),
            }
        }
        if let Some(size) = manifest_size {
            if sums_size.is_none() {
                self.wrong(Key::Sums, "is missing, although the manifest is there");
            }
            if closed.is_none() && self.unread_event {
                self.unproven(Key::Manifest, "the chain could not be read to its end");
            } else if let Some(bytes) = self.read(&Key::Manifest, size, MAX_MANIFEST) {
                let result = match &chain {
                    Some(chain) => check_manifest(&bytes, chain),
                    None => Err(Error::Chain(
                        "there is no chain that it could belong to".to_owned(),
                    )),
                };
                match result {
                    Ok(root) => self.report.root = Some(root),
                    Err(error) => self.wrong(Key::Manifest, error),
                }
            }
        }
        self.report.chain = chain;
    }

    fn judge(&mut self, manifest: bool, expect_key: Option<PublicKey>, salvage: Option<&[u8]>) {
        let anchor = match &self.report.chain {
            Some(chain) => self.objects.anchor(chain),
            None => Anchor::None("there is no chain".to_owned()),
        };
        if let Anchor::Contradicted(findings) = &anchor {
            for one in findings {
                self.wrong(&one.object, &one.why);
            }
        }
        if let (Some(expected), Some(key)) = (expect_key, self.report.key)
            && key != expected
        {
            self.wrong(
                "progress/000001-…",
                format!("signed by key {key}, which is not the expected one"),
            );
        }
        let salvage = salvage.filter(|_| !manifest && self.report.findings.is_empty() && !self.unread);
        let salvage = salvage.map(|bytes| self.check_salvage(bytes));
        let sound_salvage = match salvage {
            Some(Ok(())) => true,
            Some(Err(Unfit::NoRecord(why))) => {
                // It is no evidence: the capture itself is as it was.
                self.unproven("salvage.json", why);
                false
            }
            Some(Err(Unfit::Contradicted(why))) => {
                self.wrong("salvage.json", why);
                false
            }
            None => false,
        };
        let (verdict, because) = if !self.report.findings.is_empty() {
            let objects: BTreeSet<&str> = self.report.findings.iter().map(|f| f.object.as_str()).collect();
            (
                Verdict::Tampered,
                format!("{} not what was sent", count(objects.len(), "object")),
            )
        } else if self.unread {
            (Verdict::Incomplete, "not everything could be read".to_owned())
        } else if sound_salvage {
            (
                Verdict::Salvaged,
                "no manifest; what the chain acknowledged is right".to_owned(),
            )
        } else if self.lost {
            (
                Verdict::Incomplete,
                "what the store never confirmed is not there".to_owned(),
            )
        } else if !manifest {
            let why = "no manifest: the capture is under way, was killed, or its end was deleted";
            (Verdict::Incomplete, why.to_owned())
        } else {
            match (expect_key, anchor) {
                (Some(_), _) => (Verdict::Verified, "the key is the expected one".to_owned()),
                (None, Anchor::WriteOnce(how)) => (Verdict::Verified, how),
                (None, Anchor::None(why)) => (Verdict::SelfConsistent, format!("no anchor: {why}")),
                // Its findings were named above.
                (None, Anchor::Contradicted(_)) => (Verdict::Tampered, "the store contradicts it".to_owned()),
            }
        };
        self.report.verdict = verdict;
        self.report.because = because;
    }

    fn check_salvage(&self, bytes: &[u8]) -> Result<(), Unfit> {
        let no_record = |e| Unfit::NoRecord(format!("no salvage record: {}; salvage anew", Error::from(e)));
        let salvage: Salvage = serde_json::from_slice(bytes).map_err(no_record)?;
        match Salvage::of(&self.report) {
            Some(derived) if derived == salvage => Ok(()),
            // The capture was still under way when it was salvaged.
            Some(derived) if derived.events.len() > salvage.events.len() && derived.continues(&salvage) => {
                Err(Unfit::NoRecord(
                    "is of an earlier moment of this capture, which has grown; salvage anew".to_owned(),
                ))
            }
            Some(_) => Err(Unfit::Contradicted(
                "is not what follows from the chain and the objects that are here".to_owned(),
            )),
            None => Err(Unfit::Contradicted(
                "there is no chain that it could belong to".to_owned(),
            )),
        }
    }
}

/// Why a salvage record does not serve.
enum Unfit {
    /// It is not one.
    NoRecord(String),
    /// It knew another capture than the one that is here.
    Contradicted(String),
}

/// `1 object`, `2 objects`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn check_segment(bytes: &[u8], entry: &SegmentEntry) -> Result<(), Error> {
    let segment = Segment::open(bytes)?;
    let (mut leaves, mut plain, mut lines) = (Vec::new(), 0u64, 0u64);
    segment.read(|frame, text| {
        leaves.push(frame.sha256);
        plain += u64::from(frame.plain);
        lines += text.iter().filter(|b| **b == b'\n').count() as u64;
        Ok::<_, Error>(())
    })?;
    if plain != entry.plain || leaves.len() as u64 != entry.frames || root(&leaves) != entry.frames_root {
        return Err(Error::Segment("its frames are not those in the chain"));
    }
    if entry.records.is_some_and(|records| records != lines) {
        return Err(Error::Segment(
            "it does not hold the records that the chain counts",
        ));
    }
    Ok(())
}

fn check_manifest(bytes: &[u8], chain: &Chain) -> Result<Hash, Error> {
    let payload = chain.key().open(bytes)?;
    let manifest = Manifest::of(chain)?;
    if manifest.payload()? != payload {
        return Err(Error::Chain("is not what follows from the chain".to_owned()));
    }
    Ok(manifest.root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::{capture, packed};
    use proptest::prelude::*;

    #[derive(Clone)]
    struct Map(BTreeMap<String, Vec<u8>>);

    impl Objects for Map {
        fn list(&self) -> Result<Vec<(String, u64)>, String> {
            Ok(self.0.iter().map(|(k, v)| (k.clone(), v.len() as u64)).collect())
        }
        fn get(&self, name: &str, _max: u64) -> Result<Vec<u8>, String> {
            self.0.get(name).cloned().ok_or("gone".into())
        }
    }

    const KINDS: [&str; 3] = ["alpha", "beta", "gamma"];

    fn whole(seed: u8) -> (CaptureId, PublicKey, Map) {
        let (id, events, segments, writer) = capture(seed, &KINDS);
        let mut chain = Chain::open(id, &events[0]).unwrap();
        events[1..].iter().for_each(|e| chain.push(e).unwrap());
        let mut map = BTreeMap::new();
        for ((sha256, event), object) in chain.events().iter().zip(&events) {
            map.insert(
                Key::Event {
                    sequence: event.sequence,
                    sha256: *sha256,
                }
                .to_string(),
                object.clone(),
            );
        }
        for p in segments {
            map.insert(p.entry.key().to_string(), p.bytes);
        }
        map.insert(Key::Sums.to_string(), sums(&chain).into_bytes());
        let payload = Manifest::of(&chain).unwrap().payload().unwrap();
        map.insert(Key::Manifest.to_string(), writer.seal(payload));
        (id, writer.key(), Map(map))
    }

    fn judge(id: CaptureId, map: &Map) -> Report {
        verify(map, id, None, None)
    }

    #[test]
    fn untouched() {
        let (id, key, map) = whole(1);
        let report = judge(id, &map);
        assert_eq!(report.verdict, Verdict::SelfConsistent, "{report:?}");
        assert_eq!(report.sound.len(), KINDS.len());
        assert_eq!(verify(&map, id, Some(key), None).verdict, Verdict::Verified);
    }

    #[test]
    fn forged_anew_is_never_verified() {
        let (_, key, _) = whole(1);
        let (id, _, forged) = whole(2);
        assert_eq!(judge(id, &forged).verdict, Verdict::SelfConsistent);
        let report = verify(&forged, id, Some(key), None);
        assert_eq!(report.verdict, Verdict::Tampered);
        assert!(report.findings[0].why.contains("not the expected one"));
    }

    proptest! {
        /// One bit of any object.
        #[test]
        fn a_changed_object_is_named(object in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (id, _, mut map) = whole(1);
            let name = object.get(&map.0.keys().cloned().collect::<Vec<_>>()).clone();
            let bytes = map.0.get_mut(&name).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let report = judge(id, &map);
            prop_assert_eq!(report.verdict, Verdict::Tampered);
            prop_assert!(report.findings.iter().any(|f| f.object == name), "{:?}", report.findings);
        }

        #[test]
        fn a_cut_object_is_named(object in any::<prop::sample::Index>(), at in any::<prop::sample::Index>()) {
            let (id, _, mut map) = whole(1);
            let name = object.get(&map.0.keys().cloned().collect::<Vec<_>>()).clone();
            let bytes = map.0.get_mut(&name).unwrap();
            bytes.truncate(at.index(bytes.len()));
            let report = judge(id, &map);
            prop_assert_eq!(report.verdict, Verdict::Tampered);
            prop_assert!(report.findings.iter().any(|f| f.object == name));
        }

        #[test]
        fn a_deleted_object_is_missed(object in any::<prop::sample::Index>()) {
            let (id, _, mut map) = whole(1);
            let name = object.get(&map.0.keys().cloned().collect::<Vec<_>>()).clone();
            map.0.remove(&name);
            let report = judge(id, &map);
            let expected = if name == "manifest.json" { Verdict::Incomplete } else { Verdict::Tampered };
            prop_assert_eq!(report.verdict, expected, "{}", name);
            // A deleted event is known by its number alone.
            let start = name.split_once('-').filter(|_| name.starts_with("progress/")).map_or(name.as_str(), |(start, _)| start);
            prop_assert!(name == "manifest.json" || report.findings.iter().any(|f| f.object.starts_with(start)), "{} {:?}", name, report.findings);
        }

        /// Two objects of one capture, or of two captures, change their places.
        #[test]
        fn swapped_contents_are_noticed(a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(), across in any::<bool>()) {
            let (id, _, mut map) = whole(1);
            let (_, _, other) = whole(if across { 2 } else { 1 });
            let names: Vec<String> = map.0.keys().cloned().collect();
            let from: Vec<String> = if across { other.0.keys().cloned().collect() } else { names.clone() };
            let (to, from) = (a.get(&names).clone(), b.get(&from).clone());
            let bytes = if across { other.0[&from].clone() } else { map.0[&from].clone() };
            prop_assume!(map.0[&to] != bytes);
            map.0.insert(to, bytes);
            prop_assert_eq!(judge(id, &map).verdict, Verdict::Tampered);
        }
    }

    #[test]
    fn anything_added_is_named() {
        let extra = packed("alpha", "{}");
        let second = Key::Segment {
            artifact: extra.entry.artifact.clone(),
            number: 2,
            sha256: extra.entry.sha256,
        };
        let (_, _, foreign) = whole(2);
        let foreign_event = foreign
            .0
            .iter()
            .find(|(k, _)| k.starts_with("progress/000002"))
            .unwrap();
        for (name, bytes) in [
            (second.to_string(), extra.bytes),
            (foreign_event.0.clone(), foreign_event.1.clone()),
            ("notes.txt".into(), b"x".to_vec()),
            ("volatile/alpha/x\x1b[2J".into(), vec![]),
        ] {
            let (id, _, mut map) = whole(1);
            map.0.insert(name.clone(), bytes);
            let report = judge(id, &map);
            assert_eq!(report.verdict, Verdict::Tampered, "{name}");
            assert!(
                report
                    .findings
                    .iter()
                    .any(|f| f.object == printable(name.as_bytes())),
                "{report:?}"
            );
            assert!(!format!("{report:?}").contains('\x1b'));
        }
    }

    #[test]
    fn a_deleted_tail_is_incomplete_then_salvaged_and_its_salvage_is_checked() {
        let (id, _, full) = whole(1);
        let mut map = full.clone();
        map.0.retain(|k, _| {
            !(k == "manifest.json"
                || k == "SHA256SUMS"
                || k.starts_with("progress/000004")
                || k.starts_with("progress/000005"))
        });
        let report = judge(id, &map);
        assert_eq!(report.verdict, Verdict::Incomplete, "{report:?}");
        // gamma's segment landed, and the event that acknowledged it is gone.
        assert_eq!(report.unproven.len(), 1);
        let salvage = Salvage::of(&report).unwrap();
        assert_eq!(salvage.unfinished, ["gamma"]);
        let object = salvage.object().unwrap();
        assert_eq!(verify(&map, id, None, Some(&object)).verdict, Verdict::Salvaged);
        // What shrinks after it was salvaged does not get a new record; what grew does.
        let mut shorter = map.clone();
        shorter.0.retain(|k, _| !k.starts_with("progress/000003"));
        assert_eq!(
            verify(&shorter, id, None, Some(&object)).verdict,
            Verdict::Tampered
        );
        let less = Salvage::of(&judge(id, &shorter)).unwrap();
        assert!(salvage.continues(&less) && !less.continues(&salvage));
        // A salvage record never outranks a manifest, nor hides a changed object.
        assert_eq!(
            verify(&full, id, None, Some(&object)).verdict,
            Verdict::SelfConsistent
        );
        let lie = String::from_utf8(object.clone())
            .unwrap()
            .replace("gamma", "delta");
        assert_eq!(
            verify(&map, id, None, Some(lie.as_bytes())).verdict,
            Verdict::Tampered
        );
        let name = map
            .0
            .keys()
            .find(|k| k.starts_with("volatile/beta"))
            .unwrap()
            .clone();
        map.0.remove(&name);
        assert_eq!(verify(&map, id, None, Some(&object)).verdict, Verdict::Tampered);
    }

    #[test]
    fn what_cannot_be_read_is_never_called_right() {
        struct Unreadable(Map, String);
        impl Objects for Unreadable {
            fn list(&self) -> Result<Vec<(String, u64)>, String> {
                self.0.list()
            }
            fn get(&self, name: &str, max: u64) -> Result<Vec<u8>, String> {
                if name == self.1 {
                    Err("Input/output error".into())
                } else {
                    self.0.get(name, max)
                }
            }
        }
        let (id, key, map) = whole(1);
        for name in map
            .0
            .keys()
            .filter(|k| *k != "SHA256SUMS" && !k.starts_with("progress/000001"))
        {
            let report = verify(&Unreadable(map.clone(), name.clone()), id, Some(key), None);
            assert_eq!(report.verdict, Verdict::Incomplete, "{name}");
            assert!(report.findings.is_empty(), "{name}: {report:?}");
            assert!(
                report.unproven.iter().any(|f| f.object == *name),
                "{name}: {report:?}"
            );
        }
    }
}
