//! The evidence format: what an agent writes, what a controller proves.
//!
//! This crate is the whole contract between the two. It holds no network, no file access and no `unsafe`; a store hands
//! it bytes and it answers with bytes or with a verdict. The prose below is the specification: it is meant to be enough
//! to write a second reader. [`SCHEMA`] is its version; a reader refuses a version it does not know.
//!
//! # Two zones
//! ```text
//! evidence/<writer>/<capture-id>/     written by the agent; each key once; never read back by it
//!   progress/<n>-<sha256>.json        the chain: signed events, n = 000001, 000002, …
//!   volatile/<kind>/<n>-<sha256>.jsonl.zst
//!   memory/<name>/<n>-<sha256>.zst    image, process-<pid>, and what is needed to read them: btf, kallsyms, …
//!   SHA256SUMS
//!   manifest.json                     last
//! cases/<case>/<capture-id>/          written by the controller (salvage.json, later witness and custody records)
//! ```
//! `<writer>` is the identity that the store vouches for (`local` in a directory), `<capture-id>` a UUID, `<n>` at
//! least six decimal digits starting at 1 in each folder, `<sha256>` the lower-case hex SHA-256 of the object's bytes.
//! [`layout`] parses and prints these names and refuses every other.
//!
//! # Segments and frames
//! An artifact (`volatile/processes`, …) is a numbered run of segments. A number is left out only where the store did not take that segment, and the
//! outcome of its step then says so. A segment is
//! ```text
//! zstd frame × N           N ≥ 1, each with its content size in the header, each independent of the others
//! skippable frame          magic 0x184D2A53: the frame table
//! skippable frame          magic 0x184D2A5E: the seek table of the zstd seekable format, 0.1.0, without checksums
//! ```
//! so that `zstd -d` reads it, a seekable reader seeks in it, and segments put end to end are still one zstd stream.
//! The content of the frame table, little endian: `"SFFT"`, u16 version = 1, u16 entry length = 48, then for every zstd
//! frame u32 plaintext bytes, u32 stored bytes, i64 when its plaintext was read (microseconds since 1970, UTC), 32 bytes
//! SHA-256 of its plaintext. The seek table has one entry more than the frame table: the frame table's own frame, with
//! plaintext size 0. Nothing else is in a segment. Limits: [`frames::MAX_FRAME`], [`frames::MAX_SEGMENT`].
//!
//! The plaintext of a `volatile` artifact is JSON lines: one [`records::Record`] a line. No line spans two frames. A
//! process with very long lists has several records in a row, each with its `pid`, that continue the lists.
//!
//! The plaintext of `memory/image` is physical memory in the LiME format ([`image::lime`]). Each segment starts with the
//! header of a range of its own, alone in its first frame, so any subset of the segments, decompressed and put end to end, is
//! a LiME image. That of `memory/process-<pid>` is an ELF core; of the others, the bytes that the kernel gave. What could not
//! be read stands there as zeros; the step's outcome accounts for every byte of every range ([`chain::RangeAccount`]) and
//! the records of `volatile/memory` say where the gaps are and why.
//!
//! # Roots
//! All roots are Merkle tree hashes as in RFC 9162, section 2.1.1, with SHA-256 ([`root`]): of a segment over the
//! plaintext hashes of its frames (`frames_root`), of an artifact over the SHA-256 of its stored segments, of a capture
//! over the roots of its artifacts in the order of their names.
//!
//! # The chain
//! Every progress object and the manifest is one line, `{"signed":` *payload* `,"signature":"` *128 hex digits* `"}\n`,
//! where the signature is Ed25519 (RFC 8032) over exactly the bytes of *payload*. The key is made for one capture
//! and its public half stands in the first event; verification is strict (no small-order keys, no malleable
//! signatures). The payload of event *n* ([`chain::Event`]) carries `sequence` = *n*, `capture` = the capture id and
//! `previous` = the SHA-256 of the whole object of event *n − 1* (null for the first).
//! It lists the segments acknowledged by the store since the event before it, each exactly once in a chain, in
//! ascending order within an artifact. A segment whose receipt is not `confirmed` in a store of kind `s3` is one whose answer was lost: it may be absent. The first event is `opened` (before anything is collected), the last
//! `closed`; between them a `step` for each step of the plan, in the plan's order, and before the `step` of a long one any
//! number of `progress`.
//!
//! # The manifest
//! `SHA256SUMS` names every progress object and every segment, sorted by key, in the form that `sha256sum -c` reads from
//! inside the capture's folder. [`manifest::Manifest`] is a pure function of the chain and of the hash of `SHA256SUMS`: a
//! reader rebuilds it from the events and compares. No manifest means that the capture is not complete.
//!
//! # Strings of the guest
//! [`text::Text`]: a JSON string when the bytes are UTF-8, otherwise `{"escaped": …, "base64": …}`, of which only the
//! second is data. JSON is written with every control, format and bidirectional character escaped, so that a record
//! printed raw cannot drive a terminal; [`text::printable`] does the same for text.
#![forbid(unsafe_code)]

pub mod chain;
pub mod error;
pub mod frames;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod records;
pub mod root;
pub mod segments;
pub mod signature;
pub mod text;
pub mod verdict;

pub use error::Error;

/// The version of the format that this crate writes, and the only one it reads.
pub const SCHEMA: &str = "stillframe/1";
