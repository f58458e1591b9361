//! BTF: parsed, and made into a symbol table.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_symbols::{Kernel, Symbol, btf, isf::Isf};

fuzz_target!(|data: &[u8]| {
    // The header is easy to get right and says nothing: what follows it is what is fuzzed.
    let (types, strings) = data.split_at(data.len() / 2 / 4 * 4);
    let strings = [&b"\0task_struct\0mm_struct\0list_head\0"[..], strings, b"\0"].concat();
    let mut bytes = btf::MAGIC.to_vec();
    for word in [0, types.len(), types.len(), strings.len()] {
        bytes.extend((word as u32).to_le_bytes());
    }
    bytes.extend(types);
    bytes.extend(strings);
    if let Ok(types) = btf::Types::parse(&bytes) {
        let symbols = ["init_task", "linux_banner"].map(|name| Symbol { address: 0xffff_ffff_8200_0000, kind: b'D', name: name.to_owned() });
        let kernel = Kernel {
            banner: b"Linux version 1\n".to_vec(),
            symbols: symbols.to_vec(),
            vmcoreinfo: None,
            btf: None,
            tables: vec![],
            offset: 0,
        };
        if let Ok(isf) = Isf::of(&kernel, &types) {
            isf.write(std::io::sink()).unwrap();
        }
    }
});
