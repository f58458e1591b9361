//! A host that is this machine in namespaces of its own: of mounts, processes, System V objects and names. They live as long as their first process, and
//! with it ends all that runs in them, as when a host is switched off. The network is the machine's, being the way to the lab; so are files and, for root, users.

use anyhow::{Context as _, Result, ensure};
use std::{
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The first process calls the host by its name, hides the machine's memory, which is not the host's, says so, and takes in what is left behind, until
/// whoever started it is gone.
const FIRST: &str = "hostname \"$1\" && { [ ! -e /proc/kcore ] || mount --bind /dev/null /proc/kcore; } && echo up && exec 3<&0 && { cat <&3 & wait $!; }";

/// The namespaces of one host.
#[derive(Debug)]
pub struct Namespaces {
    first: Child,
    is_root: bool,
}

impl Namespaces {
    /// Makes them for a host of this name.
    pub fn start(name: &str) -> Result<Self> {
        let is_root = std::fs::metadata("/proc/self")?.uid() == 0;
        let mut first = Command::new("unshare");
        if !is_root {
            first.arg("--map-root-user");
        }
        first.args([
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        let mut first = first
            .args(["sh", "-c", FIRST, "sh", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("unshare")?;
        let mut said = [0; 3];
        let up = first.stdout.take().context("no output")?.read_exact(&mut said);
        let host = Namespaces { first, is_root };
        ensure!(up.is_ok() && said == *b"up\n", "{name}: no namespaces of its own");
        Ok(host)
    }

    /// What runs in them, ready for a program and its arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        let of = |kind: &str, name: &str| format!("--{kind}=/proc/{}/ns/{name}", self.first.id());
        if !self.is_root {
            command.args([&of("user", "user"), "--preserve-credentials"]);
        }
        // Of processes, those that its first process has made are in the new one; itself it is not.
        command.args([
            of("mount", "mnt"),
            of("uts", "uts"),
            of("ipc", "ipc"),
            of("pid", "pid_for_children"),
        ]);
        command
    }
}

impl Drop for Namespaces {
    /// Returns when everything in them has ended, which is when their first process is gone: it goes with its input.
    fn drop(&mut self) {
        drop(self.first.stdin.take());
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.first.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}
