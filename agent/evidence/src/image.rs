//! Images of physical memory, whoever took them: where in the file which physical address is. Reads LiME, AVML (compressed),
//! ELF cores of the kernel and raw files; writes the headers of LiME and ELF.
//!
//! Nothing here opens a file. All of an image is hostile: every length is checked against the file, every list is bounded.

pub mod avml;
pub mod elf;
pub mod lime;

use std::io;

/// Bytes at offsets, such as a file.
pub trait Bytes: Send + Sync {
    /// How many there are.
    fn size(&self) -> io::Result<u64>;
    /// Fills `buffer` from the offset `at`; an error when there are not as many.
    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Bytes for &[u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let found = usize::try_from(at)
            .ok()
            .and_then(|at| self.get(at..at.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }
}

#[cfg(unix)]
impl Bytes for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        use std::io::Seek as _;
        // The length of a block device is not in its metadata.
        let mut file = self;
        file.seek(io::SeekFrom::End(0))
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, at)
    }
}

#[cfg(windows)]
impl Bytes for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|m| m.len())
    }

    fn read_at(&self, mut at: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let n = std::os::windows::fs::FileExt::seek_read(self, buffer, at)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at = at.saturating_add(n as u64);
            buffer = buffer.get_mut(n..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Why a file is not read as an image.
#[derive(Debug, thiserror::Error)]
pub enum NotAnImage {
    /// The file could not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It claims a format and breaks its rules.
    #[error("{format} at offset {at}: {why}")]
    Malformed {
        /// The format.
        format: &'static str,
        /// Where.
        at: u64,
        /// Which rule.
        why: &'static str,
    },
}

/// The formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// LiME, as this project writes it, LiME itself, and AVML when it does not compress.
    Lime,
    /// AVML's version 2: LiME-like headers, content in snappy frames.
    Avml,
    /// An ELF core with physical addresses.
    Elf,
    /// The bytes of physical memory from address 0.
    Raw,
}

impl Format {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Lime => "lime",
            Format::Avml => "avml",
            Format::Elf => "elf",
            Format::Raw => "raw",
        }
    }
}

/// A run of physical addresses in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Where they are.
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// As they are, at this offset.
    Plain(u64),
    /// One chunk of snappy's framing format.
    Snappy(avml::Chunk),
}

/// Runs that an image may have. A compressed one has one for each 64 KiB: this is 2 TiB of them.
const MAX_RUNS: usize = 1 << 25;

/// An image and its map.
pub struct Image<'a> {
    bytes: &'a dyn Bytes,
    format: Format,
    /// By address, without overlap.
    runs: Vec<Run>,
    cut: Option<String>,
}

/// What a format's reader found.
struct Map {
    runs: Vec<Run>,
    /// Where the file ends before what it announces does: as far as it goes it is read.
    cut: Option<String>,
}

fn cut_off(at: u64, why: &str) -> Option<String> {
    Some(format!("at offset {at}: {why}"))
}

