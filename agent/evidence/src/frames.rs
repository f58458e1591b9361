//! Frames and the object that carries them. Reads and writes one segment in memory; knows nothing of artifacts.
//!
//! The byte layout is specified in the crate's documentation. The seek table follows the zstd seekable format 0.1.0
//! (`contrib/seekable_format` of the zstd sources); the frame table is our own, in a skippable frame before it.

use crate::{Error, root::Hash};
use jiff::Timestamp;
use std::io;
use zstd::bulk::{Compressor, Decompressor};

/// The largest plaintext of one frame, in bytes.
pub const MAX_FRAME: usize = 8 << 20;
/// The largest segment as stored, in bytes.
pub const MAX_SEGMENT: usize = 64 << 20;

const FRAME_TABLE_MAGIC: u32 = 0x184D_2A53;
const FRAME_TABLE_HEADER: [u8; 8] = *b"SFFT\x01\x00\x30\x00";
const FRAME_ENTRY: usize = 48;
const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const SEEK_ENTRY: usize = 8;
const SEEK_FOOTER: usize = 9;
const SKIPPABLE_HEADER: usize = 8;

/// What the frame table says of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Bytes of plaintext.
    pub plain: u32,
    /// Bytes as stored.
    pub stored: u32,
    /// When the plaintext was read from its source; microseconds.
    pub read_at: Timestamp,
    /// SHA-256 of the plaintext.
    pub sha256: Hash,
}

/// Makes frames, one at a time; threads that compress side by side have one each.
pub struct Framer(Compressor<'static>);

impl Framer {
    /// A framer that compresses at zstd `level`.
    pub fn new(level: i32) -> io::Result<Self> {
        let mut compressor = Compressor::new(level)?;
        compressor.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true))?;
        compressor.set_parameter(zstd::zstd_safe::CParameter::ContentSizeFlag(true))?;
        Ok(Framer(compressor))
    }

    /// A framer for memory. Its frames carry no checksum of zstd's own beside their SHA-256, and level 1 remembers 2 to the power of `places` places,
    /// 4 bytes each: of 1 GiB of a guest's memory, in frames of 256 KiB, it stores 0.780 of what AVML stores with 15, and 0.777 with 16.
    pub fn of_memory(level: i32, places: u32) -> io::Result<Self> {
        let mut framer = Framer::new(level)?;
        framer
            .0
            .set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(false))?;
        framer.set_level_of_memory(level, places)?;
        Ok(framer)
    }

    /// Compresses memory at another level from here on.
    pub fn set_level_of_memory(&mut self, level: i32, places: u32) -> io::Result<()> {
        // 0 is the level's own.
        let (shortest, places) = if level == 1 { (6, places) } else { (0, 0) };
        self.0
            .set_parameter(zstd::zstd_safe::CParameter::CompressionLevel(level))?;
        self.0
            .set_parameter(zstd::zstd_safe::CParameter::MinMatch(shortest))?;
        self.0.set_parameter(zstd::zstd_safe::CParameter::HashLog(places))
    }

    /// Appends the frame of `plain` to `out`. Fails when it is empty or larger than [`MAX_FRAME`]; `out` is then as it
    /// was.
    pub fn frame(&mut self, plain: &[u8], read_at: Timestamp, out: &mut Vec<u8>) -> io::Result<Frame> {
        self.frame_of_hash(plain, Hash::of(plain), read_at, out)
    }

    /// As [`Framer::frame`], for whoever has hashed `plain` already.
    fn frame_of_hash(
        &mut self,
        plain: &[u8],
        sha256: Hash,
        read_at: Timestamp,
        out: &mut Vec<u8>,
    ) -> io::Result<Frame> {
        if plain.is_empty() || plain.len() > MAX_FRAME {
            return Err(io::Error::other(format!("a frame of {} bytes", plain.len())));
        }
        let before = out.len();
        out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        // Behind what is there, into room that nobody has to clear first.
        let mut behind = io::Cursor::new(std::mem::take(out));
        behind.set_position(before as u64);
        let result = self.0.compress_to_buffer(plain, &mut behind);
        *out = behind.into_inner();
        let written = *result.as_ref().unwrap_or(&0);
        out.truncate(before + written);
        result?;
        let (Ok(plain_size), Ok(stored)) = (u32::try_from(plain.len()), u32::try_from(written)) else {
            return Err(io::ErrorKind::Other.into());
        };
        Ok(Frame {
            plain: plain_size,
            stored,
            read_at: Timestamp::from_microsecond(read_at.as_microsecond()).unwrap_or(read_at),
            sha256,
        })
    }
}

