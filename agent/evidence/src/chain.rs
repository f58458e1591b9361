//! The chain: signed events, each linked to the one before. Writes it and reads it; knows no store.

use crate::{
    Error, SCHEMA,
    layout::{Artifact, CaptureId, CaseName, Key, Kind},
    records::host::{Clock, Identity},
    root::Hash,
    segments::SegmentEntry,
    signature::{PublicKey, Signatory, seal, split},
    text::{Text, json_line},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// The largest progress object that is read, in bytes.
pub const MAX_EVENT: u64 = 16 << 20;

/// The payload of one progress object.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// [`SCHEMA`].
    pub schema: String,
    /// The capture that it belongs to.
    pub capture: CaptureId,
    /// Its place in the chain, from 1.
    pub sequence: u64,
    /// SHA-256 of the whole progress object before it.
    pub previous: Option<Hash>,
    /// When it was made, by the guest's clock.
    pub at: Timestamp,
    /// Microseconds of the guest's monotonic clock since the chain was opened.
    pub elapsed_us: u64,
    /// Segments acknowledged since the event before.
    pub segments: Vec<SegmentEntry>,
    /// What happened.
    pub event: What,
}

/// What an event reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Before anything is collected.
    Opened(Box<Opening>),
    /// The step under way has come further: what it has stored so far is acknowledged.
    Progress(Progress),
    /// A step of the plan has ended.
    Step(Outcome),
    /// After the last step.
    Closed(Closing),
}

/// The first event: who asked for what, on which host, by which program, under which key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Opening {
    /// The order as it reached the agent.
    pub order: Order,
    /// The steps, in the order in which they will run.
    pub plan: Vec<Step>,
    /// The public half of the key made for this capture.
    pub key: PublicKey,
    /// The program.
    pub agent: AgentIdentity,
    /// The host.
    pub host: Identity,
    /// The host's clocks.
    pub clock: Clock,
    /// What the evidence is put into: `directory`, `pipe`.
    pub store: String,
}

/// Who ordered the capture, and what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The case.
    pub case: CaseName,
    /// The profile: `triage`.
    pub profile: String,
    /// A value that the orderer chose, so that an old chain cannot answer a new order.
    pub nonce: String,
    /// Who ordered, as the orderer said.
    pub ordered_by: Text,
    /// When, by the orderer's clock.
    pub ordered_at: Option<Timestamp>,
}

/// One step of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The kind collected.
    pub kind: Kind,
    /// Seconds after which the step is ended with what it has.
    pub deadline_s: u64,
}

/// The program that captures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentIdentity {
    /// Its version.
    pub version: String,
    /// The platform it was built for.
    pub target: String,
    /// Its process id.
    pub pid: u32,
    /// Where it was started from.
    pub path: Text,
    /// SHA-256 of its own file; `None` when it could not be read.
    pub sha256: Option<Hash>,
    /// Its command line.
    pub argv: Vec<Text>,
}

/// How far a long step has come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// The kind collected.
    pub kind: Kind,
    /// Bytes done.
    pub done: u64,
    /// Bytes expected.
    pub expected: u64,
    /// In the first of a step: the ranges of memory that are expected, first and last address, unless they are too many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<(u64, u64)>,
}

/// Ranges that an event lists; where there are more, they are records.
pub const MAX_RANGES: usize = 4096;

/// What was made of one range of memory; all in bytes. Their sum is the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeAccount {
    /// The first address: physical, or virtual for the memory of one process.
    pub start: u64,
    /// The last address.
    pub end: u64,
    /// Read, and holding something.
    pub read: u64,
    /// Read as zeros, and nothing says that the kernel kept it back.
    pub zero: u64,
    /// Stored as zeros, because the kernel keeps it back (offline, poisoned, no page there) or because it holds the key of
    /// this capture.
    pub withheld: u64,
    /// Stored as zeros, because reading failed.
    pub unreadable: u64,
    /// Not stored: the capture was stopped before, or the store failed.
    pub missing: u64,
}

