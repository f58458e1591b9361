//! Worker processes: the agent runs itself again for everything that may hang or crash on a hostile host.
//!
//! A worker runs the steps one after another and writes messages to a pipe. When it falls silent or dies, the parent
//! records what it was at, leaves it (it may sit in an uninterruptible sleep that no signal ends, so nobody waits for
//! it), and starts another at that very item, with the field that it was lost on left out. A worker has no other
//! descriptor of its parent's: one that cannot die keeps nothing open that anybody waits on.
//!
//! A worker may work in several lanes (threads), each at an item of its own; what hangs one of them shows when the others
//! have run out of work.
//!
//! The pipe: `u8 tag, u8 lane, u32 length (little endian), body`; tag `R` carries a record as it will be stored, tag `M` a
//! [`Message`] as JSON. The parent bounds every length: a worker may have been taken over by what it reads.

use crate::{cancel::Cancel, collect::Usage};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeSet, VecDeque},
    io::{self, Read, Write},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::{Problem, Status},
    frames::MAX_FRAME,
    text::Text,
};

/// A worker that says nothing for this long is taken to hang.
pub const SILENCE: Duration = Duration::from_secs(2);
/// Workers that may be lost in one step before it is given up.
const MAX_LOST: u32 = 64;
/// Different problems kept for one outcome; further ones are counted together.
const MAX_PROBLEMS: usize = 32;

/// What a worker is to do; one line of JSON on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Where the host's root is mounted.
    pub root: PathBuf,
    /// Steps: place in the plan, kind.
    pub steps: Vec<(u64, String)>,
    /// Threads for the kinds that can use them.
    pub lanes: u8,
    /// As little as can be is to stay behind in the kernel's memory, which is captured next.
    pub sparing: bool,
    /// Where to take up the first of them, lane by lane.
    pub resume: Vec<Resume>,
    /// Mounts that a worker hung on.
    pub avoid_mounts: BTreeSet<u64>,
    /// Fields that a worker hung on where no mount is to blame: processes that are blocked are not asked for them again.
    pub hung: BTreeSet<String>,
    /// Processes seen so far: id and start.
    pub seen: Vec<(u32, u64)>,
}

/// Where a lost worker's successor takes up.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Resume {
    /// The first item to do.
    pub key: u64,
    /// Fields of that item to leave out.
    pub avoid: Vec<String>,
}

/// What a worker says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Message {
    /// A step begins.
    Begin {
        /// Its place in the plan.
        step: u64,
    },
    /// An item of it begins.
    Item {
        /// Its rising key.
        key: u64,
        /// What it is, for a person.
        name: Text,
    },
    /// What may hang is read next.
    Touching {
        /// The field.
        field: String,
        /// The mount that it lies on.
        mount: Option<u64>,
    },
    /// A long read goes on.
    Alive,
    /// The item is done.
    Done,
    /// Something could not be read.
    Problem(Problem),
    /// Something to know.
    Note(String),
    /// A process of the first look.
    Seen {
        /// Its id.
        pid: u32,
        /// Its start.
        start_ticks: u64,
    },
    /// A step is over.
    End {
        /// Its place in the plan.
        step: u64,
        /// `Complete` or `Unsupported`: the parent knows of the problems.
        status: Status,
        /// Why it is unsupported.
        reason: Option<String>,
    },
    /// The worker is done.
    Bye(Usage),
}

/// Writes one frame of the pipe.
pub fn write_frame(pipe: &mut impl Write, tag: u8, lane: u8, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    pipe.write_all(&[tag, lane])?;
    pipe.write_all(&length.to_le_bytes())?;
    pipe.write_all(body)
}

impl Message {
    /// Writes it to the pipe, without flushing.
    pub fn write(&self, pipe: &mut impl Write, lane: u8) -> io::Result<()> {
        write_frame(
            pipe,
            b'M',
            lane,
            &serde_json::to_vec(self).map_err(io::Error::other)?,
        )
    }
}