/// Puts frames together to one segment after another, with one buffer.
#[derive(Default)]
pub struct SegmentBuilder {
    bytes: Vec<u8>,
    frames: Vec<Frame>,
}

impl SegmentBuilder {
    /// The segment as it is now, without its tables.
    pub fn stored(&self) -> &[u8] {
        &self.bytes
    }

    fn fits(&self, more: usize) -> io::Result<()> {
        let tables = (self.frames.len() + 1) * (FRAME_ENTRY + SEEK_ENTRY) + 64;
        if self.bytes.len().saturating_add(more) + tables > MAX_SEGMENT {
            return Err(io::Error::other(format!(
                "a frame of {more} bytes does not fit the segment"
            )));
        }
        Ok(())
    }

    /// Continues in a buffer that was used before, so that nothing is allocated anew for every segment. To be called between two.
    pub fn reuse(&mut self, mut buffer: Vec<u8>) {
        if self.frames.is_empty() && buffer.capacity() > self.bytes.capacity() {
            buffer.clear();
            self.bytes = buffer;
        }
    }

    /// Makes and appends one frame. Fails as [`Framer::frame`] does, and when the segment would outgrow [`MAX_SEGMENT`]; the
    /// segment is then as it was.
    pub fn push(&mut self, framer: &mut Framer, plain: &[u8], read_at: Timestamp) -> io::Result<()> {
        self.push_of_hash(framer, plain, Hash::of(plain), read_at)
    }

    /// As [`SegmentBuilder::push`], for whoever has hashed `plain` already.
    pub fn push_of_hash(
        &mut self,
        framer: &mut Framer,
        plain: &[u8],
        sha256: Hash,
        read_at: Timestamp,
    ) -> io::Result<()> {
        self.fits(zstd::zstd_safe::compress_bound(plain.len()))?;
        let frame = framer.frame_of_hash(plain, sha256, read_at, &mut self.bytes)?;
        self.frames.push(frame);
        Ok(())
    }

    /// Appends a frame that was made elsewhere.
    pub fn append(&mut self, frame: Frame, stored: &[u8]) -> io::Result<()> {
        self.fits(stored.len())?;
        self.bytes.extend_from_slice(stored);
        self.frames.push(frame);
        Ok(())
    }

