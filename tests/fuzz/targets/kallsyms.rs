//! kallsyms: its text, and its tables as they lie in memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_symbols::{kallsyms, tables};

fuzz_target!(|data: &[u8]| {
    let _ = kallsyms::parse(data);
    // A whole token table with its index, and what is fuzzed on both sides of it.
    let (before, behind) = data.split_at(data.len() / 2);
    let mut bytes = before.to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let mut index = Vec::new();
    let table = bytes.len();
    for n in 0..=255u8 {
        index.extend(((bytes.len() - table) as u16).to_le_bytes());
        bytes.extend([n.max(1), 0]);
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(index);
    bytes.extend(behind);
    for digits in tables::candidates(&bytes) {
        let _ = tables::decode(&bytes, digits, |at| Some(0xffff_ffff_8100_0000 + at as u64));
    }
});