impl RangeAccount {
    /// Bytes of the range.
    pub fn size(&self) -> u64 {
        self.end.saturating_sub(self.start).saturating_add(1)
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Everything that was there was read.
    Complete,
    /// Something that was there could not be read; `problems` says what.
    Partial,
    /// The deadline came first; what was read until then is there.
    TimedOut,
    /// Nothing of use, or not all of it stored; `reason` says why.
    Failed,
    /// Not run; `reason` says why.
    Skipped,
    /// This kernel or this platform does not have it.
    Unsupported,
}

impl Status {
    /// True when nothing is missing that the host had to give.
    pub fn is_good(self) -> bool {
        matches!(self, Status::Complete | Status::Unsupported)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Status::Complete => "complete",
            Status::Partial => "partial",
            Status::TimedOut => "timed out",
            Status::Failed => "failed",
            Status::Skipped => "skipped",
            Status::Unsupported => "unsupported",
        })
    }
}

/// The end of a step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Zero-based place in the plan.
    pub step: u64,
    /// The kind.
    pub kind: Kind,
    /// How it ended.
    pub status: Status,
    /// Why, when it is not complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What could not be read, alike problems counted together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// What a reader should know and what is no problem.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Records collected.
    pub records: u64,
    /// Bytes of records, and of memory, before compression.
    pub bytes: u64,
    /// What was made of each range of memory that was expected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<RangeAccount>,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
}

impl Outcome {
    /// True when nothing is missing that was asked for. That a kernel does not have some kind of record is an answer; that its
    /// memory cannot be had is not.
    pub fn is_good(&self) -> bool {
        let memory = matches!(self.kind.as_str(), "memory" | "process-memory");
        self.status.is_good() && !(memory && self.status == Status::Unsupported)
    }
}

/// Something that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind of thing: `environ`, `utmp`, …
    pub what: String,
    /// The first one that it happened to, such as `/proc/17/environ`.
    pub source: Text,
    /// The error number of the system, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
    /// What went wrong.
    pub error: String,
    /// How many times, this first one included.
    pub count: u64,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let safe = |text: &str| crate::text::printable(text.as_bytes());
        let (what, error) = (safe(&self.what), safe(&self.error));
        match self.count {
            1 => write!(f, "{}: {error}", self.source),
            n => write!(f, "{n} × {what}: {error} (first: {})", self.source),
        }
    }
}

/// One line for a person: what was collected, how it ended, what it took, the first thing to know of it.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = self.ended.as_millisecond() - self.started.as_millisecond();
        let amount = match (self.ranges.is_empty(), self.records) {
            (false, _) => format!("{:>7} MiB    ", self.bytes >> 20),
            (true, 1) => "      1 record ".to_owned(),
            (true, n) => format!("{n:>7} records"),
        };
        write!(
            f,
            "{:<16} {:<11} {amount} {took:>6} ms",
            self.kind.as_str(),
            self.status
        )?;
        let more = |n: usize| {
            if n > 1 {
                format!("; {} more", n - 1)
            } else {
                String::new()
            }
        };
        match (&self.reason, self.problems.first(), self.notes.is_empty()) {
            (Some(reason), ..) => write!(f, "   {}", crate::text::printable(reason.as_bytes())),
            (None, Some(problem), _) => write!(f, "   {problem}{}", more(self.problems.len())),
            (None, None, false) => write!(
                f,
                "   {}",
                crate::text::printable(self.notes.join(", ").as_bytes())
            ),
            _ => Ok(()),
        }
    }
}

/// The last event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Closing {
    /// Why the capture ended before its plan did, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// What the agent itself cost the host.
    pub footprint: Footprint,
}

/// What an analyst can subtract from the host: the agent itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Footprint {
    /// Process ids: the agent's, then its workers'.
    pub pids: Vec<u32>,
    /// Processor time of all of them, in microseconds.
    pub cpu_us: Option<u64>,
    /// Largest resident memory of the agent, plus the largest of any of its workers, in bytes.
    pub peak_resident: Option<u64>,
    /// Bytes that its workers and itself read through system calls.
    pub read: Option<u64>,
    /// Bytes put into the store.
    pub sent: u64,
    /// Files that it created on the host, the store's aside.
    pub paths: Vec<Text>,
    /// Buffers that hold evidence, as `[address, bytes]` in the agent's own address space.
    pub buffers: Vec<(u64, u64)>,
}