    /// Ends the segment and empties the builder; `None` when nothing was pushed.
    pub fn finish(&mut self) -> Option<(Vec<u8>, Vec<Frame>)> {
        if self.frames.is_empty() {
            return None;
        }
        let frames = std::mem::take(&mut self.frames);
        let mut bytes = std::mem::take(&mut self.bytes);
        let entries = frames.iter().map(|f| (f.stored, f.plain));

        let mut table = FRAME_TABLE_HEADER.to_vec();
        for frame in &frames {
            table.extend_from_slice(&frame.plain.to_le_bytes());
            table.extend_from_slice(&frame.stored.to_le_bytes());
            table.extend_from_slice(&frame.read_at.as_microsecond().to_le_bytes());
            table.extend_from_slice(&frame.sha256.0);
        }
        // push() bounds the segment at 64 MiB, so every length below fits 32 bits.
        let table_frame = u32::try_from(SKIPPABLE_HEADER + table.len()).ok()?;
        let count = u32::try_from(frames.len() + 1).ok()?;
        let seek_table = u32::try_from((frames.len() + 1) * SEEK_ENTRY + SEEK_FOOTER).ok()?;

        bytes.extend_from_slice(&FRAME_TABLE_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(table.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(&SEEK_TABLE_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&seek_table.to_le_bytes());
        for (stored, plain) in entries.chain([(table_frame, 0)]) {
            bytes.extend_from_slice(&stored.to_le_bytes());
            bytes.extend_from_slice(&plain.to_le_bytes());
        }
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.push(0);
        bytes.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
        Some((bytes, frames))
    }
}

/// Takes integers off the front of hostile bytes.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
}

/// A segment whose tables have been read and found to agree with each other. Frames are checked as they are read.
pub struct Segment<'a> {
    frames: Vec<(Frame, &'a [u8])>,
}

impl<'a> Segment<'a> {
    /// Reads the tables. Every byte of `bytes` must be accounted for, and every table must say the same.
    pub fn open(bytes: &'a [u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_SEGMENT {
            return Err(Error::Segment("larger than a segment may be"));
        }
        let (body, footer) = bytes
            .split_last_chunk::<SEEK_FOOTER>()
            .ok_or(Error::Segment("too short for a seek table"))?;
        let mut footer = Cursor(footer);
        let (count, descriptor, magic) = (footer.u32(), footer.array::<1>(), footer.u32());
        if magic != Some(SEEKABLE_MAGIC) || descriptor != Some([0]) {
            return Err(Error::Segment("no zstd seek table at its end"));
        }
        // A count that does not fit is caught by the lengths below.
        let count = usize::try_from(count.unwrap_or(0)).unwrap_or(0);
        let frames = count
            .checked_sub(1)
            .filter(|n| *n > 0)
            .ok_or(Error::Segment("no frame"))?;
        let entries_len = count
            .checked_mul(SEEK_ENTRY)
            .ok_or(Error::Segment("seek table too long"))?;
        let table_len = FRAME_TABLE_HEADER.len() + frames * FRAME_ENTRY;
        let split = body
            .len()
            .checked_sub(entries_len + SKIPPABLE_HEADER)
            .ok_or(Error::Segment("seek table longer than the object"))?;
        let (body, seek) = body.split_at(split);
        let mut seek = Cursor(seek);
        if seek.u32() != Some(SEEK_TABLE_MAGIC)
            || seek.u32().map(usize::try_from) != Some(Ok(entries_len + SEEK_FOOTER))
        {
            return Err(Error::Segment("the seek table's own header is wrong"));
        }
        let split = body
            .len()
            .checked_sub(SKIPPABLE_HEADER + table_len)
            .ok_or(Error::Segment("frame table longer than the object"))?;
        let (mut data, table) = body.split_at(split);
        let mut table = Cursor(table);
        if table.u32() != Some(FRAME_TABLE_MAGIC)
            || table.u32().map(usize::try_from) != Some(Ok(table_len))
            || table.array() != Some(FRAME_TABLE_HEADER)
        {
            return Err(Error::Segment("the frame table's own header is wrong"));
        }
        let mut out = Vec::with_capacity(frames);
        for _ in 0..frames {
            let short = Error::Segment("frame table too short");
            let (Some(plain), Some(stored), Some(micros), Some(sha256)) = (
                table.u32(),
                table.u32(),
                table.array().map(i64::from_le_bytes),
                table.array().map(Hash),
            ) else {
                return Err(short);
            };
            if (seek.u32(), seek.u32()) != (Some(stored), Some(plain)) {
                return Err(Error::Segment("the seek table and the frame table differ"));
            }
            let read_at = Timestamp::from_microsecond(micros)
                .map_err(|_| Error::Segment("a frame's time is not a time"))?;
            if plain == 0 || usize::try_from(plain).is_ok_and(|n| n > MAX_FRAME) {
                return Err(Error::Segment("a frame is empty or larger than a frame may be"));
            }
            let (frame, rest) = usize::try_from(stored)
                .ok()
                .and_then(|n| data.split_at_checked(n))
                .ok_or(Error::Segment("a frame ends beyond the object"))?;
            data = rest;
            out.push((
                Frame {
                    plain,
                    stored,
                    read_at,
                    sha256,
                },
                frame,
            ));
        }
        let table_frame = u32::try_from(SKIPPABLE_HEADER + table_len).ok();
        if (seek.u32(), seek.u32()) != (table_frame, Some(0)) || !data.is_empty() {
            return Err(Error::Segment("bytes that no table accounts for"));
        }
        Ok(Segment { frames: out })
    }

