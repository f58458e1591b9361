//! The memory of one process, as an ELF core that a debugger opens (gABI; kernel `fs/binfmt_elf.c`). The process is neither stopped nor
//! traced, and no page of a file is brought in: only what is resident or swapped out is read (the latter comes into memory by that), and the rest is
//! left out and told.

use super::{Held, PAGE, Share, Source, join, part};
use crate::collect::describe;
use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use stillframe_evidence::{
    image::elf,
    records::memory::{Gap, MemoryGap, Region},
    text::Text,
};

/// Holes of fewer pages in anonymous memory are stored as the zeros that they are, unread, rather than told apart: a program header costs as much
/// as half a page says. In a mapping of a file a hole is what the file has there, and is left out.
const JOIN: u64 = 4;
/// Bytes of the head of a core: it stands in one segment.
const MAX_HEAD: usize = 32 << 20;
/// Runs of pages of one process.
const MAX_RUNS: usize = 1 << 20;
/// Bytes of one mapping whose page table is walked: what is larger and mostly empty (address sanitizers) would take hours.
const MAX_MAPPING: u64 = 4 << 40;

/// A process, opened.
pub struct Process {
    memory: File,
    /// Bytes before the first mapping: the head of the core.
    head: Vec<u8>,
    runs: Vec<(u64, u64)>,
    /// Holes inside of them, in order: reading would bring them in.
    absent: Vec<(u64, u64)>,
    state: Mutex<State>,
    /// Its mappings.
    pub regions: Vec<Region>,
    /// Mappings that were left out because of their size.
    pub left_out: Vec<MemoryGap>,
    segment: u64,
}

struct State {
    runs: VecDeque<(u64, u64)>,
    number: u64,
    head: Vec<u8>,
}

impl Process {
    /// Reads its mappings below `root`. The error is one line.
    pub fn open(root: &Path, pid: u32) -> Result<Self, String> {
        let folder = root.join(format!("proc/{pid}"));
        let wrong = |what: &str, error: io::Error| match error.raw_os_error() {
            Some(2 | 3) => format!("no process {pid}"),
            _ => format!("{}: {}", folder.join(what).display(), describe(&error)),
        };
        let smaps = fs::read(folder.join("smaps")).map_err(|e| wrong("smaps", e))?;
        let memory = File::open(folder.join("mem")).map_err(|e| wrong("mem", e))?;
        let pagemap = File::open(folder.join("pagemap")).map_err(|e| wrong("pagemap", e))?;
        let mut regions = Vec::new();
        let mut loads = Vec::new();
        let (mut left_out, mut absent) = (Vec::new(), Vec::new());
        for (mut region, present) in mappings(pid, &smaps) {
            if present && region.permissions.starts_with('r') && region.path != Text::from("[vvar]") {
                if region.end - region.start > MAX_MAPPING {
                    left_out.push(MemoryGap {
                        start: region.start,
                        end: region.end - 1,
                        gap: Gap::NotResident,
                        why: "the mapping is larger than is walked".to_owned(),
                    });
                } else {
                    let join = if is_anonymous(&region) { JOIN } else { 1 };
                    for (start, size) in resident(&pagemap, (region.start, region.end), join, &mut absent) {
                        region.captured += size;
                        loads.push(elf::Segment {
                            load: true,
                            flags: flags(&region.permissions),
                            offset: 0,
                            virtual_address: start,
                            physical_address: 0,
                            size,
                        });
                    }
                }
            }
            regions.push(region);
        }
        if loads.len() > MAX_RUNS {
            return Err(format!(
                "process {pid} has its memory in {} pieces, more than are stored",
                loads.len()
            ));
        }
        let notes = notes(&folder, pid, &regions);
        let borrowed: Vec<(&str, u32, &[u8])> = notes
            .iter()
            .map(|(owner, kind, content)| (*owner, *kind, content.as_slice()))
            .collect();
        let mut head = elf::head(&borrowed, &mut loads, PAGE, 0);
        if head.len() > MAX_HEAD {
            return Err(format!(
                "process {pid}: the head of its core would have {} bytes, more than is stored",
                head.len()
            ));
        }
        let aligned = head.len().next_multiple_of(4096);
        head.resize(aligned, 0);
        let runs: Vec<(u64, u64)> = loads.iter().map(|l| (l.virtual_address, l.size)).collect();
        Ok(Process {
            memory,
            state: Mutex::new(State {
                runs: runs.iter().copied().collect(),
                number: 0,
                head: head.clone(),
            }),
            head,
            runs,
            absent,
            regions,
            left_out,
            segment: 1 << 20,
        })
    }

    /// Cuts into segments of this size from here on.
    pub fn in_segments_of(mut self, segment: u64) -> Self {
        self.segment = segment;
        self
    }

    /// Bytes of the core.
    pub fn size(&self) -> u64 {
        self.runs
            .iter()
            .fold(self.head.len() as u64, |sum, (_, size)| sum.saturating_add(*size))
    }
}

fn flags(permissions: &str) -> u32 {
    let one = |c: char, flag: u32| if permissions.contains(c) { flag } else { 0 };
    one('r', 4) | one('w', 2) | one('x', 1)
}

