//! A guest with a real kernel: the distribution's own cloud kernel in QEMU under TCG, with an initramfs made here. The guest
//! has no network and no disk but one raw file, onto which programs in it write what the tests read.

use crate::programs;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Emulation is slow and machines are busy; a guest that needs longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// A guest before it is booted.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// The kernel, as a folder of `lab/kernels`: `6.1`.
    pub kernel: &'a str,
    /// MiB of memory.
    pub memory: u64,
    /// Processors.
    pub cpus: u32,
    /// Five levels of page tables.
    pub la57: bool,
    /// More of the kernel's command line.
    pub append: &'a str,
    /// MiB of its disk.
    pub disk: u64,
    /// What is on its disk when it starts.
    pub content: Option<&'a Path>,
    /// A network in which 10.0.2.2 is this machine's loopback, and nothing else answers.
    pub network: bool,
}

impl Default for Machine<'_> {
    fn default() -> Self {
        Machine {
            kernel: "6.1",
            memory: 1024,
            cpus: 2,
            la57: false,
            append: "",
            disk: 256,
            content: None,
            network: false,
        }
    }
}

/// The script gives the guest its address and no route, so it reaches its own network alone.
const NETWORK: &[&str] = &[
    "-netdev",
    "user,id=n0,ipv6=off",
    "-device",
    "virtio-net-pci,netdev=n0,romfile=",
];
/// What a script says for that, with the module `virtio_net`.
pub const JOIN_NETWORK: &str = "ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0\n";

/// A running guest; it ends when this is dropped.
pub struct Guest {
    qemu: Child,
    folder: tempfile::TempDir,
    serial: UnixStream,
    qmp: UnixStream,
    began: Instant,
    memory: u64,
    /// Writes down what its console says, until it ends.
    hearing: Option<std::thread::JoinHandle<()>>,
}

/// What a guest left behind.
pub struct Ran {
    /// What its script printed.
    pub console: String,
    /// The content of its disk.
    pub disk: PathBuf,
    _folder: tempfile::TempDir,
}

/// The folders of the kernels that `tests/run` fetched, by version.
pub fn kernels() -> Result<Vec<(String, PathBuf)>> {
    let folder = programs::target().join("lab/kernels");
    let mut found: Vec<(String, PathBuf)> = fs::read_dir(&folder)
        .with_context(|| format!("{}: no kernels; `tests/run` fetches them", folder.display()))?
        .flatten()
        .filter(|e| e.path().join("boot").is_dir())
        .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
        .collect();
    found.sort();
    Ok(found)
}

/// The file of `boot/` whose name starts so, and what follows in its name.
pub fn boot_file(kernel: &str, prefix: &str) -> Result<(PathBuf, String)> {
    let boot = programs::target().join("lab/kernels").join(kernel).join("boot");
    fs::read_dir(&boot)
        .with_context(|| format!("{}: no kernel; `tests/run` fetches it", boot.display()))?
        .flatten()
        .find_map(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            Some((e.path(), name.strip_prefix(prefix)?.to_owned()))
        })
        .with_context(|| format!("no {prefix} in {}", boot.display()))
}

/// Boots the usual guest, runs `script` in it to its end, and powers it off.
pub fn run(script: &str, files: &[(&str, &Path)], modules: &[&str]) -> Result<Ran> {
    Machine::default().boot(script, files, modules)?.ended()
}