impl<'a> Image<'a> {
    /// Finds out the format and reads the map.
    pub fn open(bytes: &'a dyn Bytes) -> Result<Self, NotAnImage> {
        let size = bytes.size()?;
        let mut magic = [0; 4];
        if size >= 4 {
            bytes.read_at(0, &mut magic)?;
        }
        let (format, Map { mut runs, cut }) = match magic {
            lime::MAGIC => (Format::Lime, lime::runs(bytes, size)?),
            avml::MAGIC => (Format::Avml, avml::runs(bytes, size)?),
            elf::MAGIC => (Format::Elf, elf::runs(bytes, size)?),
            _ if size % 4096 != 0 => {
                return Err(NotAnImage::Malformed {
                    format: "raw",
                    at: size,
                    why: "no format that is known, and not whole pages as a raw image is",
                });
            }
            _ => {
                let content = Content::Plain(0);
                let runs = vec![Run {
                    start: 0,
                    size,
                    content,
                }];
                (Format::Raw, Map { runs, cut: None })
            }
        };
        runs.retain(|run| run.size > 0);
        runs.sort_by_key(|run| run.start);
        let overlap = runs.windows(2).any(|pair| match pair {
            [a, b] => a.start.checked_add(a.size).is_none_or(|end| end > b.start),
            _ => false,
        });
        let wraps = runs
            .last()
            .is_some_and(|last| last.start.checked_add(last.size).is_none());
        if overlap || wraps {
            return Err(NotAnImage::Malformed {
                format: format.as_str(),
                at: 0,
                why: "two ranges overlap",
            });
        }
        Ok(Image {
            bytes,
            format,
            runs,
            cut,
        })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Where and why the file ends before its end, if it does: a full disk, a tool that was killed.
    pub fn cut(&self) -> Option<&str> {
        self.cut.as_deref()
    }

    /// What is in the image: first address and number of bytes of each stretch, rising, neighbours joined.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for run in &self.runs {
            match ranges.last_mut() {
                Some((start, size)) if start.saturating_add(*size) == run.start => *size += run.size,
                _ => ranges.push((run.start, run.size)),
            }
        }
        ranges
    }

    /// Fills `buffer` from the physical address `address`; says how many bytes are in the image, the rest is zero. The
    /// error is that of the file, or of its compression.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let end = address.saturating_add(buffer.len() as u64);
        let first = self
            .runs
            .partition_point(|run| run.start.saturating_add(run.size) <= address);
        let mut at = address;
        let mut found = 0;
        for run in self.runs.get(first..).unwrap_or_default() {
            if run.start >= end {
                break;
            }
            let (from, to) = (run.start.max(address), (run.start + run.size).min(end));
            part(buffer, at - address, from - address)?.fill(0);
            let into = part(buffer, from - address, to - address)?;
            match &run.content {
                Content::Plain(offset) => self
                    .bytes
                    .read_at(offset.saturating_add(from - run.start), into)?,
                Content::Snappy(chunk) => chunk.read(self.bytes, from - run.start, into)?,
            }
            found += into.len();
            at = to;
        }
        part(buffer, at - address, end - address)?.fill(0);
        Ok(found)
    }
}

