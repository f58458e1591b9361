//! BTF: the types of a kernel (`Documentation/bpf/btf.rst`, `include/uapi/linux/btf.h`). Only a whole one, not the split ones of
//! modules. All lengths, names and references are checked once, here.

use crate::Error;

/// What BTF starts with: magic 0xeb9f, version 1, no flags, a header of 24 bytes.
pub const MAGIC: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
/// The largest that is read; those of distributions have 4 to 7 MB.
pub const MAX: u64 = 64 << 20;
const HEADER: usize = 24;
/// Bytes of names, each as often as it is referred to: a kernel has 6 MB of them.
const MAX_NAMES: usize = 128 << 20;
/// Bytes of one name (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;

/// A type. Types refer to each other by id; 0 is void.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// An integer.
    Int {
        /// Its name.
        name: String,
        /// Bytes.
        size: u32,
        /// `BTF_INT_SIGNED` 1, `BTF_INT_CHAR` 2, `BTF_INT_BOOL` 4.
        encoding: u8,
        /// Bits, fewer than its bytes have in an old bitfield; and where they start.
        bits: u8,
        /// Where they start.
        bit_offset: u8,
    },
    /// A floating-point number.
    Float {
        /// Its name.
        name: String,
        /// Bytes.
        size: u32,
    },
    /// A pointer.
    Pointer(u32),
    /// An array.
    Array {
        /// The type of its elements.
        element: u32,
        /// How many.
        count: u32,
    },
    /// A struct or union.
    Composite {
        /// Its tag; empty when it has none.
        name: String,
        /// True for a union.
        union: bool,
        /// Bytes.
        size: u32,
        /// Its members.
        members: Vec<Member>,
    },
    /// An enumeration.
    Enum {
        /// Its tag; empty when it has none.
        name: String,
        /// Bytes.
        size: u32,
        /// Whether its constants are signed.
        signed: bool,
        /// Its constants.
        constants: Vec<(String, i128)>,
    },
    /// A struct or union that is declared and not defined.
    Forward {
        /// Its tag.
        name: String,
        /// True for a union.
        union: bool,
    },
    /// A name for another type.
    Typedef {
        /// The name.
        name: String,
        /// The type.
        target: u32,
    },
    /// `const`, `volatile`, `restrict`, a tag.
    Qualified(u32),
    /// The type of a function.
    Function,
    /// A variable.
    Variable {
        /// Its name.
        name: String,
        /// Its type.
        target: u32,
    },
    /// What says nothing about layout.
    Other,
}

/// A member of a struct or union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its type.
    pub target: u32,
    /// Where it starts, in bits.
    pub bit_offset: u32,
    /// Bits of a bitfield; 0 when it is none.
    pub bits: u32,
}

/// All types.
#[derive(Clone, Debug)]
pub struct Types(Vec<Type>);

struct Cursor<'a>(&'a [u8]);

/// The strings, and how much of them may still be copied.
struct Names<'a> {
    strings: &'a [u8],
    left: usize,
}

impl Cursor<'_> {
    fn u32(&mut self) -> Result<u32, Error> {
        let (word, rest) = self
            .0
            .split_first_chunk()
            .ok_or(Error::Btf("ends within a type"))?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*word))
    }
}

/// Bytes of the whole, by the header at the start of `bytes`; nothing when it is none.
pub fn size(bytes: &[u8]) -> Option<u64> {
    let (types, strings) = sections(bytes)?;
    Some(HEADER as u64 + types.1 + strings.1)
}

/// Offset behind the header and length of the types and of the strings.
fn sections(bytes: &[u8]) -> Option<((u64, u64), (u64, u64))> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let word = |n: usize| Some(u64::from(u32::from_le_bytes(*rest.get(n * 4..)?.first_chunk()?)));
    let (types, strings) = ((word(0)?, word(1)?), (word(2)?, word(3)?));
    // As every kernel has it: types first, strings right behind.
    (types.0 == 0 && strings.0 == types.1 && types.1 % 4 == 0 && types.1 + strings.1 + HEADER as u64 <= MAX)
        .then_some((types, strings))
}

impl Types {
    /// Parses and checks all of it. Bytes behind the end are ignored.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let (types, strings) = sections(bytes).ok_or(Error::Btf("no header"))?;
        let section = |(offset, length): (u64, u64)| {
            let start = HEADER.checked_add(usize::try_from(offset).ok()?)?;
            bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
        };
        let cut = || Error::Btf("is cut off");
        let (mut rest, strings) = (
            Cursor(section(types).ok_or_else(cut)?),
            section(strings).ok_or_else(cut)?,
        );
        if strings.first() != Some(&0) {
            return Err(Error::Btf("its strings do not start with an empty one"));
        }
        let mut names = Names {
            strings,
            left: MAX_NAMES,
        };
        let mut list = vec![Type::Other];
        while !rest.0.is_empty() {
            list.push(one(&mut rest, &mut names)?);
        }
        let types = Types(list);
        types.check()?;
        Ok(types)
    }

    fn check(&self) -> Result<(), Error> {
        let known = |id: u32| usize::try_from(id).is_ok_and(|id| id < self.0.len());
        let right = self.0.iter().all(|t| match t {
            Type::Pointer(id) | Type::Qualified(id) => known(*id),
            Type::Array { element, .. } => known(*element),
            Type::Typedef { target, .. } | Type::Variable { target, .. } => known(*target),
            Type::Composite { members, .. } => members.iter().all(|m| known(m.target)),
            _ => true,
        });
        if right {
            Ok(())
        } else {
            Err(Error::Btf("refers to a type that it does not have"))
        }
    }

    /// Every type with its id, from 1.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Type)> {
        (0u32..).zip(&self.0).skip(1)
    }

    /// The type of an id; void is nothing.
    pub fn get(&self, id: u32) -> Option<&Type> {
        self.0.get(usize::try_from(id).ok()?).filter(|_| id > 0)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len() - 1
    }

    /// Whether there is a struct or union of that tag.
    pub fn has(&self, tag: &str) -> bool {
        self.0
            .iter()
            .any(|t| matches!(t, Type::Composite { name, .. } if name == tag))
    }
}