impl Machine<'_> {
    /// Boots it and has it run `script` (busybox's sh; `$1` is the disk, what is said to it arrives on standard input), after
    /// which it powers itself off. `files` lie in its root. `modules` are loaded before, with what they depend on.
    pub fn boot(&self, script: &str, files: &[(&str, &Path)], modules: &[&str]) -> Result<Guest> {
        programs::require(&["qemu-system-x86_64", "busybox", "cpio"])?;
        let (image, release) = boot_file(self.kernel, "vmlinuz-")?;
        let kernel = programs::target().join("lab/kernels").join(self.kernel);
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("root");
        lay_root(&root, &kernel, &release, script, files, modules)?;
        let initrd = folder.path().join("initrd");
        pack(&root, &initrd)?;
        let at = |name: &str| folder.path().join(name);
        if let Some(content) = self.content {
            fs::copy(content, at("disk"))?;
        }
        fs::File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(at("disk"))?
            .set_len(self.disk << 20)?;
        // Without cmpxchg16b: QEMU 7.2 now and then leaves another number in the flags, and the guest's kernel ends in a double fault.
        let la57 = if self.la57 { "on" } else { "off" };
        let append = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 nowatchdog {}",
            self.append
        );
        let socket = |name: &str| format!("path={},server=on,wait=off", at(name).display());
        let qemu = Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                "tcg,thread=multi",
                "-machine",
                "q35",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(if self.network { &[][..] } else { &["-nic", "none"] })
            .args([
                "-nodefaults",
                "-no-user-config",
                "-cpu",
                &format!("max,cx16=off,la57={la57}"),
            ])
            .args(["-m", &format!("{}M", self.memory), "-smp", &self.cpus.to_string()])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", &append])
            .args(["-chardev", &format!("socket,id=s0,{}", socket("serial"))])
            .args([
                "-serial",
                "chardev:s0",
                "-chardev",
                &format!("socket,id=q0,{}", socket("qmp")),
                "-mon",
                "chardev=q0,mode=control",
            ])
            .args([
                "-drive",
                &format!(
                    "file={},if=none,id=d0,format=raw,cache=unsafe,aio=threads",
                    at("disk").display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=d0", "-device", "virtio-rng-pci"])
            .args(if self.network { NETWORK } else { &[] })
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .context("qemu-system-x86_64")?;
        let mut qemu = Killed(Some(qemu));
        let serial = connect(&at("serial"), &mut qemu)?;
        let qmp = connect(&at("qmp"), &mut qemu)?;
        let mut guest = Guest {
            qemu: qemu.0.take().context("no guest")?,
            folder,
            serial,
            qmp,
            began: Instant::now(),
            memory: self.memory << 20,
            hearing: None,
        };
        // QEMU's own log of it has characters twice now and then.
        let (mut heard, mut console) = (
            guest.serial.try_clone()?,
            fs::File::create(guest.folder.path().join("console"))?,
        );
        guest.hearing = Some(std::thread::spawn(move || {
            _ = std::io::copy(&mut heard, &mut console)
        }));
        guest.answer("QMP")?;
        guest.order("{\"execute\":\"qmp_capabilities\"}")?;
        Ok(guest)
    }
}

/// Ended when dropped, until it is taken.
struct Killed(Option<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn connect(path: &Path, qemu: &mut Killed) -> Result<UnixStream> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(_)
                if Instant::now() < until
                    && qemu.0.as_mut().is_some_and(|q| matches!(q.try_wait(), Ok(None))) =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error).context("qemu does not answer"),
        }
    }
}

