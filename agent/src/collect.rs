//! What a collector is, and what it is given: a way to say what it found, what it could not read, and what it is about
//! to touch. This is the worker's side of the pipe; the parent's is in [`crate::worker`].

use crate::worker::{Job, Message, Resume};
use jiff::Timestamp;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::{Problem, Status},
    frames::MAX_FRAME,
    records::{Data, FieldError, Record},
    text::{Text, write_json},
};

/// A kind of volatile data and how it is read on this platform.
pub struct Collector {
    /// Its name.
    pub kind: &'static str,
    /// One line for a person.
    pub about: &'static str,
    /// When the step is ended with what it has.
    pub deadline: Duration,
    /// Reads it all.
    pub collect: fn(&mut Collection) -> Result<(), Unsupported>,
}

/// This kernel or this platform does not have what was asked for; the string says what is missing.
pub struct Unsupported(pub String);

/// What a worker keeps between the steps that it runs.
#[derive(Default)]
pub struct Memory {
    /// Process id and start of the first look, so that the second can tell a reused id.
    pub seen: BTreeMap<u32, u64>,
    /// What the platform's collectors share.
    pub look: crate::sys::Look,
}

/// The worker's end of the pipe.
pub type Pipe = Mutex<Box<dyn Write + Send>>;

/// Messages are gathered up to this many bytes before they are written.
const GATHERED: usize = 32 << 10;

/// What a collector works with.
pub struct Collection<'a> {
    job: &'a Job,
    pipe: &'a Pipe,
    lane: u8,
    /// Item at which this worker takes over from one that was lost, and the fields of it that are not to be touched.
    resume: &'a [Resume],
    item: u64,
    gathered: Vec<u8>,
    /// The record under way; one buffer for all of them.
    line: Vec<u8>,
    alive: Instant,
    /// What the steps share.
    pub memory: Memory,
}

/// A field that a lost worker was at is not read again.
#[derive(Debug)]
pub struct Avoided;

impl<'a> Collection<'a> {
    fn new(job: &'a Job, pipe: &'a Pipe, lane: u8, resume: &'a [Resume], memory: Memory) -> Self {
        Collection {
            job,
            pipe,
            lane,
            resume,
            item: 0,
            gathered: Vec::with_capacity(GATHERED),
            line: Vec::new(),
            alive: Instant::now(),
            memory,
        }
    }

