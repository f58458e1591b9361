//! The steps of a capture that stream memory, and what is stored beside it.

use super::{Failure, MemoryOrder, Progress, Request, Session, What};
use crate::{
    cancel::Cancel,
    collect::describe,
    memory::{
        Sizes, Source, companions, image,
        kcore::{Kcore, Unavailable},
        lime::{Lime, Module},
        needles::Needles,
        process::Process,
        ranges,
        shortage::{self, Shortage},
        stream::{self, Answer, Limits, Told},
    },
    plan::Step,
    worker,
};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    io::{self, Read as _},
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::{MAX_RANGES, Problem, RangeAccount, Status},
    frames::{Framer, SegmentBuilder},
    image::Image,
    layout::{Artifact, Kind},
    records::{
        Data, Record,
        memory::{Companion, MemoryGap, MemorySource},
    },
    root::Hash,
    segments::Packed,
    text::{Text, write_json},
};

/// Runs of pages that get a record of their own; further ones are in the sums of their range.
const MAX_GAPS: usize = 100_000;
/// What has been stored is acknowledged in the chain this often: a killed agent loses no more than that.
const ACKNOWLEDGED: Duration = Duration::from_secs(1);
/// Plaintext of a frame of a companion.
const FRAME: usize = 128 << 10;
/// Stored bytes after which a segment of a companion is put.
const SEGMENT: usize = 256 << 10;

/// How a memory step ended.
pub struct End {
    /// As any step.
    pub how: worker::End,
    /// What was made of each range.
    pub ranges: Vec<RangeAccount>,
}

impl End {
    fn new(status: Status, reason: Option<String>) -> Self {
        End {
            how: worker::End {
                status,
                reason,
                problems: Vec::new(),
                notes: Vec::new(),
            },
            ranges: Vec::new(),
        }
    }

    /// Not begun.
    pub fn skipped(why: String) -> Self {
        End::new(Status::Skipped, Some(why))
    }

    fn failed(why: String) -> Self {
        End::new(Status::Failed, Some(why))
    }

    fn problem(
        &mut self,
        what: &str,
        source: impl AsRef<[u8]>,
        errno: Option<i32>,
        error: String,
        count: u64,
    ) {
        self.how.problems.push(Problem {
            what: what.to_owned(),
            source: Text(source.as_ref().to_vec()),
            errno,
            error,
            count,
        });
        if self.how.status == Status::Complete {
            self.how.status = Status::Partial;
        }
    }

    /// Takes in what a stream came to.
    fn streamed(&mut self, summary: stream::Summary) {
        if let Some(why) = summary.ended {
            self.how.status = match (summary.late, summary.bytes) {
                (true, _) => Status::TimedOut,
                (false, 0) => Status::Failed,
                (false, _) => Status::Partial,
            };
            self.how.reason.get_or_insert(why);
        }
        let unreadable: u64 = summary
            .ranges
            .iter()
            .map(|r| r.unreadable)
            .fold(0, u64::saturating_add);
        if unreadable > 0 {
            let error = format!("{unreadable} bytes could not be read; zeros stand in their place");
            self.problem("memory", "memory", None, error, 1);
        }
        self.ranges.extend(summary.ranges);
    }
}