fn one(rest: &mut Cursor, names: &mut Names) -> Result<Type, Error> {
    let name_at = rest.u32()?;
    let info = rest.u32()?;
    let size = rest.u32()?;
    let own_name = names.text(name_at)?;
    let name = || Ok::<_, Error>(own_name.clone());
    let flag = info >> 31 == 1;
    let count = info & 0xffff;
    Ok(match info >> 24 & 0x1f {
        1 => {
            let data = rest.u32()?;
            let byte = |shift: u32| u8::try_from(data >> shift & 0xff).unwrap_or(0);
            Type::Int {
                name: name()?,
                size,
                encoding: byte(24) & 0xf,
                bits: byte(0),
                bit_offset: byte(16),
            }
        }
        2 => Type::Pointer(size),
        3 => {
            let element = rest.u32()?;
            let _index = rest.u32()?;
            let count = rest.u32()?;
            Type::Array { element, count }
        }
        kind @ (4 | 5) => {
            let mut members = Vec::new();
            for _ in 0..count {
                let (name, target, offset) = (names.text(rest.u32()?)?, rest.u32()?, rest.u32()?);
                let (bit_offset, bits) = if flag {
                    (offset & 0xff_ffff, offset >> 24)
                } else {
                    (offset, 0)
                };
                members.push(Member {
                    name,
                    target,
                    bit_offset,
                    bits,
                });
            }
            Type::Composite {
                name: name()?,
                union: kind == 5,
                size,
                members,
            }
        }
        kind @ (6 | 19) => {
            let mut constants = Vec::new();
            for _ in 0..count {
                let name = names.text(rest.u32()?)?;
                let low = rest.u32()?;
                let value = match (kind, flag) {
                    (6, true) => i128::from(low.cast_signed()),
                    (6, false) => i128::from(low),
                    (_, signed) => {
                        let value = u64::from(rest.u32()?) << 32 | u64::from(low);
                        if signed {
                            i128::from(value.cast_signed())
                        } else {
                            i128::from(value)
                        }
                    }
                };
                constants.push((name, value));
            }
            Type::Enum {
                name: name()?,
                size,
                signed: flag,
                constants,
            }
        }
        7 => Type::Forward {
            name: name()?,
            union: flag,
        },
        8 => Type::Typedef {
            name: name()?,
            target: size,
        },
        9 | 10 | 11 | 18 => Type::Qualified(size),
        12 => Type::Other,
        13 => {
            for _ in 0..count {
                let _ = (rest.u32()?, rest.u32()?);
            }
            Type::Function
        }
        14 => {
            let _linkage = rest.u32()?;
            Type::Variable {
                name: name()?,
                target: size,
            }
        }
        15 => {
            for _ in 0..count {
                let _ = (rest.u32()?, rest.u32()?, rest.u32()?);
            }
            Type::Other
        }
        16 => Type::Float { name: name()?, size },
        17 => {
            let _component = rest.u32()?;
            Type::Other
        }
        _ => return Err(Error::Btf("has a type of an unknown kind")),
    })
}

impl Names<'_> {
    fn text(&mut self, at: u32) -> Result<String, Error> {
        let rest = usize::try_from(at).ok().and_then(|at| self.strings.get(at..));
        let text = rest
            .and_then(|rest| rest.split(|b| *b == 0).next())
            .map(std::str::from_utf8);
        match text {
            Some(Ok(text)) if text.len() <= MAX_NAME && text.len() <= self.left => {
                self.left -= text.len();
                Ok(text.to_owned())
            }
            _ => Err(Error::Btf(
                "refers to a name that it does not have, or has more of them than any kernel",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn anything_is_refused_or_read(types in proptest::collection::vec(any::<u32>(), 0..60), strings in "[a-z\0]{0,40}") {
            let mut bytes = MAGIC.to_vec();
            let strings = format!("\0{strings}\0");
            let length = |n: usize| u32::try_from(n).unwrap();
            for word in [0, length(types.len() * 4), length(types.len() * 4), length(strings.len())] {
                bytes.extend(word.to_le_bytes());
            }
            types.iter().for_each(|t| bytes.extend((t & 0x9f00_0007).to_le_bytes()));
            bytes.extend(strings.as_bytes());
            if let Ok(types) = Types::parse(&bytes) {
                let _ = types.iter().count();
            }
        }
    }
}