    /// Where the host's root is: `/`, or where a container has it mounted.
    pub fn root(&self) -> &'a Path {
        &self.job.root
    }

    /// Whether as little as can be is to stay behind in the kernel's memory.
    pub fn is_sparing(&self) -> bool {
        self.job.sparing
    }

    /// A path of the host, given without its leading slash.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.job.root.join(path)
    }

    /// Runs `work` in every lane at once and returns what each gives, with what each remembered. `work` is told its lane and
    /// how many there are, and does the items whose number, divided by that, leaves its lane.
    pub fn in_lanes<R: Send>(
        &mut self,
        work: impl Fn(&mut Collection, u64, u64) -> R + Sync,
    ) -> Vec<(R, Memory)> {
        self.flush();
        let (job, pipe, resume, lanes) = (self.job, self.pipe, self.resume, self.job.lanes.max(1));
        let run = |lane: u8| {
            if lane > 0 {
                crate::sys::own_descriptors();
            }
            let mut collection = Collection::new(job, pipe, lane, resume, Memory::default());
            let result = work(&mut collection, u64::from(lane), u64::from(lanes));
            collection.flush();
            (result, collection.memory)
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..lanes).map(|lane| scope.spawn(move || run(lane))).collect();
            let first = run(0);
            // A lane that panics takes the worker with it: the parent knows what to do.
            let rest = others
                .into_iter()
                .map(|lane| lane.join().unwrap_or_else(|_| std::process::abort()));
            std::iter::once(first).chain(rest).collect()
        })
    }

    fn resume(&self) -> Option<&'a Resume> {
        self.resume.get(usize::from(self.lane))
    }

    /// Begins the item `key`; false when a worker before this one has done it. Keys must rise within a lane.
    pub fn item(&mut self, key: u64, name: impl AsRef<[u8]>) -> bool {
        if self.resume().is_some_and(|resume| key < resume.key) {
            return false;
        }
        self.item = key;
        self.send(&Message::Item {
            key,
            name: Text(name.as_ref().to_vec()),
        });
        true
    }

    /// Ends the item under way: a successor need not look at it again.
    pub fn done(&mut self) {
        self.send(&Message::Done);
    }

    /// Says that `field` of this item is read next and that reading it may hang. An error when a worker has been lost
    /// there before. `mount` is where the file lies, when that is known.
    pub fn touching(&mut self, field: &'static str, mount: Option<u64>) -> Result<(), Avoided> {
        let lost = self
            .resume()
            .is_some_and(|r| r.key == self.item && r.avoid.iter().any(|f| f == field));
        if lost || mount.is_some_and(|m| self.job.avoid_mounts.contains(&m)) {
            return Err(Avoided);
        }
        self.send(&Message::Touching {
            field: field.to_owned(),
            mount,
        });
        self.flush();
        Ok(())
    }

    /// True when a worker has hung on `field` of some process: those that are blocked as well are then left alone.
    pub fn hung_on(&self, field: &str) -> bool {
        self.job.hung.contains(field)
    }

    /// Says that a long read goes on.
    pub fn alive(&mut self) {
        if self.alive.elapsed() > Duration::from_millis(200) {
            self.alive = Instant::now();
            self.send(&Message::Alive);
            self.flush();
        }
    }

    /// A record. What it could not read counts against the outcome, unless it had simply gone.
    pub fn record(
        &mut self,
        source: impl AsRef<[u8]>,
        read_at: Timestamp,
        data: Data,
        errors: Vec<FieldError>,
    ) {
        for error in errors.iter().filter(|e| !is_gone(e.errno)) {
            self.send(&Message::Problem(Problem {
                what: error.field.clone(),
                source: error.source.clone(),
                errno: error.errno,
                error: error.error.clone(),
                count: 1,
            }));
        }
        let record = Record {
            source: Text(source.as_ref().to_vec()),
            read_at,
            errors,
            data,
        };
        let mut line = std::mem::take(&mut self.line);
        for record in record.in_parts() {
            match write_json(&record, &mut line) {
                Ok(()) if line.len() < MAX_FRAME => self.gather(b'R', &line),
                Ok(()) => self.problem(
                    "record",
                    &record.source.0,
                    None,
                    format!("{} bytes, more than fit", line.len()),
                ),
                Err(error) => self.problem("record", &record.source.0, None, error),
            }
        }
        // One giant must not be held until the end.
        line.clear();
        line.shrink_to(1 << 20);
        self.line = line;
    }

    /// Something that could not be read and that no record stands for.
    pub fn problem(
        &mut self,
        what: &str,
        source: impl AsRef<[u8]>,
        errno: Option<i32>,
        error: impl std::fmt::Display,
    ) {
        self.send(&Message::Problem(Problem {
            what: what.to_owned(),
            source: Text(source.as_ref().to_vec()),
            errno,
            error: error.to_string(),
            count: 1,
        }));
    }

    /// The same, from an I/O error.
    pub fn unread(&mut self, what: &str, source: impl AsRef<[u8]>, error: &io::Error) {
        self.problem(what, source, error.raw_os_error(), describe(error));
    }

    /// Something a reader of the outcome should know.
    pub fn note(&mut self, note: String) {
        self.send(&Message::Note(note));
    }

    /// Remembers a process, here and with the parent, in case this worker is lost.
    pub fn seen(&mut self, pid: u32, start_ticks: u64) {
        self.memory.seen.insert(pid, start_ticks);
        self.send(&Message::Seen { pid, start_ticks });
    }

    fn send(&mut self, message: &Message) {
        // Writing to memory fails for no message that there is.
        let _ = message.write(&mut self.gathered, self.lane);
        self.flush_full();
    }

    fn gather(&mut self, tag: u8, body: &[u8]) {
        let _ = crate::worker::write_frame(&mut self.gathered, tag, self.lane, body);
        self.flush_full();
    }

    fn flush_full(&mut self) {
        if self.gathered.len() >= GATHERED {
            self.flush();
        }
    }

    /// Whole messages at a time: lanes share the pipe.
    fn flush(&mut self) {
        let written = self
            .pipe
            .lock()
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
            .and_then(|mut pipe| {
                pipe.write_all(&self.gathered)?;
                pipe.flush()
            });
        if written.is_err() {
            // A worker without a parent has nothing left to do.
            std::process::exit(0);
        }
        self.gathered.clear();
        self.gathered.shrink_to(4 * GATHERED);
    }
}

