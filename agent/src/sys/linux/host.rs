//! The host itself: identity, kernel, memory, taint, virtualisation, and whether the agent sees it or a container.

use super::{
    clock::{booted, clock},
    proc::{self, bracketed, fields, lines, number, unescape},
};
use crate::collect::{Collection, Errors, Unsupported};
use jiff::Timestamp;
use procfs_core::{FromBufRead as _, Meminfo};
use std::{
    collections::BTreeMap,
    io,
    path::Path,
    time::{Duration, Instant},
};
use stillframe_evidence::{
    records::{
        Data,
        host::{Host, Identity, Instance, Memory, Namespace, Swap, Taint},
    },
    text::Text,
};

const DMI: [&str; 8] = [
    "sys_vendor",
    "product_name",
    "product_version",
    "product_uuid",
    "board_vendor",
    "board_asset_tag",
    "bios_vendor",
    "bios_version",
];

/// One record.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let read_at = Timestamp::now();
    if !c.item(0, "host") {
        return Ok(());
    }
    let mut errors = Errors::default();
    let host = read(c, &mut errors);
    if host.agent_contained == Some(true) {
        c.note("the agent runs inside a container's namespaces: this is not the whole host".to_owned());
    }
    c.record(
        c.path("proc").as_os_str().as_encoded_bytes(),
        read_at,
        Data::Host(Box::new(host)),
        errors.list,
    );
    Ok(())
}

/// What tells this host from another. It reads procfs and sysfs, one small file, and asks the metadata service where the
/// firmware says that there is one; neither the file nor the service is waited for longer than a second.
pub fn identity(root: &Path) -> Identity {
    let line = |path: &str| proc::read_line(&root.join(path)).ok();
    let mut identity = local_identity(root);
    let dmi = |name: &str| line(&format!("sys/class/dmi/id/{name}"));
    let is_ec2 = dmi("sys_vendor").is_some_and(|v| v.as_bytes() == b"Amazon EC2")
        // Xen instances: their vendor is Xen, and only the version says whose.
        || dmi("bios_version").is_some_and(|v| v.as_bytes().ends_with(b"amazon"));
    // Xen has no tag: the instance then is whom the document names.
    let tag = dmi("board_asset_tag").filter(|tag| tag.as_bytes().starts_with(b"i-"));
    let firmware_id = is_ec2.then(|| tag.unwrap_or_default());
    let path = root.join("etc/machine-id");
    let (tell, told) = std::sync::mpsc::channel();
    // A thread that hangs is left behind; it keeps nothing that anybody waits for.
    let asked = std::thread::Builder::new().spawn(move || {
        let machine_id = proc::read_regular(&path, 4096)
            .ok()
            .map(|b| Text::from(b.trim_ascii()));
        let _ = tell.send((machine_id, None));
        let _ = tell.send((None, crate::imds::instance(firmware_id)));
    });
    let until = Instant::now() + Duration::from_secs(1);
    while asked.is_ok()
        && let Ok((machine_id, instance)) = told.recv_timeout(until.saturating_duration_since(Instant::now()))
    {
        identity.machine_id = identity.machine_id.or(machine_id);
        identity.instance = identity.instance.or(instance);
    }
    identity
}

fn local_identity(root: &Path) -> Identity {
    let line = |path: &str| proc::read_line(&root.join(path)).ok();
    Identity {
        hostname: line("proc/sys/kernel/hostname").unwrap_or_default(),
        os: "linux".to_owned(),
        boot_id: line("proc/sys/kernel/random/boot_id"),
        machine_id: None,
        instance: None::<Instance>,
    }
}

