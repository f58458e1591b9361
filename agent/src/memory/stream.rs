//! From a source to segments: threads that each read, hash and compress a frame at a time, and one place that puts the frames
//! in order. No hash runs over the whole, so nothing is serial but the order.

use super::{PAGE, Piece, Source, join};
use crate::{
    cancel::Cancel,
    sys::{KeyPages, LockedBuffer},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::RangeAccount,
    frames::{Frame, Framer},
    layout::Artifact,
    records::memory::{Gap, MemoryGap},
    segments::{FramePacker, Packed},
};

/// The levels of zstd between which the stream moves: from one that outruns most stores to one that a slow link is worth.
const LEVELS: [i32; 4] = [1, 2, 3, 5];

/// How the stream may use the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Threads that read, hash and compress.
    pub threads: usize,
    /// Bytes of a frame.
    pub frame: usize,
    /// Bytes that a segment usually has at most as stored: what its buffer starts with.
    pub segment: usize,
    /// The highest level of zstd that its memory is worth here.
    pub level: i32,
    /// Bytes of plaintext a second, at most.
    pub rate: Option<u64>,
    /// When it ends, finished or not.
    pub until: Instant,
}

/// What the caller answers.
pub enum Answer {
    /// Go on; with a buffer of a segment that has been stored, where there is one.
    Go(Option<Vec<u8>>),
    /// The store takes no more.
    Stop,
}

/// What the caller is told, in order.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one at a time, and it is moved once"
)]
pub enum Told<'a> {
    /// A segment is ready.
    Segment(Packed),
    /// So many bytes are packed, and these gaps were in them.
    Packed(u64, &'a [MemoryGap]),
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Every range that was expected or found.
    pub ranges: Vec<RangeAccount>,
    /// Why it ended before everything was read.
    pub ended: Option<String>,
    /// True when that was its deadline.
    pub late: bool,
    /// Bytes packed.
    pub bytes: u64,
    /// Addresses and lengths of the buffers.
    pub buffers: Vec<(u64, u64)>,
    accounts: BTreeMap<u64, RangeAccount>,
    /// What the last segments hold, by their number: until the store has answered, they may be missing.
    recent: VecDeque<(u64, Vec<(u64, Tally)>)>,
}

/// Segments whose store may not have answered when the stream ends, and some more.
const RECENT: usize = 16;

impl Summary {
    /// Closes the books. `failed` is the first segment that the store did not take: it and those behind it are missing.
    pub fn close(&mut self, failed: Option<u64>) {
        for (number, tallies) in std::mem::take(&mut self.recent) {
            if failed.is_none_or(|failed| number < failed) {
                self.book(tallies);
            }
        }
        for account in self.accounts.values_mut() {
            let known = [account.read, account.zero, account.withheld, account.unreadable];
            account.missing = known.into_iter().fold(account.size(), u64::saturating_sub);
        }
        self.ranges = std::mem::take(&mut self.accounts).into_values().collect();
    }

    fn book(&mut self, tallies: Vec<(u64, Tally)>) {
        for (start, tally) in tallies {
            if let Some(account) = self.accounts.get_mut(&start) {
                account.read += tally.read;
                account.zero += tally.zero;
                account.withheld += tally.withheld;
                account.unreadable += tally.unreadable;
            }
        }
    }

