//! `/proc/kcore`: physical memory as the kernel's own ELF core (kernel `fs/proc/kcore.c`). Each `PT_LOAD` with a physical address
//! is a stretch of RAM; kernels that leave `p_paddr` zero are read by their direct map. The kernel says nothing when it keeps
//! a page back: zeros come, and no error. So pages of zeros are looked up in `/proc/kpageflags`.

use super::{Cutter, Held, PAGE, Share, Source, join, part, ranges};
use crate::collect::describe;
use std::{
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use stillframe_evidence::{
    image::{Bytes as _, elf},
    records::memory::{Gap, MemoryGap},
};

/// Why `/proc/kcore` cannot be the source.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The kernel was built without it.
    #[error(
        "this kernel has no /proc/kcore; where it can load modules, LiME's for exactly this kernel would do (--lime-module)"
    )]
    Absent,
    /// Lockdown.
    #[error(
        "the kernel is locked down (confidentiality), which closes /proc/kcore and every other way to read its memory from inside; \
         take a snapshot from outside, or boot without lockdown=confidentiality"
    )]
    LockedDown,
    /// Not root, or not in the host's own namespaces.
    #[error("/proc/kcore may not be read: {0}; the agent must run as root with CAP_SYS_RAWIO")]
    Denied(String),
    /// It is there and makes no sense.
    #[error("/proc/kcore cannot be used: {0}")]
    Unusable(String),
}

/// Where the kernel's own text is linked to start (`arch/x86/include/asm/page_64_types.h`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Pages that are read one by one behind an error.
const CAREFUL: u64 = 256;

/// A stretch of physical memory and where it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    start: u64,
    size: u64,
    offset: u64,
}

/// How the physical addresses were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// The program headers say.
    Physical,
    /// They say zero: the direct map, which starts at this virtual address.
    DirectMap(u64),
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Addresses::Physical => f.write_str("p_paddr"),
            Addresses::DirectMap(base) => write!(f, "direct map at {base:#x}"),
        }
    }
}

/// The open file and its map.
pub struct Kcore {
    path: PathBuf,
    /// Open files, one for each thread that reads. Until 6.3 the kernel copies through a page that belongs to the open file, without a
    /// lock (`fs/proc/kcore.c`, `read_kcore`): two reads at once of one file mix the pages up, and both succeed.
    files: Mutex<Vec<File>>,
    flags: Option<File>,
    stretches: Vec<Stretch>,
    expected: Vec<(u64, u64)>,
    cutter: Mutex<Cutter>,
    /// How the addresses were found.
    pub addresses: Addresses,
}

impl Kcore {
    /// Opens it below `root`, and finds what is RAM. `segment` is the size of the segments.
    pub fn open(root: &Path) -> Result<Self, Unavailable> {
        let path = root.join("proc/kcore");
        let file = File::open(&path).map_err(|error| match error.raw_os_error() {
            Some(2) => Unavailable::Absent,
            Some(1) if is_locked_down(root) => Unavailable::LockedDown,
            _ => Unavailable::Denied(describe(&error)),
        })?;
        let unusable = |why: String| Unavailable::Unusable(why);
        // The loads as the kernel lists them: their offsets are beyond any file's size, so nothing is checked against that.
        let segments: Vec<elf::Segment> = elf::segments(&file)
            .map_err(|error| unusable(error.to_string()))?
            .into_iter()
            .filter(|s| s.load && s.size > 0)
            .collect();
        let iomem = fs::read(root.join("proc/iomem")).unwrap_or_default();
        let ram = ranges::system_ram(&String::from_utf8_lossy(&iomem));
        let (stretches, addresses) = map(&segments, |name| pointer(&file, &segments, root, name));
        let listed: Vec<(u64, u64)> = stretches.iter().map(|s| (s.start, s.size)).collect();
        let expected = match (ram.is_empty(), addresses) {
            (false, _) => ram,
            (true, Addresses::Physical) => listed,
            (true, Addresses::DirectMap(_)) => {
                let why = "the program headers have no physical addresses and /proc/iomem shows none";
                return Err(unusable(why.to_owned()));
            }
        };
        if ranges::common(
            &expected,
            &stretches.iter().map(|s| (s.start, s.size)).collect::<Vec<_>>(),
        )
        .is_empty()
        {
            return Err(unusable("it lists no physical memory".to_owned()));
        }
        Ok(Kcore {
            path,
            files: Mutex::new(vec![file]),
            flags: File::open(root.join("proc/kpageflags")).ok(),
            stretches,
            cutter: Mutex::new(Cutter::new(&expected, u64::MAX)),
            expected,
            addresses,
        })
    }

    /// Cuts into segments of this size from here on.
    pub fn in_segments_of(mut self, segment: u64) -> Self {
        self.cutter = Mutex::new(Cutter::new(&self.expected, segment));
        self
    }