/// Makes the events of a chain.
pub struct ChainWriter {
    key: Box<dyn Signatory>,
    capture: CaptureId,
    sequence: u64,
    previous: Option<Hash>,
}

impl ChainWriter {
    /// A chain without events.
    pub fn new(key: Box<dyn Signatory>, capture: CaptureId) -> Self {
        ChainWriter {
            key,
            capture,
            sequence: 0,
            previous: None,
        }
    }

    /// The public half of the key.
    pub fn key(&self) -> PublicKey {
        self.key.public()
    }

    /// The next event and its object.
    pub fn next(
        &mut self,
        elapsed_us: u64,
        segments: Vec<SegmentEntry>,
        event: What,
    ) -> Result<(Key, Vec<u8>, Event), Error> {
        let event = Event {
            schema: SCHEMA.to_owned(),
            capture: self.capture,
            sequence: self.sequence + 1,
            previous: self.previous,
            at: Timestamp::now(),
            elapsed_us,
            segments,
            event,
        };
        let object = seal(&*self.key, json_line(&event)?);
        if object.len() as u64 > MAX_EVENT {
            return Err(Error::Chain(format!(
                "event {} would be larger than any reader reads",
                event.sequence
            )));
        }
        let sha256 = Hash::of(&object);
        self.sequence += 1;
        self.previous = Some(sha256);
        Ok((
            Key::Event {
                sequence: event.sequence,
                sha256,
            },
            object,
            event,
        ))
    }

    /// Signs a manifest.
    pub fn seal(&self, payload: String) -> Vec<u8> {
        seal(&*self.key, payload)
    }
}

/// A chain as far as it has been read and found right.
#[derive(Clone, Debug)]
pub struct Chain {
    capture: CaptureId,
    key: PublicKey,
    events: Vec<(Hash, Event)>,
    /// Segments so far of each artifact, and outcomes so far.
    counts: BTreeMap<Artifact, u64>,
    done: usize,
}

impl Chain {
    /// Starts a chain with its first object. The key is taken from it: whose key that is, is for an anchor to say.
    pub fn open(capture: CaptureId, object: &[u8]) -> Result<Self, Error> {
        let event: Event = serde_json::from_str(split(object)?.0)?;
        let What::Opened(opening) = &event.event else {
            return Err(Error::Chain("the first event does not open a capture".to_owned()));
        };
        let mut chain = Chain {
            capture,
            key: opening.key,
            events: Vec::new(),
            counts: BTreeMap::new(),
            done: 0,
        };
        chain.push(object)?;
        Ok(chain)
    }

    /// Appends the next object, if it is what must come next.
    pub fn push(&mut self, object: &[u8]) -> Result<(), Error> {
        let event: Event = serde_json::from_str(self.key.open(object)?)?;
        self.follows(&event).map_err(Error::Chain)?;
        for segment in &event.segments {
            self.counts.insert(segment.artifact.clone(), segment.number);
        }
        self.done += usize::from(matches!(event.event, What::Step(_)));
        self.events.push((Hash::of(object), event));
        Ok(())
    }

