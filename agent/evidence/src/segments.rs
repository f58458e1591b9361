//! Runs of segments: what the chain says of each, and how a stream of records becomes them.

use crate::{
    frames::{Framer, SegmentBuilder},
    layout::{Artifact, Key},
    root::{Hash, root},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::io;

/// What a store answered to a put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Receipt {
    /// False when the answer was lost: the object may or may not be there, and only the controller can look.
    pub confirmed: bool,
    /// The checksum that the store computed, as it states it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// The version id of the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// The KMS key that the store encrypted it under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kms_key: Option<String>,
    /// The store's own clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<Timestamp>,
}

/// One segment in the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentEntry {
    /// The artifact that it belongs to.
    pub artifact: Artifact,
    /// Its place in the artifact, from 1.
    pub number: u64,
    /// SHA-256 of the object as stored.
    pub sha256: Hash,
    /// Bytes as stored.
    pub stored: u64,
    /// Bytes of plaintext.
    pub plain: u64,
    /// Frames in it.
    pub frames: u64,
    /// Root over the plaintext hashes of its frames.
    pub frames_root: Hash,
    /// Records in it, for an artifact of records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
    /// What the store answered.
    pub receipt: Receipt,
}

impl SegmentEntry {
    /// The key of the object.
    pub fn key(&self) -> Key {
        Key::Segment {
            artifact: self.artifact.clone(),
            number: self.number,
            sha256: self.sha256,
        }
    }
}

/// A segment ready to be put: the bytes and what the chain will say, the receipt aside.
pub struct Packed {
    /// The object.
    pub bytes: Vec<u8>,
    /// Its entry.
    pub entry: SegmentEntry,
}

impl Packed {
    /// Ends the segment under way and takes it out of `builder`; `None` when nothing was pushed. `sha256` gives the hash of the
    /// object.
    pub fn take(
        artifact: Artifact,
        number: u64,
        builder: &mut SegmentBuilder,
        records: Option<u64>,
        sha256: impl FnOnce(&[u8]) -> Hash,
    ) -> Option<Packed> {
        let (bytes, frames) = builder.finish()?;
        let leaves: Vec<Hash> = frames.iter().map(|f| f.sha256).collect();
        let entry = SegmentEntry {
            artifact,
            number,
            sha256: sha256(&bytes),
            stored: bytes.len() as u64,
            plain: frames.iter().map(|f| u64::from(f.plain)).sum(),
            frames: frames.len() as u64,
            frames_root: root(&leaves),
            records,
            receipt: Receipt::default(),
        };
        Some(Packed { bytes, entry })
    }
}

/// Plaintext of a frame of records.
const FRAME: usize = 256 << 10;
/// Stored bytes after which a segment of records is put.
const SEGMENT: usize = 2 << 20;

/// Packs records, already serialized, into the segments of one artifact. No record is split between segments unless
/// it is alone larger than a frame may be, which [`RecordPacker::push`] refuses.
pub struct RecordPacker {
    artifact: Artifact,
    framer: Framer,
    builder: SegmentBuilder,
    number: u64,
    plain: Vec<u8>,
    first_read: Timestamp,
    records: u64,
}

impl RecordPacker {
    /// A packer whose first segment will be number 1.
    pub fn new(artifact: Artifact, level: i32) -> io::Result<Self> {
        Ok(RecordPacker {
            artifact,
            framer: Framer::new(level)?,
            builder: SegmentBuilder::default(),
            number: 0,
            plain: Vec::with_capacity(FRAME + (64 << 10)),
            first_read: Timestamp::UNIX_EPOCH,
            records: 0,
        })
    }

    /// Where the plaintext stands in this process: address and length in bytes, for the footprint.
    pub fn buffer(&self) -> (u64, u64) {
        (self.plain.as_ptr().addr() as u64, self.plain.capacity() as u64)
    }

    /// Appends one record (one line of JSON, without its line feed). A full segment comes back.
    pub fn push(&mut self, line: &[u8]) -> io::Result<Option<Packed>> {
        if self.plain.is_empty() {
            self.first_read = Timestamp::now();
        }
        if self.plain.len() + line.len() + 1 > crate::frames::MAX_FRAME {
            self.frame()?;
        }
        if line.len() + 1 > crate::frames::MAX_FRAME {
            return Err(io::Error::other(format!("a record of {} bytes", line.len())));
        }
        self.plain.extend_from_slice(line);
        self.plain.push(b'\n');
        self.records += 1;
        if self.plain.len() >= FRAME {
            self.frame()?;
        }
        Ok(if self.builder.stored().len() >= SEGMENT {
            self.segment()
        } else {
            None
        })
    }

    /// Ends the segment under way, if there is anything in it.
    pub fn flush(&mut self) -> io::Result<Option<Packed>> {
        self.frame()?;
        Ok(self.segment())
    }

    fn frame(&mut self) -> io::Result<()> {
        if !self.plain.is_empty() {
            self.builder
                .push(&mut self.framer, &self.plain, self.first_read)?;
            self.plain.clear();
        }
        Ok(())
    }

    fn segment(&mut self) -> Option<Packed> {
        let packed = Packed::take(
            self.artifact.clone(),
            self.number + 1,
            &mut self.builder,
            Some(self.records),
            Hash::of,
        )?;
        self.number += 1;
        self.records = 0;
        Some(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Segment;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_come_back_in_order(lines in proptest::collection::vec("[a-z]{0,40}", 0..200), flush_at in 0usize..200) {
            let mut packer = RecordPacker::new("volatile/x".parse().unwrap(), 1).unwrap();
            let mut packed = Vec::new();
            for (i, line) in lines.iter().enumerate() {
                packed.extend(packer.push(line.as_bytes()).unwrap());
                if i == flush_at {
                    packed.extend(packer.flush().unwrap());
                }
            }
            packed.extend(packer.flush().unwrap());
            let mut text = Vec::new();
            for (i, p) in packed.iter().enumerate() {
                prop_assert_eq!(p.entry.number, i as u64 + 1);
                prop_assert_eq!(p.entry.sha256, Hash::of(&p.bytes));
                text.extend(Segment::open(&p.bytes).unwrap().plaintext().unwrap());
            }
            let expected: String = lines.iter().map(|l| format!("{l}\n")).collect();
            prop_assert_eq!(text, expected.into_bytes());
            prop_assert_eq!(packed.iter().map(|p| p.entry.records.unwrap()).sum::<u64>(), lines.len() as u64);
        }
    }

    #[test]
    fn a_large_record_is_kept_whole_and_an_absurd_one_refused() {
        let mut packer = RecordPacker::new("volatile/x".parse().unwrap(), 1).unwrap();
        let large = vec![b'a'; 3 << 20];
        let _ = packer.push(&large).unwrap();
        assert!(packer.push(&vec![b'a'; crate::frames::MAX_FRAME]).is_err());
        let packed = packer.flush().unwrap().unwrap();
        assert_eq!(packed.entry.plain, large.len() as u64 + 1);
    }
}
