//! Strings that a guest chose: kept byte for byte, never able to drive a terminal.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Bytes that are usually text. In JSON a string when they are UTF-8, else `{"escaped": …, "base64": …}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Text(pub Vec<u8>);

impl Text {
    /// The exact bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<T: AsRef<[u8]> + ?Sized> From<&T> for Text {
    fn from(bytes: &T) -> Self {
        Text(bytes.as_ref().to_vec())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.0))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[derive(Serialize, Deserialize)]
struct Raw {
    escaped: String,
    base64: String,
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => Raw {
                escaped: printable(&self.0),
                base64: STANDARD.encode(&self.0),
            }
            .serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Text(String),
            Raw(Raw),
        }
        match Either::deserialize(deserializer)? {
            Either::Text(text) => Ok(Text(text.into_bytes())),
            Either::Raw(raw) => STANDARD
                .decode(raw.base64)
                .map(Text)
                .map_err(serde::de::Error::custom),
        }
    }
}

/// True for what could drive a terminal or reorder what is read on it: controls (C0, DEL, C1), format and bidirectional
/// characters, line separators, tags, variation of width.
fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{115f}' | '\u{1160}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// `bytes` for a person: backslash escapes for what is not UTF-8 and for what could drive a terminal.
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                c if c.is_ascii() && deceives(c) => out.push_str(&format!("\\x{:02x}", u32::from(c))),
                c if deceives(c) => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// JSON text with every such character as a `\u` escape: the same value, safe to print. `json` must be valid JSON, so
/// that the characters in question stand in strings only; line feeds between values are kept.
pub fn harmless_json(json: &str) -> String {
    if json.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return json.to_owned();
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if c != '\n' && deceives(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// One line of JSON, escaped as [`harmless_json`], without a line feed.
pub fn json_line<T: Serialize>(value: &T) -> Result<String, crate::Error> {
    let mut line = Vec::new();
    write_json(value, &mut line)?;
    String::from_utf8(line).map_err(|_| crate::Error::Chain("JSON that is not UTF-8".to_owned()))
}

/// The same into a buffer that is emptied first, for those who write many.
pub fn write_json<T: Serialize>(value: &T, line: &mut Vec<u8>) -> Result<(), crate::Error> {
    line.clear();
    serde_json::to_writer(&mut *line, value)?;
    // In blocks and without a way out of them, so that the compiler does many bytes at once.
    let strange = |block: &[u8]| block.iter().fold(false, |any, b| any | !(0x20..0x7f).contains(b));
    if line.chunks(64).any(strange) {
        let text = String::from_utf8_lossy(line);
        *line = harmless_json(&text).into_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_survive_json(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let line = json_line(&Text(bytes.clone())).unwrap();
            prop_assert_eq!(serde_json::from_str::<Text>(&line).unwrap().0, bytes);
        }

        #[test]
        fn text_survives_json(text in any::<String>()) {
            let line = json_line(&Text::from(&text)).unwrap();
            let mut buffer = b"before".to_vec();
            write_json(&Text::from(&text), &mut buffer).unwrap();
            prop_assert_eq!(line.as_bytes(), &buffer[..]);
            prop_assert!(!line.chars().any(deceives));
            prop_assert_eq!(serde_json::from_str::<Text>(&line).unwrap().0, text.into_bytes());
        }

        #[test]
        fn nothing_printable_deceives(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(!printable(&bytes).chars().any(deceives));
        }
    }

    #[test]
    fn hostile_names_are_shown_for_what_they_are() {
        let name = "a\n\x1b[2Jb\u{9b}31m\u{202e}cod.exe\\".as_bytes();
        assert_eq!(printable(name), "a\\n\\x1b[2Jb\\u{9b}31m\\u{202e}cod.exe\\\\");
        assert_eq!(printable(b"\xff\xfeok"), "\\xff\\xfeok");
    }
}