    fn follows(&self, event: &Event) -> Result<(), String> {
        let expected = self.events.len() as u64 + 1;
        if event.schema != SCHEMA {
            return Err(format!(
                "of schema {}, not {SCHEMA}",
                crate::text::printable(event.schema.as_bytes())
            ));
        }
        if event.capture != self.capture {
            return Err(format!("belongs to capture {}", event.capture));
        }
        if event.sequence != expected {
            return Err(format!(
                "is event {} in the place of event {expected}",
                event.sequence
            ));
        }
        if event.previous != self.events.last().map(|(hash, _)| *hash) {
            return Err("does not link to the event before it".to_owned());
        }
        if self.closing().is_some() {
            return Err("comes after the last event".to_owned());
        }
        let mut next: BTreeMap<&Artifact, u64> = BTreeMap::new();
        for segment in &event.segments {
            let known = || self.counts.get(&segment.artifact).copied().unwrap_or(0);
            let count = next.entry(&segment.artifact).or_insert_with(known);
            if segment.number <= *count {
                return Err(format!(
                    "lists segment {} of {} behind segment {count}",
                    segment.number, segment.artifact
                ));
            }
            *count = segment.number;
        }
        let plan = self.events.first().and_then(|(_, first)| match &first.event {
            What::Opened(opening) => Some(&opening.plan),
            _ => None,
        });
        let done = self.done;
        match (&event.event, plan) {
            (What::Opened(_), None) => Ok(()),
            (What::Opened(_), Some(_)) => Err("opens the capture a second time".to_owned()),
            (_, None) => Err("comes before the capture is opened".to_owned()),
            (What::Progress(progress), Some(plan)) => match plan.get(done) {
                Some(step) if step.kind == progress.kind => Ok(()),
                _ => Err(format!(
                    "reports progress of {}, which is not under way",
                    progress.kind
                )),
            },
            (What::Step(outcome), Some(plan)) => {
                let fits = plan.get(done).is_some_and(|step| step.kind == outcome.kind);
                if fits && outcome.step == done as u64 {
                    Ok(())
                } else {
                    Err(format!(
                        "reports {} where the plan has another step",
                        outcome.kind
                    ))
                }
            }
            (What::Closed(_), Some(plan)) if plan.len() == done => Ok(()),
            (What::Closed(_), Some(_)) => {
                Err("closes the capture before every step has an outcome".to_owned())
            }
        }
    }

    /// The capture.
    pub fn capture(&self) -> CaptureId {
        self.capture
    }

    /// The key that signed every event.
    pub fn key(&self) -> PublicKey {
        self.key
    }

    /// The events, each with the SHA-256 of its object.
    pub fn events(&self) -> &[(Hash, Event)] {
        &self.events
    }

    /// The first event's content.
    pub fn opening(&self) -> Option<&Opening> {
        match self.events.first() {
            Some((
                _,
                Event {
                    event: What::Opened(opening),
                    ..
                },
            )) => Some(opening),
            _ => None,
        }
    }

    /// The last event's content, if the chain was ended.
    pub fn closing(&self) -> Option<&Closing> {
        match self.events.last() {
            Some((
                _,
                Event {
                    event: What::Closed(closing),
                    ..
                },
            )) => Some(closing),
            _ => None,
        }
    }

