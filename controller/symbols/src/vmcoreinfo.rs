//! VMCOREINFO: what the kernel notes down for those who read its memory (`Documentation/admin-guide/kdump/vmcoreinfo.rst`). Lines of
//! `KEY=VALUE`, `NUMBER(x)=decimal`, `SYMBOL(x)=hexadecimal`.

use std::collections::BTreeMap;

/// What is read of it at most: the kernel gives it a page.
pub const MAX: usize = 4096;

/// The note, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmcoreinfo {
    lines: BTreeMap<String, String>,
    text: Vec<u8>,
}

/// The tables of kallsyms, as the kernel calls them; those that VMCOREINFO names since 6.1.
const TABLES: [&str; 6] = [
    "kallsyms_names",
    "kallsyms_num_syms",
    "kallsyms_token_table",
    "kallsyms_token_index",
    "kallsyms_offsets",
    "kallsyms_relative_base",
];

impl Vmcoreinfo {
    /// Nothing when it is not one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let text = bytes.split(|b| *b == 0).next().filter(|t| t.len() <= MAX)?;
        if !text.starts_with(b"OSRELEASE=") {
            return None;
        }
        let lines = std::str::from_utf8(text).ok()?.lines();
        let lines = lines
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        Some(Vmcoreinfo {
            lines: lines.collect(),
            text: text.to_vec(),
        })
    }

    /// The text.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    fn line(&self, key: &str) -> Option<&str> {
        self.lines.get(key).map(String::as_str)
    }

    /// The release.
    pub fn release(&self) -> &str {
        self.line("OSRELEASE").unwrap_or_default()
    }

    /// `NUMBER(name)`.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.line(&format!("NUMBER({name})"))?.parse().ok()
    }

    /// `SYMBOL(name)`: a run-time address.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.line(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// `KERNELOFFSET`.
    pub fn kernel_offset(&self) -> Option<u64> {
        u64::from_str_radix(self.line("KERNELOFFSET")?, 16).ok()
    }

    /// What to add to a link-time physical address of the kernel.
    pub fn phys_base(&self) -> Option<u64> {
        // A signed number, and a wrapping sum: the kernel may lie below where it was linked.
        self.number("phys_base").map(i64::cast_unsigned)
    }

    /// The addresses of the tables of kallsyms that it names.
    pub fn tables(&self) -> Vec<(String, u64)> {
        TABLES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.symbol(name)?)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_is_read() {
        let info = Vmcoreinfo::parse(b"OSRELEASE=6.1.0\nNUMBER(phys_base)=-16777216\nSYMBOL(swapper_pg_dir)=ffffffff82a10000\nKERNELOFFSET=1e00000\n\0junk").unwrap();
        assert_eq!(
            (info.release(), info.kernel_offset()),
            ("6.1.0", Some(0x1e0_0000))
        );
        assert_eq!(info.phys_base(), Some(0xffff_ffff_ff00_0000));
        assert_eq!(info.symbol("swapper_pg_dir"), Some(0xffff_ffff_82a1_0000));
    }

    proptest! {
        #[test]
        fn anything_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Vmcoreinfo::parse(&[b"OSRELEASE=", &bytes[..]].concat()).map(|i| (i.tables(), i.phys_base()));
        }
    }
}
