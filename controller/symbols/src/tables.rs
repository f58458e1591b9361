//! The tables of kallsyms as they lie in the kernel's read-only data (`scripts/kallsyms.c`, `kernel/kallsyms.c`). Three layouts:
//!
//! ```text
//! to 6.3   offsets, relative_base, num_syms, names, markers, [seqs_of_names,] token_table, token_index
//! to 6.19  num_syms, names, markers, token_table, token_index, offsets, relative_base
//! from 7.0 num_syms, names, markers, token_table, token_index, offsets          each offset relative to its own place
//! ```
//! `seqs_of_names` (6.2 and 6.3, and the stable releases of 6.1) is not read. Names are token numbers; the first character that
//! they spell is the type letter. An offset is relative to `relative_base`: negative ones as base − 1 − offset, others absolute,
//! as long as per-CPU symbols were absolute (to 6.14); after that all are added to the base.

use crate::{KERNEL_MAP, Symbol};
use memchr::memmem::Finder;
use std::ops::Range;

/// Bytes before and behind a token table in which the other tables lie.
pub const BEFORE: u64 = 16 << 20;
/// See [`BEFORE`].
pub const BEHIND: u64 = 8 << 20;

/// Symbols of one kernel: the smallest that runs has tens of thousands, and no distribution reaches a million.
const SYMBOLS: Range<u32> = 1000..4_000_000;

/// Places that look like markers and are tried: in a kernel the nearest is right.
const MAX_MARKERS: usize = 64;
/// Characters of a name, with its type letter (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;

/// The digits in the token table: `0`, `1`, … `9` are always tokens of themselves.
pub const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";

