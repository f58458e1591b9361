//! A capture from its order to its manifest: the only place that knows both collectors and stores.
//!
//! The order of things is the promise: the first event lands before anything is collected; a step's event lands after its
//! segments were acknowledged; then the last event, `SHA256SUMS`, the manifest. At any moment at which the agent is
//! killed, what is in the store is a valid beginning.

use crate::{
    cancel::Cancel,
    plan::Profile,
    worker::{Event as Step, Task, supervise},
};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeSet, VecDeque},
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel},
    thread::Scope,
    time::Instant,
};
use stillframe_evidence::{
    Error,
    chain::{
        self, AgentIdentity, Chain, ChainWriter, Closing, Event, Footprint, Opening, Order, Outcome, Status,
        What,
    },
    layout::{Artifact, CaptureId, Key, Kind},
    manifest::{Manifest, sums},
    root::Hash,
    segments::{Packed, RecordPacker, SegmentEntry},
    signature::CaptureKey,
    text::Text,
};
use stillframe_store::Store;

/// The zstd level of records: they are few, and the host's processor is somebody's evidence too.
const LEVEL: i32 = 1;

/// What is asked for.
pub struct Request {
    /// The id that the orderer minted.
    pub id: CaptureId,
    /// The order.
    pub order: Order,
    /// The profile that the order names.
    pub profile: Profile,
    /// Where the host's root is mounted: `/`, or a folder in a privileged container.
    pub root: PathBuf,
    /// Processors that collecting may use at once.
    pub cpus: u8,
}