    /// The `VMCOREINFO` note, where the kernel gives one.
    pub fn vmcoreinfo(&self) -> Option<Vec<u8>> {
        self.with_file(|file| elf::vmcoreinfo(file).ok().flatten()).ok()?
    }

    /// Gives an open file to one thread alone.
    fn with_file<T>(&self, read: impl FnOnce(&File) -> T) -> io::Result<T> {
        let spare = self.files.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let file = spare.map_or_else(|| File::open(&self.path), Ok)?;
        let result = read(&file);
        self.files
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(file);
        Ok(result)
    }

    /// Physical memory at `address`; what cannot be read is zero and comes back as gaps.
    fn fill(&self, file: &File, address: u64, buffer: &mut [u8]) -> Vec<MemoryGap> {
        let mut gaps = Vec::new();
        let end = address.saturating_add(buffer.len() as u64);
        let mut at = address;
        while at < end {
            let covering = self
                .stretches
                .iter()
                .find(|s| s.start <= at && at - s.start < s.size);
            let to = match covering {
                Some(s) => (s.start + s.size).min(end),
                None => {
                    let next = self.stretches.iter().map(|s| s.start).filter(|s| *s > at).min();
                    next.unwrap_or(end).min(end)
                }
            };
            let piece = part(buffer, at - address, to - at);
            match covering {
                Some(s) => read(file, at, s.offset.saturating_add(at - s.start), piece, &mut gaps),
                None => {
                    piece.fill(0);
                    let why = "RAM of /proc/iomem that /proc/kcore does not list".to_owned();
                    join(&mut gaps, gap(at, to, Gap::Unreadable, why));
                }
            }
            at = to;
        }
        gaps
    }
}

/// As much at a time as goes; where reading fails, one page is given up and the rest read.
fn read(file: &File, address: u64, offset: u64, buffer: &mut [u8], gaps: &mut Vec<MemoryGap>) {
    let size = buffer.len() as u64;
    let (mut done, mut careful) = (0, 0);
    while done < size {
        let page = (PAGE - (address + done) % PAGE).min(size - done);
        let want = if careful > 0 { page } else { size - done };
        let why = match crate::sys::read_at(file, part(buffer, done, want), offset.saturating_add(done)) {
            Ok(n) if n > 0 => {
                done += n as u64;
                careful = u64::saturating_sub(careful, 1);
                continue;
            }
            Ok(_) => "/proc/kcore ends before it".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => describe(&error),
        };
        // Which page of many is the bad one shows when they are read one by one.
        if careful == 0 && want > page {
            careful = CAREFUL;
            continue;
        }
        part(buffer, done, page).fill(0);
        join(
            gaps,
            gap(address + done, address + done + page, Gap::Unreadable, why),
        );
        done += page;
        careful = CAREFUL;
    }
}

fn gap(start: u64, end: u64, gap: Gap, why: String) -> MemoryGap {
    MemoryGap {
        start,
        end: end.saturating_sub(1),
        gap,
        why,
    }
}

/// Whether lockdown is at its strictest (kernel `security/lockdown/lockdown.c`).
pub fn is_locked_down(root: &Path) -> bool {
    fs::read_to_string(root.join("sys/kernel/security/lockdown"))
        .is_ok_and(|text| text.contains("[confidentiality]"))
}

/// Where physical memory is in the file. `pointer` gives the value of a pointer of the kernel, by its name.
fn map(segments: &[elf::Segment], pointer: impl Fn(&str) -> Option<u64>) -> (Vec<Stretch>, Addresses) {
    let known = |s: &&elf::Segment| s.physical_address != u64::MAX;
    if segments.iter().filter(known).any(|s| s.physical_address != 0) {
        let stretch = |s: &elf::Segment| Stretch {
            start: s.physical_address,
            size: s.size,
            offset: s.offset,
        };
        // -1 marks what is not RAM: vmalloc space, modules. Zero is an address only for the one that really starts there. The kernel's own
        // text and data come last: the kernel unmaps parts of that second view of them (page table isolation), which then read
        // as zeros although the direct map has them.
        let of_text = |s: &&elf::Segment| s.virtual_address >= KERNEL_MAP;
        let direct = segments.iter().filter(known).filter(|s| !of_text(s));
        let text = segments.iter().filter(known).filter(of_text);
        let mut stretches: Vec<Stretch> = direct.chain(text).map(stretch).collect();
        let zeros = stretches.iter().filter(|s| s.start == 0).count();
        if zeros > 1 {
            stretches.retain(|s| s.start != 0);
        }
        return (stretches, Addresses::Physical);
    }
    // Where the direct map starts: randomised since 4.8 (page_offset_base), fixed before (Documentation/x86/x86_64/mm.rst).
    let base = pointer("page_offset_base").unwrap_or(0xffff_8800_0000_0000);
    // Vmalloc space comes behind the direct map, at least 64 TiB above its start.
    let direct = |s: &&elf::Segment| s.virtual_address >= base && s.virtual_address - base < 64 << 40;
    let stretch = |s: &elf::Segment| Stretch {
        start: s.virtual_address - base,
        size: s.size,
        offset: s.offset,
    };
    let stretches = segments.iter().filter(direct).map(stretch).collect();
    (stretches, Addresses::DirectMap(base))
}