    /// The frame table.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = Frame> + '_ {
        self.frames.iter().map(|(frame, _)| *frame)
    }

    /// Decompresses and checks each frame in turn and hands its plaintext to `each`. One buffer of at most
    /// [`MAX_FRAME`] bytes is used, whatever the object claims.
    pub fn read<E: From<Error>>(&self, mut each: impl FnMut(Frame, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let wrong = |index, why: String| E::from(Error::Frame { index, why });
        let mut decompressor = Decompressor::new().map_err(|e| wrong(0, e.to_string()))?;
        let mut plain = Vec::new();
        for (index, (frame, stored)) in self.frames.iter().enumerate() {
            let size = usize::try_from(frame.plain).unwrap_or(0).min(MAX_FRAME);
            if zstd::zstd_safe::find_frame_compressed_size(stored) != Ok(stored.len())
                || !matches!(zstd::zstd_safe::get_frame_content_size(stored), Ok(Some(n)) if n == u64::from(frame.plain))
            {
                return Err(wrong(
                    index,
                    "is not one zstd frame of the stated sizes".to_owned(),
                ));
            }
            plain.clear();
            plain.resize(size, 0);
            let written = decompressor
                .decompress_to_buffer(stored, plain.as_mut_slice())
                .map_err(|error| wrong(index, format!("does not decompress: {error}")))?;
            if written != size || Hash::of(&plain) != frame.sha256 {
                return Err(wrong(index, "its plaintext is not what was hashed".to_owned()));
            }
            each(*frame, &plain)?;
        }
        Ok(())
    }

    /// The whole plaintext, checked. For segments known to be small (records); an image is read frame by frame.
    pub fn plaintext(&self) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        self.read(|_, plain| {
            out.extend_from_slice(plain);
            Ok::<_, Error>(())
        })?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Cursor as IoCursor, Read as _};

    fn build(plains: &[Vec<u8>]) -> (Vec<u8>, Vec<Frame>) {
        let (mut framer, mut builder) = (Framer::new(1).unwrap(), SegmentBuilder::default());
        for (i, plain) in plains.iter().enumerate() {
            builder
                .push(
                    &mut framer,
                    plain,
                    Timestamp::from_microsecond(i64::try_from(i).unwrap() * 7).unwrap(),
                )
                .unwrap();
        }
        builder.finish().unwrap()
    }

    fn plains() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let plain = prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..3000),
            (any::<u8>(), 1usize..70_000).prop_map(|(b, n)| vec![b; n]),
        ];
        proptest::collection::vec(plain, 1..6)
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(plains in plains()) {
            let (bytes, frames) = build(&plains);
            let segment = Segment::open(&bytes).unwrap();
            prop_assert_eq!(segment.frames().collect::<Vec<_>>(), frames);
            prop_assert_eq!(segment.plaintext().unwrap(), plains.concat());
        }

        /// Two readers that are not ours: zstd's stream decoder, over segments put end to end, and a seekable reader.
        #[test]
        fn others_read_it(a in plains(), b in plains()) {
            let (mut bytes, _) = build(&a);
            let mut seekable = zeekstd::Decoder::new(IoCursor::new(bytes.clone())).unwrap();
            prop_assert_eq!(seekable.seek_table().num_frames() as usize, a.len() + 1);
            let mut plain = Vec::new();
            seekable.read_to_end(&mut plain).unwrap();
            prop_assert_eq!(&plain, &a.concat());

            bytes.extend(build(&b).0);
            prop_assert_eq!(zstd::stream::decode_all(&bytes[..]).unwrap(), [a.concat(), b.concat()].concat());
        }

        /// A changed bit is either refused or proven harmless by giving the very same plaintext and table.
        #[test]
        fn a_flipped_bit_never_changes_the_plaintext(plains in plains(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (mut bytes, frames) = build(&plains);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(segment) = Segment::open(&bytes)
                && let Ok(plain) = segment.plaintext()
            {
                prop_assert_eq!(plain, plains.concat());
                let hashes = |f: &[Frame]| f.iter().map(|f| (f.plain, f.sha256)).collect::<Vec<_>>();
                prop_assert_eq!(hashes(&segment.frames().collect::<Vec<_>>()), hashes(&frames));
            }
        }

        #[test]
        fn a_cut_is_refused(plains in plains(), at in any::<prop::sample::Index>()) {
            let (bytes, _) = build(&plains);
            prop_assert!(Segment::open(&bytes[..at.index(bytes.len())]).is_err());
            prop_assert!(Segment::open(&[&bytes[..], &[0]].concat()).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Segment::open(&bytes).is_err());
        }
    }

    #[test]
    fn limits_hold_when_writing() {
        let (mut framer, mut builder) = (Framer::new(1).unwrap(), SegmentBuilder::default());
        let now = Timestamp::UNIX_EPOCH;
        assert!(builder.push(&mut framer, &[], now).is_err());
        assert!(builder.push(&mut framer, &vec![0; MAX_FRAME + 1], now).is_err());
        assert!(builder.finish().is_none());
    }
}
