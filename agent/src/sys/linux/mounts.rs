//! Mounts, once for every mount namespace that holds a process.

use super::{
    look::Look,
    proc::{self, fields, lines, number, unescape},
};
use crate::collect::{Collection, Unsupported};
use jiff::Timestamp;
use std::io;
use stillframe_evidence::{
    records::{Data, mounts::Mount},
    text::Text,
    verdict::count,
};

/// Every namespace in the order of its inode.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    Look::ensure(c);
    let look = std::mem::take(&mut c.memory.look);
    look.confess_namespaces(c);
    c.memory.look = look;
    let mut namespaces = c.memory.look.mntns.clone();
    if namespaces.is_empty() {
        // Not even the agent's own link could be read: its own view is all there is.
        namespaces.insert(0, vec![std::process::id()]);
    }
    let total = namespaces.len();
    for (inode, pids) in namespaces {
        let name = format!("mnt:[{inode}]");
        if !c.item(inode, &name) {
            continue;
        }
        if c.touching("mountinfo", None).is_err() {
            c.problem(
                "mountinfo",
                &name,
                None,
                "not read: a worker that read here was lost",
            );
            c.done();
            continue;
        }
        let read_at = Timestamp::now();
        let mut last = None;
        let read = pids.iter().find_map(|pid| {
            let path = c.path(format!("proc/{pid}/mountinfo"));
            match proc::read(&path) {
                Ok(bytes) => Some((*pid, path, bytes)),
                Err(error) => {
                    last = Some((path, error));
                    None
                }
            }
        });
        let Some((pid, path, bytes)) = read else {
            let (path, error) = last.unwrap_or_else(|| (c.path("proc"), io::ErrorKind::NotFound.into()));
            c.unread("mountinfo", path.as_os_str().as_encoded_bytes(), &error);
            c.done();
            continue;
        };
        for line in lines(&bytes) {
            match parse(line) {
                Some(mount) => {
                    let mount = Mount {
                        mntns: (inode != 0).then_some(inode),
                        seen_by: pid,
                        ..mount
                    };
                    c.record(
                        path.as_os_str().as_encoded_bytes(),
                        read_at,
                        Data::Mount(Box::new(mount)),
                        Vec::new(),
                    );
                }
                None => c.problem(
                    "mountinfo",
                    path.as_os_str().as_encoded_bytes(),
                    None,
                    "a line of unknown form",
                ),
            }
        }
        c.done();
    }
    c.note(count(total, "mount namespace"));
    Ok(())
}

/// proc_pid_mountinfo(5): optional fields end at a lone `-`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = fields(line);
    let mut mount = Mount {
        id: number(fields.next()?)?,
        parent: number(fields.next()?)?,
        device: Text::from(fields.next()?),
        root: unescape(fields.next()?),
        target: unescape(fields.next()?),
        options: Text::from(fields.next()?),
        ..Mount::default()
    };
    for field in fields.by_ref() {
        if field == b"-" {
            break;
        }
        mount.propagation.push(Text::from(field));
    }
    mount.fstype = unescape(fields.next()?);
    mount.source_device = unescape(fields.next().unwrap_or_default());
    mount.super_options = unescape(fields.next().unwrap_or_default());
    Some(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_optional_fields() {
        let mount = parse(
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/\xff rw,errors=continue",
        )
        .unwrap();
        assert_eq!(mount.target, Text::from("/mnt 2"));
        assert_eq!(mount.propagation.len(), 2);
        assert_eq!(
            (mount.fstype, mount.source_device),
            (Text::from("ext3"), Text::from(b"/dev/\xff"))
        );
        assert!(parse(b"36 35 98:0 / /x rw - ").is_none());
        assert!(parse(b"36 35 98:0 / /x rw - tmpfs").is_some());
    }
}
