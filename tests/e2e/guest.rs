//! The agent in a guest with a real kernel that has modules: what this machine's kernel may not have, and the promise that
//! nothing is executed on the host.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{fs::File, path::Path, process::Command, sync::OnceLock};
use stillframe_tests::{guest, programs, store};

/// `kernel.modprobe` points at a program that leaves a mark. The control, before and after, makes the kernel ask for a module;
/// the capture in between must not.
const SCRIPT: &str = r#"
printf '#!/bin/sh\necho "$@" >> /tmp/mark\n' > /tmp/trap && chmod +x /tmp/trap
echo /tmp/trap > /proc/sys/kernel/modprobe
mount -t nosuchfs none /mnt 2>/dev/null
echo "CONTROL BEFORE $(wc -l < /tmp/mark)"
rm -f /tmp/mark

# A file of the host says that unix_diag is built in. It is not, and whoever believed it would spring the trap.
echo kernel/net/unix/unix_diag.ko >> "/lib/modules/$(uname -r)/modules.builtin"
cp /bin/busybox /tmp/vanishing && (exec -a 'busybox
lines' /tmp/vanishing sleep 1000) &
unshare -n sleep 1001 &
unshare -n sh -c 'nc -l -p 4321 127.0.0.1 || nc -l -p 4321; sleep 1002' &
sleep 2
rm /tmp/vanishing
ip link set lo up
echo "PROC MODULES BEGIN"
cat /proc/modules
echo "PROC MODULES END"
/stillframe-agent capture --case guest --store - > "$1" 2> /tmp/said
echo "AGENT ENDED $?"
cat /tmp/said
if [ -e /tmp/mark ]; then echo "MARKED BY: $(cat /tmp/mark)"; else echo "NO MARK"; fi
mount -t nosuchfs none /mnt 2>/dev/null
echo "CONTROL AFTER $(wc -l < /tmp/mark)"
"#;

struct Guest {
    console: String,
    base: tempfile::TempDir,
}

/// Boots a guest that captures itself onto its disk, and receives that.
fn captured(script: &str) -> Result<Guest> {
    let agent = programs::static_agent()?;
    let ran = guest::run(script, &[("stillframe-agent", &agent)], &["loop", "dummy"])?;
    println!("{}", ran.console);
    let base = tempfile::tempdir()?;
    let received = Command::new(programs::controller()?)
        .args(["receive", "--store"])
        .arg(base.path())
        .stdin(File::open(&ran.disk)?)
        .output()?;
    ensure!(received.status.code() == Some(0), "{received:?}\n{}", ran.console);
    Ok(Guest {
        console: ran.console,
        base,
    })
}

/// One boot for most of the tests of this file.
fn guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| captured(SCRIPT).unwrap_or_else(|error| panic!("the guest: {error:?}")))
}

fn base() -> &'static Path {
    guest().base.path()
}

/// The program that is released: no loader, no library of the host, and small. An ELF file without PT_INTERP asks for nobody.
#[test]
fn the_released_agent_is_static_and_small() {
    let agent = File::open(programs::static_agent().unwrap()).unwrap();
    let size = agent.metadata().unwrap().len();
    assert!(size <= 8 << 20, "{size} bytes");
    let mut head = vec![0; 64 << 10];
    let n = std::os::unix::fs::FileExt::read_at(&agent, &mut head, 0).unwrap();
    let word = |at: usize, size: usize| {
        head[at..at + size]
            .iter()
            .rev()
            .fold(0usize, |n, b| n << 8 | usize::from(*b))
    };
    assert_eq!(&head[..6], b"\x7fELF\x02\x01");
    let (table, count) = (word(32, 8), word(56, 2));
    assert!(count > 0 && table + count * 56 <= n);
    const PT_INTERP: usize = 3;
    assert!((0..count).all(|i| word(table + i * 56, 4) != PT_INTERP));
}

#[test]
fn nothing_is_executed_on_the_host() {
    let console = &guest().console;
    // The trap works: without that, no mark would mean nothing.
    for control in ["CONTROL BEFORE ", "CONTROL AFTER "] {
        let times = console
            .split(control)
            .nth(1)
            .and_then(|rest| rest.lines().next())
            .unwrap();
        assert_ne!(times.trim(), "0", "{console}");
    }
    assert!(console.contains("NO MARK"), "{console}");
    assert!(console.contains("AGENT ENDED 0"), "{console}");
    // unix_diag is a module of this kernel and not loaded: it was not asked, and that is said.
    let notes = store::outcome(base(), "sockets").unwrap()["notes"].to_string();
    assert!(notes.contains("sock_diag not asked"), "{notes}");
}