/// Why a capture has no manifest.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The store took the chain no further; what it took before is valid, and `salvage` reads it.
    #[error("the store failed at {key}: {source}")]
    Store {
        /// What it would not take.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The system gave no randomness for the key, or no thread.
    #[error("{what}: {why}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The format refused what the agent made: a defect of the agent.
    #[error("the evidence contradicts itself: {0}")]
    Format(#[from] Error),
}

/// Runs the capture. `tell` hears every event as soon as the store has it. The outcome of every step is in the chain that
/// comes back, which is closed.
pub fn run(
    request: &Request,
    store: &dyn Store,
    cancel: &Cancel,
    mut tell: impl FnMut(&Event),
) -> Result<Chain, Failure> {
    std::thread::scope(|scope| {
        let key = new_key()?;
        let mut session = Session {
            store,
            opened: Instant::now(),
            writer: ChainWriter::new(key, request.id),
            chain: None,
            put: Putter::start(scope, store)?,
            acknowledged: Vec::new(),
            waiting: VecDeque::new(),
            current: None,
            broken: None,
            footprint: Footprint {
                pids: vec![std::process::id()],
                ..Footprint::default()
            },
            tell: &mut tell,
        };
        session.open(request)?;
        session.steps(request, cancel)?;
        session.close(cancel)
    })
}

fn new_key() -> Result<CaptureKey, Failure> {
    let mut seed = [0; 32];
    let result = getrandom::fill(&mut seed);
    let key = CaptureKey::from_seed(&seed);
    seed.fill(0);
    result.map(|()| key).map_err(|e| Failure::System {
        what: "no random key for this capture",
        why: e.to_string(),
    })
}

/// Puts objects beside the collecting, one after another, so that neither waits for the other.
struct Putter {
    give: SyncSender<Put>,
    taken: Receiver<Taken>,
    in_flight: usize,
}

enum Put {
    Segment(Packed),
    Event(Key, Vec<u8>, Box<Event>),
}

enum Taken {
    Segment(SegmentEntry, io::Result<()>),
    Event(Key, Box<Event>, io::Result<()>),
}

impl Putter {
    fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        store: &'env dyn Store,
    ) -> Result<Self, Failure> {
        let (give, jobs) = sync_channel::<Put>(4);
        // Answers are never waited for by the one who gives them.
        let (done, taken) = channel();
        let work = move || {
            // A gap in the numbers of an artifact would make what is behind it unreadable.
            let mut ended: BTreeSet<Artifact> = BTreeSet::new();
            for job in jobs {
                let taken = match job {
                    Put::Segment(Packed { bytes, mut entry }) => {
                        let result = if ended.contains(&entry.artifact) {
                            Err(io::Error::other("one before it was not stored"))
                        } else {
                            store
                                .put(&entry.key(), &bytes)
                                .map(|receipt| entry.receipt = receipt)
                        };
                        if result.is_err() {
                            ended.insert(entry.artifact.clone());
                        }
                        Taken::Segment(entry, result)
                    }
                    Put::Event(key, bytes, event) => {
                        let result = store.put(&key, &bytes).map(|_| ());
                        Taken::Event(key, event, result)
                    }
                };
                if done.send(taken).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("store".to_owned());
        let no_thread = |e: io::Error| Failure::System {
            what: "no thread for the store",
            why: e.to_string(),
        };
        thread.spawn_scoped(scope, work).map_err(no_thread)?;
        Ok(Putter {
            give,
            taken,
            in_flight: 0,
        })
    }
}

/// The step under way.
struct Current {
    packer: RecordPacker,
    outcome: Outcome,
    failed: Option<String>,
}

struct Session<'a> {
    store: &'a dyn Store,
    opened: Instant,
    writer: ChainWriter,
    chain: Option<Chain>,
    put: Putter,
    /// Segments that the store has and that no event has named yet.
    acknowledged: Vec<SegmentEntry>,
    /// Outcomes whose segments are under way: the outcome, and how many it still waits for.
    waiting: VecDeque<(Outcome, usize)>,
    current: Option<Current>,
    /// Why the chain goes no further.
    broken: Option<Failure>,
    footprint: Footprint,
    tell: &'a mut dyn FnMut(&Event),
}

impl Session<'_> {
    fn open(&mut self, request: &Request) -> Result<(), Failure> {
        let steps = request.profile.collectors();
        let opening = Opening {
            order: request.order.clone(),
            plan: steps.map(step).collect::<Result<_, _>>()?,
            key: self.writer.key(),
            agent: identity(),
            host: crate::sys::identity(&request.root),
            clock: crate::sys::clock(request.order.ordered_at),
            store: self.store.kind().to_owned(),
        };
        self.event(What::Opened(Box::new(opening)))?;
        // Nothing is collected before it has landed.
        self.drain()
    }

    /// Makes the next event and has it put. It is told when the store has it.
    fn event(&mut self, what: What) -> Result<(), Failure> {
        let segments = std::mem::take(&mut self.acknowledged);
        let elapsed = u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (key, object, event) = self.writer.next(elapsed, segments, what)?;
        // The same reading that a verifier does, so that a chain that would not verify is never closed.
        match &mut self.chain {
            Some(chain) => chain.push(&object)?,
            None => self.chain = Some(Chain::open(event.capture, &object)?),
        }
        self.footprint.sent = self.footprint.sent.saturating_add(object.len() as u64);
        self.put(Put::Event(key, object, Box::new(event)));
        Ok(())
    }

    fn put(&mut self, put: Put) {
        match self.put.give.send(put) {
            Ok(()) => self.put.in_flight += 1,
            Err(_) => self.store_died(),
        }
    }

    fn store_died(&mut self) {
        self.put.in_flight = 0;
        let why = "it ended before the capture did".to_owned();
        self.broken.get_or_insert(Failure::System {
            what: "the thread of the store",
            why,
        });
    }

    /// Waits until the store has answered everything; an error when the chain goes no further.
    fn drain(&mut self) -> Result<(), Failure> {
        while self.put.in_flight > 0 {
            self.settle(true);
            self.report()?;
        }
        self.report()
    }

    fn object(&mut self, key: &Key, bytes: &[u8]) -> Result<(), Failure> {
        self.footprint.sent = self.footprint.sent.saturating_add(bytes.len() as u64);
        match self.store.put(key, bytes) {
            Ok(_) => Ok(()),
            Err(source) => Err(Failure::Store {
                key: key.to_string(),
                source,
            }),
        }
    }

    fn steps(&mut self, request: &Request, cancel: &Cancel) -> Result<(), Failure> {
        let tasks: Vec<Task> = (0u64..)
            .zip(request.profile.collectors())
            .map(|(step, c)| Task {
                step,
                kind: c.kind.to_owned(),
                deadline: c.deadline,
            })
            .collect();
        let cost = supervise(&request.root, request.cpus, &tasks, cancel, |event| match event {
            Step::Begin(task) => self.begin(task),
            Step::Record(line) => self.record(&line),
            Step::End(_, end) => self.end(end),
        })?;
        self.drain()?;
        let own = crate::sys::usage();
        let plus = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b.unwrap_or(0)));
        self.footprint.pids.extend(cost.pids);
        self.footprint.cpu_us = plus(own.cpu_us, cost.usage.cpu_us);
        self.footprint.peak_resident = plus(own.peak_resident, cost.usage.peak_resident);
        self.footprint.read = plus(own.read, cost.usage.read);
        Ok(())
    }

    fn begin(&mut self, task: &Task) -> Result<(), Failure> {
        let kind: Kind = task.kind.parse()?;
        let packer =
            RecordPacker::new(Artifact::Volatile(kind.clone()), LEVEL).map_err(|e| Failure::System {
                what: "no compressor",
                why: e.to_string(),
            })?;
        let now = Timestamp::now();
        let outcome = Outcome {
            step: task.step,
            kind,
            status: Status::Complete,
            reason: None,
            problems: Vec::new(),
            notes: Vec::new(),
            records: 0,
            bytes: 0,
            started: now,
            ended: now,
        };
        self.current = Some(Current {
            packer,
            outcome,
            failed: None,
        });
        Ok(())
    }

    fn record(&mut self, line: &[u8]) -> Result<(), Failure> {
        self.settle(false);
        self.report()?;
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        if current.failed.is_some() {
            return Ok(());
        }
        match current.packer.push(line) {
            Ok(packed) => {
                current.outcome.records += 1;
                current.outcome.bytes += line.len() as u64 + 1;
                if let Some(packed) = packed {
                    self.send(packed);
                }
            }
            Err(error) => current.failed = Some(format!("a record could not be packed: {error}")),
        }
        Ok(())
    }

    fn send(&mut self, packed: Packed) {
        self.footprint.sent = self.footprint.sent.saturating_add(packed.entry.stored);
        self.put(Put::Segment(packed));
    }

    fn end(&mut self, end: crate::worker::End) -> Result<(), Failure> {
        let Some(mut current) = self.current.take() else {
            return Ok(());
        };
        self.footprint.buffers = vec![current.packer.buffer()];
        if current.failed.is_none() {
            match current.packer.flush() {
                Ok(Some(packed)) => self.send(packed),
                Ok(None) => (),
                Err(error) => current.failed = Some(format!("a record could not be packed: {error}")),
            }
        }
        let outcome = &mut current.outcome;
        outcome.status = end.status;
        outcome.reason = end.reason;
        outcome.problems = end.problems;
        outcome.notes = end.notes;
        outcome.ended = Timestamp::now();
        if let Some(why) = current.failed {
            outcome.status = Status::Failed;
            outcome.reason = Some(why);
        }
        // Its segments are behind everything that is in flight now.
        self.waiting.push_back((current.outcome, self.put.in_flight));
        self.settle(false);
        self.report()
    }

    /// Takes what the store has answered; waits for one answer when `wait` is set.
    fn settle(&mut self, wait: bool) {
        let mut wait = wait;
        loop {
            let answer = match wait {
                true => self.put.taken.recv().map_err(|_| TryRecvError::Disconnected),
                false => self.put.taken.try_recv(),
            };
            wait = false;
            let answer = match answer {
                Ok(answer) => answer,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => return self.store_died(),
            };
            self.put.in_flight = self.put.in_flight.saturating_sub(1);
            for (_, left) in &mut self.waiting {
                *left = left.saturating_sub(1);
            }
            match answer {
                Taken::Segment(entry, Ok(())) => self.acknowledged.push(entry),
                Taken::Segment(entry, Err(error)) => self.fail(&entry, &error),
                Taken::Event(_, event, Ok(())) => (self.tell)(&event),
                Taken::Event(key, _, Err(source)) => {
                    self.broken.get_or_insert(Failure::Store {
                        key: key.to_string(),
                        source,
                    });
                }
            }
        }
    }

    fn outcome_of(&mut self, entry: &SegmentEntry) -> Option<&mut Outcome> {
        let Artifact::Volatile(kind) = &entry.artifact;
        let current = self.current.as_mut().map(|c| &mut c.outcome);
        self.waiting
            .iter_mut()
            .map(|(outcome, _)| outcome)
            .chain(current)
            .find(|o| o.kind == *kind)
    }

    fn fail(&mut self, entry: &SegmentEntry, error: &io::Error) {
        let why = format!(
            "segment {} was not stored: {}",
            entry.number,
            crate::collect::describe(error)
        );
        if let Some(current) = &mut self.current
            && Artifact::Volatile(current.outcome.kind.clone()) == entry.artifact
        {
            current.failed.get_or_insert(why.clone());
        }
        if let Some(outcome) = self.outcome_of(entry)
            && outcome.status != Status::Failed
        {
            outcome.status = Status::Failed;
            outcome.reason = Some(why);
        }
    }

    /// An event for every outcome whose segments have all been answered.
    fn report(&mut self) -> Result<(), Failure> {
        if let Some(failure) = self.broken.take() {
            return Err(failure);
        }
        while self.waiting.front().is_some_and(|(_, left)| *left == 0) {
            if let Some((outcome, _)) = self.waiting.pop_front() {
                self.event(What::Step(outcome))?;
            }
        }
        Ok(())
    }

    fn close(mut self, cancel: &Cancel) -> Result<Chain, Failure> {
        let stopped = cancel.requested().map(|why| format!("stopped: {why}"));
        let footprint = self.footprint.clone();
        self.event(What::Closed(Closing { stopped, footprint }))?;
        self.drain()?;
        let Some(chain) = self.chain.take() else {
            return Err(Failure::Format(Error::Chain(
                "the chain was never opened".to_owned(),
            )));
        };
        self.object(&Key::Sums, sums(&chain).as_bytes())?;
        let manifest = self.writer.seal(&Manifest::of(&chain)?.payload()?);
        self.object(&Key::Manifest, &manifest)?;
        let end = |source| Failure::Store {
            key: "its end".to_owned(),
            source,
        };
        self.store.finish().map_err(end)?;
        Ok(chain)
    }
}

/// How a collector stands in the plan.
pub fn step(collector: &crate::collect::Collector) -> Result<chain::Step, Error> {
    Ok(chain::Step {
        kind: collector.kind.parse()?,
        deadline_s: collector.deadline.as_secs(),
    })
}

fn identity() -> AgentIdentity {
    let program = crate::sys::own_program();
    AgentIdentity {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        pid: std::process::id(),
        path: std::env::current_exe()
            .map(|p| Text::from(p.as_os_str().as_encoded_bytes()))
            .unwrap_or_default(),
        sha256: program.and_then(std::fs::File::open).and_then(hash).ok(),
        argv: std::env::args_os()
            .map(|a| Text::from(a.as_encoded_bytes()))
            .collect(),
    }
}

/// In small pieces: the whole program in memory would be more than the rest of the agent.
fn hash(mut file: std::fs::File) -> io::Result<Hash> {
    let mut sha256 = Sha256::new();
    let mut buffer = [0; 64 << 10];
    loop {
        let n = io::Read::read(&mut file, &mut buffer)?;
        match buffer.get(..n) {
            Some(bytes) if n > 0 => sha256.update(bytes),
            _ => return Ok(Hash(sha256.finalize().into())),
        }
    }
}
