//! Memory, as a stream of frames: what is read ([`Source`]), and how it becomes segments ([`stream`]).
//!
//! ```text
//! source (kcore | lime | process | image) -> share -> frames (zstd + SHA-256) and segment, on every core allowed -> store, in order
//! ```
//! A source knows addresses and nothing of compression or stores. Everything is bounded: as many buffers as threads, locked,
//! made once, and as many again that hold a segment each where a source can only be read from front to back. What cannot be read is filled with zeros and told; nothing that cannot be read ends the rest.

pub mod companions;
pub mod image;
pub mod kcore;
pub mod lime;
pub mod needles;
pub mod probe;
pub mod process;
pub mod ranges;
pub mod sha256;
pub mod shortage;
pub mod stream;

use crate::sys::LockedBuffer;
use jiff::Timestamp;
use std::{collections::VecDeque, io};
use stillframe_evidence::{image::lime as lime_format, records::memory::MemoryGap};

/// Bytes of a page, the unit in which memory is accounted for. Larger pages are runs of these.
pub const PAGE: u64 = 4096;

/// What one thread reads, hashes and compresses into one segment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Its place in the artifact, from 0, without a gap.
    pub number: u64,
    /// What stands before its content, in a frame of its own: the header of a range, the head of a core.
    pub head: Vec<u8>,
    /// First address and bytes of what is read, one after the other.
    pub stretches: Vec<(u64, u64)>,
}

/// What a thread holds of its share already, of a source that can only be read from front to back.
#[derive(Default)]
pub struct Held {
    start: u64,
    size: u64,
    at: Option<Timestamp>,
    buffer: Option<LockedBuffer>,
}

impl Held {
    /// Room for `size` bytes that start at `start` and are read now, in place of what was held. A buffer has `most` bytes.
    fn room(&mut self, start: u64, size: u64, most: u64) -> io::Result<&mut [u8]> {
        let buffer = match self.buffer.take() {
            Some(buffer) if buffer.len() as u64 >= size => buffer,
            _ => LockedBuffer::new(usize::try_from(size.max(most)).map_err(io::Error::other)?)?,
        };
        (self.start, self.size, self.at) = (start, size, Some(Timestamp::now()));
        Ok(part(self.buffer.insert(buffer), 0, size))
    }

    /// Clears what is held of these pages, each given by its first address and the first one behind it.
    fn clear(&mut self, pages: impl Fn(u64, u64) -> Vec<(u64, u64)>) {
        if let Some(buffer) = &mut self.buffer {
            for (start, end) in pages(self.start, self.size) {
                part(
                    buffer,
                    start.saturating_sub(self.start),
                    end.saturating_sub(start),
                )
                .fill(0);
            }
        }
    }

    /// Copies what starts at `address`; nothing where that is not held.
    fn copy(&self, address: u64, to: &mut [u8]) -> Option<()> {
        let from = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let held = self.buffer.as_ref()?.get(from..from.checked_add(to.len())?)?;
        to.copy_from_slice(held);
        Some(())
    }
}

/// Where memory is read from, by several threads at once: each takes a share, and reads it.
pub trait Source: Sync {
    /// What is expected, in order: first address and bytes of each range.
    fn expected(&self) -> Vec<(u64, u64)>;

    /// Hands out the next share; nothing when there is no more. An error ends the artifact: what was not handed out until then
    /// is missing.
    fn next(&self, held: &mut Held) -> Result<Option<Share>, String>;

    /// Reads what starts at `address`, in the share handed out with `held`, and fills `buffer`. What cannot be read is zero and
    /// comes back.
    fn read(&self, held: &Held, address: u64, buffer: &mut [u8]) -> Result<Vec<MemoryGap>, String>;

    /// Of the pages behind `address` that are zero (`zero` has one entry a page), those that the kernel keeps back: reading them
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
    /// Bytes of a frame.
    pub frame: usize,
    /// Bytes of memory in a segment.
    pub segment: u64,
    /// The highest level of zstd: each has larger tables than the one before.
    pub level: i32,
    /// The places that level 1 remembers, as a power of two.
    pub places: u32,
    /// Segments that are made at once: one for each thread, and some so that a thread with an easy one need not wait for the one before.
    pub ahead: usize,
    /// Segments that may be on their way to the store while another is made.
    pub in_flight: usize,
}

