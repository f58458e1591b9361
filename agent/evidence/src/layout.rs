//! The names of the objects of a capture. Nothing here is made of guest data, and nothing outside these forms is a key.

use crate::{Error, root::Hash};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};
use uuid::Uuid;

/// The id of a capture, minted by whoever orders it: a UUID (version 7 from our own programs, so ids sort by time).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CaptureId(Uuid);

impl CaptureId {
    /// A new id of this moment.
    pub fn mint() -> Self {
        CaptureId(Uuid::now_v7())
    }

    /// When it was minted, to the millisecond, by the clock of whoever did; nothing where the id does not say.
    pub fn minted(&self) -> Option<Timestamp> {
        let (seconds, nanoseconds) = self
            .0
            .get_timestamp()
            .filter(|_| self.0.get_version_num() == 7)?
            .to_unix();
        Timestamp::new(i64::try_from(seconds).ok()?, i32::try_from(nanoseconds).ok()?).ok()
    }
}

impl fmt::Display for CaptureId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl FromStr for CaptureId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = Error::Name {
            what: "capture id",
            why: "a UUID in lower case with hyphens is expected",
        };
        let id = Uuid::try_parse(text).map(CaptureId).map_err(|_| wrong.clone())?;
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(wrong)
        }
    }
}

/// A name with a fixed alphabet: safe in a key, a path, a policy and a shell.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal, $extra:literal, $shown:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(String);

        impl $name {
            /// The name as it stands in a key.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                let starts = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
                let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || $extra.contains(&b));
                if starts && fits && text.len() <= $max {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(Error::Name {
                        what: $what,
                        why: concat!("at most ", $max, " letters, digits and ", $shown, ", the first a letter or digit"),
                    })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The identity that the store vouches for: the first part of a capture's prefix.
    Writer, "writer", 128, b"._:@=+-", "._:@=+-"
);
name!(
    /// The case that a capture belongs to.
    CaseName, "case name", 64, b"._-", "._-"
);
name!(
    /// A kind of volatile data, such as `processes`.
    Kind, "kind", 32, b"-", "-"
);

macro_rules! as_string {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
as_string!(CaptureId, Writer, CaseName, Kind, Artifact, Key);

impl Writer {
    /// The writer of a plain directory, for which nobody vouches.
    pub fn local() -> Self {
        Writer("local".to_owned())
    }
}

/// What a run of segments holds. Its name is a folder of the capture.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Artifact {
    /// Records of one kind, as JSON lines.
    Volatile(Kind),
    /// Memory (`image`, `process-17`) and what is needed to read it (`btf`, `kallsyms`, …), byte for byte.
    Memory(Kind),
}

impl Artifact {
    fn suffix(&self) -> &'static str {
        match self {
            Artifact::Volatile(_) => ".jsonl.zst",
            Artifact::Memory(_) => ".zst",
        }
    }
}

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Artifact::Volatile(kind) => write!(f, "volatile/{kind}"),
            Artifact::Memory(name) => write!(f, "memory/{name}"),
        }
    }
}

impl FromStr for Artifact {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once('/') {
            Some(("volatile", kind)) => Ok(Artifact::Volatile(kind.parse()?)),
            Some(("memory", name)) => Ok(Artifact::Memory(name.parse()?)),
            _ => Err(Error::Name {
                what: "artifact",
                why: "no artifact of this format has that name",
            }),
        }
    }
}

/// The key of one object, relative to its capture's prefix.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// An event of the chain.
    Event {
        /// Its place in the chain, from 1.
        sequence: u64,
        /// The SHA-256 of the object.
        sha256: Hash,
    },
    /// A segment of an artifact.
    Segment {
        /// The artifact.
        artifact: Artifact,
        /// Its place in the artifact, from 1.
        number: u64,
        /// The SHA-256 of the object.
        sha256: Hash,
    },
    /// `SHA256SUMS`.
    Sums,
    /// `manifest.json`.
    Manifest,
}

impl Key {
    /// The hash that the key itself promises, where it does.
    pub fn sha256(&self) -> Option<Hash> {
        match self {
            Key::Event { sha256, .. } | Key::Segment { sha256, .. } => Some(*sha256),
            Key::Sums | Key::Manifest => None,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Event { sequence, sha256 } => write!(f, "progress/{sequence:06}-{sha256}.json"),
            Key::Segment {
                artifact,
                number,
                sha256,
            } => {
                write!(f, "{artifact}/{number:06}-{sha256}{}", artifact.suffix())
            }
            Key::Sums => f.write_str("SHA256SUMS"),
            Key::Manifest => f.write_str("manifest.json"),
        }
    }
}