/// The error of the system, without the ` (os error 13)` that the standard library appends.
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

/// True for the errors that mean that the thing had gone: ENOENT, ESRCH.
pub fn is_gone(errno: Option<i32>) -> bool {
    matches!(errno, Some(2 | 3))
}

/// Collects the fields that could not be read, for a record. Places are given relative to a folder, so that a path is made
/// only for what failed.
#[derive(Default)]
pub struct Errors {
    folder: Vec<u8>,
    /// What could not be read.
    pub list: Vec<FieldError>,
}

impl Errors {
    /// For places in `folder`.
    pub fn below(folder: &Path) -> Self {
        Errors {
            folder: folder.as_os_str().as_encoded_bytes().to_vec(),
            list: Vec::new(),
        }
    }

    /// The value, or nothing and an entry.
    pub fn keep<T>(&mut self, field: &str, place: impl AsRef<[u8]>, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let place = place.as_ref();
                let apart: &[u8] = if self.folder.is_empty() || place.is_empty() {
                    b""
                } else {
                    b"/"
                };
                self.list.push(FieldError {
                    field: field.to_owned(),
                    source: Text([&self.folder, apart, place].concat()),
                    errno: error.raw_os_error(),
                    error: describe(&error),
                });
                None
            }
        }
    }

    /// The same, where absence is an answer: ENOENT gives nothing and no entry.
    pub fn keep_present<T>(
        &mut self,
        field: &str,
        place: impl AsRef<[u8]>,
        result: io::Result<T>,
    ) -> Option<T> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            result => self.keep(field, place, result),
        }
    }

    /// A field that a worker was lost on.
    pub fn avoided(&mut self, field: &str, place: impl AsRef<[u8]>) {
        let error = io::Error::other("not read: a worker that read here was lost");
        let _: Option<()> = self.keep(field, place, Err(error));
    }
}

/// What a worker tells of itself when it is done.
#[derive(Debug, Clone, Copy, Default, Serialize, serde::Deserialize)]
pub struct Usage {
    /// Processor time, microseconds.
    pub cpu_us: Option<u64>,
    /// Largest resident memory, bytes.
    pub peak_resident: Option<u64>,
    /// Bytes read by system calls.
    pub read: Option<u64>,
}

impl Usage {
    /// Adds what one more worker cost: sums, and the largest resident memory.
    pub fn add(&mut self, one: Usage) {
        let plus = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
            (a, b) => a.or(b),
        };
        self.cpu_us = plus(self.cpu_us, one.cpu_us);
        self.read = plus(self.read, one.read);
        self.peak_resident = self.peak_resident.max(one.peak_resident);
    }
}

/// The worker's whole life: reads its job from `input`, runs its steps, writes messages to `output`.
pub fn work(input: impl io::Read, output: Box<dyn Write + Send>) -> io::Result<()> {
    let job: Job = serde_json::from_reader(input).map_err(io::Error::other)?;
    // Another root has a procfs of its own.
    if job.sparing && job.root == Path::new("/") {
        crate::sys::read_by_own_instance();
    }
    let pipe: Pipe = Mutex::new(output);
    let mut memory = Memory {
        seen: job.seen.iter().copied().collect(),
        ..Memory::default()
    };
    let mut resume = job.resume.as_slice();
    for (index, kind) in &job.steps {
        let mut collection = Collection::new(&job, &pipe, 0, resume, memory);
        collection.send(&Message::Begin { step: *index });
        collection.flush();
        let result = match crate::sys::COLLECTORS.iter().find(|c| c.kind == kind.as_str()) {
            Some(collector) => (collector.collect)(&mut collection),
            None => Err(Unsupported(format!("this platform does not collect {kind}"))),
        };
        let (status, reason) = match result {
            Ok(()) => (Status::Complete, None),
            Err(Unsupported(why)) => (Status::Unsupported, Some(why)),
        };
        collection.send(&Message::End {
            step: *index,
            status,
            reason,
        });
        collection.flush();
        memory = collection.memory;
        resume = &[];
    }
    let mut last = Collection::new(&job, &pipe, 0, &[], memory);
    last.send(&Message::Bye(crate::sys::usage()));
    last.flush();
    Ok(())
}
