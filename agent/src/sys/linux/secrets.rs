//! Mappings of `memfd_secret`: the kernel takes their pages out of its own map. They read as zeros from `/proc/kcore`, and a module that
//! reads all of physical memory crashes at them.

use super::proc::{self, ProcDir};
use crate::collect::{Collection, Unsupported, is_gone};
use jiff::Timestamp;
use stillframe_evidence::records::{Data, memory::SecretMapping};

/// Every process but the agent itself, whose own is in the outcome of the memory step.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let agent = std::os::unix::process::parent_id();
    let pids = match ProcDir::open(&c.path("proc")).and_then(|folder| folder.numbers()) {
        Ok(pids) => pids,
        Err(error) => {
            c.unread("processes", "/proc", &error);
            return Ok(());
        }
    };
    for pid in pids.into_iter().filter(|pid| *pid != agent) {
        let name = format!("/proc/{pid}");
        if !c.item(u64::from(pid), &name) {
            continue;
        }
        // Waits for the lock of the address space, which a process stuck in the kernel may hold for ever.
        if c.touching("maps", None).is_err() {
            continue;
        }
        let read_at = Timestamp::now();
        match proc::read(&c.path(format!("proc/{pid}/maps"))) {
            Ok(maps) => {
                for (start, end) in proc::lines(&maps).filter_map(secret) {
                    let data = Data::SecretMapping(Box::new(SecretMapping { pid, start, end }));
                    c.record(format!("{name}/maps"), read_at, data, Vec::new());
                }
            }
            Err(error) if is_gone(error.raw_os_error()) => (),
            Err(error) => c.unread("maps", format!("{name}/maps"), &error),
        }
        c.done();
    }
    Ok(())
}

/// First address and the one behind the last, of a line of maps that is such a mapping. The kernel calls its file so, and no file
/// of a disk can be called both that and deleted without a folder before it.
fn secret(line: &[u8]) -> Option<(u64, u64)> {
    let path = line.strip_suffix(b" /secretmem (deleted)")?;
    let mut ends = path
        .split(|b| *b == b' ')
        .next()?
        .split(|b| *b == b'-')
        .map(proc::hex);
    Some((ends.next()??, ends.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernel_s_own_name_counts() {
        let line =
            b"7f12a0000000-7f12a0020000 rw-s 00000000 00:0f 1024                       /secretmem (deleted)";
        assert_eq!(secret(line), Some((0x7f12_a000_0000, 0x7f12_a002_0000)));
        assert_eq!(
            secret(b"7f12a0000000-7f12a0020000 rw-s 00000000 00:0f 1024 /tmp/secretmem x"),
            None
        );
    }
}