impl Guest {
    /// What its script has printed so far.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until it has printed `text`.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        loop {
            let console = self.console();
            if console.contains(text) {
                return Ok(());
            }
            ensure!(
                self.qemu.try_wait()?.is_none(),
                "the guest ended before it said {text}; it said:\n{console}"
            );
            ensure!(
                self.began.elapsed() < PATIENCE,
                "the guest never said {text}; it said:\n{console}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Says a line to its script.
    pub fn say(&mut self, line: &str) -> Result<()> {
        Ok(self.serial.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Reads answers until one has the key `key`.
    fn answer(&mut self, key: &str) -> Result<()> {
        self.qmp.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            self.qmp.read_exact(&mut byte).context("QMP")?;
            if byte != [b'\n'] {
                line.extend(byte);
                continue;
            }
            let answer: serde_json::Value = serde_json::from_slice(&line)?;
            ensure!(answer.get("error").is_none(), "QMP: {answer}");
            if answer.get(key).is_some() {
                return Ok(());
            }
            line.clear();
        }
    }

    fn order(&mut self, order: &str) -> Result<()> {
        self.qmp.write_all(format!("{order}\n").as_bytes())?;
        self.answer("return")
    }

    /// The truth: all of its physical memory from address 0, while it stands still.
    pub fn truth(&mut self, to: &Path) -> Result<()> {
        self.order("{\"execute\":\"stop\"}")?;
        let file = serde_json::Value::from(to.to_str().context("a path that is not UTF-8")?);
        let size = self.memory;
        self.order(&format!(
            "{{\"execute\":\"pmemsave\",\"arguments\":{{\"val\":0,\"size\":{size},\"filename\":{file}}}}}"
        ))?;
        self.order("{\"execute\":\"cont\"}")
    }

    /// Takes its power, as a plug that is pulled.
    pub fn power_off(mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// Waits until it has powered itself off.
    pub fn ended(mut self) -> Result<Ran> {
        let status = loop {
            if let Some(status) = self.qemu.try_wait()? {
                break status;
            }
            ensure!(
                self.began.elapsed() < PATIENCE,
                "the guest hangs; it said:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(50));
        };
        if let Some(hearing) = self.hearing.take() {
            let _ = hearing.join();
        }
        let console = self.console();
        ensure!(
            status.success() && console.contains("GUEST ENDED"),
            "the guest failed ({status}); it said:\n{console}"
        );
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir()?);
        Ok(Ran {
            console,
            disk: folder.path().join("disk"),
            _folder: folder,
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn lay_root(
    root: &Path,
    kernel: &Path,
    release: &str,
    script: &str,
    files: &[(&str, &Path)],
    modules: &[&str],
) -> Result<()> {
    for name in [
        "bin",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "etc",
        "mnt",
        "lib/modules",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|p| Path::new(p).is_file())
        .context("no busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let applets = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8(applets.stdout)?
        .lines()
        .filter(|a| *a != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    // What the kernel has built in, as a distribution's own root file system says.
    let folder = root.join("lib/modules").join(release);
    fs::create_dir_all(&folder)?;
    let builtin = format!("lib/modules/{release}/modules.builtin");
    fs::copy(kernel.join(&builtin), root.join(&builtin))?;
    let mut order = Vec::new();
    for module in ["virtio_pci", "virtio_blk"].iter().chain(modules) {
        let listed = Command::new("modprobe")
            .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
            .arg("-d")
            .arg(kernel)
            .args(["-S", release, "--show-depends", module])
            .output()
            .context("modprobe")?;
        // Newer kernels have the disk's built in.
        let built_in = String::from_utf8_lossy(&listed.stdout).contains("builtin ");
        ensure!(
            listed.status.success() || built_in,
            "{module}: {}",
            String::from_utf8_lossy(&listed.stderr)
        );
        for line in String::from_utf8(listed.stdout)?.lines() {
            // The path may be followed by parameters of the distribution's choice.
            if let Some(path) = line
                .strip_prefix("insmod ")
                .and_then(|rest| rest.split(' ').next())
            {
                let path = Path::new(path);
                let name = path
                    .file_name()
                    .context("no name")?
                    .to_string_lossy()
                    .into_owned();
                if !order.contains(&name) {
                    fs::copy(path, root.join("lib/modules").join(&name))?;
                    order.push(name);
                }
            }
        }
    }
    for (name, source) in files {
        fs::copy(source, root.join(name)).with_context(|| source.display().to_string())?;
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755))?;
    }
    fs::write(root.join("script"), script)?;
    let insmod: String = order
        .iter()
        .map(|m| format!("insmod /lib/modules/{m}\n"))
        .collect();
    let init = format!(
        "#!/bin/sh\nexport PATH=/bin\nmount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmp /run\nmount -t securityfs sec /sys/kernel/security 2>/dev/null\n{insmod}stty -echo\nsh /script /dev/vda\necho GUEST ENDED\nsync\npoweroff -f\n"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn pack(root: &Path, initrd: &Path) -> Result<()> {
    let pipeline = "find . -print0 | cpio --quiet --null -H newc -o | gzip -1";
    let out = fs::File::create(initrd)?;
    let status = Command::new("sh")
        .args(["-c", pipeline])
        .current_dir(root)
        .stdout(out)
        .status()?;
    ensure!(status.success(), "the initramfs could not be packed");
    Ok(())
}
