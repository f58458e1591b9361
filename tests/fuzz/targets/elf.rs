//! ELF cores: program headers and the VMCOREINFO note.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::image::elf;
use stillframe_symbols::Vmcoreinfo;

fuzz_target!(|data: &[u8]| {
    // A header with so many program headers of 56 bytes behind it, which are what is fuzzed, with what they point to.
    let Some((count, rest)) = data.split_first() else { return };
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend([0; 8]);
    bytes.extend(64u64.to_le_bytes());
    bytes.extend([0; 8 + 4]);
    for half in [64, 56, u16::from(*count) % 8, 64, 0, 0] {
        bytes.extend(u16::to_le_bytes(half));
    }
    bytes.extend(rest);
    let bytes = bytes.as_slice();
    let _ = elf::segments(&bytes);
    if let Ok(Some(note)) = elf::vmcoreinfo(&bytes) {
        let _ = Vmcoreinfo::parse(&note).map(|info| (info.tables(), info.phys_base()));
    }
    let _ = Vmcoreinfo::parse(rest).map(|info| (info.tables(), info.phys_base()));
});