fn part(buffer: &mut [u8], from: u64, to: u64) -> io::Result<&mut [u8]> {
    let index = |n: u64| usize::try_from(n).map_err(io::Error::other);
    buffer
        .get_mut(index(from)?..index(to)?)
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    /// Pages with content, as ranges that do not touch.
    fn ranges() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
        proptest::collection::vec((1u64..50, 1usize..60_000, any::<u8>()), 1..5).prop_map(|parts| {
            let mut at = 0;
            let range = |(gap, size, seed): (u64, usize, u8)| {
                at += gap * 4096;
                let start = at;
                at += size as u64;
                let byte = |n: usize| u8::try_from(n / 7 % 251).unwrap_or(0) ^ seed;
                (start, (0..size).map(byte).collect())
            };
            parts.into_iter().map(range).collect()
        })
    }

    fn lime_of(ranges: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (start, content) in ranges {
            out.extend(lime::header(*start, start + content.len() as u64 - 1));
            out.extend(content);
        }
        out
    }

    fn avml_of(ranges: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (start, content) in ranges {
            let mut header = lime::header(*start, start + content.len() as u64 - 1);
            header[..4].copy_from_slice(&avml::MAGIC);
            header[4] = 2;
            out.extend(header);
            let mut snappy = snap::write::FrameEncoder::new(Vec::new());
            snappy.write_all(content).unwrap();
            let stream = snappy.into_inner().unwrap();
            out.extend(&stream);
            out.extend((stream.len() as u64).to_le_bytes());
        }
        out
    }

    fn elf_of(ranges: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let load = |(start, content): &(u64, Vec<u8>)| elf::Segment {
            load: true,
            flags: 7,
            offset: 0,
            virtual_address: 0,
            physical_address: *start,
            size: content.len() as u64,
        };
        let mut loads: Vec<elf::Segment> = ranges.iter().map(load).collect();
        let mut out = elf::head(&[("VMCOREINFO", 0, b"OSRELEASE=x\n")], &mut loads, 4096, 0);
        for (load, (_, content)) in loads.iter().zip(ranges) {
            out.resize(usize::try_from(load.offset).unwrap(), 0);
            out.extend(content);
        }
        out
    }

    /// Whether so many bytes are all of the first ranges: a file that ends between two cannot know of the next.
    fn whole_ranges(ranges: &[(u64, Vec<u8>)], there: u64) -> bool {
        let mut sum = 0;
        ranges.iter().any(|(_, content)| {
            sum += content.len() as u64;
            sum == there
        })
    }

    proptest! {
        #[test]
        fn every_format_gives_the_memory_back(ranges in ranges(), from in 0u64..300_000, size in 1usize..100_000) {
            for (format, bytes) in [("lime", lime_of(&ranges)), ("avml", avml_of(&ranges)), ("elf", elf_of(&ranges))] {
                let bytes = bytes.as_slice();
                let image = Image::open(&bytes).unwrap();
                prop_assert_eq!(image.format().as_str(), format);
                prop_assert_eq!(image.cut(), None);
                let listed: Vec<(u64, u64)> = ranges.iter().map(|(start, content)| (*start, content.len() as u64)).collect();
                prop_assert_eq!(image.ranges(), listed);
                let mut buffer = vec![0xee; size];
                let found = image.read(from, &mut buffer).unwrap();
                let byte = |address: u64| ranges.iter().find_map(|(start, content)| content.get(usize::try_from(address.checked_sub(*start)?).ok()?));
                let expected: Vec<Option<&u8>> = (from..from + size as u64).map(byte).collect();
                prop_assert_eq!(found, expected.iter().flatten().count());
                prop_assert_eq!(buffer, expected.into_iter().map(|b| b.copied().unwrap_or(0)).collect::<Vec<u8>>());
            }
        }

        /// A file that was cut off is read as far as it goes, and says that it was; a changed one is refused or read, never more than
        /// it holds.
        #[test]
        fn a_cut_or_changed_image_is_no_danger(ranges in ranges(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
            for whole in [lime_of(&ranges), avml_of(&ranges), elf_of(&ranges)] {
                let at = at.index(whole.len());
                if let Some(bytes) = whole.get(..at).filter(|b| b.len() > 4)
                    && let Ok(image) = Image::open(&bytes)
                {
                    let there: u64 = image.ranges().iter().map(|(_, size)| size).sum();
                    let all: u64 = ranges.iter().map(|(_, content)| content.len() as u64).sum();
                    // AVML's last eight bytes say nothing of the content.
                    prop_assert!(there <= all && (there == all || image.cut().is_some() || whole_ranges(&ranges, there)));
                    for (start, size) in image.ranges() {
                        let mut buffer = vec![0; usize::try_from(size).unwrap()];
                        prop_assert_eq!(image.read(start, &mut buffer).unwrap(), buffer.len());
                    }
                }
                let mut changed = whole.clone();
                changed[at] = with;
                let changed = changed.as_slice();
                if let Ok(image) = Image::open(&changed) {
                    let mut buffer = vec![0; 4096];
                    for (start, _) in image.ranges() {
                        let _ = image.read(start, &mut buffer);
                    }
                }
            }
        }
    }

    #[test]
    fn the_note_is_found_again() {
        let bytes = elf_of(&[(0x1000, vec![1; 100])]);
        assert_eq!(
            elf::vmcoreinfo(&bytes.as_slice()).unwrap().unwrap(),
            b"OSRELEASE=x\n"
        );
    }

    #[test]
    fn more_segments_than_a_header_counts() {
        let ranges: Vec<(u64, Vec<u8>)> = (0..70_000u64).map(|n| (n * 8192, vec![7])).collect();
        let bytes = elf_of(&ranges);
        // The table is bounded when it is read: 65,536.
        assert!(elf::segments(&bytes.as_slice()).is_err());
        let fewer = elf_of(ranges.get(..65_534).unwrap());
        assert_eq!(elf::segments(&fewer.as_slice()).unwrap().len(), 65_535);
    }
}
