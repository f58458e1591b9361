//! ELF cores: program headers and the VMCOREINFO note.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::image::elf;
use stillframe_symbols::Vmcoreinfo;

fuzz_target!(|data: &[u8]| {
    let _ = elf::segments(&data);
    if let Ok(Some(note)) = elf::vmcoreinfo(&data) {
        let _ = Vmcoreinfo::parse(&note).map(|info| (info.tables(), info.phys_base()));
    }
});
