//! The manifest and `SHA256SUMS`: both follow from the chain alone, so a reader rebuilds and compares them.

use crate::{
    Error, SCHEMA,
    chain::{Chain, Closing, Order, Outcome},
    layout::{Artifact, CaptureId, Key},
    records::host::Identity,
    root::{Hash, root},
    segments::SegmentEntry,
    signature::PublicKey,
    text::write_json,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write as _};

/// The largest manifest or `SHA256SUMS` that is read, in bytes.
pub const MAX_MANIFEST: u64 = 256 << 20;
/// Bytes that a segment takes in a manifest, about.
const ENTRY: usize = 512;
/// Bytes of a line of `SHA256SUMS`, about.
const LINE: usize = 192;

/// One artifact: its segments and their root. Where they stand in a chain, they are borrowed (`S`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactEntry<S = SegmentEntry> {
    /// Its name.
    pub artifact: Artifact,
    /// Bytes as stored.
    pub stored: u64,
    /// Bytes of plaintext.
    pub plain: u64,
    /// Records, for an artifact of records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
    /// Root over the SHA-256 of its segments.
    pub root: Hash,
    /// The segments in order.
    pub segments: Vec<S>,
}

/// What a whole capture is, on one page. Signed by the capture's key; the last object written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest<S = SegmentEntry> {
    /// [`SCHEMA`].
    pub schema: String,
    /// The capture.
    pub capture: CaptureId,
    /// Its key.
    pub key: PublicKey,
    /// The order.
    pub order: Order,
    /// The host.
    pub host: Identity,
    /// When the chain was opened.
    pub opened: Timestamp,
    /// When it was closed.
    pub closed: Timestamp,
    /// The outcome of every step.
    pub outcomes: Vec<Outcome>,
    /// Every artifact, by name.
    pub artifacts: Vec<ArtifactEntry<S>>,
    /// SHA-256 of every progress object, in order.
    pub events: Vec<Hash>,
    /// How the capture ended.
    pub closing: Closing,
    /// SHA-256 of `SHA256SUMS`.
    pub sums: Hash,
    /// Root over the roots of the artifacts.
    pub root: Hash,
}

/// The artifacts of a chain, by name.
pub fn artifacts(chain: &Chain) -> Vec<ArtifactEntry<&SegmentEntry>> {
    let mut counts: BTreeMap<&Artifact, usize> = BTreeMap::new();
    for segment in chain.segments() {
        *counts.entry(&segment.artifact).or_default() += 1;
    }
    let room = |(artifact, count)| (artifact, Vec::with_capacity(count));
    let mut by_name: BTreeMap<&Artifact, Vec<&SegmentEntry>> = counts.into_iter().map(room).collect();
    for segment in chain.segments() {
        by_name.entry(&segment.artifact).or_default().push(segment);
    }
    let entry = |(artifact, segments): (&Artifact, Vec<_>)| artifact_entry(artifact.clone(), segments);
    by_name.into_iter().map(entry).collect()
}

fn artifact_entry(artifact: Artifact, segments: Vec<&SegmentEntry>) -> ArtifactEntry<&SegmentEntry> {
    ArtifactEntry {
        artifact,
        // Sums of what a hostile store claims must not overflow.
        stored: segments.iter().fold(0, |sum, s| sum.saturating_add(s.stored)),
        plain: segments.iter().fold(0, |sum, s| sum.saturating_add(s.plain)),
        records: segments
            .iter()
            .try_fold(0u64, |sum, s| s.records.map(|n| sum.saturating_add(n))),
        root: root(&segments.iter().map(|s| s.sha256).collect::<Vec<_>>()),
        segments,
    }
}

impl ArtifactEntry<&SegmentEntry> {
    /// The same, to outlive the chain.
    pub fn cloned(self) -> ArtifactEntry {
        ArtifactEntry {
            artifact: self.artifact,
            stored: self.stored,
            plain: self.plain,
            records: self.records,
            root: self.root,
            segments: self.segments.into_iter().cloned().collect(),
        }
    }
}

/// `SHA256SUMS` of a chain.
pub fn sums(chain: &Chain) -> String {
    let events = chain.events().iter().map(|(sha256, e)| Key::Event {
        sequence: e.sequence,
        sha256: *sha256,
    });
    let mut keys: Vec<Key> = events.chain(chain.segments().map(SegmentEntry::key)).collect();
    keys.sort_by_key(Key::to_string);
    let mut sums = String::with_capacity(keys.len() * LINE);
    for key in &keys {
        if let Some(sha256) = key.sha256() {
            // Writing to a string does not fail.
            let _ = writeln!(sums, "{sha256}  {key}");
        }
    }
    sums
}

impl<'a> Manifest<&'a SegmentEntry> {
    /// The manifest of a closed chain.
    pub fn of(chain: &'a Chain) -> Result<Self, Error> {
        let open = || Error::Chain("the chain was never closed".to_owned());
        let (Some(opening), Some(closing)) = (chain.opening(), chain.closing()) else {
            return Err(open());
        };
        let (Some((_, first)), Some((_, last))) = (chain.events().first(), chain.events().last()) else {
            return Err(open());
        };
        let artifacts = artifacts(chain);
        Ok(Manifest {
            schema: SCHEMA.to_owned(),
            capture: chain.capture(),
            key: chain.key(),
            order: opening.order.clone(),
            host: opening.host.clone(),
            opened: first.at,
            closed: last.at,
            outcomes: chain.outcomes().cloned().collect(),
            events: chain.events().iter().map(|(hash, _)| *hash).collect(),
            closing: closing.clone(),
            sums: Hash::of(sums(chain).as_bytes()),
            root: root(&artifacts.iter().map(|a| a.root).collect::<Vec<_>>()),
            artifacts,
        })
    }

    /// The payload that is signed.
    pub fn payload(&self) -> Result<String, Error> {
        // Grown bit by bit it would take up three times its size, on a host where that may be evidence.
        let segments: usize = self
            .artifacts
            .iter()
            .map(|artifact| artifact.segments.len())
            .sum();
        let mut line = Vec::with_capacity((segments + 16) * ENTRY);
        write_json(self, &mut line)?;
        String::from_utf8(line).map_err(|_| Error::Chain("a manifest that is not UTF-8".to_owned()))
    }
}
