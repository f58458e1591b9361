//! Kernel modules, by procfs and by sysfs; what only one of them shows is still a record.

use super::proc::{self, fields, hex, lines, number};
use crate::collect::{Collection, Errors, Unsupported};
use jiff::Timestamp;
use std::{
    collections::BTreeMap,
    io,
    os::unix::{ffi::OsStringExt as _, fs::DirEntryExt as _},
    path::Path,
};
use stillframe_evidence::{
    records::{Data, modules::Module},
    text::Text,
};

const SYSFS: [&str; 6] = [
    "version",
    "srcversion",
    "initstate",
    "coresize",
    "initsize",
    "taint",
];

/// Every module of either list, by name.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let procfs = c.path("proc/modules");
    let source = procfs.as_os_str().as_encoded_bytes();
    let read_at = Timestamp::now();
    let mut found: BTreeMap<Vec<u8>, Module> = BTreeMap::new();
    let (mut procfs_read, mut sysfs_read) = (false, false);
    match proc::read(&procfs) {
        Ok(bytes) => {
            procfs_read = true;
            found.extend(lines(&bytes).filter_map(parse).map(|m| (m.name.0.clone(), m)));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && c.path("proc/self/stat").exists() => {
            return Err(Unsupported(
                "this kernel has no loadable modules: /proc/modules does not exist".to_owned(),
            ));
        }
        Err(error) => c.unread("modules", source, &error),
    }
    let sysfs = c.path("sys/module");
    match list(&sysfs) {
        Ok(mut folders) => {
            sysfs_read = true;
            // Where procfs shows none, sysfs is all there is.
            if c.is_sparing() && !found.is_empty() && inodes_only_rise() {
                let listed = folders.len();
                folders = without_built_in(folders, |name| found.contains_key(name));
                let built_in = listed - folders.len();
                c.note(format!(
                    "{built_in} folders of sysfs taken for built-in code by their inodes"
                ));
            }
            for (_, name) in folders {
                // Code that is built in has a folder here too, but nothing that can be in a state.
                if !sysfs.join(super::os(&name)).join("initstate").exists() {
                    continue;
                }
                let module = found.entry(name).or_insert_with_key(|name| Module {
                    name: Text::from(&**name),
                    ..Module::default()
                });
                module.seen_in.push("sysfs".to_owned());
            }
        }
        Err(error) => c.unread("modules", sysfs.as_os_str().as_encoded_bytes(), &error),
    }
    // With one list unread, that a module is not in it says nothing.
    let both = [&procfs_read, &sysfs_read].into_iter().all(|read| *read);
    let (mut hidden, mut unaddressed) = (0u64, 0u64);
    for (key, (name, mut module)) in (0u64..).zip(found) {
        if !c.item(key, &name) {
            continue;
        }
        let mut errors = Errors::default();
        if module.seen_in.iter().any(|s| s == "sysfs") {
            read_sysfs(&sysfs.join(super::os(&name)), &mut module, &mut errors);
        }
        hidden += u64::from(both && module.seen_in.len() == 1);
        let in_procfs = module.seen_in.iter().any(|s| s == "procfs");
        unaddressed += u64::from(in_procfs && module.address.is_none());
        let source = if in_procfs {
            source
        } else {
            sysfs.as_os_str().as_encoded_bytes()
        };
        c.record(source, read_at, Data::Module(Box::new(module)), errors.list);
        c.done();
    }
    if hidden > 0 {
        c.note(format!("{hidden} in only one of procfs and sysfs"));
    }
    if unaddressed > 0 {
        c.note(format!(
            "{unaddressed} without an address (kernel.kptr_restrict, or no privilege)"
        ));
    }
    Ok(())
}

/// Inodes and names in a folder, by inode. Listing sysfs leaves nothing behind in the kernel; looking at a name does.
fn list(folder: &Path) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let mut found: Vec<(u64, Vec<u8>)> = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| (entry.ino(), entry.file_name().into_vec()))
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Nodes of sysfs between one folder of built-in code and the next. The group of a folder is made anew for each of its parameters
/// (`kernel/params.c`, `kernel_add_sysfs_param`): 435 nodes for 28 of them. Behind one with more, the rest is looked at.
const NODES: u64 = 1024;

/// Leaves out what is surely built in, some hundred folders: looking into each would change one page after another of the kernel's
/// tables of names and inodes, which are about to be captured. `param_sysfs_builtin` of `kernel/params.c` makes all of them in one go,
/// among them `kernel`, which no module can be called; and inodes of sysfs only rise. So they are those from `kernel` on, up to
/// the first that is loaded or that is not next to the one before. What could be missed is a module that was loaded right
/// then and hides from procfs: never up to Linux 6.1 (`subsys_initcall`, before the initramfs is unpacked), since then only one
/// that the initramfs loads while the kernel is not through with its own start (`late_initcall`), and before any that is seen.
fn without_built_in(mut folders: Vec<(u64, Vec<u8>)>, loaded: impl Fn(&[u8]) -> bool) -> Vec<(u64, Vec<u8>)> {
    let Some(first) = folders.iter().position(|(_, name)| name == b"kernel") else {
        return folders;
    };
    let mut rest = folders.split_off(first);
    let mut before = None;
    let beyond = rest.iter().position(|(inode, name)| {
        let next_to = before.is_none_or(|before| inode.saturating_sub(before) <= NODES);
        before = Some(*inode);
        loaded(name) || !next_to
    });
    folders.extend(rest.split_off(beyond.unwrap_or(rest.len())));
    folders
}