impl Sizes {
    /// For `total` bytes of memory, on a host that has `host`, read by so many threads, for a store that takes `at_once`. A small host gives up little of its memory for buffers, since what they
    /// overwrite may be evidence; a large image gets fewer objects.
    pub fn of(total: u64, host: u64, threads: usize, at_once: usize) -> Self {
        let small = is_small(host);
        // A small host has one buffer for a store that takes one at a time: there is not much to win by making the next one meanwhile.
        let in_flight = if small {
            at_once - at_once.min(1)
        } else {
            at_once.max(2)
        };
        let ahead = threads + threads / 2;
        let least = if small { 1 << 20 } else { 4 << 20 };
        // All segments in memory together; and no more of them than a manifest can name.
        let buffers = (ahead + in_flight).max(2) as u64;
        let most = (BUFFERS / buffers).max(total >> 16).clamp(1 << 20, 16 << 20);
        Sizes {
            // What is read, hashed and compressed one after the other stays in a core's own cache.
            frame: if small { 64 << 10 } else { 256 << 10 },
            segment: 1 << (total >> 10).max(least).min(most).ilog2(),
            level: if small { 1 } else { 5 },
            places: if small { 15 } else { 16 },
            ahead: ahead.max(1),
            in_flight,
        }
    }
}

/// Bytes of segments that are in memory at once, on a host with no more than 256 GiB.
const BUFFERS: u64 = 32 << 20;

/// True of a host whose memory a capture must be sparing with.
pub fn is_small(host: u64) -> bool {
    host < 3 << 30
}

/// Cuts ranges into the shares of a LiME image, each a range of its own.
#[derive(Debug)]
pub struct Cutter {
    ranges: VecDeque<(u64, u64)>,
    segment: u64,
    number: u64,
}

impl Cutter {
    /// For ranges given as first address and bytes.
    pub fn new(ranges: &[(u64, u64)], segment: u64) -> Self {
        Cutter {
            ranges: ranges.iter().copied().filter(|(_, size)| *size > 0).collect(),
            segment: segment.max(PAGE),
            number: 0,
        }
    }
}

impl Iterator for Cutter {
    type Item = Share;

    fn next(&mut self) -> Option<Share> {
        let (start, size) = self.ranges.front_mut()?;
        // Segments end at multiples of their size, so that they lie on large pages.
        let taken = (self.segment - *start % self.segment).min(*size);
        let share = Share {
            number: self.number,
            head: lime_format::header(*start, start.saturating_add(taken - 1)).to_vec(),
            stretches: vec![(*start, taken)],
        };
        self.number += 1;
        *start = start.saturating_add(taken);
        *size -= taken;
        if *size == 0 {
            self.ranges.pop_front();
        }
        Some(share)
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

    #[test]
    fn segments_fit_the_host() {
        let segment = |gib: u64, threads| Sizes::of(gib << 30, gib << 30, threads, 1).segment >> 20;
        assert_eq!(
            [segment(1, 1), segment(1, 4), segment(4, 2), segment(64, 4)],
            [1, 1, 4, 4]
        );
        // What a manifest can name bounds it from the other side.
        assert_eq!([segment(1024, 4), segment(1024, 16)], [16, 16]);
    }

    proptest! {
        #[test]
        fn shares_are_the_ranges_again(sizes in proptest::collection::vec((0u64..40, 1u64..5), 0..12), segment in 1u64..9) {
            let mut at = 0;
            let ranges: Vec<(u64, u64)> = sizes.iter().map(|(size, gap)| { at += gap * PAGE; let range = (at, size * PAGE); at += size * PAGE; range }).collect();
            let cutter = Cutter::new(&ranges, segment * PAGE);
            let (mut pages, mut number) = (Vec::new(), 0);
            for share in cutter {
                prop_assert_eq!(share.number, number);
                number += 1;
                let (start, size) = share.stretches[0];
                prop_assert_eq!(share.stretches.len(), 1);
                prop_assert!(size > 0 && size <= segment * PAGE);
                prop_assert_eq!(share.head, lime_format::header(start, start + size - 1));
                pages.extend((start..start + size).step_by(4096));
            }
            let expected: Vec<u64> = ranges.iter().flat_map(|(start, size)| (*start..start + size).step_by(4096)).collect();
            prop_assert_eq!(&pages, &expected);
        }
    }
}