    fn segment(&mut self, number: u64, tallies: Vec<(u64, Tally)>) {
        self.recent.push_back((number, tallies));
        if self.recent.len() > RECENT
            && let Some((_, tallies)) = self.recent.pop_front()
        {
            self.book(tallies);
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    read: u64,
    zero: u64,
    withheld: u64,
    unreadable: u64,
}

/// A piece after hashing and compressing.
struct Made {
    sequence: u64,
    starts_segment: bool,
    head: Option<Frame>,
    frame: Frame,
    /// The stored bytes of `head`, then of `frame`.
    stored: Vec<u8>,
    address: u64,
    tally: Tally,
    gaps: Vec<MemoryGap>,
}

struct Shared<'a> {
    source: &'a dyn Source,
    key: &'a KeyPages,
    limits: Limits,
    level: AtomicI32,
    stop: AtomicBool,
    /// Pieces taken, and pieces that are in their segment: what lies between is in memory.
    window: Mutex<(u64, u64)>,
    moved: Condvar,
    /// Buffers of frames that were packed, for the next ones.
    spare: Mutex<Vec<Vec<u8>>>,
    started: Instant,
    paced: Mutex<u64>,
}

/// Streams all of `source` into segments of `artifact`. `told` may end it with an error of its own.
pub fn run<E>(
    source: &dyn Source,
    artifact: Artifact,
    limits: Limits,
    key: &KeyPages,
    cancel: &Cancel,
    mut told: impl FnMut(Told) -> Result<Answer, E>,
) -> Result<Summary, E> {
    let shared = Shared {
        source,
        key,
        limits,
        level: AtomicI32::new(LEVELS.first().copied().unwrap_or(1)),
        stop: AtomicBool::new(false),
        window: Mutex::new((0, 0)),
        moved: Condvar::new(),
        spare: Mutex::default(),
        started: Instant::now(),
        paced: Mutex::new(0),
    };
    let threads = limits.threads.max(1);
    std::thread::scope(|scope| {
        let (give, made) = sync_channel(threads);
        let mut summary = Summary::default();
        for number in 0..threads {
            let (give, shared) = (give.clone(), &shared);
            let mut buffer = match LockedBuffer::new(limits.frame) {
                Ok(buffer) => buffer,
                // One thread is enough.
                Err(_) if number > 0 => break,
                Err(error) => {
                    summary.ended = Some(format!("no memory for a buffer: {error}"));
                    break;
                }
            };
            summary.buffers.push(buffer.place());
            let thread = std::thread::Builder::new()
                .name(format!("memory-{number}"))
                .stack_size(256 << 10);
            let run = move || {
                if let Err(why) = work(shared, &mut buffer, &give) {
                    shared.stop.store(true, Ordering::Relaxed);
                    let _ = give.send(Err(why));
                }
            };
            match thread.spawn_scoped(scope, run) {
                Ok(_) => (),
                Err(_) if number > 0 => break,
                Err(error) => summary.ended = Some(format!("no thread: {error}")),
            }
        }
        drop(give);
        let result = assemble(&shared, artifact, cancel, &made, &mut summary, &mut told);
        // Whoever still waits, for a turn or to hand over, is let go.
        shared.stop.store(true, Ordering::Relaxed);
        shared.moved.notify_all();
        drop(made);
        result.map(|()| summary)
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the window has room; false when it is over.
fn turn(shared: &Shared) -> bool {
    let ahead = shared.limits.threads.max(1) as u64 * 2;
    let mut window = lock(&shared.window);
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return false;
        }
        let (taken, done) = *window;
        if taken - done < ahead {
            window.0 += 1;
            return true;
        }
        window = shared
            .moved
            .wait_timeout(window, Duration::from_millis(200))
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

fn pace(shared: &Shared, bytes: u64) {
    let Some(rate) = shared.limits.rate.filter(|rate| *rate > 0) else {
        return;
    };
    let so_far = {
        let mut paced = lock(&shared.paced);
        *paced += bytes;
        *paced
    };
    let due = Duration::from_millis(so_far.saturating_mul(1000) / rate);
    let mut early = due.saturating_sub(shared.started.elapsed());
    while !early.is_zero() && !shared.stop.load(Ordering::Relaxed) {
        let nap = early.min(Duration::from_millis(200));
        std::thread::sleep(nap);
        early = due.saturating_sub(shared.started.elapsed());
    }
}

fn work(shared: &Shared, buffer: &mut [u8], give: &SyncSender<Result<Made, String>>) -> Result<(), String> {
    let no_compressor = |error: std::io::Error| format!("no compressor: {error}");
    let mut level = shared.level.load(Ordering::Relaxed);
    let mut framer = Framer::of_memory(level).map_err(no_compressor)?;
    let mut zeros: Option<(Frame, Vec<u8>)> = None;
    while turn(shared) {
        let Some(mut piece) = shared.source.next(buffer)? else {
            return Ok(());
        };
        let Some(plain) = buffer.get_mut(..piece.size) else {
            return Err("a source gave more than its buffer holds".to_owned());
        };
        let wanted = shared.level.load(Ordering::Relaxed);
        if wanted != level {
            framer.set_level_of_memory(wanted).map_err(no_compressor)?;
            level = wanted;
        }
        let (tally, all_zero) = account(shared, &mut piece, plain);
        let mut stored = lock(&shared.spare).pop().unwrap_or_default();
        stored.clear();
        let failed = |error: std::io::Error| format!("{:#x} could not be compressed: {error}", piece.address);
        let head = match piece.head.is_empty() {
            true => None,
            false => Some(
                framer
                    .frame(&piece.head, piece.read_at, &mut stored)
                    .map_err(failed)?,
            ),
        };
        let frame = match &zeros {
            // The frame of so many zeros is always the same one.
            Some((frame, bytes)) if all_zero && usize::try_from(frame.plain) == Ok(piece.size) => {
                stored.extend_from_slice(bytes);
                let read_at =
                    Timestamp::from_microsecond(piece.read_at.as_microsecond()).unwrap_or(piece.read_at);
                Frame { read_at, ..*frame }
            }
            _ => {
                let before = stored.len();
                let frame = framer.frame(plain, piece.read_at, &mut stored).map_err(failed)?;
                if all_zero {
                    zeros = Some((frame, stored.get(before..).unwrap_or_default().to_vec()));
                }
                frame
            }
        };
        pace(shared, piece.size as u64);
        let made = Made {
            sequence: piece.sequence,
            starts_segment: piece.starts_segment,
            head,
            frame,
            stored,
            address: piece.address,
            tally,
            gaps: piece.gaps,
        };
        if give.send(Ok(made)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Leaves out the pages of the key, and says of every byte what it is.
fn account(shared: &Shared, piece: &mut Piece, plain: &mut [u8]) -> (Tally, bool) {
    if shared.source.is_this_host() {
        for (start, end) in shared.key.inside(piece.address, plain.len() as u64) {
            super::part(plain, start - piece.address, end - start).fill(0);
            join(
                &mut piece.gaps,
                MemoryGap {
                    start,
                    end: end - 1,
                    gap: Gap::Withheld,
                    why: "it holds the key of this capture".to_owned(),
                },
            );
        }
    }
    let zero: Vec<bool> = plain.chunks(4096).map(is_zero).collect();
    let kept_back = if zero.contains(&true) {
        shared.source.kept_back(piece.address, &zero)
    } else {
        Vec::new()
    };
    for gap in kept_back {
        if !piece
            .gaps
            .iter()
            .any(|known| known.start <= gap.start && gap.end <= known.end)
        {
            piece.gaps.push(gap);
        }
    }
    let mut tally = Tally::default();
    for ((index, chunk), zero) in (0u64..).zip(plain.chunks(4096)).zip(&zero) {
        let (address, size) = (piece.address.saturating_add(index * PAGE), chunk.len() as u64);
        let gap = piece
            .gaps
            .iter()
            .find(|gap| gap.start <= address && address <= gap.end);
        match (gap.map(|gap| gap.gap), zero) {
            (Some(Gap::Withheld), _) => tally.withheld += size,
            (Some(_), _) => tally.unreadable += size,
            (None, true) => tally.zero += size,
            (None, false) => tally.read += size,
        }
    }
    (tally, !zero.contains(&false))
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|b| *b == 0)
}

/// Moves the level by what the store takes: up when the stream waits for the store, down when the store waits for it.
struct Pressure {
    since: Instant,
    blocked: Duration,
    place: usize,
}

impl Pressure {
    fn judge(&mut self, level: &AtomicI32, highest: i32) {
        let elapsed = self.since.elapsed();
        if elapsed < Duration::from_secs(1) {
            return;
        }
        if self.blocked > elapsed / 2 {
            self.place = (self.place + 1).min(LEVELS.len() - 1);
        } else if self.blocked < elapsed / 8 {
            self.place = self.place.saturating_sub(1);
        }
        let wanted = LEVELS.get(self.place).copied().unwrap_or(1);
        level.store(wanted.min(highest), Ordering::Relaxed);
        self.since = Instant::now();
        self.blocked = Duration::ZERO;
    }
}

fn assemble<E>(
    shared: &Shared,
    artifact: Artifact,
    cancel: &Cancel,
    made: &Receiver<Result<Made, String>>,
    summary: &mut Summary,
    told: &mut impl FnMut(Told) -> Result<Answer, E>,
) -> Result<(), E> {
    for (start, size) in shared.source.expected() {
        let end = start.saturating_add(size.saturating_sub(1));
        let account = RangeAccount {
            start,
            end,
            ..RangeAccount::default()
        };
        summary.accounts.insert(start, account);
    }
    let mut tallies: Vec<(u64, Tally)> = Vec::new();
    let mut packer = FramePacker::new(artifact);
    packer.reuse(Vec::with_capacity(shared.limits.segment));
    let mut waiting: BTreeMap<u64, Made> = BTreeMap::new();
    let mut next = 0;
    let mut pressure = Pressure {
        since: Instant::now(),
        blocked: Duration::ZERO,
        place: 0,
    };
    'pieces: loop {
        if let Some(why) = cancel.requested()
            && summary.ended.is_none()
        {
            summary.ended = Some(format!("stopped: {why}"));
            shared.stop.store(true, Ordering::Relaxed);
        }
        if Instant::now() > shared.limits.until && summary.ended.is_none() {
            summary.ended = Some("the deadline came first".to_owned());
            summary.late = true;
            shared.stop.store(true, Ordering::Relaxed);
        }
        match made.recv_timeout(Duration::from_millis(200)) {
            Ok(Ok(one)) => _ = waiting.insert(one.sequence, one),
            Ok(Err(why)) => _ = summary.ended.get_or_insert(why),
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        }
        while let Some(one) = waiting.remove(&next) {
            next += 1;
            if one.starts_segment
                && let Some(packed) = packer.segment()
            {
                summary.segment(packed.entry.number, std::mem::take(&mut tallies));
                let handed_over = Instant::now();
                let answer = told(Told::Segment(packed))?;
                pressure.blocked += handed_over.elapsed();
                match answer {
                    Answer::Go(buffer) => {
                        packer.reuse(buffer.unwrap_or_else(|| Vec::with_capacity(shared.limits.segment)))
                    }
                    Answer::Stop => {
                        summary.ended.get_or_insert("the store took no more".to_owned());
                        return Ok(());
                    }
                }
            }
            if let Err(why) = append(&mut packer, &one) {
                summary.ended.get_or_insert(why);
                break 'pieces;
            }
            let start = range_of(&mut summary.accounts, &one);
            match tallies.last_mut() {
                Some((last, tally)) if *last == start => tally.add(one.tally),
                _ => tallies.push((start, one.tally)),
            }
            summary.bytes = summary.bytes.saturating_add(u64::from(one.frame.plain));
            let answer = told(Told::Packed(summary.bytes, &one.gaps))?;
            lock(&shared.spare).push(one.stored);
            lock(&shared.window).1 += 1;
            shared.moved.notify_all();
            if matches!(answer, Answer::Stop) {
                summary.ended.get_or_insert("the store took no more".to_owned());
                return Ok(());
            }
        }
        pressure.judge(&shared.level, shared.limits.level);
    }
    if let Some(packed) = packer.segment() {
        summary.segment(packed.entry.number, tallies);
        told(Told::Segment(packed))?;
    }
    Ok(())
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.read += other.read;
        self.zero += other.zero;
        self.withheld += other.withheld;
        self.unreadable += other.unreadable;
    }
}

fn append(packer: &mut FramePacker, made: &Made) -> Result<(), String> {
    let mut stored = made.stored.as_slice();
    for frame in made.head.iter().chain([&made.frame]) {
        let size = usize::try_from(frame.stored).unwrap_or(usize::MAX);
        let (bytes, rest) = stored.split_at_checked(size).ok_or("a frame without its bytes")?;
        packer.append(*frame, bytes).map_err(|error| error.to_string())?;
        stored = rest;
    }
    Ok(())
}

/// The start of the range that a piece is in.
fn range_of(accounts: &mut BTreeMap<u64, RangeAccount>, made: &Made) -> u64 {
    let last = made
        .address
        .saturating_add(u64::from(made.frame.plain).saturating_sub(1));
    let before = accounts.range_mut(..=made.address).next_back();
    match before {
        Some((start, account)) if made.address <= account.end => {
            // A last page that the list of RAM has only a part of.
            account.end = account.end.max(last);
            *start
        }
        // What a source has beyond what was expected; pieces that follow each other make one range.
        Some((start, account)) if account.end.checked_add(1) == Some(made.address) => {
            account.end = last;
            *start
        }
        _ => {
            let account = RangeAccount {
                start: made.address,
                end: last,
                ..RangeAccount::default()
            };
            accounts.insert(made.address, account);
            made.address
        }
    }
}