enum What {
    Record(Vec<u8>),
    Message(Message),
}

struct Heard {
    lane: u8,
    what: What,
}

fn hear(pipe: &mut impl Read) -> io::Result<Heard> {
    let (mut tag, mut lane, mut length) = ([0; 1], [0; 1], [0; 4]);
    pipe.read_exact(&mut tag)?;
    pipe.read_exact(&mut lane)?;
    pipe.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_FRAME {
        return Err(io::Error::other("a worker sent more than a frame may hold"));
    }
    let mut body = vec![0; length];
    pipe.read_exact(&mut body)?;
    let what = match tag {
        [b'R'] if !body.contains(&b'\n') => What::Record(body),
        [b'M'] => What::Message(serde_json::from_slice(&body).map_err(io::Error::other)?),
        _ => return Err(io::Error::other("a worker sent what is no message")),
    };
    let [lane] = lane;
    Ok(Heard { lane, what })
}

struct Worker {
    child: Child,
    heard: Receiver<io::Result<Vec<Heard>>>,
    /// What was heard and not yet acted upon.
    pending: VecDeque<Heard>,
}

/// How long the reader lets a worker fill the pipe. A worker tells of everything that it touches, thousands of times a
/// second; a reader that woke for each would cost the host more than the collecting does.
const GATHER: Duration = Duration::from_millis(2);

/// Reads the pipe until it ends; hands over what has come, in batches of about so many bytes.
fn read_pipe(output: ChildStdout, room: usize, tell: &SyncSender<io::Result<Vec<Heard>>>) {
    let mut output = io::BufReader::with_capacity(room, output);
    loop {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let end = loop {
            match hear(&mut output) {
                Ok(heard) => {
                    if let What::Record(line) = &heard.what {
                        bytes += line.len();
                    }
                    batch.push(heard);
                }
                Err(error) => break Some(error),
            }
            if output.buffer().is_empty() || bytes > room {
                break None;
            }
        };
        if tell.send(Ok(batch)).is_err() {
            return;
        }
        if let Some(error) = end {
            let _ = tell.send(Err(error));
            return;
        }
        if bytes <= room {
            std::thread::sleep(GATHER);
        }
    }
}

impl Worker {
    fn start(job: &Job) -> io::Result<Self> {
        let mut child = Command::new(crate::sys::own_program()?)
            .arg("worker")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        // What lies in a pipe and on the way from it is the host's memory, too: on a small host it stays what a pipe is made with.
        let small = crate::sys::total_memory(&job.root).is_some_and(crate::memory::is_small);
        let room = if small { 32 << 10 } else { 256 << 10 };
        if !small {
            crate::sys::widen_pipe(&output, 1 << 20);
        }
        let job = serde_json::to_vec(job)?;
        // Few: a batch may hold megabytes, and the store may be slower than the worker.
        let (tell, heard) = sync_channel(4);
        let reader = std::thread::Builder::new()
            .name("pipe".to_owned())
            .stack_size(128 << 10);
        reader.spawn(move || {
            // A worker may be stopped before it has read its job, and a parent that waited for that would wait for ever.
            // One that is gone already shows at the other end.
            let _ = input.write_all(&job);
            drop(input);
            read_pipe(output, room, &tell);
        })?;
        Ok(Worker {
            child,
            heard,
            pending: VecDeque::new(),
        })
    }

    /// The next thing heard within `patience`.
    fn hear(&mut self, patience: Duration) -> Result<io::Result<Heard>, RecvTimeoutError> {
        let until = Instant::now() + patience;
        loop {
            if let Some(heard) = self.pending.pop_front() {
                return Ok(Ok(heard));
            }
            match self
                .heard
                .recv_timeout(until.saturating_duration_since(Instant::now()))?
            {
                Ok(batch) => self.pending.extend(batch),
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// How a worker whose pipe is closed came to its end. It is given a moment to be gone, never more.
    fn fate(&mut self) -> String {
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(Some(status)) => return crate::sys::exit_reason(status),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(error) => return error.to_string(),
            }
        }
        let _ = self.child.kill();
        "closed its pipe".to_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.try_wait();
        }
    }
}

