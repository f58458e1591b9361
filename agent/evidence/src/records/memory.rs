//! Memory: how it was read, what is not in the image, and what was stored beside it.

use crate::{layout::Artifact, root::Hash, text::Text};
use serde::{Deserialize, Serialize};

/// Something of the running kernel that is stored beside the image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Companion {
    /// The artifact that holds its bytes.
    pub artifact: Artifact,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 of all of it.
    pub sha256: Hash,
}

/// How memory was read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MemorySource {
    /// `kcore`, `lime`, `image`, `process`.
    pub method: String,
    /// The artifact that holds the bytes.
    pub artifact: Option<Artifact>,
    /// The format of an image that somebody else took: `lime`, `avml`, `raw`, `elf`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Bytes of plaintext in a frame.
    pub frame: u64,
    /// Bytes of memory in a segment, at most.
    pub segment: u64,
    /// Threads that read, hashed and compressed.
    pub threads: u64,
    /// How `/proc/kcore` says where physical memory is: `p_paddr`, or `direct map at ADDRESS` on kernels that leave that zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<String>,
    /// SHA-256 of the kernel module that was loaded for the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_sha256: Option<Hash>,
    /// What became of that module afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_removed: Option<String>,
    /// The process, for `process`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// A run of addresses whose content is not in the image: zeros stand in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryGap {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub end: u64,
    /// Whether reading failed, or the content was kept back.
    pub gap: Gap,
    /// Why: the error, or the flag of the kernel.
    pub why: String,
}

/// The kinds of [`MemoryGap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gap {
    /// Reading failed.
    Unreadable,
    /// Kept back: by the kernel, or by the agent because it holds this capture's key.
    Withheld,
    /// Of a process: nothing is there yet, or it lies in a file and was never touched.
    NotResident,
}

/// A mapping of `memfd_secret`: its pages read as zeros from `/proc/kcore`, whatever is in them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecretMapping {
    /// The process.
    pub pid: u32,
    /// The first address in that process.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
}

/// A mapping of a process whose memory was captured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Region {
    /// The process.
    pub pid: u32,
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// As in `/proc/PID/maps`: `rw-p`.
    pub permissions: String,
    /// Offset in the file.
    pub offset: u64,
    /// The file, or what the kernel calls it.
    pub path: Text,
    /// Bytes that were resident or swapped out, and are in the core.
    pub captured: u64,
}
