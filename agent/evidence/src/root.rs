//! SHA-256, and the Merkle tree hash of RFC 9162, section 2.1.1, over lists of hashes.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// A SHA-256 value; 64 lower-case hex digits in JSON and in keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The SHA-256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Hash(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Hash {
    type Err = crate::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = crate::Error::Name {
            what: "hash",
            why: "64 lower-case hex digits are expected",
        };
        let mut bytes = [0; 32];
        if text.bytes().any(|b| b.is_ascii_uppercase()) || hex::decode_to_slice(text, &mut bytes).is_err() {
            return Err(wrong);
        }
        Ok(Hash(bytes))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The Merkle tree hash of `leaves`; of an empty list, the SHA-256 of nothing.
pub fn root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => Hash::of(b""),
        [leaf] => Hash(
            Sha256::new()
                .chain_update([0])
                .chain_update(leaf.0)
                .finalize()
                .into(),
        ),
        _ => {
            // RFC 9162: the largest power of two smaller than the number of leaves.
            let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
            let node = Sha256::new()
                .chain_update([1])
                .chain_update(root(left).0)
                .chain_update(root(right).0);
            Hash(node.finalize().into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9162's tree written out by hand for five leaves.
    #[test]
    fn the_shape_is_that_of_rfc_9162() {
        let leaf = |n: u8| Hash::of(&[n]);
        let l = |n: u8| Hash::of(&[&[0][..], &leaf(n).0].concat());
        let n = |a: Hash, b: Hash| Hash::of(&[&[1][..], &a.0, &b.0].concat());
        let expected = n(n(n(l(0), l(1)), n(l(2), l(3))), l(4));
        assert_eq!(root(&[leaf(0), leaf(1), leaf(2), leaf(3), leaf(4)]), expected);
        assert_eq!(
            root(&[leaf(0), leaf(1), leaf(2), leaf(3)]),
            n(n(l(0), l(1)), n(l(2), l(3)))
        );
        assert_eq!(root(&[leaf(7)]), l(7));
    }

    #[test]
    fn upper_case_is_not_a_second_spelling() {
        let hash = Hash::of(b"x").to_string();
        assert!(hash.parse::<Hash>().is_ok());
        assert!(hash.to_uppercase().parse::<Hash>().is_err());
    }
}