fn number_and_hash(text: &str) -> Option<(u64, Hash)> {
    let (number, hash) = text.split_once('-')?;
    Some((number.parse().ok().filter(|n| *n > 0)?, hash.parse().ok()?))
}

impl FromStr for Key {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let key = match text {
            "SHA256SUMS" => Some(Key::Sums),
            "manifest.json" => Some(Key::Manifest),
            _ => text.rsplit_once('/').and_then(|(folder, file)| {
                if folder == "progress" {
                    let (sequence, sha256) = number_and_hash(file.strip_suffix(".json")?)?;
                    return Some(Key::Event { sequence, sha256 });
                }
                let artifact: Artifact = folder.parse().ok()?;
                let (number, sha256) = number_and_hash(file.strip_suffix(artifact.suffix())?)?;
                Some(Key::Segment {
                    artifact,
                    number,
                    sha256,
                })
            }),
        };
        // One spelling only: a second one would be a second object with the same claim.
        key.filter(|key| key.to_string() == text).ok_or(Error::Name {
            what: "key",
            why: "no object of a capture has that name",
        })
    }
}

/// The prefix of a capture's evidence in a store, without a slash at the end.
pub fn evidence_prefix(writer: &Writer, capture: CaptureId) -> String {
    format!("evidence/{writer}/{capture}")
}

/// The prefix of what the controller writes about a capture, without a slash at the end.
pub fn case_prefix(case: &CaseName, capture: CaptureId) -> String {
    format!("cases/{case}/{capture}")
}

/// Splits a full key, `evidence/<writer>/<capture-id>/<key>`, as a stream of objects carries it.
pub fn parse_evidence_key(text: &str) -> Result<(Writer, CaptureId, Key), Error> {
    let wrong = Error::Name {
        what: "key",
        why: "evidence/<writer>/<capture-id>/<object> is expected",
    };
    let mut parts = text.splitn(4, '/');
    let (Some("evidence"), Some(writer), Some(capture), Some(key)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(wrong);
    };
    Ok((writer.parse()?, capture.parse()?, key.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> impl Strategy<Value = Key> {
        let hash = any::<[u8; 32]>().prop_map(Hash);
        let artifact = ("[a-z][a-z-]{0,20}", any::<bool>()).prop_map(|(k, memory)| match memory {
            true => Artifact::Memory(k.parse().unwrap()),
            false => Artifact::Volatile(k.parse().unwrap()),
        });
        prop_oneof![
            (1u64.., hash.clone()).prop_map(|(sequence, sha256)| Key::Event { sequence, sha256 }),
            (artifact, 1u64.., hash).prop_map(|(artifact, number, sha256)| Key::Segment {
                artifact,
                number,
                sha256
            }),
            Just(Key::Sums),
            Just(Key::Manifest),
        ]
    }

    proptest! {
        #[test]
        fn a_key_is_its_own_parse(key in keys(), cut in 0usize..200) {
            let text = key.to_string();
            prop_assert_eq!(text.parse::<Key>().unwrap(), key);
            let full = format!("{}/{text}", evidence_prefix(&Writer::local(), CaptureId::mint()));
            prop_assert!(parse_evidence_key(&full).is_ok());
            if cut < text.len() {
                prop_assert!(text.get(..cut).unwrap().parse::<Key>().is_err());
            }
        }

        #[test]
        fn whatever_parses_prints_back(text in "(progress|volatile/[a-z.]{0,4}|\\.\\.)/[0-9]{1,7}-[0-9a-fA-F]{62,64}\\.(json|jsonl\\.zst)") {
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn no_name_leaves_its_folder() {
        for bad in ["..", ".", "", "a/b", "a\\b", "a b", "-x", "é", "a\0", "$(id)"] {
            assert!(bad.parse::<CaseName>().is_err(), "{bad}");
            assert!(bad.parse::<Writer>().is_err(), "{bad}");
        }
        assert!("AROAEXAMPLE:i-0123456789abcdef0".parse::<Writer>().is_ok());
        assert!("../../etc/passwd".parse::<Key>().is_err());
        assert!("volatile/../000001-00.jsonl.zst".parse::<Key>().is_err());
        assert!(
            "0197C9E2-0000-7000-8000-000000000000"
                .parse::<CaptureId>()
                .is_err()
        );
        assert!("0197c9e2000070008000000000000000".parse::<CaptureId>().is_err());
    }
}
