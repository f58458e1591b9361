//! A guest with a real kernel: the distribution's own cloud kernel in QEMU under TCG, with an initramfs made here. The guest
//! has no network and no disk but one raw file, onto which programs in it write what the tests read.

use crate::programs;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Emulation is slow and machines are busy; a guest that needs longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// What a guest left behind.
pub struct Ran {
    /// What its script printed.
    pub console: String,
    /// The content of its disk.
    pub disk: PathBuf,
    _folder: tempfile::TempDir,
}

/// Boots a guest, runs `script` in it (busybox's sh; `$1` is the disk), and powers it off. `files` lie in its root.
/// `modules` are loaded before, with what they depend on.
pub fn run(script: &str, files: &[(&str, &Path)], modules: &[&str]) -> Result<Ran> {
    programs::require(&["qemu-system-x86_64", "busybox", "cpio"])?;
    let kernel = programs::target().join("lab/kernel");
    let boot = kernel.join("boot");
    let image = fs::read_dir(&boot)
        .with_context(|| format!("{}: no kernel; `tests/run` fetches it", boot.display()))?
        .flatten()
        .find(|e| e.file_name().to_string_lossy().starts_with("vmlinuz-"))
        .context("no vmlinuz")?;
    let release = image
        .file_name()
        .to_string_lossy()
        .trim_start_matches("vmlinuz-")
        .to_owned();

    let folder = tempfile::tempdir()?;
    let root = folder.path().join("root");
    let order = lay_root(&root, &kernel, &release, script, files, modules)?;
    ensure!(!order.is_empty(), "no module for the disk");
    let initrd = folder.path().join("initrd");
    pack(&root, &initrd)?;
    let disk = folder.path().join("disk");
    fs::File::create(&disk)?.set_len(256 << 20)?;
    let console = folder.path().join("console");

    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,la57=off",
            "-machine",
            "q35",
            "-m",
            "1024M",
            "-smp",
            "2",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-nic",
            "none",
        ])
        .arg("-kernel")
        .arg(image.path())
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1 nowatchdog"])
        .args(["-serial", &format!("file:{}", console.display())])
        .args([
            "-drive",
            &format!(
                "file={},if=none,id=d0,format=raw,cache=unsafe,aio=threads",
                disk.display()
            ),
        ])
        .args(["-device", "virtio-blk-pci,drive=d0", "-device", "virtio-rng-pci"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .context("qemu-system-x86_64")?;
    let began = Instant::now();
    let status = loop {
        if let Some(status) = qemu.try_wait()? {
            break status;
        }
        if began.elapsed() > PATIENCE {
            let _ = qemu.kill();
            let _ = qemu.wait();
            bail!(
                "the guest hangs; it said:\n{}",
                fs::read_to_string(&console).unwrap_or_default()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let console = String::from_utf8_lossy(&fs::read(&console)?).replace('\r', "");
    ensure!(
        status.success() && console.contains("GUEST ENDED"),
        "the guest failed ({status}); it said:\n{console}"
    );
    Ok(Ran {
        console,
        disk,
        _folder: folder,
    })
}

fn lay_root(
    root: &Path,
    kernel: &Path,
    release: &str,
    script: &str,
    files: &[(&str, &Path)],
    modules: &[&str],
) -> Result<Vec<String>> {
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
        ensure!(
            listed.status.success(),
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
         mount -t tmpfs tmp /run\n{insmod}sh /script /dev/vda\necho GUEST ENDED\nsync\npoweroff -f\n"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    Ok(order)
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