/// The tables, found and decoded.
#[derive(Clone, Debug)]
pub struct Tables {
    /// The symbols in the kernel's order.
    pub symbols: Vec<Symbol>,
    /// Where each table starts, as an offset in what was searched.
    pub places: Vec<(&'static str, usize)>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

struct Tokens<'a> {
    /// Where the token table starts, and where the index does.
    table: usize,
    index: usize,
    tokens: Vec<&'a [u8]>,
}

/// The tables around the digits at `digits` in `bytes`, which must start at an address that is a multiple of 8. `address_of` gives the run-time address of an offset in `bytes`, where
/// that is known.
pub fn decode(bytes: &[u8], digits: usize, address_of: impl Fn(usize) -> Option<u64>) -> Option<Tables> {
    let tokens = tokens(bytes, digits)?;
    let found = markers(bytes, tokens.table)
        .take(MAX_MARKERS)
        .find_map(|(markers, count)| {
            // What follows the markers may by chance look like one or two more.
            let counts = (count.saturating_sub(2)..=count).rev();
            let mut found = counts.filter_map(|count| names(bytes, markers, count, &tokens));
            found
                .next()
                .map(|(num_syms, names, ends)| (markers, num_syms, names, ends))
        });
    let (markers, num_syms, names, ends) = found?;
    let count = ends.len();
    let mut places = vec![
        ("kallsyms_num_syms", num_syms),
        ("kallsyms_names", names),
        ("kallsyms_markers", markers),
        ("kallsyms_token_table", tokens.table),
        ("kallsyms_token_index", tokens.index),
    ];
    let size = count.checked_mul(4)?;
    // To 6.3: before the names.
    let before = || {
        let base = num_syms.checked_sub(8)?;
        let offsets = base.checked_sub(size.checked_next_multiple_of(8)?)?;
        let addresses = based(bytes, offsets, base, count)?;
        Some((offsets, Some(base), addresses))
    };
    let behind = || {
        let offsets = (tokens.index + 512).checked_next_multiple_of(8)?;
        let base = offsets.checked_add(size)?.checked_next_multiple_of(8)?;
        let addresses = based(bytes, offsets, base, count)?;
        Some((offsets, Some(base), addresses))
    };
    let relative = || {
        let offsets = (tokens.index + 512).checked_next_multiple_of(4)?;
        let addresses = (0..count).map(|n| {
            let at = offsets + n * 4;
            address_of(at)?.checked_add_signed(i64::from(u32_at(bytes, at)?.cast_signed()))
        });
        let addresses = plausible(addresses.collect::<Option<Vec<u64>>>()?)?;
        Some((offsets, None, addresses))
    };
    let (offsets, base, addresses) = before().or_else(behind).or_else(relative)?;
    places.push(("kallsyms_offsets", offsets));
    places.extend(base.map(|base| ("kallsyms_relative_base", base)));
    let mut symbols = Vec::with_capacity(count);
    let mut at = names;
    for (end, address) in ends.into_iter().zip(addresses) {
        symbols.push(symbol(bytes.get(at..end)?, address, &tokens)?);
        at = end;
    }
    Some(Tables { symbols, places })
}

/// The addresses of offsets relative to a base.
fn based(bytes: &[u8], offsets: usize, base: usize, count: usize) -> Option<Vec<u64>> {
    let base = u64_at(bytes, base)?;
    if base < KERNEL_MAP {
        return None;
    }
    let offset = |n: usize| u32_at(bytes, offsets + n * 4);
    let negative = (0..count)
        .filter(|n| offset(*n).is_some_and(|o| o >> 31 == 1))
        .count();
    let per_cpu_is_absolute = negative > count / 2;
    let address = |n: usize| {
        let offset = offset(n)?;
        match (per_cpu_is_absolute, offset >> 31) {
            (true, 1) => (base - 1).checked_add(u64::from(offset.wrapping_neg())),
            (true, _) => Some(u64::from(offset)),
            (false, _) => base.checked_add(u64::from(offset)),
        }
    };
    plausible((0..count).map(address).collect::<Option<Vec<u64>>>()?)
}

/// The kernel sorts its symbols by address: tables that do not are no tables.
fn plausible(addresses: Vec<u64>) -> Option<Vec<u64>> {
    let last = *addresses.last()?;
    let sorted = addresses
        .windows(2)
        .filter(|pair| matches!(pair, [a, b] if a <= b))
        .count();
    let kernel = addresses.iter().filter(|a| **a >= KERNEL_MAP).count();
    // Absolute per-CPU symbols come where their place is, out of order.
    (last >= KERNEL_MAP
        && sorted + 1 + addresses.len() / 16 >= addresses.len()
        && kernel > addresses.len() / 2)
        .then_some(addresses)
}

/// Finds the index behind the table, and with it where the table starts.
fn tokens(bytes: &[u8], digits: usize) -> Option<Tokens<'_>> {
    let near = digits.checked_next_multiple_of(4)?;
    // The table of a real kernel is 900 to 1100 bytes long; 256 tokens of 32 bytes would be 8 KiB.
    (near..near.checked_add(8 << 10)?).step_by(4).find_map(|index| {
        if u16_at(bytes, index)? != 0 || u16_at(bytes, index + 2)? == 0 {
            return None;
        }
        let table = digits.checked_sub(usize::from(u16_at(bytes, index + 2 * usize::from(b'0'))?))?;
        let mut tokens = Vec::with_capacity(256);
        let mut expected = 0;
        for n in 0..256 {
            let start = u16_at(bytes, index + 2 * n)?;
            if usize::from(start) != expected {
                return None;
            }
            let token = bytes.get(table + expected..index)?;
            let length = token.iter().position(|b| *b == 0)?;
            tokens.push(token.get(..length)?);
            expected += length + 1;
        }
        // Nothing but padding lies between the two.
        let rest = bytes.get(table + expected..index)?;
        (rest.len() < 8 && rest.iter().all(|b| *b == 0)).then_some(Tokens { table, index, tokens })
    })
}

/// What 256 names can take, in bytes: each has at least a length and a token, and at most 512 tokens.
const MARKED: Range<u32> = 512..(256 * 514);

/// Where the markers may be, before the token table: a zero and then numbers that rise as the names of 256 symbols do. Their
/// place and number, the nearest first. Between them and the token table there may be `seqs_of_names`.
fn markers(bytes: &[u8], table: usize) -> impl Iterator<Item = (usize, usize)> {
    let words = table / 4;
    let lowest = table.saturating_sub(usize::try_from(BEFORE).unwrap_or(0)) / 4;
    (lowest..words).rev().map(|word| word * 4).filter_map(move |at| {
        if u32_at(bytes, at)? != 0 || !MARKED.contains(&u32_at(bytes, at + 4)?) {
            return None;
        }
        let mut count = 1;
        let mut last = 0;
        while at + count * 4 < table
            && let Some(marker) = u32_at(bytes, at + count * 4)
            && MARKED.contains(&marker.wrapping_sub(last))
        {
            last = marker;
            count += 1;
        }
        (count > 3).then_some((at, count))
    })
}

