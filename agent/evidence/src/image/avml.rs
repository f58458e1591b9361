//! AVML's version 2: for each range a header as LiME's, with the magic `AVML` and version 2, then a stream in snappy's framing
//! format, then the length of that stream as a u64 (AVML 0.21.0, `src/image.rs`, `src/io/snappy.rs`; snappy's
//! `framing_format.txt`). A chunk holds at most 64 KiB and is compressed for itself, so any of them can be read alone.

use super::{Bytes, Content, MAX_RUNS, Map, NotAnImage, Run, cut_off};
use std::io::{self, Read as _};

/// The first four bytes.
pub const MAGIC: [u8; 4] = 0x4c4d_5641_u32.to_le_bytes();
const HEADER: u64 = 32;
const IDENTIFIER: [u8; 10] = *b"\xff\x06\x00\x00sNaPpY";
const COMPRESSED: u8 = 0;
const UNCOMPRESSED: u8 = 1;
/// The largest plaintext of a chunk.
const MAX_PLAIN: u32 = 64 << 10;
/// The largest chunk with its header: 64 KiB that would not compress, and what snappy adds at worst.
const MAX_STORED: u32 = 80 << 10;

/// One chunk: where it is, with its header of four bytes, and how long that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    at: u64,
    stored: u32,
    plain: u32,
}

impl Chunk {
    /// Fills `into` from `offset` in the plaintext. The chunk's checksum is checked.
    pub(super) fn read(&self, bytes: &dyn Bytes, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let size = |n: u32| usize::try_from(n).map_err(io::Error::other);
        let mut stored = vec![0; size(self.stored)?];
        bytes.read_at(self.at, &mut stored)?;
        let mut plain = vec![0; size(self.plain)?];
        snap::read::FrameDecoder::new(IDENTIFIER.chain(&*stored)).read_exact(&mut plain)?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let found = offset
            .checked_add(into.len())
            .and_then(|end| plain.get(offset..end));
        into.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Bytes of plaintext of a chunk whose header and first bytes are `head`: snappy's raw format starts with that number.
fn plain_size(kind: u8, length: u32, head: &[u8]) -> Option<u32> {
    let plain = match kind {
        UNCOMPRESSED => length.checked_sub(4)?,
        _ => u32::try_from(snap::raw::decompress_len(head.get(4..)?).ok()?).ok()?,
    };
    (plain <= MAX_PLAIN).then_some(plain)
}

pub(super) fn runs(bytes: &dyn Bytes, size: u64) -> Result<Map, NotAnImage> {
    let wrong = |at, why| NotAnImage::Malformed {
        format: "AVML",
        at,
        why,
    };
    let mut runs = Vec::new();
    let (mut at, mut cut) = (0, None);
    'ranges: while at < size {
        let mut head = [0; super::lime::HEADER];
        if size - at < HEADER {
            cut = cut_off(at, "ends within a header");
            break;
        }
        bytes.read_at(at, &mut head)?;
        // The same header but for these two words.
        let (words, _) = head.split_at_mut(8);
        if *words != *[MAGIC, 2u32.to_le_bytes()].as_flattened() {
            return Err(wrong(at, "no header of a range where one must be"));
        }
        words.copy_from_slice([super::lime::MAGIC, 1u32.to_le_bytes()].as_flattened());
        let (start, end) =
            super::lime::parse(&head).ok_or(wrong(at, "a range that ends before it starts"))?;
        let stream = at + HEADER;
        at = stream;
        let mut address = start;
        while address <= end {
            if runs.len() >= MAX_RUNS {
                return Err(wrong(at, "more chunks than are read"));
            }
            let mut head = [0; 16];
            let there = usize::try_from((size - at).min(16)).unwrap_or(16);
            let head = head.get_mut(..there).unwrap_or_default();
            bytes.read_at(at, head)?;
            let [kind, a, b, c, rest @ ..] = &*head else {
                cut = cut_off(at, "ends within a chunk");
                break 'ranges;
            };
            let length = u32::from_le_bytes([*a, *b, *c, 0]);
            let stored = length + 4;
            if u64::from(stored) > size - at {
                cut = cut_off(at, "ends within a chunk");
                break 'ranges;
            }
            match *kind {
                COMPRESSED | UNCOMPRESSED if length >= 4 && stored <= MAX_STORED => {
                    let plain =
                        plain_size(*kind, length, rest).ok_or(wrong(at, "a chunk of an impossible size"))?;
                    if u64::from(plain) > end - address + 1 {
                        return Err(wrong(at, "more content than the range has"));
                    }
                    runs.push(Run {
                        start: address,
                        size: u64::from(plain),
                        content: Content::Snappy(Chunk { at, stored, plain }),
                    });
                    address = match address.checked_add(u64::from(plain)) {
                        Some(next) if plain > 0 => next,
                        _ => return Err(wrong(at, "a chunk of an impossible size")),
                    };
                }
                // The identifier of the stream, padding, and what a later version may skip.
                0x80..=0xff => (),
                _ => return Err(wrong(at, "a chunk of an unknown kind")),
            }
            at += u64::from(stored);
        }
        let mut trailer = [0; 8];
        if size - at < 8 {
            cut = cut_off(at, "ends before the length of its stream");
            break;
        }
        bytes.read_at(at, &mut trailer)?;
        if u64::from_le_bytes(trailer) != at - stream {
            return Err(wrong(at, "the length of its stream is another"));
        }
        at += 8;
    }
    Ok(Map { runs, cut })
}