/// Private memory of no file: `[heap]`, `[stack]`, or without a name. What is shared may be anybody's.
fn is_anonymous(region: &Region) -> bool {
    let path = region.path.as_bytes();
    region.permissions.ends_with('p') && (path.is_empty() || path.starts_with(b"["))
}

/// The mappings of `smaps`, and whether anything of them is resident or swapped out.
fn mappings(pid: u32, smaps: &[u8]) -> Vec<(Region, bool)> {
    let mut found: Vec<(Region, bool)> = Vec::new();
    for line in smaps.split(|b| *b == b'\n') {
        if let Some(region) = mapping(pid, line) {
            found.push((region, false));
            continue;
        }
        let text = String::from_utf8_lossy(line);
        let amount = ["Rss:", "Swap:"].iter().find_map(|name| text.strip_prefix(name));
        let amount = amount.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        if let (Some(amount), Some((_, present))) = (amount, found.last_mut()) {
            *present |= amount > 0;
        }
    }
    found
}

/// `start-end perms offset dev inode path`.
fn mapping(pid: u32, line: &[u8]) -> Option<Region> {
    let mut fields = line.splitn(6, |b| *b == b' ');
    let mut next = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    let permissions = next()?.to_owned();
    let offset = address(next()?)?;
    let _ = (next()?, next()?);
    let path = fields.next().unwrap_or_default().trim_ascii_start();
    (start < end && permissions.len() == 4).then(|| Region {
        pid,
        start,
        end,
        permissions,
        offset,
        path: Text::from(path),
        captured: 0,
    })
}

/// Runs of pages that are in memory or swapped out: bits 63 and 62 of an entry (`Documentation/admin-guide/mm/pagemap.rst`). The short holes
/// between them go to `absent`.
fn resident(
    pagemap: &File,
    (start, end): (u64, u64),
    join: u64,
    absent: &mut Vec<(u64, u64)>,
) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut entries = vec![0; 64 << 10];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from((end - at) / PAGE * 8)
            .unwrap_or(usize::MAX)
            .min(entries.len());
        let buffer = entries.get_mut(..wanted).unwrap_or_default();
        let n = match crate::sys::read_at(pagemap, buffer, at / PAGE * 8) {
            Ok(n) if n >= 8 => n,
            // vsyscall lies beyond the table.
            _ => break,
        };
        let (words, _) = buffer.get(..n).unwrap_or_default().as_chunks::<8>();
        for (page, word) in (0u64..).zip(words) {
            if u64::from_le_bytes(*word) >> 62 == 0 {
                continue;
            }
            let address = at + page * PAGE;
            match runs.last_mut() {
                Some((start, size)) if address - (*start + *size) < join * PAGE => {
                    if *start + *size < address {
                        absent.push((*start + *size, address - (*start + *size)));
                    }
                    *size = address + PAGE - *start
                }
                _ => runs.push((address, PAGE)),
            }
        }
        at += words.len() as u64 * PAGE;
    }
    runs
}