fn read(c: &mut Collection, errors: &mut Errors) -> Host {
    let root = c.root().to_owned();
    let mut keep = |field: &str, path: &str| {
        let path = root.join(path);
        errors.keep_present(field, path.as_os_str().as_encoded_bytes(), proc::read(&path))
    };
    let trimmed = |bytes: Vec<u8>| Text::from(bytes.trim_ascii_end());
    let mut host = Host {
        // The instance identity stands in the first event; it is not asked for twice.
        identity: local_identity(c.root()),
        clock: clock(None),
        kernel: keep("kernel", "proc/version").map(trimmed),
        architecture: Some(Text::from(std::env::consts::ARCH)),
        command_line: keep("command_line", "proc/cmdline").map(trimmed),
        booted: booted(),
        lockdown: keep("lockdown", "sys/kernel/security/lockdown").and_then(|b| selected(&b)),
        modprobe: keep("modprobe", "proc/sys/kernel/modprobe").map(trimmed),
        taint: keep("taint", "proc/sys/kernel/tainted")
            .and_then(|b| number(b.trim_ascii()))
            .map(taint),
        swaps: keep("swaps", "proc/swaps")
            .map(|b| lines(&b).skip(1).filter_map(swap).collect())
            .unwrap_or_default(),
        memory: keep("memory", "proc/meminfo").and_then(|b| memory(&b)),
        ..Host::default()
    };
    if let Some(uptime) = keep("uptime", "proc/uptime") {
        host.uptime_s = fields(&uptime).next().and_then(number);
    }
    if let Some(load) = keep("load", "proc/loadavg") {
        let numbers: Vec<f64> = fields(&load).take(3).filter_map(number).collect();
        host.load = <[f64; 3]>::try_from(numbers).ok();
    }
    if let Some(cpuinfo) = keep("processors", "proc/cpuinfo") {
        let value = |name: &[u8]| {
            lines(&cpuinfo).find_map(|l| {
                Some(
                    l.strip_prefix(name)?
                        .trim_ascii_start()
                        .strip_prefix(b":")?
                        .trim_ascii(),
                )
            })
        };
        host.processors = Some(lines(&cpuinfo).filter(|l| l.starts_with(b"processor")).count() as u64);
        host.processor = value(b"model name").map(Text::from);
        host.virtualization.hypervisor_bit =
            value(b"flags").map(|flags| fields(flags).any(|f| f == b"hypervisor"));
    }
    host.virtualization.hypervisor_type = keep("hypervisor", "sys/hypervisor/type").map(trimmed);
    host.virtualization.dmi = dmi(c.root(), errors);
    if c.touching("machine_id", None).is_ok() {
        let path = c.path("etc/machine-id");
        let id = errors.keep_present(
            "machine_id",
            path.as_os_str().as_encoded_bytes(),
            proc::read_regular(&path, 4096),
        );
        host.identity.machine_id = id.map(|b| Text::from(b.trim_ascii()));
    } else {
        errors.avoided("machine_id", "/etc/machine-id");
    }
    if c.touching("distribution", None).is_ok() {
        let release = |path: &str| proc::read_regular(&c.path(path), 64 << 10);
        let os_release = release("etc/os-release").or_else(|_| release("usr/lib/os-release"));
        if let Some(bytes) = errors.keep_present("distribution", "/etc/os-release", os_release) {
            host.distribution = lines(&bytes).filter_map(assignment).collect();
        }
    } else {
        errors.avoided("distribution", "/etc/os-release");
    }
    if c.touching("timezone", None).is_ok() {
        host.timezone = std::fs::read_link(c.path("etc/localtime"))
            .ok()
            .map(|t| Text::from(t.as_os_str().as_encoded_bytes()));
    } else {
        errors.avoided("timezone", "/etc/localtime");
    }
    host.agent_namespaces = namespaces();
    host.agent_contained = contained(&host.agent_namespaces);
    host
}

fn dmi(root: &Path, errors: &mut Errors) -> BTreeMap<String, Text> {
    let read = |name: &&str| {
        let path = root.join("sys/class/dmi/id").join(name);
        let value =
            errors.keep_present("dmi", path.as_os_str().as_encoded_bytes(), proc::read_line(&path))?;
        Some(((*name).to_owned(), value))
    };
    DMI.iter()
        .filter_map(read)
        .collect::<Vec<_>>()
        .into_iter()
        .collect()
}

fn memory(meminfo: &[u8]) -> Option<Memory> {
    let info = Meminfo::from_buf_read(meminfo).ok()?;
    Some(Memory {
        total: info.mem_total,
        available: info.mem_available,
        swap_total: info.swap_total,
        swap_free: info.swap_free,
    })
}

/// `Filename Type Size Used Priority`, sizes in KiB.
fn swap(line: &[u8]) -> Option<Swap> {
    let mut fields = fields(line);
    Some(Swap {
        path: unescape(fields.next()?),
        kind: Text::from(fields.next()?),
        size: number::<u64>(fields.next()?)?.checked_mul(1024)?,
        used: number::<u64>(fields.next()?)?.checked_mul(1024)?,
        priority: number(fields.next()?)?,
    })
}

