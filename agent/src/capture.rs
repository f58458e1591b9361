//! A capture from its order to its manifest: the only place that knows both collectors and stores.
//!
//! The order of things is the promise: the first event lands before anything is collected; a step's event lands after its
//! segments were acknowledged; then the last event, `SHA256SUMS`, the manifest. At any moment at which the agent is
//! killed, what is in the store is a valid beginning.

mod memory;

use crate::{
    cancel::Cancel,
    plan::{Action, Step},
    sys::{KeyPages, Vault},
    worker::{Event as Turn, Known, Task, supervise},
};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel},
    },
    thread::Scope,
    time::Instant,
};
use stillframe_evidence::{
    Error,
    chain::{
        self, AgentIdentity, Chain, ChainWriter, Closing, Event, Footprint, Opening, Order, Outcome,
        Progress, Status, What,
    },
    layout::{Artifact, CaptureId, Key, Kind},
    manifest::{Manifest, sums},
    records::host::Clock,
    root::Hash,
    segments::{Packed, RecordPacker, SegmentEntry},
    text::Text,
};
use stillframe_store::{PutError, Store};

/// The zstd level of records: they are few, and the host's processor is somebody's evidence too.
const LEVEL: i32 = 1;
/// Buffers of segments that are kept for the next ones.
const SPARE: usize = 4;

/// How memory is to be captured.
#[derive(Default)]
pub struct MemoryOrder {
    /// An image that somebody else took, to be brought in.
    pub image: Option<PathBuf>,
    /// A LiME module and its SHA-256, to be loaded instead of reading `/proc/kcore`.
    pub lime: Option<(PathBuf, Hash)>,
    /// Processes whose memory is wanted by itself.
    pub pids: Vec<u32>,
    /// Bytes a second, at most.
    pub rate: Option<u64>,
}