/// What a debugger wants to know: NT_PRPSINFO, NT_PRSTATUS of each thread, NT_AUXV, NT_FILE (`include/uapi/linux/elf.h`).
fn notes(folder: &Path, pid: u32, regions: &[Region]) -> Vec<(&'static str, u32, Vec<u8>)> {
    let mut notes = vec![("CORE", 3, information(folder, pid))];
    let mut threads: Vec<u32> = fs::read_dir(folder.join("task"))
        .map(|entries| {
            entries
                .flatten()
                .filter_map(|e| e.file_name().to_str()?.parse().ok())
                .collect()
        })
        .unwrap_or_default();
    threads.sort_unstable();
    for thread in threads.iter().take(4096) {
        notes.push(("CORE", 1, status(folder, *thread)));
    }
    if threads.is_empty() {
        notes.push(("CORE", 1, status(folder, pid)));
    }
    if let Ok(auxv) = fs::read(folder.join("auxv")) {
        notes.push(("CORE", 6, auxv));
    }
    let files: Vec<&Region> = regions.iter().filter(|r| r.path.0.starts_with(b"/")).collect();
    let mut list: Vec<u8> = [files.len() as u64, PAGE]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    for region in &files {
        list.extend(
            [region.start, region.end, region.offset / PAGE]
                .into_iter()
                .flat_map(u64::to_le_bytes),
        );
    }
    for region in &files {
        list.extend_from_slice(&region.path.0);
        list.push(0);
    }
    notes.push(("CORE", 0x4649_4c45, list));
    notes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// `struct elf_prpsinfo` of x86-64: 136 bytes; pid at 24, pr_fname at 40, pr_psargs at 56.
fn information(folder: &Path, pid: u32) -> Vec<u8> {
    let mut bytes = vec![0; 136];
    put(&mut bytes, 24, &pid.to_le_bytes());
    let cut = |path: PathBuf, most: usize| {
        let text = fs::read(path).unwrap_or_default();
        let text: Vec<u8> = text
            .trim_ascii_end()
            .iter()
            .take(most)
            .map(|b| if *b == 0 { b' ' } else { *b })
            .collect();
        text
    };
    put(&mut bytes, 40, &cut(folder.join("comm"), 15));
    put(&mut bytes, 56, &cut(folder.join("cmdline"), 79));
    bytes
}

/// `struct elf_prstatus` of x86-64: 336 bytes; pr_pid at 32, registers from 112, of which rip is the 17th and rsp the 20th. The two are
/// known of a thread that waits in the kernel (`/proc/PID/task/TID/syscall`); the others would take stopping it.
fn status(folder: &Path, thread: u32) -> Vec<u8> {
    let mut bytes = vec![0; 336];
    put(&mut bytes, 32, &thread.to_le_bytes());
    let line = fs::read_to_string(folder.join(format!("task/{thread}/syscall"))).unwrap_or_default();
    let mut last = line
        .split_whitespace()
        .rev()
        .map_while(|field| u64::from_str_radix(field.strip_prefix("0x")?, 16).ok());
    if let (Some(instruction), Some(stack)) = (last.next(), last.next()) {
        put(&mut bytes, 112 + 16 * 8, &instruction.to_le_bytes());
        put(&mut bytes, 112 + 19 * 8, &stack.to_le_bytes());
    }
    bytes
}

/// Whether `address` is in a hole, and bytes until that changes.
fn hole(absent: &[(u64, u64)], address: u64) -> (bool, u64) {
    let next = absent.partition_point(|(start, size)| start + size <= address);
    match absent.get(next) {
        Some((start, size)) if *start <= address => (true, start + size - address),
        Some((start, _)) => (false, start - address),
        None => (false, u64::MAX),
    }
}

impl Source for Process {
    fn expected(&self) -> Vec<(u64, u64)> {
        self.runs.clone()
    }

    fn next(&self, _held: &mut Held) -> Result<Option<Share>, String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut share = Share {
            number: state.number,
            head: std::mem::take(&mut state.head),
            stretches: Vec::new(),
        };
        // A page at least, so that a long head is not alone for ever.
        let mut room = self.segment.saturating_sub(share.head.len() as u64).max(PAGE);
        while let Some((start, left)) = state.runs.front_mut().filter(|_| room > 0) {
            let size = room.min(*left);
            share.stretches.push((*start, size));
            room -= size;
            *start += size;
            *left -= size;
            if *left == 0 {
                state.runs.pop_front();
            }
        }
        state.number += 1;
        Ok((!share.stretches.is_empty()).then_some(share))
    }

    fn read(&self, _held: &Held, address: u64, piece: &mut [u8]) -> Result<Vec<MemoryGap>, String> {
        let size = piece.len();
        let mut gaps = Vec::new();
        let mut done = 0u64;
        while done < size as u64 {
            let left = size as u64 - done;
            let wanted = match hole(&self.absent, address + done) {
                (true, hole) => {
                    let hole = hole.min(left);
                    part(piece, done, hole).fill(0);
                    done += hole;
                    continue;
                }
                (false, until) => until.min(left),
            };
            let why = match crate::sys::read_at(&self.memory, part(piece, done, wanted), address + done) {
                Ok(n) if n > 0 => {
                    done += n as u64;
                    continue;
                }
                Ok(_) => "the process is gone".to_owned(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => describe(&error),
            };
            let page = (PAGE - (address + done) % PAGE).min(size as u64 - done);
            part(piece, done, page).fill(0);
            let gap = MemoryGap {
                start: address + done,
                end: address + done + page - 1,
                gap: Gap::Unreadable,
                why,
            };
            join(&mut gaps, gap);
            done += page;
        }
        Ok(gaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mappings_are_read() {
        let smaps = b"55d0c0a00000-55d0c0a21000 rw-p 00001000 00:00 0                          [he ap]\nRss:                   4 kB\nSwap:                  0 kB\n\
            7f0000000000-7f0000001000 ---p 00000000 00:00 0 \nRss:                   0 kB\nSwap:                  0 kB\n";
        let found = mappings(7, smaps);
        let (heap, present) = &found[0];
        assert_eq!(
            (heap.start, heap.end, heap.offset, *present),
            (0x55d0_c0a0_0000, 0x55d0_c0a2_1000, 0x1000, true)
        );
        assert_eq!(heap.path, Text::from("[he ap]"));
        assert!(!found[1].1);
    }

    #[test]
    fn a_page_that_is_not_there_is_not_read() {
        let absent = [(0x3000, 0x1000), (0x6000, 0x2000)];
        assert_eq!(hole(&absent, 0x1000), (false, 0x2000));
        assert_eq!(hole(&absent, 0x3000), (true, 0x1000));
        assert_eq!(hole(&absent, 0x4000), (false, 0x2000));
        assert_eq!(hole(&absent, 0x7000), (true, 0x1000));
        assert_eq!(hole(&absent, 0x8000), (false, u64::MAX));
        assert_eq!(hole(&[], 0), (false, u64::MAX));
    }

    proptest! {
        #[test]
        fn any_smaps_is_read(text in "[0-9a-f rwxp:\\-\nRskB]{0,300}") {
            let _ = mappings(1, text.as_bytes());
        }
    }
}
