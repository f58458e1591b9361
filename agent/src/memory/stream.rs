//! From a source to segments: threads that each read, hash and compress a segment of their own, a frame at a time, and one place
//! that puts the segments in order. No hash runs over the whole, so nothing is serial but the order.

use super::{
    Held, PAGE, Share, Source, join,
    needles::Needles,
    sha256::{Running, advance},
    shortage::{self, Shortage},
};
use crate::{
    cancel::Cancel,
    sys::{KeyPages, LockedBuffer},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::Path,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::RangeAccount,
    frames::{Frame, Framer, SegmentBuilder},
    layout::Artifact,
    records::memory::{Gap, MemoryGap},
    segments::Packed,
};

/// The levels of zstd between which the stream moves: from one that outruns most stores to one that a slow link is worth.
const LEVELS: [i32; 4] = [1, 2, 3, 5];

/// How the stream may use the host.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Threads that read, hash and compress.
    pub threads: usize,
    /// Bytes of a frame.
    pub frame: usize,
    /// Segments that are made at once.
    pub ahead: u64,
    /// Bytes that a segment has at most as stored: its buffer never grows, and what is not written to is never there.
    pub segment: usize,
    /// The highest level of zstd that its memory is worth here.
    pub level: i32,
    /// The places that level 1 remembers, as a power of two.
    pub places: u32,
    /// Bytes of plaintext a second, at most.
    pub rate: Option<u64>,
    /// Where the host's root is, whose shortage of memory holds the stream back.
    pub root: &'a Path,
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