/// Where the number of symbols and the names start, and where each name ends.
fn names(
    bytes: &[u8],
    markers: usize,
    count_of_markers: usize,
    tokens: &Tokens,
) -> Option<(usize, usize, Vec<usize>)> {
    let last_marker = usize::try_from(u32_at(bytes, markers + 4 * (count_of_markers - 1))?).ok()?;
    // The names behind the last marker are between 1 and 256; a name has at most 512 characters, and so at most as many tokens.
    let latest = markers.checked_sub(last_marker)?;
    let earliest = latest.saturating_sub(256 * 520);
    let counts = u32::try_from(count_of_markers).ok()?;
    let most = counts.checked_mul(256)?;
    let fits = |n: u32| SYMBOLS.contains(&n) && n <= most && n > most - 256;
    (earliest / 4..latest / 4 + 1)
        .rev()
        .map(|word| word * 4)
        .find_map(|names| {
            [4, 8].into_iter().find_map(|gap| {
                let num_syms = names.checked_sub(gap)?;
                let count = u32_at(bytes, num_syms).filter(|n| fits(*n))?;
                let padding = bytes.get(num_syms + 4..names)?;
                if padding.iter().any(|b| *b != 0) {
                    return None;
                }
                let ends = walk(bytes, names, markers, usize::try_from(count).ok()?, tokens)?;
                Some((num_syms, names, ends))
            })
        })
}

/// Walks all names; each must have tokens, every 256th start where its marker says, and the last end where the markers begin.
fn walk(bytes: &[u8], names: usize, markers: usize, count: usize, tokens: &Tokens) -> Option<Vec<usize>> {
    let mut ends = Vec::with_capacity(count);
    let mut at = names;
    for n in 0..count {
        if n % 256 == 0 && usize::try_from(u32_at(bytes, markers + n / 256 * 4)?).ok()? != at - names {
            return None;
        }
        let (length, header) = length(bytes, at)?;
        at = at.checked_add(header)?.checked_add(length)?;
        if at > markers || tokens.tokens.len() != 256 {
            return None;
        }
        ends.push(at);
    }
    let rest = bytes.get(at..markers)?;
    (rest.len() < 8 && rest.iter().all(|b| *b == 0)).then_some(ends)
}

/// Number of tokens of a name, and bytes that the number takes: one, or two when the top bit is set (since 6.1).
fn length(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.get(at)?);
    if first & 0x80 == 0 {
        return (first > 0).then_some((first, 1));
    }
    let second = usize::from(*bytes.get(at + 1)?);
    Some((first & 0x7f | second << 7, 2)).filter(|(length, _)| *length <= MAX_NAME)
}

fn symbol(name: &[u8], address: u64, tokens: &Tokens) -> Option<Symbol> {
    let (_, header) = length(name, 0)?;
    let mut text = Vec::new();
    for token in name.get(header..)? {
        text.extend_from_slice(tokens.tokens.get(usize::from(*token))?);
        if text.len() > MAX_NAME {
            return None;
        }
    }
    let (kind, name) = text.split_first()?;
    let printable = name.iter().all(u8::is_ascii_graphic) && kind.is_ascii_alphabetic();
    (printable && !name.is_empty()).then(|| Symbol {
        address,
        kind: *kind,
        name: String::from_utf8_lossy(name).into_owned(),
    })
}

/// Where the digits of a token table stand in `bytes`, which must start at an address that is a multiple of 8; each has its index
/// behind it, within [`INDEX`].
pub fn candidates(bytes: &[u8]) -> Vec<usize> {
    Finder::new(DIGITS)
        .find_iter(bytes)
        .filter(|at| tokens(bytes, *at).is_some())
        .collect()
}

