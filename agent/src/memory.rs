//! Memory, as a stream of frames: what is read ([`Source`]), and how it becomes segments ([`stream`]).
//!
//! ```text
//! source (kcore | lime | process | image) -> piece -> frame (zstd + SHA-256, on every core allowed) -> segment, in order
//! ```
//! A source knows addresses and nothing of compression or stores. Everything is bounded: as many buffers as threads, locked,
//! made once. What cannot be read is filled with zeros and told; nothing that cannot be read ends the rest.

pub mod companions;
pub mod image;
pub mod kcore;
pub mod lime;
pub mod probe;
pub mod process;
pub mod ranges;
pub mod stream;

use jiff::Timestamp;
use std::collections::VecDeque;
use stillframe_evidence::{image::lime as lime_format, records::memory::MemoryGap};

/// Bytes of a page, the unit in which memory is accounted for. Larger pages are runs of these.
pub const PAGE: u64 = 4096;

/// A piece of memory that a source has just read.
pub struct Piece {
    /// Its place in the artifact, from 0, without a gap.
    pub sequence: u64,
    /// True when a segment starts here.
    pub starts_segment: bool,
    /// What stands before it in a frame of its own: the header of a range.
    pub head: Vec<u8>,
    /// The address of its first byte.
    pub address: u64,
    /// Its bytes, at the beginning of the buffer.
    pub size: usize,
    /// When the reading began.
    pub read_at: Timestamp,
    /// What of it could not be read, and is zero in the buffer.
    pub gaps: Vec<MemoryGap>,
}

/// Where memory is read from. Several threads ask for pieces at once.
pub trait Source: Sync {
    /// What is expected, in order: first address and bytes of each range.
    fn expected(&self) -> Vec<(u64, u64)>;

    /// Reads the next piece into `buffer`; nothing when there is no more. An error ends the artifact: what was not handed
    /// out until then is missing.
    fn next(&self, buffer: &mut [u8]) -> Result<Option<Piece>, String>;

    /// Of the pages of a piece that are zero (`zero` has one entry a page), those that the kernel keeps back: reading them
    /// gives zeros without an error.
    fn kept_back(&self, _address: u64, _zero: &[bool]) -> Vec<MemoryGap> {
        Vec::new()
    }

    /// True when the addresses are physical ones of the running host: the pages that hold the capture's key are then left out.
    fn is_this_host(&self) -> bool {
        false
    }
}

/// Sizes that follow from how much there is to read.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Bytes of a piece, and so of a frame.
    pub frame: usize,
    /// Bytes of memory in a segment.
    pub segment: u64,
    /// The highest level of zstd: each has larger tables than the one before.
    pub level: i32,
}

impl Sizes {
    /// For `total` bytes of memory, on a host that has `host`. A small host gives up little of its memory for buffers; a large
    /// image gets fewer objects.
    pub fn of(total: u64, host: u64) -> Self {
        let small = host < 3 << 30;
        Sizes {
            // What is read, hashed and compressed one after the other stays in a core's own cache.
            frame: 256 << 10,
            segment: (total >> 10)
                .clamp(if small { 1 << 20 } else { 4 << 20 }, 16 << 20)
                .next_power_of_two(),
            level: if small { 1 } else { 5 },
        }
    }
}

/// A cut of the ranges: what one call of [`Source::next`] reads.
#[derive(Debug, PartialEq, Eq)]
pub struct Cut {
    /// Its place, from 0.
    pub sequence: u64,
    /// First and last address of the segment that starts here, if one does.
    pub segment: Option<(u64, u64)>,
    /// The first address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl Cut {
    /// The piece that was read of it: `size` bytes, of which `gaps` are not what is there. A segment starts with its range's header.
    fn piece(&self, size: usize, read_at: Timestamp, gaps: Vec<MemoryGap>) -> Piece {
        let header = self
            .segment
            .map(|(start, end)| lime_format::header(start, end).to_vec());
        Piece {
            sequence: self.sequence,
            starts_segment: self.segment.is_some(),
            head: header.unwrap_or_default(),
            address: self.address,
            size,
            read_at,
            gaps,
        }
    }
}

/// Cuts ranges into segments, and those into pieces.
#[derive(Debug)]
pub struct Cutter {
    ranges: VecDeque<(u64, u64)>,
    segment: u64,
    /// What is left of the segment under way.
    left: u64,
    sequence: u64,
}

impl Cutter {
    /// For ranges given as first address and bytes.
    pub fn new(ranges: &[(u64, u64)], segment: u64) -> Self {
        Cutter {
            ranges: ranges.iter().copied().filter(|(_, size)| *size > 0).collect(),
            segment: segment.max(PAGE),
            left: 0,
            sequence: 0,
        }
    }

    /// The next cut of at most `most` bytes.
    pub fn next(&mut self, most: u64) -> Option<Cut> {
        let (start, size) = self.ranges.front_mut()?;
        let mut segment = None;
        if self.left == 0 {
            // Segments end at multiples of their size, so that they lie on large pages.
            let room = self.segment - *start % self.segment;
            self.left = room.min(*size);
            segment = Some((*start, start.saturating_add(self.left - 1)));
        }
        let cut = Cut {
            sequence: self.sequence,
            segment,
            address: *start,
            size: most.min(self.left),
        };
        self.sequence += 1;
        self.left -= cut.size;
        *start = start.saturating_add(cut.size);
        *size -= cut.size;
        if *size == 0 {
            self.ranges.pop_front();
        }
        Some(cut)
    }
}

/// Joins gaps that touch and are of one kind.
pub fn join(gaps: &mut Vec<MemoryGap>, gap: MemoryGap) {
    match gaps.last_mut() {
        Some(last)
            if last.end.checked_add(1) == Some(gap.start) && last.gap == gap.gap && last.why == gap.why =>
        {
            last.end = gap.end;
        }
        _ => gaps.push(gap),
    }
}

/// A part of a buffer, by offsets; empty where it does not exist.
fn part(buffer: &mut [u8], from: u64, size: u64) -> &mut [u8] {
    let bounds = usize::try_from(from).ok().zip(usize::try_from(size).ok());
    bounds
        .and_then(|(from, size)| buffer.get_mut(from..from.checked_add(size)?))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn cuts_are_the_ranges_again(sizes in proptest::collection::vec((0u64..40, 1u64..5), 0..12), segment in 1u64..9, most in 1u64..7) {
            let mut at = 0;
            let ranges: Vec<(u64, u64)> = sizes.iter().map(|(size, gap)| { at += gap * PAGE; let range = (at, size * PAGE); at += size * PAGE; range }).collect();
            let mut cutter = Cutter::new(&ranges, segment * PAGE);
            let (mut pages, mut segments, mut sequence) = (Vec::new(), Vec::new(), 0);
            while let Some(cut) = cutter.next(most * PAGE) {
                prop_assert_eq!(cut.sequence, sequence);
                sequence += 1;
                segments.extend(cut.segment);
                let (_, end) = segments.last().copied().unwrap();
                prop_assert!(cut.size > 0 && cut.address + cut.size - 1 <= end);
                pages.extend((cut.address..cut.address + cut.size).step_by(4096));
            }
            let expected: Vec<u64> = ranges.iter().flat_map(|(start, size)| (*start..start + size).step_by(4096)).collect();
            prop_assert_eq!(&pages, &expected);
            let of_segments: Vec<u64> = segments.iter().flat_map(|(start, end)| (*start..=*end).step_by(4096)).collect();
            prop_assert_eq!(of_segments, expected);
            prop_assert!(segments.iter().all(|(start, end)| end - start < segment * PAGE));
        }
    }
}
