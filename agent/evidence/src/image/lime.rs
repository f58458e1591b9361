//! LiME: for each range a header of 32 bytes, little endian, `u32 0x4c694d45, u32 version = 1, u64 first address, u64 last
//! address, u64 0`, and then its bytes (LiME 1.9.1, `src/lime.h` and `doc/README.md`).

use super::{Bytes, Content, MAX_RUNS, Map, NotAnImage, Run, cut_off};

/// The first four bytes.
pub const MAGIC: [u8; 4] = 0x4c69_4d45_u32.to_le_bytes();
/// Bytes of a header.
pub const HEADER: usize = 32;

/// The header of the range from `start` to `end`, both included.
pub fn header(start: u64, end: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let words = [start, end, 0];
    let bytes = MAGIC
        .into_iter()
        .chain(1u32.to_le_bytes())
        .chain(words.into_iter().flat_map(u64::to_le_bytes));
    header.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    header
}

/// First and last address, when `header` is one.
pub fn parse(header: &[u8; HEADER]) -> Option<(u64, u64)> {
    let (magic, rest) = header.split_first_chunk::<4>()?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (start, rest) = rest.split_first_chunk::<8>()?;
    let (end, _) = rest.split_first_chunk::<8>()?;
    let (start, end) = (u64::from_le_bytes(*start), u64::from_le_bytes(*end));
    (*magic == MAGIC && u32::from_le_bytes(*version) == 1 && end >= start && end - start < u64::MAX)
        .then_some((start, end))
}

pub(super) fn runs(bytes: &dyn Bytes, size: u64) -> Result<Map, NotAnImage> {
    let wrong = |at, why| NotAnImage::Malformed {
        format: "LiME",
        at,
        why,
    };
    let mut runs = Vec::new();
    let (mut at, mut cut) = (0, None);
    while at < size {
        let mut head = [0; HEADER];
        if size - at < HEADER as u64 {
            cut = cut_off(at, "ends within a header");
            break;
        }
        bytes.read_at(at, &mut head)?;
        let (start, end) = parse(&head).ok_or(wrong(at, "no header of a range where one must be"))?;
        let content = at + HEADER as u64;
        let mut length = end - start + 1;
        if length > size - content {
            cut = cut_off(at, "the range is longer than what is left of the file");
            length = size - content;
        }
        if runs.len() >= MAX_RUNS {
            return Err(wrong(at, "more ranges than are read"));
        }
        runs.push(Run {
            start,
            size: length,
            content: Content::Plain(content),
        });
        at = content + length;
    }
    Ok(Map { runs, cut })
}
