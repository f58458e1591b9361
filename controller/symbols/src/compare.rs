//! What the agent read from the running kernel, against what the image has of the same boot. A difference is a finding: one of the two was
//! changed, or they are of two boots. Each part is compared by itself, so that one that is hidden hides no other.

use crate::{Files, Kernel, Symbol, Vmcoreinfo, kallsyms};
use std::collections::BTreeMap;

/// What comparing came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// One line a difference.
    pub differences: Vec<String>,
    /// The running kernel hid its addresses (kernel.kptr_restrict): names and types of symbols were compared, their addresses could not be.
    pub names_only: bool,
}

/// Compares what is there of `files` with `kernel`.
pub fn compare(kernel: &Kernel, files: &Files) -> Comparison {
    let mut found = Vec::new();
    let banner = [files.version.trim_ascii_end(), b"\n"].concat();
    if banner != kernel.banner {
        found.push(format!(
            "the banner was {}",
            String::from_utf8_lossy(banner.trim_ascii_end())
        ));
    }
    let theirs = kallsyms::parse(files.kallsyms);
    let names_only = !theirs.is_empty() && theirs.iter().all(|s| s.address == 0);
    found.extend(symbols(&kernel.symbols, &theirs, names_only));
    // What the agent could not read says nothing; what it read and the image lacks does.
    match (files.vmcoreinfo, &kernel.vmcoreinfo) {
        (Some(bytes), Some(ours)) if Vmcoreinfo::parse(bytes).as_ref() != Some(ours) => {
            found.push("VMCOREINFO is another".to_owned());
        }
        (Some(_), None) => {
            found.push("VMCOREINFO, which the running kernel had, is not in the image".to_owned())
        }
        _ => (),
    }
    match (files.btf, &kernel.btf) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            found.push("the types (BTF) of the running kernel are others than those in the image".to_owned());
        }
        (Some(_), None) => {
            found.push("types (BTF), which the running kernel had, are not in the image".to_owned())
        }
        _ => (),
    }
    Comparison {
        differences: found,
        names_only,
    }
}

fn symbols(ours: &[Symbol], theirs: &[Symbol], names_only: bool) -> Option<String> {
    let address = |s: &Symbol| if names_only { 0 } else { s.address };
    let alike = |(a, b): (&Symbol, &Symbol)| a.name == b.name && a.kind == b.kind && address(a) == address(b);
    if ours.len() == theirs.len() && ours.iter().zip(theirs).all(alike) {
        return None;
    }
    let known: BTreeMap<(&str, u8), u64> = ours
        .iter()
        .map(|s| ((s.name.as_str(), s.kind), address(s)))
        .collect();
    let differ = |s: &&Symbol| known.get(&(s.name.as_str(), s.kind)) != Some(&address(s));
    Some(format!(
        "kallsyms: {} symbols in the image, {} in the running kernel, {} of those elsewhere or absent",
        ours.len(),
        theirs.len(),
        theirs.iter().filter(differ).count()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str =
        "ffffffff81000000 T _text\nffffffff81000040 T startup_64\nffffffff82000000 D init_task\n";
    const VERSION: &[u8] = b"Linux version 6.1.0 (x@y) #1\n";
    const NOTE: &[u8] = b"OSRELEASE=6.1.0\nKERNELOFFSET=0\n";

    fn files(kallsyms: &str) -> Files<'_> {
        Files {
            btf: Some(b"types"),
            kallsyms: kallsyms.as_bytes(),
            vmcoreinfo: Some(NOTE),
            version: VERSION,
        }
    }

    #[test]
    fn the_same_is_the_same() {
        let kernel = Kernel::from_files(&files(KALLSYMS)).unwrap();
        assert_eq!(compare(&kernel, &files(KALLSYMS)), Comparison::default());
    }

    #[test]
    fn each_part_is_compared() {
        for (file, says) in [
            (
                Files {
                    version: b"Linux version 6.1.0 (x@y) #2\n",
                    ..files(KALLSYMS)
                },
                "banner",
            ),
            (
                Files {
                    version: b"",
                    ..files(KALLSYMS)
                },
                "banner",
            ),
            (
                Files {
                    vmcoreinfo: Some(b"OSRELEASE=6.1.0\nKERNELOFFSET=200000\n"),
                    ..files(KALLSYMS)
                },
                "VMCOREINFO",
            ),
            (
                Files {
                    btf: Some(b"other"),
                    ..files(KALLSYMS)
                },
                "BTF",
            ),
            (files(&KALLSYMS.replace("startup_64", "startup_46")), "1 of those"),
            (files(&KALLSYMS.replace("82000000", "82000008")), "1 of those"),
            (files(""), "0 in the running kernel"),
        ] {
            let kernel = Kernel::from_files(&files(KALLSYMS)).unwrap();
            let found = compare(&kernel, &file).differences;
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(says), "{found:?}");
        }
    }

    #[test]
    fn hidden_addresses_hide_nothing_else() {
        let hidden: String = KALLSYMS
            .lines()
            .map(|l| format!("0000000000000000{}\n", l.split_at(16).1))
            .collect();
        let kernel = Kernel::from_files(&files(KALLSYMS)).unwrap();
        let same = compare(&kernel, &files(&hidden));
        assert!(same.names_only && same.differences.is_empty(), "{same:?}");
        let other = Files {
            version: b"Linux version 6.1.0 (x@y) #2\n",
            ..files(&hidden)
        };
        assert!(compare(&kernel, &other).differences[0].contains("banner"));
        let renamed = hidden.replace("init_task", "init_tusk");
        assert!(compare(&kernel, &files(&renamed)).differences[0].contains("kallsyms"));
    }
}