/// The choice in `none [integrity] confidentiality`.
fn selected(line: &[u8]) -> Option<Text> {
    fields(line.trim_ascii()).find_map(|f| Some(Text::from(f.strip_prefix(b"[")?.strip_suffix(b"]")?)))
}

/// `KEY="value"` of os-release(5).
fn assignment(line: &[u8]) -> Option<(String, Text)> {
    let equals = line
        .iter()
        .position(|b| *b == b'=')
        .filter(|_| !line.starts_with(b"#"))?;
    let value = line.get(equals + 1..)?;
    let unquoted = [b"\"", b"'"]
        .iter()
        .find_map(|q| value.strip_prefix(*q)?.strip_suffix(*q));
    Some((
        stillframe_evidence::text::printable(line.get(..equals)?),
        Text::from(unquoted.unwrap_or(value)),
    ))
}

/// Documentation/admin-guide/tainted-kernels.rst
const TAINTS: [&str; 20] = [
    "proprietary module was loaded",
    "module was force loaded",
    "kernel running on an out of specification system",
    "module was force unloaded",
    "processor reported a machine check exception",
    "bad page referenced",
    "taint requested by userspace",
    "kernel died recently",
    "ACPI table overridden by user",
    "kernel issued warning",
    "staging driver was loaded",
    "workaround for bug in platform firmware applied",
    "externally-built module was loaded",
    "unsigned module was loaded",
    "soft lockup occurred",
    "kernel has been live patched",
    "auxiliary taint",
    "kernel was built with the struct randomization plugin",
    "an in-kernel test has been run",
    "userspace used a mutating debug operation in fwctl",
];

fn taint(bits: u64) -> Taint {
    let reasons = TAINTS
        .iter()
        .enumerate()
        .filter(|(bit, _)| bits >> bit & 1 == 1)
        .map(|(_, why)| (*why).to_owned());
    Taint {
        bits,
        reasons: reasons.collect(),
    }
}

/// Inodes of the namespaces that the kernel booted with (include/linux/proc_ns.h; `net` and `mnt` have one since 6.18).
const INITIAL: [(&str, u64, bool); 8] = [
    ("ipc", 0xEFFF_FFFF, true),
    ("uts", 0xEFFF_FFFE, true),
    ("user", 0xEFFF_FFFD, true),
    ("pid", 0xEFFF_FFFC, true),
    ("cgroup", 0xEFFF_FFFB, true),
    ("time", 0xEFFF_FFFA, true),
    ("net", 0xEFFF_FFF9, false),
    ("mnt", 0xEFFF_FFF8, false),
];

fn namespaces() -> BTreeMap<String, Namespace> {
    let read = |(kind, fixed, always): &(&str, u64, bool)| {
        let link = std::fs::read_link(format!("/proc/self/ns/{kind}")).ok()?;
        let inode = bracketed(link.as_os_str().as_encoded_bytes(), kind)?;
        let initial = if inode == *fixed {
            Some(true)
        } else {
            always.then_some(false)
        };
        Some(((*kind).to_owned(), Namespace { inode, initial }))
    };
    INITIAL.iter().filter_map(read).collect()
}

/// A container has process ids of its own, or at least a mount namespace other than that of process 1.
fn contained(namespaces: &BTreeMap<String, Namespace>) -> Option<bool> {
    if namespaces.get("pid")?.initial == Some(false) {
        return Some(true);
    }
    let inode = |path: &str| -> io::Result<Option<u64>> {
        Ok(bracketed(
            std::fs::read_link(path)?.as_os_str().as_encoded_bytes(),
            "mnt",
        ))
    };
    Some(inode("/proc/1/ns/mnt").ok()? != inode("/proc/self/ns/mnt").ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files() {
        assert_eq!(
            selected(b"none [integrity] confidentiality\n"),
            Some(Text::from("integrity"))
        );
        assert_eq!(
            assignment(b"PRETTY_NAME=\"Debian \xff\""),
            Some(("PRETTY_NAME".into(), Text::from(b"Debian \xff")))
        );
        assert_eq!(assignment(b"# no=comment"), None);
        let swap = swap(b"/swap\\040file file 1048572 256 -2").unwrap();
        assert_eq!(
            (swap.path, swap.size, swap.used),
            (Text::from("/swap file"), 1_048_572 * 1024, 256 * 1024)
        );
        assert_eq!(
            taint(0x3001).reasons,
            [
                "proprietary module was loaded",
                "externally-built module was loaded",
                "unsigned module was loaded"
            ]
        );
    }
}
