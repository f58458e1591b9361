//! What can be wrong with bytes that claim to be evidence.

/// A reason that an object is not what the format demands. It names the defect, the caller names the object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A key, a capture id, a writer or a case name that the layout does not allow.
    #[error("{what} is not allowed: {why}")]
    Name {
        /// Which kind of name.
        what: &'static str,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// A segment, its frame table or its seek table is malformed.
    #[error("not a valid segment: {0}")]
    Segment(&'static str),
    /// A frame does not decompress to what the frame table says.
    #[error("frame {index}: {why}")]
    Frame {
        /// Zero-based place in the segment.
        index: usize,
        /// What is wrong.
        why: String,
    },
    /// A signed object is malformed or its signature does not hold.
    #[error("{0}")]
    Signature(&'static str),
    /// JSON that does not fit the schema.
    #[error("not valid JSON of {schema}: {why}", schema = crate::SCHEMA)]
    Json {
        /// What the parser says; escaped for a terminal.
        why: String,
    },
    /// A chain, or a manifest against its chain, that contradicts itself.
    #[error("{0}")]
    Chain(String),
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Error::Json {
            why: crate::text::printable(error.to_string().as_bytes()),
        }
    }
}