/// The value of a pointer of the kernel: its address from kallsyms, its content through the file itself.
fn pointer(file: &File, segments: &[elf::Segment], root: &Path, name: &str) -> Option<u64> {
    let kallsyms = fs::read_to_string(root.join("proc/kallsyms")).ok()?;
    let line = kallsyms
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(name))?;
    let address = u64::from_str_radix(line.split(' ').next()?, 16)
        .ok()
        .filter(|a| *a != 0)?;
    let holds = |s: &&elf::Segment| s.virtual_address <= address && address - s.virtual_address < s.size;
    let segment = segments.iter().find(holds)?;
    let mut word = [0; 8];
    let offset = segment.offset.checked_add(address - segment.virtual_address)?;
    file.read_at(offset, &mut word).ok()?;
    Some(u64::from_le_bytes(word)).filter(|value| *value != 0)
}

/// Flags of a page that mean that its content is kept back (`include/uapi/linux/kernel-page-flags.h`).
const KEPT_BACK: [(u32, &str); 3] = [
    (19, "the kernel marked the page as poisoned (hardware error)"),
    (20, "there is no page at this address"),
    (23, "the page is offline"),
];

impl Source for Kcore {
    fn expected(&self) -> Vec<(u64, u64)> {
        self.expected.clone()
    }

    fn next(&self, _held: &mut Held) -> Result<Option<Share>, String> {
        Ok(self.cutter.lock().unwrap_or_else(PoisonError::into_inner).next())
    }

    fn read(&self, _held: &Held, address: u64, buffer: &mut [u8]) -> Result<Vec<MemoryGap>, String> {
        self.with_file(|file| self.fill(file, address, buffer))
            .map_err(|error| format!("/proc/kcore: {}", describe(&error)))
    }

    fn kept_back(&self, address: u64, zero: &[bool]) -> Vec<MemoryGap> {
        let Some(flags) = &self.flags else {
            return Vec::new();
        };
        let mut words = vec![0; zero.len() * 8];
        let Ok(n) = crate::sys::read_at(flags, &mut words, address / PAGE * 8) else {
            return Vec::new();
        };
        let (words, _) = words.get(..n).unwrap_or_default().as_chunks::<8>();
        let mut gaps = Vec::new();
        for ((page, word), zero) in (0u64..).zip(words).zip(zero) {
            let word = u64::from_le_bytes(*word);
            let why = KEPT_BACK.iter().find(|(bit, _)| word >> bit & 1 == 1);
            if let (true, Some((_, why))) = (zero, why) {
                let start = address + page * PAGE;
                join(
                    &mut gaps,
                    gap(start, start + PAGE, Gap::Withheld, (*why).to_owned()),
                );
            }
        }
        gaps
    }

    fn is_this_host(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(virtual_address: u64, physical_address: u64, size: u64, offset: u64) -> elf::Segment {
        elf::Segment {
            load: true,
            flags: 7,
            offset,
            virtual_address,
            physical_address,
            size,
        }
    }

    #[test]
    fn what_is_not_ram_is_left_out() {
        let segments = [
            load(0xffff_c900_0000_0000, u64::MAX, 1 << 40, 0x1000),
            load(0xffff_8880_0000_1000, 0x1000, 0x9e000, 0x2000),
            load(0xffff_8880_0010_0000, 0x10_0000, 0x1000_0000, 0x3000),
        ];
        let (stretches, addresses) = map(&segments, |_| None);
        assert_eq!(addresses, Addresses::Physical);
        assert_eq!(
            stretches.iter().map(|s| s.start).collect::<Vec<_>>(),
            [0x1000, 0x10_0000]
        );
    }

    /// A kernel before 4.19 sets no physical address.
    #[test]
    fn the_direct_map_is_the_fallback() {
        let base = 0xffff_9d8a_4000_0000;
        let segments = [
            load(0xffff_ffff_8100_0000, 0, 0x100_0000, 0x1000),
            load(base + 0x10_0000, 0, 0x1000_0000, 0x3000),
            load(base + (66 << 40), 0, 1 << 40, 0x5000),
        ];
        let (stretches, addresses) = map(&segments, |name| (name == "page_offset_base").then_some(base));
        assert_eq!(addresses, Addresses::DirectMap(base));
        let expected = Stretch {
            start: 0x10_0000,
            size: 0x1000_0000,
            offset: 0x3000,
        };
        assert_eq!(stretches, [expected]);
    }
}