    /// The outcomes so far, in the plan's order.
    pub fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.events.iter().filter_map(|(_, e)| match &e.event {
            What::Step(outcome) => Some(outcome),
            _ => None,
        })
    }

    /// The segments acknowledged so far, in the chain's order.
    pub fn segments(&self) -> impl Iterator<Item = &SegmentEntry> {
        self.events.iter().flat_map(|(_, e)| &e.segments)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        segments::{Packed, RecordPacker},
        signature::CaptureKey,
    };
    use proptest::prelude::*;

    pub(crate) fn opening(key: PublicKey, kinds: &[&str]) -> What {
        What::Opened(Box::new(Opening {
            order: Order {
                case: "case".parse().unwrap(),
                profile: "triage".into(),
                nonce: "n".into(),
                ordered_by: Text::from("me"),
                ordered_at: None,
            },
            plan: kinds
                .iter()
                .map(|k| Step {
                    kind: k.parse().unwrap(),
                    deadline_s: 1,
                })
                .collect(),
            key,
            agent: AgentIdentity {
                version: "0".into(),
                target: "t".into(),
                pid: 1,
                path: Text::from("/a"),
                sha256: None,
                argv: vec![],
            },
            host: Identity::default(),
            clock: Clock::default(),
            store: "directory".into(),
        }))
    }

    pub(crate) fn outcome(step: u64, kind: &str) -> What {
        let now = Timestamp::UNIX_EPOCH;
        What::Step(Outcome {
            step,
            kind: kind.parse().unwrap(),
            status: Status::Complete,
            reason: None,
            problems: vec![],
            notes: vec![],
            records: 1,
            bytes: 2,
            ranges: vec![],
            started: now,
            ended: now,
        })
    }

    pub(crate) fn closed() -> What {
        What::Closed(Closing {
            stopped: None,
            footprint: Footprint::default(),
        })
    }

    pub(crate) fn packed(kind: &str, text: &str) -> Packed {
        let mut packer = RecordPacker::new(Artifact::Volatile(kind.parse().unwrap()), 1).unwrap();
        assert!(packer.push(text.as_bytes()).unwrap().is_none());
        packer.flush().unwrap().unwrap()
    }

    /// A capture of `kinds`, one segment each: its id, its objects in the order of the chain, its segments.
    pub(crate) fn capture(seed: u8, kinds: &[&str]) -> (CaptureId, Vec<Vec<u8>>, Vec<Packed>, ChainWriter) {
        let id = CaptureId::mint();
        let mut writer = ChainWriter::new(Box::new(CaptureKey::from_seed(&[seed; 32])), id);
        let mut objects = vec![];
        let mut segments = vec![];
        let key = writer.key();
        objects.push(writer.next(0, vec![], opening(key, kinds)).unwrap().1);
        for (i, kind) in kinds.iter().enumerate() {
            let p = packed(kind, &format!("{{\"seed\":{seed},\"n\":{i}}}"));
            objects.push(
                writer
                    .next(1, vec![p.entry.clone()], outcome(i as u64, kind))
                    .unwrap()
                    .1,
            );
            segments.push(p);
        }
        objects.push(writer.next(2, vec![], closed()).unwrap().1);
        (id, objects, segments, writer)
    }

    fn read(id: CaptureId, objects: &[Vec<u8>]) -> Result<Chain, Error> {
        let mut chain = Chain::open(id, objects.first().ok_or(Error::Chain("empty".into()))?)?;
        for object in &objects[1..] {
            chain.push(object)?;
        }
        Ok(chain)
    }

    proptest! {
        #[test]
        fn only_the_written_order_reads(kinds in proptest::collection::btree_set("[a-z]{1,5}", 1..5), from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>()) {
            let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
            let (id, objects, ..) = capture(1, &kinds);
            let chain = read(id, &objects).unwrap();
            prop_assert_eq!(chain.events().len(), kinds.len() + 2);
            prop_assert!(chain.closing().is_some());

            let (from, to) = (from.index(objects.len()), to.index(objects.len()));
            let mut moved = objects.clone();
            let one = moved.remove(from);
            prop_assert!(from == objects.len() - 1 || read(id, &moved).is_err(), "a deleted event");
            moved.insert(to, one);
            prop_assert!(from == to || read(id, &moved).is_err(), "a moved event");
            let mut doubled = objects.clone();
            doubled.insert(to, objects[from].clone());
            prop_assert!(read(id, &doubled).is_err(), "a doubled event");
        }
    }

    #[test]
    fn another_capture_s_event_does_not_fit() {
        let (id, mut a, ..) = capture(1, &["x", "y"]);
        let (other, b, ..) = capture(1, &["x", "y"]);
        assert!(read(other, &a).is_err(), "a chain under another id");
        a[2] = b[2].clone();
        assert!(
            read(id, &a).is_err(),
            "an event of a second capture under the same key"
        );
    }

    #[test]
    fn a_chain_cannot_close_over_a_missing_outcome() {
        let id = CaptureId::mint();
        let mut writer = ChainWriter::new(Box::new(CaptureKey::from_seed(&[9; 32])), id);
        let key = writer.key();
        let first = writer.next(0, vec![], opening(key, &["x"])).unwrap().1;
        let last = writer.next(0, vec![], closed()).unwrap().1;
        assert!(read(id, &[first, last]).is_err());
    }
}