/// One step as the supervisor is given it.
pub struct Task {
    /// Its place in the plan.
    pub step: u64,
    /// The kind of its records.
    pub kind: String,
    /// The collector that reads it.
    pub collector: &'static str,
    /// Its deadline.
    pub deadline: Duration,
}

/// What the supervisor tells its caller.
pub enum Event<'a> {
    /// A step begins.
    Begin(&'a Task),
    /// A record of the step under way, as it will be stored.
    Record(Vec<u8>),
    /// The step is over.
    End(&'a Task, End),
}

/// How a step ended.
#[derive(Debug)]
pub struct End {
    /// How.
    pub status: Status,
    /// Why, where it is not complete.
    pub reason: Option<String>,
    /// What could not be read.
    pub problems: Vec<Problem>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// What the workers cost.
#[derive(Debug, Default)]
pub struct Cost {
    /// Their process ids.
    pub pids: Vec<u32>,
    /// What those told that came to a proper end: sums, and the largest resident memory.
    pub usage: Usage,
}

/// What is known across steps, whoever runs them.
#[derive(Default)]
pub struct Known {
    /// Processes seen: id and start.
    seen: Vec<(u32, u64)>,
    avoided: Avoid,
}

/// What workers have hung on, across steps.
#[derive(Default)]
struct Avoid {
    mounts: BTreeSet<u64>,
    fields: BTreeSet<String>,
}

/// State of the step under way, across the workers that run it.
struct Progress {
    started: Instant,
    /// Time that the store took from the step, which is not the host's fault.
    stored: Duration,
    begun: bool,
    lanes: Vec<Lane>,
    problems: Vec<Problem>,
    notes: Vec<String>,
    lost: u32,
}

/// A field that is about to be read, and the mount that it lies on.
type Field = (String, Option<u64>);
/// An item, and the field of it that was being read.
type At = (Text, Option<Field>);

/// What one thread of a worker is at.
#[derive(Default)]
struct Lane {
    item: Option<(u64, Text)>,
    records_of_item: u64,
    field: Option<Field>,
    /// Times that a worker was lost at the first item of `resume`.
    losses: u32,
    resume: Resume,
}

impl Lane {
    /// Decides where this lane of the next worker starts; says what this one was at, if it was at anything.
    fn lost(&mut self, hung: bool) -> Option<At> {
        let field = self.field.take();
        let (key, name) = self.item.take()?;
        if self.records_of_item > 0 {
            // Its first records are here, and would be here twice; what more it had to give is lost.
            self.losses = 0;
            self.resume = Resume {
                key: key.saturating_add(1),
                avoid: Vec::new(),
            };
            return Some((name, field));
        }
        if key != self.resume.key {
            self.losses = 0;
            self.resume = Resume {
                key,
                avoid: Vec::new(),
            };
        }
        self.losses += 1;
        match &field {
            // A death from outside says nothing of the item: it is read once more. What hangs, hangs again.
            _ if !hung && self.losses == 1 => (),
            Some((field, _)) if !self.resume.avoid.contains(field) => self.resume.avoid.push(field.clone()),
            _ => {
                self.losses = 0;
                self.resume = Resume {
                    key: key.saturating_add(1),
                    avoid: Vec::new(),
                };
            }
        }
        Some((name, field))
    }
}

impl Progress {
    fn new(lanes: u8) -> Self {
        Progress {
            started: Instant::now(),
            stored: Duration::ZERO,
            begun: false,
            lanes: (0..lanes.max(1)).map(|_| Lane::default()).collect(),
            problems: Vec::new(),
            notes: Vec::new(),
            lost: 0,
        }
    }

    /// Time that the collecting has taken.
    fn elapsed(&self) -> Duration {
        self.started.elapsed().saturating_sub(self.stored)
    }

    fn problem(&mut self, problem: Problem) {
        let alike =
            |p: &&mut Problem| p.what == problem.what && p.errno == problem.errno && p.error == problem.error;
        if let Some(known) = self.problems.iter_mut().find(alike) {
            known.count = known.count.saturating_add(problem.count);
        } else if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else if let Some(last) = self.problems.last_mut() {
            last.what = "others".to_owned();
            last.errno = None;
            last.error = "further problems of other kinds".to_owned();
            last.count = last.count.saturating_add(problem.count);
        }
    }

    /// Takes note of a lost worker.
    fn lost(&mut self, fate: &str, avoid: &mut Avoid, hung: bool) {
        self.lost += 1;
        let mut at: Vec<At> = Vec::new();
        for lane in &mut self.lanes {
            at.extend(lane.lost(hung));
        }
        if at.is_empty() {
            at.push((Text::from("between two items"), None));
        }
        for (name, field) in at {
            match &field {
                Some((_, Some(mount))) if hung => _ = avoid.mounts.insert(*mount),
                Some((field, None)) if hung => _ = avoid.fields.insert(field.clone()),
                _ => (),
            }
            let what = field.map_or_else(|| "item".to_owned(), |(field, _)| field);
            self.problem(Problem {
                source: Text([name.as_bytes(), b" ", what.as_bytes()].concat()),
                what,
                errno: None,
                error: format!("the worker that read it {fate}"),
                count: 1,
            });
        }
    }

    fn end(self, status: Status, reason: Option<String>) -> End {
        let status = match status {
            Status::Complete if !self.problems.is_empty() => Status::Partial,
            status => status,
        };
        End {
            status,
            reason,
            problems: self.problems,
            notes: self.notes,
        }
    }
}

enum Turn {
    Go,
    StepDone(End),
    WorkerDone,
    Lost { fate: String, hung: bool },
}

/// Runs `tasks` in order in as many workers as it takes. Every task gets exactly one `Begin` and one `End`, whatever
/// happens, except that `each` may end everything by an error of its own.
pub fn supervise<E>(
    root: &std::path::Path,
    lanes: u8,
    sparing: bool,
    tasks: &[Task],
    cancel: &Cancel,
    known: &mut Known,
    mut each: impl FnMut(Event) -> Result<(), E>,
) -> Result<Cost, E> {
    let mut cost = Cost::default();
    let Known { seen, avoided } = known;
    let mut worker: Option<Worker> = None;
    let mut remaining = tasks.iter();
    let mut behind = tasks;
    while let Some(task) = remaining.next() {
        let mut progress = Progress::new(lanes);
        each(Event::Begin(task))?;
        let end = loop {
            if let Some(why) = cancel.requested() {
                let status = if progress.begun {
                    Status::Partial
                } else {
                    Status::Skipped
                };
                worker = None;
                break progress.end(status, Some(format!("stopped: {why}")));
            }
            let Some(current) = &mut worker else {
                let steps = behind.iter().map(|t| (t.step, t.collector.to_owned())).collect();
                let job = Job {
                    root: root.to_owned(),
                    steps,
                    sparing,
                    lanes,
                    resume: progress.lanes.iter().map(|lane| lane.resume.clone()).collect(),
                    avoid_mounts: avoided.mounts.clone(),
                    hung: avoided.fields.clone(),
                    seen: seen.clone(),
                };
                match Worker::start(&job) {
                    Ok(started) => {
                        cost.pids.push(started.child.id());
                        worker = Some(started);
                        continue;
                    }
                    Err(error) => {
                        break progress.end(
                            Status::Failed,
                            Some(format!("no worker could be started: {error}")),
                        );
                    }
                }
            };
            match turn(current, task, &mut progress, &mut cost, seen, &mut each)? {
                Turn::Go => (),
                Turn::StepDone(end) => break end,
                Turn::WorkerDone => worker = None,
                Turn::Lost { fate, hung } => {
                    worker = None;
                    progress.lost(&fate, avoided, hung);
                    if progress.lost >= MAX_LOST || (!progress.begun && progress.lost >= 3) {
                        let why = format!("{} workers were lost; the last one {fate}", progress.lost);
                        break progress.end(Status::Failed, Some(why));
                    }
                }
            }
            if progress.elapsed() >= task.deadline {
                // Its worker is in the middle of this step: the next step gets a new one.
                worker = None;
                let why = format!("the deadline of {} s came first", task.deadline.as_secs());
                break progress.end(Status::TimedOut, Some(why));
            }
        };
        if end.status == Status::Failed {
            worker = None;
        }
        each(Event::End(task, end))?;
        behind = remaining.as_slice();
    }
    // The last worker's own account of itself, if it gives one soon.
    if let Some(mut last) = worker {
        if let Ok(Ok(Heard {
            what: What::Message(Message::Bye(usage)),
            ..
        })) = last.hear(Duration::from_millis(200))
        {
            cost.usage.add(usage);
        }
        last.fate();
    }
    Ok(cost)
}

/// Hears one message of the worker, or its silence.
fn turn<E>(
    worker: &mut Worker,
    task: &Task,
    progress: &mut Progress,
    cost: &mut Cost,
    seen: &mut Vec<(u32, u64)>,
    each: &mut impl FnMut(Event) -> Result<(), E>,
) -> Result<Turn, E> {
    let patience = SILENCE.min(task.deadline.saturating_sub(progress.elapsed()));
    let (lane, message) = match worker.hear(patience) {
        Ok(Ok(Heard {
            lane,
            what: What::Record(line),
        })) => {
            if let Some(lane) = progress.lanes.get_mut(usize::from(lane)) {
                lane.records_of_item += 1;
            }
            let handed_over = Instant::now();
            each(Event::Record(line))?;
            progress.stored += handed_over.elapsed();
            return Ok(Turn::Go);
        }
        Ok(Ok(Heard {
            lane,
            what: What::Message(message),
        })) => (lane, message),
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Turn::Lost {
                fate: worker.fate(),
                hung: false,
            });
        }
        Ok(Err(error)) => {
            let fate = format!(
                "was ended by the agent: {}",
                stillframe_evidence::text::printable(error.to_string().as_bytes())
            );
            return Ok(Turn::Lost { fate, hung: false });
        }
        Err(RecvTimeoutError::Disconnected) => {
            return Ok(Turn::Lost {
                fate: worker.fate(),
                hung: false,
            });
        }
        Err(RecvTimeoutError::Timeout) if patience < SILENCE => return Ok(Turn::Go),
        Err(RecvTimeoutError::Timeout) => {
            return Ok(Turn::Lost {
                fate: format!("said nothing for {} s", SILENCE.as_secs()),
                hung: true,
            });
        }
    };
    match message {
        Message::Begin { step } if step == task.step => progress.begun = true,
        Message::Item { key, name } => {
            if let Some(lane) = progress.lanes.get_mut(usize::from(lane)) {
                lane.item = Some((key, name));
                lane.records_of_item = 0;
                lane.field = None;
            }
        }
        Message::Touching { field, mount } => {
            if let Some(lane) = progress.lanes.get_mut(usize::from(lane)) {
                lane.field = Some((field, mount));
            }
        }
        Message::Alive => (),
        Message::Done => {
            if let Some(lane) = progress.lanes.get_mut(usize::from(lane))
                && let Some((key, _)) = lane.item.take()
            {
                lane.resume = Resume {
                    key: key.saturating_add(1),
                    avoid: Vec::new(),
                };
            }
        }
        Message::Problem(problem) => progress.problem(problem),
        Message::Note(note) => {
            if progress.notes.len() < MAX_PROBLEMS {
                progress.notes.push(note);
            }
        }
        Message::Seen { pid, start_ticks } => seen.push((pid, start_ticks)),
        Message::End { step, status, reason } if step == task.step => {
            let finished = std::mem::replace(progress, Progress::new(0));
            return Ok(Turn::StepDone(finished.end(status, reason)));
        }
        Message::Bye(usage) => {
            cost.usage.add(usage);
            return Ok(Turn::WorkerDone);
        }
        Message::Begin { .. } | Message::End { .. } => {
            let fate = "spoke of another step and was ended by the agent".to_owned();
            return Ok(Turn::Lost { fate, hung: false });
        }
    }
    Ok(Turn::Go)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(what: &str, error: &str) -> Problem {
        Problem {
            what: what.into(),
            source: Text::from("/x"),
            errno: None,
            error: error.into(),
            count: 1,
        }
    }

    #[test]
    fn alike_problems_are_counted_and_their_number_is_bounded() {
        let mut progress = Progress::new(1);
        for i in 0..1000 {
            progress.problem(problem("exe", "Permission denied"));
            progress.problem(problem("x", &i.to_string()));
        }
        assert_eq!(progress.problems[0].count, 1000);
        assert_eq!(progress.problems.len(), MAX_PROBLEMS);
        assert_eq!(progress.problems.iter().map(|p| p.count).sum::<u64>(), 2000);
    }

    fn at(lane: &mut Lane, key: u64, field: Option<(&str, u64)>) {
        lane.item = Some((key, Text::from(&format!("/proc/{key}"))));
        lane.records_of_item = 0;
        lane.field = field.map(|(f, mount)| (f.to_owned(), Some(mount)));
    }

    #[test]
    fn what_hung_is_left_out_at_once_and_its_mount_with_it() {
        let mut progress = Progress::new(2);
        let mut avoid = Avoid::default();
        at(&mut progress.lanes[1], 7, Some(("image", 42)));
        progress.lanes[0].resume.key = 7;
        progress.lost("said nothing for 2 s", &mut avoid, true);
        assert_eq!(
            (progress.lanes[1].resume.key, &progress.lanes[1].resume.avoid[..]),
            (7, &["image".to_owned()][..])
        );
        assert_eq!(
            progress.lanes[0].resume.key, 7,
            "a lane between two items goes on where it was"
        );
        assert_eq!(
            (
                progress.problems.len(),
                progress.problems[0].source.to_string().as_str()
            ),
            (1, "/proc/7 image")
        );
        assert!(avoid.mounts.contains(&42));
        at(&mut progress.lanes[1], 9, None);
        progress.lanes[1].records_of_item = 1;
        progress.lost("was killed by signal 9", &mut avoid, false);
        assert_eq!(
            progress.lanes[1].resume.key, 10,
            "records that are here are not collected twice"
        );
        assert_eq!(
            progress.problems.len(),
            2,
            "and the rest of that item is named as lost"
        );
        at(&mut progress.lanes[1], 11, None);
        progress.lost("said nothing for 2 s", &mut avoid, true);
        assert_eq!(
            progress.lanes[1].resume.key, 12,
            "an item that hangs without a field to leave out is passed over"
        );
    }

    #[test]
    fn a_killed_worker_s_item_is_read_again_then_without_the_field_then_not_at_all() {
        let mut lane = Lane::default();
        let mut seen = Vec::new();
        for _ in 0..4 {
            at(&mut lane, 7, Some(("maps", 1)));
            lane.lost(false);
            seen.push((lane.resume.key, lane.resume.avoid.len()));
        }
        assert_eq!(seen, [(7, 0), (7, 1), (8, 0), (7, 0)]);
    }

    #[test]
    fn a_worker_that_speaks_nonsense_is_not_believed() {
        for bytes in [
            &b"M\0\xff\xff\xff\xff"[..],
            b"R\0\x03\0\0\0a\nb",
            b"X\0\0\0\0\0",
            b"M\0\x02\0\0\0{}",
        ] {
            assert!(hear(&mut &bytes[..]).is_err());
        }
    }
}