impl Session<'_> {
    /// A record of the step under way.
    fn datum(&mut self, source: &str, data: Data) -> Result<(), Failure> {
        let record = Record {
            source: Text::from(source),
            read_at: Timestamp::now(),
            errors: Vec::new(),
            data,
        };
        let mut line = Vec::new();
        write_json(&record, &mut line)?;
        self.record(&line)
    }

    /// Stores what is needed to read the image.
    pub(super) fn companions(&mut self, request: &Request) -> Result<End, Failure> {
        let mut end = End::new(Status::Complete, None);
        let kcore = Kcore::open(&request.root).ok();
        let in_flight = Sizes::of(0, memory_of(request), threads_of(request), self.store.at_once()).in_flight;
        for companion in companions::all(&request.root, kcore.as_ref()) {
            match companion {
                Ok(found) => self.companion(found, in_flight, &mut end)?,
                // Not every kernel has every one of them.
                Err(missing) if missing.error.kind() == io::ErrorKind::NotFound => {
                    let source = missing.source.display();
                    end.how.notes.push(format!("no {} ({source})", missing.name));
                }
                Err(missing) => {
                    let source = missing.source.as_os_str().as_encoded_bytes();
                    end.problem(
                        missing.name,
                        source,
                        missing.error.raw_os_error(),
                        describe(&missing.error),
                        1,
                    );
                }
            }
        }
        Ok(end)
    }

    fn companion(
        &mut self,
        mut found: companions::Found,
        in_flight: usize,
        end: &mut End,
    ) -> Result<(), Failure> {
        let artifact = Artifact::Memory(found.name.parse()?);
        let system = |error: io::Error| Failure::System {
            what: "no compressor",
            why: error.to_string(),
        };
        let mut number = 0;
        let mut builder = SegmentBuilder::default();
        let mut framer = Framer::new(super::LEVEL).map_err(system)?;
        let mut plain = Vec::with_capacity(FRAME);
        let (mut sha256, mut bytes) = (Sha256::new(), 0u64);
        // Per-CPU symbols have small numbers for addresses; a kernel that hides them gives zeros for all others, too.
        let mut hidden = found.name == "kallsyms";
        loop {
            plain.clear();
            let read_at = Timestamp::now();
            if let Err(error) = found.bytes.by_ref().take(FRAME as u64).read_to_end(&mut plain) {
                let source = found.source.as_os_str().as_encoded_bytes();
                end.problem(found.name, source, error.raw_os_error(), describe(&error), 1);
                if plain.is_empty() {
                    break;
                }
            }
            if plain.is_empty() {
                break;
            }
            if hidden
                && plain
                    .split(|b| *b == b'\n')
                    .any(|line| line.starts_with(b"ffffffff"))
            {
                hidden = false;
            }
            sha256.update(&plain);
            bytes += plain.len() as u64;
            if builder.stored().is_empty() {
                let room = self.spare.pop();
                builder.reuse(room.unwrap_or_else(|| Vec::with_capacity(SEGMENT + 2 * FRAME)));
            }
            builder.push(&mut framer, &plain, read_at).map_err(system)?;
            if builder.stored().len() >= SEGMENT {
                number += 1;
                let packed = Packed::take(artifact.clone(), number, &mut builder, None, Hash::of);
                self.send_memory(packed, in_flight)?;
            }
        }
        let packed = Packed::take(artifact.clone(), number + 1, &mut builder, None, Hash::of);
        self.send_memory(packed, in_flight)?;
        if hidden && bytes > 0 {
            end.how
                .notes
                .push("kallsyms has no addresses (kernel.kptr_restrict); the image has them".to_owned());
        }
        if bytes > 0 {
            let companion = Companion {
                artifact,
                bytes,
                sha256: Hash(sha256.finalize().into()),
            };
            self.datum(
                &found.source.to_string_lossy(),
                Data::Companion(Box::new(companion)),
            )?;
        }
        Ok(())
    }

    /// Puts a segment of memory; few are in flight at once, since each is megabytes. False when the store has failed on one of
    /// this step: no later one can be read without it.
    fn send_memory(&mut self, packed: Option<Packed>, in_flight: usize) -> Result<bool, Failure> {
        let Some(packed) = packed else { return Ok(true) };
        if self.has_failed() {
            return Ok(false);
        }
        self.send(packed);
        while self.put.in_flight > in_flight && self.broken.is_none() {
            self.settle(true);
        }
        self.report()?;
        Ok(!self.has_failed())
    }

    fn has_failed(&self) -> bool {
        self.current
            .as_ref()
            .is_some_and(|current| current.failed.is_some())
    }

    /// Streams physical memory, of this host or of an image.
    pub(super) fn memory(&mut self, request: &Request, step: &Step, cancel: &Cancel) -> Result<End, Failure> {
        let MemoryOrder { image, lime, .. } = &request.memory;
        if let Some(path) = image {
            return self.image(path, request, step, cancel);
        }
        let root = &request.root;
        let mut end = match lime {
            Some((path, sha256)) => self.lime(path, *sha256, request, step, cancel)?,
            None => {
                let kcore = match Kcore::open(root) {
                    Ok(kcore) => kcore,
                    Err(why @ (Unavailable::Absent | Unavailable::LockedDown)) => {
                        return Ok(End::new(Status::Unsupported, Some(why.to_string())));
                    }
                    Err(why) => return Ok(End::failed(why.to_string())),
                };
                let sizes = Sizes::of(
                    total(&kcore.expected()),
                    memory_of(request),
                    threads_of(request),
                    self.store.at_once(),
                );
                let addresses = kcore.addresses.to_string();
                let source = kcore.in_segments_of(sizes.segment);
                let about = MemorySource {
                    method: "kcore".to_owned(),
                    addresses: Some(addresses),
                    ..MemorySource::default()
                };
                self.stream(&source, "image", about, sizes, request, step, cancel)?
            }
        };
        let copies = match lime {
            Some(_) => "; copies that the kernel made of it on the module's way to the agent are blanked",
            None => "",
        };
        let kept = format!("the capture's key: {}{copies}", self.key_kept);
        end.how.notes.push(kept);
        Ok(end)
    }

    /// Why a module must not read all of physical memory here.
    fn secrets_in_the_way(&self) -> Option<String> {
        let outcomes = self.chain.iter().flat_map(|chain| chain.outcomes());
        let waiting = self.waiting.iter();
        let outcome = outcomes
            .chain(waiting)
            .find(|o| o.kind.as_str() == "secret-mappings");
        match outcome.map(|o| (o.records, o.status)) {
            Some((0, Status::Complete)) => None,
            None | Some((0, _)) => Some("not every process could be asked for memory in memfd_secret, at which LiME would crash the kernel: it was not loaded".to_owned()),
            Some((n, _)) => Some(format!("{n} mappings of memfd_secret (cat secret-mappings): LiME would crash the kernel at their pages, so it was not loaded")),
        }
    }

    fn image(
        &mut self,
        path: &std::path::Path,
        request: &Request,
        step: &Step,
        cancel: &Cancel,
    ) -> Result<End, Failure> {
        let file = match image::open(path) {
            Ok(file) => file,
            Err(why) => return Ok(End::failed(why)),
        };
        let image = match Image::open(&file) {
            Ok(image) => image,
            Err(why) => return Ok(End::failed(format!("--image {}: {why}", path.display()))),
        };
        let sizes = Sizes::of(
            total(&image.ranges()),
            memory_of(request),
            threads_of(request),
            self.store.at_once(),
        );
        let about = MemorySource {
            method: "image".to_owned(),
            format: Some(image.format().as_str().to_owned()),
            ..MemorySource::default()
        };
        if image.ranges().is_empty() {
            return Ok(End::failed(format!(
                "--image {}: there is nothing in it",
                path.display()
            )));
        }
        let cut = image.cut().map(str::to_owned);
        let source = image::ImageFile::new(image, sizes.segment);
        let mut end = self.stream(&source, "image", about, sizes, request, step, cancel)?;
        if let Some(why) = cut {
            end.problem(
                "image",
                path.as_os_str().as_encoded_bytes(),
                None,
                format!("the file was cut off {why}"),
                1,
            );
        }
        Ok(end)
    }

    fn lime(
        &mut self,
        path: &std::path::Path,
        sha256: Hash,
        request: &Request,
        step: &Step,
        cancel: &Cancel,
    ) -> Result<End, Failure> {
        let release = fs::read_to_string(request.root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
        let module = match Module::check(path, sha256, release.trim()) {
            Ok(module) => module,
            Err(why) => return Ok(End::failed(why)),
        };
        if let Some(why) = self.secrets_in_the_way() {
            return Ok(End::failed(why));
        }
        let iomem = fs::read(request.root.join("proc/iomem")).unwrap_or_default();
        let ram = ranges::system_ram(&String::from_utf8_lossy(&iomem));
        let sizes = Sizes::of(
            total(&ram),
            memory_of(request),
            threads_of(request),
            self.store.at_once(),
        );
        let source = match Lime::start(&module, ram, sizes.segment) {
            Ok(source) => source,
            Err(why) => return Ok(End::failed(why)),
        };
        let about = MemorySource {
            method: "lime".to_owned(),
            module_sha256: Some(module.sha256),
            ..MemorySource::default()
        };
        let mut end = self.stream(&source, "image", about.clone(), sizes, request, step, cancel)?;
        let (loaded, removed) = source.finish(&request.root);
        if let Err(why) = loaded {
            end.how.status = Status::Failed;
            end.how.reason = Some(format!(
                "the LiME module could not be loaded ({why}): what was read came from somebody else"
            ));
        }
        let removed = match removed {
            Ok(()) => "removed".to_owned(),
            Err(why) => {
                let error = format!("the module lime is still loaded: {why}; `rmmod lime` removes it");
                end.problem("module", "lime", None, error.clone(), 1);
                error
            }
        };
        let about = MemorySource {
            module_removed: Some(removed),
            ..about
        };
        self.datum("delete_module", Data::MemorySource(Box::new(about)))?;
        Ok(end)
    }

    /// Streams the memory of the processes that were named.
    pub(super) fn process_memory(
        &mut self,
        request: &Request,
        step: &Step,
        cancel: &Cancel,
    ) -> Result<End, Failure> {
        let mut end = End::new(Status::Complete, None);
        for pid in &request.memory.pids {
            let place = format!("/proc/{pid}/mem");
            if let Shortage::All(_) = shortage::now(&request.root) {
                end.problem(
                    "process",
                    &place,
                    None,
                    "not begun: the host is short of memory".to_owned(),
                    1,
                );
                continue;
            }
            let process = match Process::open(&request.root, *pid) {
                Ok(process) if *pid != std::process::id() => process,
                Ok(_) => {
                    end.problem("process", &place, None, "this is the agent itself".to_owned(), 1);
                    continue;
                }
                Err(why) => {
                    end.problem("process", &place, None, why, 1);
                    continue;
                }
            };
            let sizes = Sizes::of(
                process.size(),
                memory_of(request),
                threads_of(request),
                self.store.at_once(),
            );
            let process = process.in_segments_of(sizes.segment);
            for region in &process.regions {
                self.datum(
                    &format!("/proc/{pid}/smaps"),
                    Data::Region(Box::new(region.clone())),
                )?;
            }
            for gap in &process.left_out {
                self.datum(&place, Data::MemoryGap(Box::new(gap.clone())))?;
            }
            let about = MemorySource {
                method: "process".to_owned(),
                pid: Some(*pid),
                ..MemorySource::default()
            };
            let one = self.stream(
                &process,
                &format!("process-{pid}"),
                about,
                sizes,
                request,
                step,
                cancel,
            )?;
            end.ranges.extend(one.ranges);
            end.how.problems.extend(one.how.problems);
            if one.how.status != Status::Complete {
                end.how.status = one.how.status;
                end.how.reason = one.how.reason.map(|why| format!("process {pid}: {why}"));
            }
        }
        Ok(end)
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "each is a different thing, and all are there only here"
    )]
    fn stream(
        &mut self,
        source: &dyn Source,
        name: &str,
        about: MemorySource,
        sizes: Sizes,
        request: &Request,
        step: &Step,
        cancel: &Cancel,
    ) -> Result<End, Failure> {
        let artifact = Artifact::Memory(name.parse()?);
        let threads = threads_of(request);
        let place = about.method.clone();
        let about = MemorySource {
            artifact: Some(artifact.clone()),
            frame: sizes.frame as u64,
            segment: sizes.segment,
            threads: threads as u64,
            ..about
        };
        self.datum(&place, Data::MemorySource(Box::new(about)))?;
        let limits = Limits {
            threads,
            frame: sizes.frame,
            ahead: sizes.ahead as u64,
            segment: usize::try_from(sizes.segment + sizes.segment / 16 + (64 << 10)).unwrap_or(0),
            level: sizes.level,
            places: sizes.places,
            rate: request.memory.rate,
            root: &request.root,
            until: Instant::now() + step.deadline,
        };
        let kind: Kind = step.kind.parse()?;
        let ranges = source.expected();
        let expected = total(&ranges);
        if place != "process" {
            // So that a capture that is killed says what it lacks.
            let listed = ranges
                .iter()
                .take(MAX_RANGES)
                .map(|(start, size)| (*start, start.saturating_add(size.saturating_sub(1))));
            let ranges = if ranges.len() > MAX_RANGES {
                Vec::new()
            } else {
                listed.collect()
            };
            self.drain()?;
            let kind = kind.clone();
            self.event(What::Progress(Progress {
                kind,
                done: 0,
                expected,
                ranges,
            }))?;
        }
        let key = self.key.clone();
        // Those of the companions are too small.
        self.spare.clear();
        let before = self.current.as_ref().map_or(0, |current| current.outcome.bytes);
        let (mut gaps, mut untold): (Vec<MemoryGap>, u64) = (Vec::new(), 0);
        let store = self.store;
        let seed = self.seed.map(|seed| seed.to_vec());
        let secrets = || {
            let of_store = store.secrets().into_iter().map(String::into_bytes);
            of_store.chain(seed.clone()).collect()
        };
        let needles = Needles::new(&secrets);
        let mut summary = stream::run(
            source,
            artifact,
            limits,
            &key,
            &needles,
            cancel,
            |told| match told {
                Told::Segment(packed, found) => {
                    for gap in found {
                        match gaps.len() < MAX_GAPS {
                            true => crate::memory::join(&mut gaps, gap),
                            false => untold += 1,
                        }
                    }
                    Ok::<_, Failure>(match self.send_memory(Some(packed), sizes.in_flight)? {
                        true => Answer::Go(self.spare.pop()),
                        false => Answer::Stop,
                    })
                }
                Told::Read(done) => {
                    if let Some(current) = &mut self.current {
                        current.outcome.bytes = before.saturating_add(done);
                    }
                    self.settle(false);
                    self.report()?;
                    self.progress(&kind, done, expected)?;
                    Ok(if self.has_failed() {
                        Answer::Stop
                    } else {
                        Answer::Go(None)
                    })
                }
            },
        )?;
        // What became of the last segments decides what is missing.
        while self.put.in_flight > 0 && self.broken.is_none() {
            self.settle(true);
        }
        // What comes after them takes their place in memory.
        self.spare.clear();
        let not_stored = self
            .current
            .as_mut()
            .map(|current| std::mem::take(&mut current.not_stored));
        if let Some(current) = &mut self.current {
            current.outcome.bytes = before.saturating_add(summary.bytes);
        }
        summary.close(&not_stored.unwrap_or_default());
        for gap in gaps {
            self.datum(&place, Data::MemoryGap(Box::new(gap)))?;
        }
        for buffer in &summary.buffers {
            if self.footprint.buffers.len() < 256 {
                self.footprint.buffers.push(*buffer);
            }
        }
        let mut end = End::new(Status::Complete, None);
        let missing: u64 = summary
            .ranges
            .iter()
            .map(|r| r.missing)
            .fold(0, u64::saturating_add);
        let ended = summary.ended.is_some();
        // Too many for an event, or many small ones of a process, whose regions are records.
        if summary.ranges.len() > MAX_RANGES || place == "process" {
            for range in std::mem::take(&mut summary.ranges) {
                self.datum(&place, Data::MemoryRange(range))?;
            }
        }
        end.streamed(summary);
        if missing > 0 && !ended {
            let error = format!("{missing} bytes that were expected did not come");
            end.problem("memory", &place, None, error, 1);
        }
        if untold > 0 {
            end.how.notes.push(format!(
                "{untold} further gaps are in the sums of their ranges only"
            ));
        }
        Ok(end)
    }

    /// Acknowledges in the chain what the store has, from time to time.
    fn progress(&mut self, kind: &Kind, done: u64, expected: u64) -> Result<(), Failure> {
        if self.acknowledged.is_empty() || self.told_at.elapsed() < ACKNOWLEDGED {
            return Ok(());
        }
        // Outcomes come in the plan's order: one whose segments are still under way goes first.
        if !self.waiting.is_empty() {
            return Ok(());
        }
        let kind = kind.clone();
        let ranges = Vec::new();
        self.event(What::Progress(Progress {
            kind,
            done,
            expected,
            ranges,
        }))
    }
}

/// Bytes of memory that this host has; little where that is not known.
fn memory_of(request: &Request) -> u64 {
    crate::sys::total_memory(&request.root).unwrap_or(0)
}

fn threads_of(request: &Request) -> usize {
    usize::from(request.cpus).max(1)
}

fn total(ranges: &[(u64, u64)]) -> u64 {
    ranges.iter().fold(0, |sum, (_, size)| sum.saturating_add(*size))
}