/// What the caller is told.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one at a time, and it is moved once"
)]
pub enum Told {
    /// The next segment is ready, in order, and these gaps are in it.
    Segment(Packed, Vec<MemoryGap>),
    /// So many bytes have been read; now and then.
    Read(u64),
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
    /// Closes the books. `not_stored` are the segments that the store did not take: they are missing.
    pub fn close(&mut self, not_stored: &BTreeSet<u64>) {
        for (number, tallies) in std::mem::take(&mut self.recent) {
            if !not_stored.contains(&number) {
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

/// What became of a stretch of a segment.
struct Account {
    address: u64,
    size: u64,
    tally: Tally,
}

/// A segment after hashing and compressing.
struct Made {
    number: u64,
    packed: Packed,
    stretches: Vec<Account>,
    gaps: Vec<MemoryGap>,
}

struct Shared<'a> {
    source: &'a dyn Source,
    artifact: Artifact,
    key: &'a KeyPages,
    needles: &'a Needles<'a>,
    limits: Limits<'a>,
    level: AtomicI32,
    /// No segment is begun any more; those under way are finished, without a pause.
    stop: AtomicBool,
    /// The host is short of memory.
    short: AtomicBool,
    /// Addresses and lengths of buffers that hold whole segments.
    held: Mutex<Vec<(u64, u64)>>,
    /// Nobody takes what is made: nothing is finished.
    abandoned: AtomicBool,
    /// Segments begun, and segments handed to the caller: what lies between is in memory.
    window: Mutex<(u64, u64)>,
    moved: Condvar,
    /// Buffers of segments that were stored, for the next ones.
    spare: Mutex<Vec<Vec<u8>>>,
    started: Instant,
    /// Bytes of plaintext read.
    read: AtomicU64,
}

/// Streams all of `source` into segments of `artifact`. `told` may end it with an error of its own.
pub fn run<E>(
    source: &dyn Source,
    artifact: Artifact,
    limits: Limits,
    key: &KeyPages,
    needles: &Needles,
    cancel: &Cancel,
    mut told: impl FnMut(Told) -> Result<Answer, E>,
) -> Result<Summary, E> {
    let shared = Shared {
        source,
        artifact,
        key,
        needles,
        limits,
        level: AtomicI32::new(LEVELS.first().copied().unwrap_or(1)),
        stop: AtomicBool::new(false),
        short: AtomicBool::new(shortage::now(limits.root) != Shortage::None),
        held: Mutex::default(),
        abandoned: AtomicBool::new(false),
        window: Mutex::new((0, 0)),
        moved: Condvar::new(),
        spare: Mutex::default(),
        started: Instant::now(),
        read: AtomicU64::new(0),
    };
    let threads = limits.threads.max(1);
    let streamed = std::thread::scope(|scope| {
        let (give, made) = sync_channel(threads);
        let mut summary = Summary::default();
        for number in 0..threads {
            let (give, shared) = (give.clone(), &shared);
            let mut buffer = match LockedBuffer::new(limits.frame * AT_ONCE) {
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
                Err(error) => {
                    summary.ended = Some(format!("no thread: {error}"));
                    break;
                }
            }
        }
        drop(give);
        let result = hand_over(&shared, cancel, &made, &mut summary, &mut told);
        // Whoever still waits, for a turn or to hand over, is let go.
        shared.stop.store(true, Ordering::Relaxed);
        shared.abandoned.store(true, Ordering::Relaxed);
        shared.moved.notify_all();
        drop(made);
        result.map(|()| summary)
    });
    streamed.map(|mut summary| {
        summary.buffers.append(&mut lock(&shared.held));
        summary
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the window has room; false when it is over.
fn turn(shared: &Shared) -> bool {
    let mut window = lock(&shared.window);
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return false;
        }
        let (begun, done) = *window;
        if begun - done < shared.limits.ahead.max(1) {
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

fn pace(shared: &Shared, read: u64) {
    if shared.short.load(Ordering::Relaxed) && !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(shortage::PAUSE);
    }
    let Some(rate) = shared.limits.rate.filter(|rate| *rate > 0) else {
        return;
    };
    let due = Duration::from_millis(read.saturating_mul(1000) / rate);
    let mut early = due.saturating_sub(shared.started.elapsed());
    while !early.is_zero() && !shared.stop.load(Ordering::Relaxed) {
        let nap = early.min(Duration::from_millis(200));
        std::thread::sleep(nap);
        early = due.saturating_sub(shared.started.elapsed());
    }
}

/// Makes one segment after another.
fn work(shared: &Shared, buffer: &mut [u8], give: &SyncSender<Result<Made, String>>) -> Result<(), String> {
    let no_compressor = |error: std::io::Error| format!("no compressor: {error}");
    let mut level = shared.level.load(Ordering::Relaxed);
    let mut maker = Maker {
        framer: Framer::of_memory(level, shared.limits.places).map_err(no_compressor)?,
        builder: SegmentBuilder::default(),
        sha256: Running::default(),
        zeros: None,
    };
    let mut held = Held::default();
    while turn(shared) {
        let share = shared.source.next(&mut held);
        if let Some(buffer) = &held.buffer
            && !lock(&shared.held).contains(&buffer.place())
        {
            lock(&shared.held).push(buffer.place());
        }
        let Some(share) = share? else { return Ok(()) };
        if shared.source.is_this_host() {
            held.clear(|start, size| shared.key.inside(start, size));
        }
        let wanted = shared.level.load(Ordering::Relaxed);
        if wanted != level {
            maker
                .framer
                .set_level_of_memory(wanted, shared.limits.places)
                .map_err(no_compressor)?;
            level = wanted;
        }
        let room = lock(&shared.spare).pop();
        maker
            .builder
            .reuse(room.unwrap_or_else(|| Vec::with_capacity(shared.limits.segment)));
        let Some(made) = maker.segment(shared, &share, &held, buffer)? else {
            return Ok(());
        };
        if give.send(Ok(made)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Frames that are read before they are hashed, side by side.
const AT_ONCE: usize = 2;

/// The plaintext of a frame.
struct Read<'a> {
    plain: &'a [u8],
    at: Timestamp,
    zero: bool,
}

/// What a thread hashes and compresses with.
struct Maker {
    framer: Framer,
    builder: SegmentBuilder,
    /// Of the segment, as far as it has been hashed.
    sha256: Running,
    /// The frame of zeros, by its size: it is always the same one.
    zeros: Option<(Frame, Vec<u8>)>,
}

impl Maker {
    /// Reads, hashes and compresses one share. Nothing comes when nobody wants it any more.
    fn segment(
        &mut self,
        shared: &Shared,
        share: &Share,
        held: &Held,
        buffer: &mut [u8],
    ) -> Result<Option<Made>, String> {
        let mut stretches = Vec::new();
        let mut gaps = Vec::new();
        for head in share.head.chunks(shared.limits.frame.max(1)) {
            self.builder
                .push(&mut self.framer, head, Timestamp::now())
                .map_err(|error| format!("a head could not be compressed: {error}"))?;
        }
        for (start, size) in &share.stretches {
            let mut tally = Tally::default();
            let (mut address, end) = (*start, start.saturating_add(*size));
            while address < end {
                if shared.abandoned.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                let room = (buffer.len() as u64).min(end - address);
                let mut reads = Vec::with_capacity(AT_ONCE);
                for plain in super::part(buffer, 0, room).chunks_mut(shared.limits.frame.max(1)) {
                    let size = plain.len() as u64;
                    let at = held.at.unwrap_or_else(Timestamp::now);
                    let mut found = shared.source.read(held, address, plain)?;
                    let zero = account(shared, address, plain, &mut found, &mut tally);
                    found.into_iter().for_each(|gap| join(&mut gaps, gap));
                    pace(shared, shared.read.fetch_add(size, Ordering::Relaxed) + size);
                    address += size;
                    reads.push(Read { plain, at, zero });
                }
                self.frames(&reads).map_err(|error| {
                    format!("what lies before {address:#x} could not be compressed: {error}")
                })?;
            }
            stretches.push(Account {
                address: *start,
                size: *size,
                tally,
            });
        }
        let sha256 = std::mem::take(&mut self.sha256);
        let packed = Packed::take(
            shared.artifact.clone(),
            share.number + 1,
            &mut self.builder,
            None,
            |object| sha256.finish(object),
        );
        Ok(packed.map(|packed| Made {
            number: share.number,
            packed,
            stretches,
            gaps,
        }))
    }

    fn frames(&mut self, reads: &[Read]) -> io::Result<()> {
        let busy: Vec<&[u8]> = reads
            .iter()
            .filter(|read| !read.zero)
            .map(|read| read.plain)
            .collect();
        let plain = |n| busy.get(n).copied().unwrap_or_default();
        let mut running = [Running::default(); AT_ONCE];
        let [first, second] = &mut running;
        let streams = [plain(0), plain(1), self.builder.stored()];
        advance([first, second, &mut self.sha256], streams);
        let mut running = running.into_iter();
        for read in reads {
            let running = if read.zero { None } else { running.next() };
            match running {
                Some(running) => {
                    let sha256 = running.finish(read.plain);
                    self.builder
                        .push_of_hash(&mut self.framer, read.plain, sha256, read.at)?;
                }
                None => self.zeros(read)?,
            }
        }
        Ok(())
    }

    fn zeros(&mut self, read: &Read) -> io::Result<()> {
        if let Some((frame, bytes)) = &self.zeros
            && usize::try_from(frame.plain) == Ok(read.plain.len())
        {
            let read_at = Timestamp::from_microsecond(read.at.as_microsecond()).unwrap_or(read.at);
            return self.builder.append(Frame { read_at, ..*frame }, bytes);
        }
        let mut bytes = Vec::new();
        let frame = self.framer.frame(read.plain, read.at, &mut bytes)?;
        self.builder.append(frame, &bytes)?;
        self.zeros = Some((frame, bytes));
        Ok(())
    }
}

fn withheld(start: u64, end: u64, why: &str) -> MemoryGap {
    MemoryGap {
        start,
        end: end.saturating_sub(1),
        gap: Gap::Withheld,
        why: why.to_owned(),
    }
}

/// Leaves out the pages of the key, blanks other copies of it and the store's credentials, and says of every byte what it is. True when all are zero.
fn account(
    shared: &Shared,
    address: u64,
    plain: &mut [u8],
    gaps: &mut Vec<MemoryGap>,
    tally: &mut Tally,
) -> bool {
    let (mut blanked, mut secrets) = (BTreeMap::<u64, u64>::new(), Vec::new());
    if shared.source.is_this_host() {
        for (start, end) in shared.key.inside(address, plain.len() as u64) {
            super::part(plain, start - address, end - start).fill(0);
            join(gaps, withheld(start, end, "it holds the key of this capture"));
        }
        for (start, end) in shared.needles.inside(plain) {
            for at in start..end {
                if let Some(byte) = plain.get_mut(at).filter(|byte| **byte != 0) {
                    *byte = 0;
                    *blanked.entry(at as u64 / PAGE).or_default() += 1;
                }
            }
            let (start, end) = (
                address.saturating_add(start as u64),
                address.saturating_add(end as u64),
            );
            secrets.push(withheld(
                start,
                end,
                "a secret of this capture: what it is stored or signed with",
            ));
        }
    }
    let zero: Vec<bool> = plain.chunks(4096).map(is_zero).collect();
    let kept_back = if zero.contains(&true) {
        shared.source.kept_back(address, &zero)
    } else {
        Vec::new()
    };
    for gap in kept_back {
        if !gaps
            .iter()
            .any(|known| known.start <= gap.start && gap.end <= known.end)
        {
            gaps.push(gap);
        }
    }
    for ((index, chunk), zero) in (0u64..).zip(plain.chunks(4096)).zip(&zero) {
        let hidden = blanked.get(&index).copied().unwrap_or(0);
        tally.withheld += hidden;
        let (address, size) = (
            address.saturating_add(index * PAGE),
            (chunk.len() as u64).saturating_sub(hidden),
        );
        let gap = gaps.iter().find(|gap| gap.start <= address && address <= gap.end);
        match (gap.map(|gap| gap.gap), zero) {
            (Some(Gap::Withheld), _) => tally.withheld += size,
            (Some(_), _) => tally.unreadable += size,
            (None, true) => tally.zero += size,
            (None, false) => tally.read += size,
        }
    }
    gaps.append(&mut secrets);
    !zero.contains(&false)
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

/// Puts the segments in order, and tells of each.
fn hand_over<E>(
    shared: &Shared,
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
    let mut waiting: BTreeMap<u64, Made> = BTreeMap::new();
    let mut next = 0;
    let mut looked = shared.started;
    let mut pressure = Pressure {
        since: Instant::now(),
        blocked: Duration::ZERO,
        place: 0,
    };
    let stopped = |answer: &Answer, summary: &mut Summary| {
        let stopped = matches!(answer, Answer::Stop);
        if stopped {
            summary.ended.get_or_insert("the store took no more".to_owned());
        }
        stopped
    };
    loop {
        if let Some(why) = cancel.requested() {
            summary.ended.get_or_insert_with(|| format!("stopped: {why}"));
            shared.stop.store(true, Ordering::Relaxed);
        }
        if Instant::now() > shared.limits.until && !shared.stop.swap(true, Ordering::Relaxed) {
            summary
                .ended
                .get_or_insert_with(|| "the deadline came first".to_owned());
            summary.late = true;
        }
        if looked.elapsed() > Duration::from_secs(1) {
            looked = Instant::now();
            let shortage = shortage::now(shared.limits.root);
            shared.short.store(shortage != Shortage::None, Ordering::Relaxed);
            if let Shortage::All(percent) = shortage {
                shared.stop.store(true, Ordering::Relaxed);
                summary.ended.get_or_insert_with(|| {
                    format!("stopped: the host is short of memory (every task waited for it in {percent:.0} % of ten seconds)")
                });
            }
        }
        match made.recv_timeout(Duration::from_millis(200)) {
            Ok(Ok(one)) => _ = waiting.insert(one.number, one),
            Ok(Err(why)) => _ = summary.ended.get_or_insert(why),
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        while let Some(one) = waiting.remove(&next) {
            next += 1;
            let tallies = one.stretches.iter().map(|stretch| {
                let start = range_of(&mut summary.accounts, stretch.address, stretch.size);
                (start, stretch.tally)
            });
            let tallies = tallies.collect();
            summary.bytes = summary.bytes.saturating_add(one.packed.entry.plain);
            summary.segment(one.packed.entry.number, tallies);
            let handed_over = Instant::now();
            let answer = told(Told::Segment(one.packed, one.gaps))?;
            pressure.blocked += handed_over.elapsed();
            if stopped(&answer, summary) {
                return Ok(());
            }
            if let Answer::Go(Some(buffer)) = answer {
                lock(&shared.spare).push(buffer);
            }
            lock(&shared.window).1 += 1;
            shared.moved.notify_all();
        }
        let answer = told(Told::Read(shared.read.load(Ordering::Relaxed)))?;
        if stopped(&answer, summary) {
            return Ok(());
        }
        pressure.judge(&shared.level, shared.limits.level);
    }
    Ok(())
}

/// The start of the range that a stretch is in.
fn range_of(accounts: &mut BTreeMap<u64, RangeAccount>, start: u64, size: u64) -> u64 {
    let last = start.saturating_add(size.saturating_sub(1));
    let before = accounts.range_mut(..=start).next_back();
    match before {
        Some((range, account)) if start <= account.end => {
            // A last page that the list of RAM has only a part of.
            account.end = account.end.max(last);
            *range
        }
        // What a source has beyond what was expected; stretches that follow each other make one range.
        Some((range, account)) if account.end.checked_add(1) == Some(start) => {
            account.end = last;
            *range
        }
        _ => {
            let account = RangeAccount {
                start,
                end: last,
                ..RangeAccount::default()
            };
            accounts.insert(start, account);
            start
        }
    }
}