/// Bytes behind the digits in which the index of a token table starts and ends.
pub const INDEX: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = KERNEL_MAP + 0x200_0000;

    /// The kernel's own way to lay its tables out, with a token for each character and one for `sys_`.
    fn lay(symbols: &[(u64, String)], layout: u8, address: u64) -> (Vec<u8>, usize) {
        let token = |n: usize| {
            if n == 200 {
                b"sys_".to_vec()
            } else {
                vec![u8::try_from(n).unwrap().max(1)]
            }
        };
        let (mut table, mut index) = (vec![], vec![]);
        for n in 0..256 {
            index.extend(u16::try_from(table.len()).unwrap().to_le_bytes());
            table.extend(token(n));
            table.push(0);
        }
        let (mut names, mut markers) = (vec![], vec![]);
        for (n, (_, name)) in symbols.iter().enumerate() {
            if n % 256 == 0 {
                markers.extend(u32::try_from(names.len()).unwrap().to_le_bytes());
            }
            let mut tokens = vec![b'T'];
            let mut rest = name.as_bytes();
            while let Some((first, tail)) = rest.split_first() {
                match rest.strip_prefix(b"sys_") {
                    Some(tail) => (tokens.push(200), rest = tail).1,
                    None => (tokens.push(*first), rest = tail).1,
                }
            }
            if tokens.len() < 128 {
                names.push(u8::try_from(tokens.len()).unwrap());
            } else {
                names.extend([
                    u8::try_from(tokens.len() & 0x7f | 0x80).unwrap(),
                    u8::try_from(tokens.len() >> 7).unwrap(),
                ]);
            }
            names.extend(tokens);
        }
        let align = |out: &mut Vec<u8>, n: usize| out.resize(out.len().next_multiple_of(n), 0);
        let n = if layout == 3 { 4 } else { 8 };
        let percpu = |a: &u64| {
            if *a < BASE {
                u32::try_from(*a).unwrap()
            } else {
                u32::try_from(a - BASE + 1).unwrap().wrapping_neg()
            }
        };
        let mut out = b"some other data here, and of no length in particular".to_vec();
        align(&mut out, 8);
        if layout == 1 || layout == 4 {
            symbols
                .iter()
                .for_each(|(a, _)| out.extend(percpu(a).to_le_bytes()));
            align(&mut out, 8);
            out.extend(BASE.to_le_bytes());
        }
        out.extend(u32::try_from(symbols.len()).unwrap().to_le_bytes());
        align(&mut out, n);
        out.extend(&names);
        align(&mut out, n);
        out.extend(&markers);
        align(&mut out, n);
        if layout == 4 {
            (0..symbols.len())
                .rev()
                .for_each(|n| out.extend(&u32::try_from(n).unwrap().to_be_bytes()[1..]));
            align(&mut out, n);
        }
        let digits = out.len() + usize::from(u16::from_le_bytes(index[96..98].try_into().unwrap()));
        out.extend(&table);
        align(&mut out, n);
        out.extend(&index);
        align(&mut out, n);
        match layout {
            2 => {
                symbols
                    .iter()
                    .for_each(|(a, _)| out.extend(percpu(a).to_le_bytes()));
                align(&mut out, 8);
                out.extend(BASE.to_le_bytes());
            }
            3 => {
                for (a, _) in symbols {
                    let own = address + out.len() as u64;
                    out.extend(
                        i32::try_from(a.cast_signed() - own.cast_signed())
                            .unwrap()
                            .to_le_bytes(),
                    );
                }
            }
            _ => (),
        }
        out.extend([0x55; 64]);
        (out, digits)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_layout_is_decoded(count in 1100usize..2400, layout in 1u8..5, long in 0usize..300, seed in any::<u64>()) {
            let name = |n: usize| format!("sys_f{n}_{}", "x".repeat(if n == 7 { long } else { n % 9 }));
            let mut at = BASE;
            let symbols: Vec<(u64, String)> = (0..count).map(|n| { at += (seed >> (n % 60)) & 0xff; (if layout != 3 && n == 3 { 0x40 } else { at }, name(n)) }).collect();
            let place = BASE + 0x80_0000;
            let (bytes, digits) = lay(&symbols, layout, place);
            prop_assert_eq!(candidates(&bytes), [digits]);
            let tables = decode(&bytes, digits, |at| Some(place + at as u64)).unwrap();
            let found: Vec<(u64, String)> = tables.symbols.into_iter().map(|s| (s.address, s.name)).collect();
            prop_assert_eq!(found, symbols);
        }

        #[test]
        fn a_flipped_byte_never_panics(count in 1100usize..1200, layout in 1u8..5, at in any::<prop::sample::Index>(), with in any::<u8>()) {
            let symbols: Vec<(u64, String)> = (0..count).map(|n| (BASE + n as u64 * 16, format!("f{n}"))).collect();
            let (mut bytes, digits) = lay(&symbols, layout, BASE);
            let at = at.index(bytes.len());
            bytes[at] = with;
            let _ = decode(&bytes, digits, |at| Some(BASE + at as u64));
        }
    }
}
