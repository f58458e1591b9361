//! The key of one capture, and signed objects.

use crate::Error;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

const OPEN: &[u8] = b"{\"signed\":";
const MIDDLE: &[u8] = b",\"signature\":\"";
const CLOSE: &[u8] = b"\"}\n";
const DIGITS: usize = 128;

/// The Ed25519 key that signs one capture. It is never written anywhere, and wiped when dropped.
pub struct CaptureKey(SigningKey);

impl CaptureKey {
    /// The key of 32 random bytes, which must come from the operating system.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        CaptureKey(SigningKey::from_bytes(seed))
    }
}

/// Whoever holds the key of a capture and signs with it.
pub trait Signatory: Send {
    /// The half that everybody may have.
    fn public(&self) -> PublicKey;
    /// `message` again, and its Ed25519 signature. It goes to where the key is and comes back: a manifest is not copied for that.
    fn sign(&self, message: String) -> (String, [u8; 64]);
}

impl Signatory for CaptureKey {
    fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    fn sign(&self, message: String) -> (String, [u8; 64]) {
        let signature = self.0.sign(message.as_bytes()).to_bytes();
        (message, signature)
    }
}

/// `{"signed":PAYLOAD,"signature":"HEX"}` and a line feed. `payload` must be one JSON value.
pub fn seal(signatory: &dyn Signatory, payload: String) -> Vec<u8> {
    let (payload, signature) = signatory.sign(payload);
    let mut sealed = payload.into_bytes();
    sealed.reserve(OPEN.len() + MIDDLE.len() + DIGITS + CLOSE.len());
    sealed.splice(..0, OPEN.iter().copied());
    sealed.extend_from_slice(MIDDLE);
    sealed.extend_from_slice(hex::encode(signature).as_bytes());
    sealed.extend_from_slice(CLOSE);
    sealed
}

/// The public half of a capture's key; 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Checks that `sealed` bears this key's signature and returns the payload.
    pub fn open<'a>(&self, sealed: &'a [u8]) -> Result<&'a str, Error> {
        let (payload, signature) = split(sealed)?;
        self.0
            .verify_strict(payload.as_bytes(), &signature)
            .map_err(|_| Error::Signature("the signature is not that of the capture's key"))?;
        Ok(payload)
    }
}

/// Takes a sealed object apart without checking its signature: to read the key out of the first event.
pub fn split(sealed: &[u8]) -> Result<(&str, Signature), Error> {
    let wrong = Error::Signature("not a signed object");
    let (rest, hex_digits) = sealed
        .strip_prefix(OPEN)
        .and_then(|rest| rest.strip_suffix(CLOSE))
        .and_then(|rest| rest.split_last_chunk::<DIGITS>())
        .ok_or(wrong.clone())?;
    let payload = rest.strip_suffix(MIDDLE).ok_or(wrong.clone())?;
    let mut signature = [0; 64];
    if hex_digits.iter().any(u8::is_ascii_uppercase)
        || hex::decode_to_slice(hex_digits, &mut signature).is_err()
    {
        return Err(wrong);
    }
    Ok((
        std::str::from_utf8(payload).map_err(|_| wrong)?,
        Signature::from_bytes(&signature),
    ))
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let hash: crate::root::Hash = text.parse().map_err(|_| Error::Name {
            what: "public key",
            why: "64 lower-case hex digits are expected",
        })?;
        let key = VerifyingKey::from_bytes(&hash.0).map_err(|_| Error::Name {
            what: "public key",
            why: "not a point of Ed25519",
        })?;
        if key.is_weak() {
            return Err(Error::Name {
                what: "public key",
                why: "a point of small order",
            });
        }
        Ok(PublicKey(key))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_the_untouched_object_opens(seed in any::<[u8; 32]>(), text in any::<String>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let key = CaptureKey::from_seed(&seed);
            let payload = serde_json::to_string(&text).unwrap();
            let sealed = seal(&key, payload.clone());
            prop_assert_eq!(key.public().open(&sealed).unwrap(), &payload);
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&sealed).is_ok());
            let mut touched = sealed.clone();
            touched[at.index(sealed.len())] ^= 1 << bit;
            prop_assert!(key.public().open(&touched).is_err());
            prop_assert!(key.public().open(&sealed[..at.index(sealed.len())]).is_err());
        }
    }

    #[test]
    fn weak_keys_are_refused() {
        assert!(format!("01{}", "00".repeat(31)).parse::<PublicKey>().is_err());
    }
}