/// With nothing in `/proc/modules` every module is in sysfs alone, and code that is built in is still none.
#[test]
fn modules_that_procfs_does_not_show() -> Result<()> {
    let guest = captured(
        r#"
echo "LOADED $(cut -d' ' -f1 /proc/modules | sort | tr '\n' ' ')"
: > /tmp/nothing
mount --bind /tmp/nothing /proc/modules
/stillframe-agent capture --case guest --store - > "$1" 2> /tmp/said
"#,
    )?;
    let loaded = guest
        .console
        .lines()
        .find_map(|line| line.strip_prefix("LOADED "));
    let loaded: Vec<Value> = loaded
        .context("the modules were not listed")?
        .split_whitespace()
        .map(Value::from)
        .collect();
    assert!(
        loaded.contains(&"loop".into()) && loaded.contains(&"dummy".into()),
        "{loaded:?}"
    );
    let records = store::records(guest.base.path(), "modules")?;
    for record in &records {
        assert_eq!(record["seen_in"], serde_json::json!(["sysfs"]), "{record}");
    }
    let mut found: Vec<Value> = records.iter().map(|record| record["name"].clone()).collect();
    found.sort_by_key(Value::to_string);
    assert_eq!(found, loaded);
    let notes = store::outcome(guest.base.path(), "modules")?["notes"].to_string();
    assert!(
        notes.contains(&format!("{} in only one of procfs and sysfs", loaded.len())),
        "{notes}"
    );
    Ok(())
}

#[test]
fn the_modules_are_those_of_the_kernel() {
    let console = &guest().console;
    let listed = console
        .split("PROC MODULES BEGIN\n")
        .nth(1)
        .unwrap()
        .split("PROC MODULES END")
        .next()
        .unwrap();
    let mut expected: Vec<(String, u64)> = listed
        .lines()
        .map(|line| {
            let mut fields = line.split(' ');
            (
                fields.next().unwrap().to_owned(),
                fields.next().unwrap().parse().unwrap(),
            )
        })
        .collect();
    expected.sort();
    let mut found: Vec<(String, u64)> = store::records(base(), "modules")
        .unwrap()
        .iter()
        .map(|m| {
            (
                m["name"].as_str().unwrap().to_owned(),
                m["size"].as_u64().unwrap(),
            )
        })
        .collect();
    found.sort();
    assert!(expected.iter().any(|(name, _)| name == "dummy"), "{console}");
    assert_eq!(found, expected);
    for module in store::records(base(), "modules").unwrap() {
        assert_eq!(
            module["seen_in"],
            serde_json::json!(["procfs", "sysfs"]),
            "{module}"
        );
        assert_eq!(module["sysfs"]["initstate"], "live", "{module}");
    }
}

#[test]
fn every_kind_is_complete() {
    for kind in [
        "host",
        "processes",
        "sockets",
        "routes",
        "modules",
        "mounts",
        "process-details",
        "sessions",
    ] {
        let outcome = store::outcome(base(), kind).unwrap();
        assert_eq!(outcome["status"], "complete", "{outcome}");
    }
    let host = &store::records(base(), "host").unwrap()[0];
    assert_eq!(host["modprobe"], "/tmp/trap");
    assert_eq!(host["agent_contained"], false);
    assert_eq!(host["virtualization"]["hypervisor_bit"], true);
    assert!(
        host["virtualization"]["dmi"]["sys_vendor"]
            .as_str()
            .is_some_and(|v| v.contains("QEMU")),
        "{host}"
    );
}

#[test]
fn a_deleted_program_under_a_false_name_is_seen_for_what_it_is() {
    let processes = store::records(base(), "processes").unwrap();
    let is_it = |p: &&Value| p["cmdline"][0] == "busybox\nlines";
    let process = processes.iter().find(is_it).expect("a process of that name");
    assert_eq!(
        (&process["exe"], &process["exe_deleted"]),
        (&"/tmp/vanishing".into(), &true.into())
    );
    let details = store::records(base(), "process-details").unwrap();
    let image = &details.iter().find(|d| d["pid"] == process["pid"]).unwrap()["image"];
    let busybox = std::fs::read("/bin/busybox")
        .or_else(|_| std::fs::read("/usr/bin/busybox"))
        .unwrap();
    assert_eq!(
        image["sha256"],
        stillframe_evidence::root::Hash::of(&busybox).to_string()
    );
    assert_eq!(image["links"], 0);
}

#[test]
fn sockets_of_another_network_namespace_are_there() {
    let sockets = store::records(base(), "sockets").unwrap();
    let listening = sockets
        .iter()
        .find(|s| s["local"]["port"] == 4321)
        .expect("a socket at that port");
    let processes = store::records(base(), "processes").unwrap();
    let agents = processes.iter().find(|p| p["pid"] == 1).unwrap()["namespaces"]["net"].clone();
    assert_ne!(listening["netns"], agents);
    assert_eq!(listening["ownership"], "owned", "{listening}");
    assert!(
        store::outcome(base(), "sockets").unwrap()["notes"]
            .to_string()
            .contains("3 network namespaces")
    );
    let links = store::records(base(), "routes").unwrap();
    let loopbacks = links
        .iter()
        .filter(|l| l["record"] == "link" && l["name"] == "lo")
        .count();
    assert_eq!(loopbacks, 3, "one lo in each namespace");
}