/// What is asked for.
pub struct Request {
    /// The id that the orderer minted.
    pub id: CaptureId,
    /// The order.
    pub order: Order,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// How memory is to be captured.
    pub memory: MemoryOrder,
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
        // A module that reads all of physical memory would crash the kernel on a page that was taken out of its map.
        let vault = Vault::new(request.memory.lime.is_none()).map_err(|error| Failure::System {
            what: "no key for this capture",
            why: crate::collect::describe(&error),
        })?;
        let mut session = Session {
            store,
            opened: Instant::now(),
            told_at: Instant::now(),
            key: vault.pages(),
            key_kept: vault.kind(),
            seed: vault.seed(),
            writer: ChainWriter::new(Box::new(vault), request.id),
            chain: None,
            put: Putter::start(scope, store)?,
            acknowledged: Vec::new(),
            waiting: VecDeque::new(),
            current: None,
            spare: Vec::new(),
            broken: None,
            known: Known::default(),
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

/// Puts objects beside the collecting, so that neither waits for the other: segments as many at once as the store can take, events one after
/// another, since each stands on the one before.
struct Putter {
    segments: SyncSender<Put>,
    events: SyncSender<Put>,
    taken: Receiver<Taken>,
    /// Everything that has not been answered.
    in_flight: usize,
    /// Segments that have not been answered, by their step.
    of_step: BTreeMap<u64, usize>,
    /// What is under way of each artifact: the chain names its segments in their order, whatever the order of the answers.
    flights: BTreeMap<Artifact, Flight>,
}

/// Segments of one artifact.
#[derive(Default)]
struct Flight {
    waiting: BTreeSet<u64>,
    answered: BTreeMap<u64, SegmentEntry>,
}

enum Put {
    /// A segment, and the step that it belongs to.
    Segment(Packed, u64),
    Event(Key, Vec<u8>, Box<Event>),
}

enum Taken {
    /// The entry, its step, how it went, and its buffer.
    Segment(SegmentEntry, u64, Result<(), PutError>, Vec<u8>),
    Event(Key, Box<Event>, Result<(), PutError>),
}

impl Putter {
    fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        store: &'env dyn Store,
    ) -> Result<Self, Failure> {
        // Answers are never waited for by the one who gives them.
        let (done, taken) = channel();
        // What is behind a segment that was not stored is not begun: of some artifacts it could not be read.
        let ended: Arc<Mutex<Ended>> = Arc::default();
        let start = |jobs: Arc<Mutex<Receiver<Put>>>| {
            let (done, ended) = (done.clone(), ended.clone());
            let work = move || {
                loop {
                    // Held while waiting: the others wait for it, and then for a job, all the same.
                    let job = lock(&jobs).recv();
                    let Ok(job) = job else { return };
                    if done.send(take(store, job, &ended)).is_err() {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name("store".to_owned())
                .stack_size(STACK);
            thread.spawn_scoped(scope, work).map_err(|e| Failure::System {
                what: "no thread for the store",
                why: e.to_string(),
            })
        };
        let (segments, jobs) = sync_channel::<Put>(4);
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..store.at_once().max(1) {
            start(jobs.clone())?;
        }
        // A store that takes one at a time takes all in the order in which they were made.
        let events = if store.at_once() > 1 {
            let (events, jobs) = sync_channel::<Put>(4);
            start(Arc::new(Mutex::new(jobs)))?;
            events
        } else {
            segments.clone()
        };
        Ok(Putter {
            segments,
            events,
            taken,
            in_flight: 0,
            of_step: BTreeMap::new(),
            flights: BTreeMap::new(),
        })
    }

    /// False when its threads have ended.
    fn put(&mut self, put: Put) -> bool {
        let under_way = match &put {
            Put::Segment(packed, step) => Some((packed.entry.artifact.clone(), packed.entry.number, *step)),
            Put::Event(..) => None,
        };
        let queue = if under_way.is_some() {
            &self.segments
        } else {
            &self.events
        };
        if queue.send(put).is_err() {
            return false;
        }
        self.in_flight += 1;
        if let Some((artifact, number, step)) = under_way {
            self.flights.entry(artifact).or_default().waiting.insert(number);
            *self.of_step.entry(step).or_default() += 1;
        }
        true
    }

    /// Books the answer to a segment. `entry` is what the chain is to say of it; what comes back can be said now, in order.
    fn answered(
        &mut self,
        artifact: &Artifact,
        number: u64,
        step: u64,
        entry: Option<SegmentEntry>,
    ) -> Vec<SegmentEntry> {
        if let Some(left) = self.of_step.get_mut(&step) {
            *left = left.saturating_sub(1);
        }
        let Some(flight) = self.flights.get_mut(artifact) else {
            return Vec::new();
        };
        flight.waiting.remove(&number);
        flight.answered.extend(entry.map(|entry| (number, entry)));
        let behind = match flight.waiting.first() {
            Some(first) => flight.answered.split_off(first),
            None => BTreeMap::new(),
        };
        let ready = std::mem::replace(&mut flight.answered, behind);
        if flight.waiting.is_empty() && flight.answered.is_empty() {
            self.flights.remove(artifact);
        }
        ready.into_values().collect()
    }

    fn is_answered(&self, step: u64) -> bool {
        self.of_step.get(&step).is_none_or(|left| *left == 0)
    }
}

/// Of a thread that puts: what a TLS handshake takes, and room to spare.
const STACK: usize = 512 << 10;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What goes no further.
#[derive(Default)]
struct Ended {
    artifacts: BTreeSet<Artifact>,
    chain: bool,
}

fn take(store: &dyn Store, job: Put, ended: &Mutex<Ended>) -> Taken {
    let no_further = || Err(io::Error::other("one before it was not stored").into());
    match job {
        Put::Segment(Packed { mut bytes, mut entry }, step) => {
            let result = if lock(ended).artifacts.contains(&entry.artifact) {
                no_further()
            } else {
                store
                    .put(&entry.key(), &mut bytes)
                    .map(|receipt| entry.receipt = receipt)
            };
            if result.is_err() {
                lock(ended).artifacts.insert(entry.artifact.clone());
            }
            Taken::Segment(entry, step, result, bytes)
        }
        Put::Event(key, mut bytes, event) => {
            // An event behind one that is missing would look like tampering.
            let result = if lock(ended).chain {
                no_further()
            } else {
                store.put(&key, &mut bytes).map(|_| ())
            };
            lock(ended).chain |= result.is_err();
            Taken::Event(key, event, result)
        }
    }
}

/// The step under way.
struct Current {
    packer: RecordPacker,
    outcome: Outcome,
    failed: Option<String>,
    /// Segments that were not stored, or of which nobody knows.
    not_stored: BTreeSet<u64>,
}

struct Session<'a> {
    store: &'a dyn Store,
    opened: Instant,
    /// When the last event was made.
    told_at: Instant,
    /// The pages that hold the capture's key, and how they are kept.
    key: KeyPages,
    key_kept: &'static str,
    /// What the key is made of, where it must be searched for.
    seed: Option<[u8; 32]>,
    writer: ChainWriter,
    chain: Option<Chain>,
    put: Putter,
    /// Segments that the store has and that no event has named yet.
    acknowledged: Vec<SegmentEntry>,
    /// Outcomes whose segments may be under way.
    waiting: VecDeque<Outcome>,
    current: Option<Current>,
    /// Buffers that held segments, for the next ones.
    spare: Vec<Vec<u8>>,
    /// Why the chain goes no further.
    broken: Option<Failure>,
    /// What workers found out for those after them.
    known: Known,
    footprint: Footprint,
    tell: &'a mut dyn FnMut(&Event),
}

impl Session<'_> {
    fn open(&mut self, request: &Request) -> Result<(), Failure> {
        let steps = request.steps.iter();
        let opening = Opening {
            order: request.order.clone(),
            plan: steps.map(step).collect::<Result<_, _>>()?,
            key: self.writer.key(),
            agent: identity(),
            host: crate::sys::identity(&request.root),
            clock: Clock {
                behind_store_us: self.store.clock_ahead_us(),
                ..crate::sys::clock(request.order.ordered_at)
            },
            store: self.store.kind().to_owned(),
        };
        self.event(What::Opened(Box::new(opening)))?;
        // Nothing is collected before it has landed.
        self.drain()
    }

    /// Makes the next event and has it put. It is told when the store has it.
    fn event(&mut self, what: What) -> Result<(), Failure> {
        let segments = std::mem::take(&mut self.acknowledged);
        self.told_at = Instant::now();
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
        if !self.put.put(put) {
            self.store_died();
        }
    }

    fn store_died(&mut self) {
        self.put.in_flight = 0;
        self.put.of_step.clear();
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

    fn object(&mut self, key: &Key, mut bytes: Vec<u8>) -> Result<(), Failure> {
        self.footprint.sent = self.footprint.sent.saturating_add(bytes.len() as u64);
        match self.store.put(key, &mut bytes) {
            Ok(_) => Ok(()),
            Err(error) => Err(Failure::Store {
                key: key.to_string(),
                source: error.error,
            }),
        }
    }

    fn steps(&mut self, request: &Request, cancel: &Cancel) -> Result<(), Failure> {
        let mut workers = crate::collect::Usage::default();
        let mut tasks: Vec<Task> = Vec::new();
        for (number, step) in (0u64..).zip(&request.steps) {
            if let Action::Collect(collector) = step.action {
                tasks.push(Task {
                    step: number,
                    kind: step.kind.clone(),
                    collector: collector.kind,
                    deadline: step.deadline,
                });
                continue;
            }
            self.collect(request, &std::mem::take(&mut tasks), &mut workers, cancel)?;
            self.begin(number, &step.kind)?;
            let end = match cancel.requested() {
                Some(why) => memory::End::skipped(format!("stopped: {why}")),
                None => match step.action {
                    Action::Companions => self.companions(request)?,
                    Action::ProcessMemory => self.process_memory(request, step, cancel)?,
                    _ => self.memory(request, step, cancel)?,
                },
            };
            if let Some(current) = &mut self.current {
                current.outcome.ranges = end.ranges;
            }
            self.end(end.how)?;
        }
        self.collect(request, &tasks, &mut workers, cancel)?;
        self.drain()?;
        let own = crate::sys::usage();
        let plus = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b.unwrap_or(0)));
        self.footprint.cpu_us = plus(own.cpu_us, workers.cpu_us);
        self.footprint.peak_resident = plus(own.peak_resident, workers.peak_resident);
        self.footprint.read = plus(own.read, workers.read);
        Ok(())
    }

    /// Runs collectors in workers.
    fn collect(
        &mut self,
        request: &Request,
        tasks: &[Task],
        workers: &mut crate::collect::Usage,
        cancel: &Cancel,
    ) -> Result<(), Failure> {
        if tasks.is_empty() {
            return Ok(());
        }
        let mut known = std::mem::take(&mut self.known);
        let cost = supervise(
            &request.root,
            request.cpus,
            request
                .steps
                .iter()
                .any(|step| matches!(step.action, Action::Memory)),
            tasks,
            cancel,
            &mut known,
            |event| match event {
                Turn::Begin(task) => self.begin(task.step, &task.kind),
                Turn::Record(line) => self.record(&line),
                Turn::End(_, end) => self.end(end),
            },
        )?;
        self.known = known;
        self.footprint.pids.extend(cost.pids);
        workers.add(cost.usage);
        Ok(())
    }

    fn begin(&mut self, step: u64, kind: &str) -> Result<(), Failure> {
        let kind: Kind = kind.parse()?;
        let packer =
            RecordPacker::new(Artifact::Volatile(kind.clone()), LEVEL).map_err(|e| Failure::System {
                what: "no compressor",
                why: e.to_string(),
            })?;
        let now = Timestamp::now();
        let outcome = Outcome {
            step,
            kind,
            status: Status::Complete,
            reason: None,
            problems: Vec::new(),
            notes: Vec::new(),
            records: 0,
            bytes: 0,
            ranges: Vec::new(),
            started: now,
            ended: now,
        };
        self.current = Some(Current {
            packer,
            outcome,
            failed: None,
            not_stored: BTreeSet::new(),
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

    /// A segment of the step under way.
    fn send(&mut self, packed: Packed) {
        let Some(step) = self.current.as_ref().map(|current| current.outcome.step) else {
            return;
        };
        self.send_for(step, packed);
    }

    fn send_for(&mut self, step: u64, packed: Packed) {
        self.footprint.sent = self.footprint.sent.saturating_add(packed.entry.stored);
        self.put(Put::Segment(packed, step));
    }

    fn end(&mut self, end: crate::worker::End) -> Result<(), Failure> {
        let Some(mut current) = self.current.take() else {
            return Ok(());
        };
        let buffer = current.packer.buffer();
        if !self.footprint.buffers.contains(&buffer) && self.footprint.buffers.len() < 256 {
            self.footprint.buffers.push(buffer);
        }
        if current.failed.is_none() {
            match current.packer.flush() {
                Ok(Some(packed)) => self.send_for(current.outcome.step, packed),
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
        self.waiting.push_back(current.outcome);
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
            match answer {
                Taken::Segment(entry, step, result, bytes) => {
                    let (artifact, number) = (entry.artifact.clone(), entry.number);
                    let said = match result {
                        Ok(()) => Some(entry),
                        Err(error) => {
                            self.fail(&entry, step, &error);
                            // It may be there: then the chain must know it.
                            error.lost.then_some(entry)
                        }
                    };
                    let ready = self.put.answered(&artifact, number, step, said);
                    self.acknowledged.extend(ready);
                    if self.spare.len() < SPARE {
                        self.spare.push(bytes);
                    }
                }
                Taken::Event(_, event, Ok(())) => (self.tell)(&event),
                Taken::Event(key, _, Err(error)) => {
                    self.broken.get_or_insert(Failure::Store {
                        key: key.to_string(),
                        source: error.error,
                    });
                }
            }
        }
    }

    fn fail(&mut self, entry: &SegmentEntry, step: u64, error: &PutError) {
        let why = format!(
            "segment {} of {} was not stored: {}",
            entry.number,
            entry.artifact,
            crate::collect::describe(&error.error)
        );
        if let Some(current) = &mut self.current
            && current.outcome.step == step
        {
            current.failed.get_or_insert(why);
            current.not_stored.insert(entry.number);
        } else if let Some(outcome) = self.waiting.iter_mut().find(|outcome| outcome.step == step)
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
        while self
            .waiting
            .front()
            .is_some_and(|outcome| self.put.is_answered(outcome.step))
        {
            if let Some(outcome) = self.waiting.pop_front() {
                self.put.of_step.remove(&outcome.step);
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
        self.spare.clear();
        let Some(chain) = self.chain.take() else {
            return Err(Failure::Format(Error::Chain(
                "the chain was never opened".to_owned(),
            )));
        };
        self.object(&Key::Sums, sums(&chain).into_bytes())?;
        let manifest = self.writer.seal(Manifest::of(&chain)?.payload()?);
        self.object(&Key::Manifest, manifest)?;
        let end = |source| Failure::Store {
            key: "its end".to_owned(),
            source,
        };
        self.store.finish().map_err(end)?;
        Ok(chain)
    }
}

/// How a step stands in the chain.
fn step(step: &Step) -> Result<chain::Step, Error> {
    Ok(chain::Step {
        kind: step.kind.parse()?,
        deadline_s: step.deadline.as_secs(),
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
    let mut buffer = [0; 8 << 10];
    loop {
        let n = io::Read::read(&mut file, &mut buffer)?;
        match buffer.get(..n) {
            Some(bytes) if n > 0 => sha256.update(bytes),
            _ => return Ok(Hash(sha256.finalize().into())),
        }
    }
}
