//! ELF cores of a kernel: `PT_LOAD` segments with physical addresses, and the `VMCOREINFO` note (System V ABI, chapter 5;
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`). 64 bit, little endian.

use super::{Bytes, Content, Map, NotAnImage, Run, cut_off};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"\x7fELF";
/// Program headers that are read.
const MAX_HEADERS: u64 = 1 << 16;
/// Bytes of notes that are read.
const MAX_NOTES: u64 = 16 << 20;

const EHDR: u64 = 64;
const PHDR: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// In `e_phnum` when the real number stands in the first section header (System V ABI, `PN_XNUM`).
const PN_XNUM: u16 = 0xffff;

/// A program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// `p_type` is `PT_LOAD`; else it is a note.
    pub load: bool,
    /// `p_flags`: 1 execute, 2 write, 4 read.
    pub flags: u32,
    /// Offset in the file.
    pub offset: u64,
    /// Virtual address.
    pub virtual_address: u64,
    /// Physical address.
    pub physical_address: u64,
    /// Bytes in the file.
    pub size: u64,
}

struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (word, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*word)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

fn wrong(at: u64, why: &'static str) -> NotAnImage {
    NotAnImage::Malformed {
        format: "ELF",
        at,
        why,
    }
}

/// The `PT_LOAD` and `PT_NOTE` segments of an ELF file.
pub fn segments(bytes: &dyn Bytes) -> Result<Vec<Segment>, NotAnImage> {
    let mut head = [0; 64];
    bytes
        .read_at(0, &mut head)
        .map_err(|_| wrong(0, "ends within its header"))?;
    let mut words = Words(&head);
    if words.take::<6>() != Some(*b"\x7fELF\x02\x01") {
        return Err(wrong(0, "not of 64 bit and little endian"));
    }
    let cut = || wrong(0, "ends within its header");
    let _ = (
        words.take::<10>(),
        words.u16(),
        words.u16(),
        words.u32(),
        words.u64(),
    );
    let table = words.u64().ok_or_else(cut)?;
    let sections = words.u64().ok_or_else(cut)?;
    let _ = (words.u32(), words.u16());
    let entry = words.u16().ok_or_else(cut)?;
    let count = match words.u16().ok_or_else(cut)? {
        PN_XNUM => {
            // sh_info of section 0.
            let mut info = [0; 4];
            bytes.read_at(sections.saturating_add(44), &mut info)?;
            u64::from(u32::from_le_bytes(info))
        }
        count => u64::from(count),
    };
    if u64::from(entry) != PHDR || count > MAX_HEADERS {
        return Err(wrong(0, "a table of program headers that is not read"));
    }
    let mut segments = Vec::new();
    for index in 0..count {
        let at = table.saturating_add(index * PHDR);
        let mut header = [0; 56];
        bytes.read_at(at, &mut header)?;
        let mut words = Words(&header);
        let cut = || wrong(at, "a program header that is cut off");
        let kind = words.u32().ok_or_else(cut)?;
        let flags = words.u32().ok_or_else(cut)?;
        let mut next = || words.u64().ok_or_else(cut);
        let segment = Segment {
            load: kind == PT_LOAD,
            flags,
            offset: next()?,
            virtual_address: next()?,
            physical_address: next()?,
            size: next()?,
        };
        if kind == PT_LOAD || kind == PT_NOTE {
            segments.push(segment);
        }
    }
    Ok(segments)
}

pub(super) fn runs(bytes: &dyn Bytes, size: u64) -> Result<Map, NotAnImage> {
    let (mut runs, mut cut): (Vec<Run>, _) = (Vec::new(), None);
    let loads: Vec<Segment> = segments(bytes)?
        .into_iter()
        .filter(|s| s.load && s.size > 0)
        .collect();
    if loads.len() > 1 && loads.iter().all(|s| s.physical_address == 0) {
        return Err(wrong(
            0,
            "its segments have no physical addresses: the core of a process, not of a kernel",
        ));
    }
    for segment in loads {
        let there = size.saturating_sub(segment.offset).min(segment.size);
        if there < segment.size {
            cut = cut_off(
                segment.offset,
                "a segment is longer than what is left of the file",
            );
        }
        runs.push(Run {
            start: segment.physical_address,
            size: there,
            content: Content::Plain(segment.offset),
        });
    }
    // The kernel's own text is listed a second time, under its other virtual address; what two have in common counts once.
    runs.sort_by_key(|run| (run.start, std::cmp::Reverse(run.size)));
    let mut end = 0;
    runs.retain_mut(|run| {
        let last = run.start.saturating_add(run.size);
        let known = u64::saturating_sub(end, run.start).min(run.size);
        if let Content::Plain(offset) = &mut run.content {
            *offset = offset.saturating_add(known);
        }
        run.start = run.start.saturating_add(known);
        run.size -= known;
        end = end.max(last);
        run.size > 0
    });
    Ok(Map { runs, cut })
}

/// The content of the note called `VMCOREINFO`, if there is one.
pub fn vmcoreinfo(bytes: &dyn Bytes) -> Result<Option<Vec<u8>>, NotAnImage> {
    for segment in segments(bytes)?.into_iter().filter(|s| !s.load) {
        let size = usize::try_from(segment.size.min(MAX_NOTES)).unwrap_or(0);
        let mut notes = vec![0; size];
        bytes.read_at(segment.offset, &mut notes)?;
        let mut rest = Words(&notes);
        while let (Some(name), Some(content), Some(_)) = (rest.u32(), rest.u32(), rest.u32()) {
            let padded = |n: u32| {
                usize::try_from(n)
                    .ok()
                    .and_then(|n| n.checked_next_multiple_of(4))
            };
            let split = padded(name).and_then(|n| rest.0.split_at_checked(n));
            let Some((owner, behind)) = split else { break };
            let split = padded(content).and_then(|n| behind.split_at_checked(n));
            let Some((content_padded, behind)) = split else {
                break;
            };
            if owner
                .strip_prefix(b"VMCOREINFO")
                .is_some_and(|rest| rest.iter().all(|b| *b == 0))
            {
                let content = usize::try_from(content)
                    .ok()
                    .and_then(|n| content_padded.get(..n));
                return Ok(content.map(<[u8]>::to_vec));
            }
            rest = Words(behind);
        }
    }
    Ok(None)
}

/// Bytes that [`head`] takes at most, for so many loads and so many bytes of notes.
pub fn head_bound(loads: usize, notes: usize) -> u64 {
    EHDR + 64 + (loads as u64 + 1) * PHDR + notes as u64 + 256
}

/// The head of an ELF core: header, program headers, notes; the content of `loads` follows it, one after another, each from a
/// multiple of `align`, the first not before `from`. `notes` are given as owner, type and content. Offsets of `loads` are filled in
/// here.
pub fn head(notes: &[(&str, u32, &[u8])], loads: &mut [Segment], align: u64, from: u64) -> Vec<u8> {
    let mut note = Vec::new();
    for (owner, kind, content) in notes {
        let length = |n: usize| u32::try_from(n).unwrap_or(0).to_le_bytes();
        note.extend(length(owner.len() + 1));
        note.extend(length(content.len()));
        note.extend(kind.to_le_bytes());
        for part in [[owner.as_bytes(), b"\0"].concat().as_slice(), content] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
    }
    let count = loads.len() as u64 + 1;
    let wide = count >= u64::from(PN_XNUM);
    // Behind the program headers: where there are too many of them, one section header that says how many.
    let sections = EHDR + count * PHDR;
    let notes_at = sections + if wide { 64 } else { 0 };
    let mut at = from.max(notes_at + note.len() as u64).next_multiple_of(align);
    let mut out = Vec::new();
    out.extend(b"\x7fELF\x02\x01\x01");
    out.resize(16, 0);
    // ET_CORE, EM_X86_64, EV_CURRENT
    out.extend([4u16, 62].into_iter().flat_map(u16::to_le_bytes));
    out.extend(1u32.to_le_bytes());
    let shoff = if wide { sections } else { 0 };
    out.extend([0u64, EHDR, shoff].into_iter().flat_map(u64::to_le_bytes));
    out.extend(0u32.to_le_bytes());
    let phnum = if wide {
        PN_XNUM
    } else {
        u16::try_from(count).unwrap_or(PN_XNUM)
    };
    let shnum = u16::from(wide);
    out.extend(
        [64u16, 56, phnum, 64, shnum, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    let header = |kind: u32, flags: u32, words: [u64; 6]| {
        let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        bytes.extend(words.into_iter().flat_map(u64::to_le_bytes));
        bytes
    };
    out.extend(header(PT_NOTE, 0, [notes_at, 0, 0, note.len() as u64, 0, 4]));
    for load in loads {
        load.offset = at;
        at = at.saturating_add(load.size).next_multiple_of(align);
        let words = [
            load.offset,
            load.virtual_address,
            load.physical_address,
            load.size,
            load.size,
            align,
        ];
        out.extend(header(PT_LOAD, load.flags, words));
    }
    if wide {
        let mut section = vec![0; 64];
        if let Some(info) = section.get_mut(44..48) {
            info.copy_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
        }
        out.extend(section);
    }
    out.extend(note);
    out
}