/// Whether an inode of sysfs is never used twice (`fs/kernfs/dir.c`: since Linux 5.5, of 64 bits).
fn inodes_only_rise() -> bool {
    let release = proc::read_line(Path::new("/proc/sys/kernel/osrelease"));
    cfg!(target_pointer_width = "64")
        && release
            .ok()
            .and_then(|release| version(release.as_bytes()))
            .is_some_and(|version| version >= (5, 5))
}

fn version(release: &[u8]) -> Option<(u32, u32)> {
    let mut parts = release.split(|b| !b.is_ascii_digit());
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

fn read_sysfs(folder: &Path, module: &mut Module, errors: &mut Errors) {
    for name in SYSFS {
        let path = folder.join(name);
        if let Some(value) =
            errors.keep_present(name, path.as_os_str().as_encoded_bytes(), proc::read_line(&path))
        {
            module.sysfs.insert(name.to_owned(), value);
        }
    }
}

/// `name size references users state address (taint)`
fn parse(line: &[u8]) -> Option<Module> {
    let mut fields = fields(line);
    let name = Text::from(fields.next()?);
    let size = fields.next().and_then(number);
    let references = fields.next().and_then(number);
    let users = fields.next().unwrap_or_default();
    Some(Module {
        name,
        seen_in: vec!["procfs".to_owned()],
        size,
        references,
        used_by: users
            .split(|b| *b == b',')
            .filter(|u| !u.is_empty() && *u != b"-")
            .map(Text::from)
            .collect(),
        state: fields.next().map(Text::from),
        // Zero is what the kernel says to whoever may not know.
        address: fields
            .next()
            .and_then(|a| hex(a.strip_prefix(b"0x")?))
            .filter(|address| *address != 0),
        taint: fields
            .next()
            .and_then(|t| Some(Text::from(t.strip_prefix(b"(")?.strip_suffix(b")")?))),
        sysfs: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_code_is_next_to_the_kernels_own_folder() {
        let names = |list: &[(u64, &str)], loaded: &[&str]| -> Vec<String> {
            let all = list
                .iter()
                .map(|(inode, name)| (*inode, name.as_bytes().to_vec()))
                .collect();
            let rest = without_built_in(all, |name| loaded.iter().any(|l| l.as_bytes() == name));
            rest.into_iter()
                .map(|(_, name)| String::from_utf8_lossy(&name).into_owned())
                .collect()
        };
        let start = [(1000, "kernel"), (1020, "vt"), (1020 + NODES, "zswap")];
        let and = |more: &[(u64, &'static str)]| [&start[..], more].concat();
        assert!(names(&start, &[]).is_empty());
        // One that hides, whether loaded long after the start, beside others that do not, or before everything.
        assert_eq!(names(&and(&[(1021 + 2 * NODES, "rootkit")]), &[]), ["rootkit"]);
        let among = [(1100 + NODES, "virtio"), (1101 + NODES, "rootkit")];
        assert_eq!(names(&and(&among), &["virtio"]), ["virtio", "rootkit"]);
        let early = [&[(999, "rootkit")][..], &start].concat();
        assert_eq!(names(&early, &[]), ["rootkit"]);
        // Where nothing is known to be built in, everything is looked at.
        assert_eq!(names(&[(1, "vt"), (2, "zswap")], &[]), ["vt", "zswap"]);
    }

    #[test]
    fn versions_of_releases() {
        assert_eq!(version(b"6.1.0-56-cloud-amd64"), Some((6, 1)));
        assert_eq!(version(b"5.4.0-150-generic"), Some((5, 4)));
        assert_eq!(version(b"7.2-rc1"), Some((7, 2)));
        assert_eq!(version(b"garbage"), None);
        assert_eq!(version(b""), None);
    }

    #[test]
    fn a_line_of_proc_modules() {
        let module =
            parse(b"nf_nat 61440 2 nft_chain_nat,xt_MASQUERADE, Live 0xffffffffc0a1b000 (OE)").unwrap();
        assert_eq!((module.size, module.references), (Some(61440), Some(2)));
        assert_eq!(
            module.used_by,
            [Text::from("nft_chain_nat"), Text::from("xt_MASQUERADE")]
        );
        assert_eq!(module.address, Some(0xffff_ffff_c0a1_b000));
        assert_eq!(module.taint, Some(Text::from("OE")));
        let module = parse(b"virtio_blk 28672 1 - Live 0x0000000000000000").unwrap();
        assert_eq!(
            (module.used_by.len(), module.taint, module.address),
            (0, None, None)
        );
    }
}
