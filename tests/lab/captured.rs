//! Captures that came out of a guest, received and fetched as a responder does it.

use crate::{
    fill::{Found, PAGE},
    guest::{Guest, Machine, Ran},
    programs, store,
};
use anyhow::{Context, Result, ensure};
use curve25519_dalek::{EdwardsPoint, Scalar};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use stillframe_evidence::{
    image::{Image, lime},
    signature::{CaptureKey, Signatory as _, split},
};

/// Three processes with names of their own, one that listens, and what holds them.
pub const MARKERS: &str = r#"
mkfifo /run/hold
for n in one two three; do cp /lab /run/marker-$n; (exec 3<>/run/hold; exec /run/marker-$n wait <&3) & done
ip link set lo up; nc -l -p 4321 < /run/hold &
"#;
/// `$FILL` MiB of pages that carry their own identity.
pub const FILL: &str = r#"
(exec 3<>/run/hold; exec /lab fill $FILL <&3 > /run/filled) &
until grep -q FILLED /run/filled 2>/dev/null; do sleep 1; done
"#;
/// A capture of memory to the disk, past the page cache: through it the image would push out a good part of what it is an image of.
pub const CAPTURE: &str = r#"
echo "AGENT ENDED $( ( (/stillframe-agent capture --case guest --profile memory --store - $MORE 2> /dev/console; echo $? >&3) | dd of="$1" bs=256k iflag=fullblock oflag=direct conv=sync 2> /dev/null ) 3>&1 )"
"#;
/// What /proc/modules says.
pub const MODULES: &str = "echo MODULES BEGIN; cat /proc/modules; echo MODULES END\n";

/// A capture that came out of a guest.
pub struct Captured {
    /// What the guest's script printed.
    pub console: String,
    /// The store.
    pub base: PathBuf,
    /// What `stillframe fetch` wrote.
    pub fetched: PathBuf,
    /// What it told.
    pub told: Value,
    _folder: tempfile::TempDir,
}

impl Captured {
    /// Receives the stream on a guest's disk, and fetches.
    pub fn from(ran: &Ran) -> Result<Self> {
        let folder = scratch()?;
        let base = folder.path().join("store");
        let mut receive = Command::new(programs::controller()?);
        let received = receive
            .args(["receive", "--store"])
            .arg(&base)
            .stdin(File::open(&ran.disk)?)
            .output()?;
        ensure!(received.status.code() == Some(0), "{received:?}\n{}", ran.console);
        let fetched = folder.path().join("fetched");
        let told = fetch(&base, &fetched, &[])?;
        let whole = told["complete"] == true
            && told["damaged"] == Value::Array(vec![])
            && told["holes"] == Value::Array(vec![]);
        ensure!(whole, "{told}");
        Ok(Captured {
            console: ran.console.clone(),
            base,
            fetched,
            told,
            _folder: folder,
        })
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.fetched.join("image.lime")
    }
}

/// A folder for what is large. Those of a run that has ended, and that statics of it kept, are deleted first.
pub fn scratch() -> Result<tempfile::TempDir> {
    let folder = programs::target().join("lab/scratch");
    std::fs::create_dir_all(&folder)?;
    for entry in std::fs::read_dir(&folder)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let lives = name
            .split('-')
            .next()
            .is_some_and(|pid| Path::new("/proc").join(pid).exists());
        if !lives {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    Ok(tempfile::Builder::new()
        .prefix(&format!("{}-", std::process::id()))
        .tempdir_in(folder)?)
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap_or("a path that is not UTF-8")
}

/// `stillframe symbols` to a file, as JSON.
pub fn symbols(arguments: &[&str]) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let to = folder.path().join("isf.json");
    let output = store::stillframe(&[&["symbols", "--to", text(&to)], arguments].concat())?;
    ensure!(output.status.success(), "{output:?}");
    Ok(serde_json::from_slice(&std::fs::read(to)?)?)
}

/// Every page of an image: its physical address and its bytes.
pub fn pages(path: &Path, mut each: impl FnMut(u64, &[u8])) -> Result<()> {
    let file = File::open(path)?;
    let image = Image::open(&file)?;
    let mut buffer = vec![0; 1 << 20];
    for (start, size) in image.ranges() {
        let mut at = 0;
        while at < size {
            let n = usize::try_from((size - at).min(1 << 20))?;
            ensure!(
                image.read(start + at, &mut buffer[..n])? == n,
                "a hole at {at:#x}"
            );
            for (index, page) in (0u64..).zip(buffer[..n].chunks(PAGE)) {
                each(start + at + index * PAGE as u64, page);
            }
            at += n as u64;
        }
    }
    Ok(())
}

/// Fails unless each of so many pages with an identity is in the image, none is there that is not whole, and no more than so many copies are.
pub fn every_identity_is_there(image: &Path, count: u64, copies: u32) -> Result<()> {
    let mut found = Found::default();
    pages(image, |address, page| found.look(address, page))?;
    ensure!(found.wrong.is_empty(), "wrong pages at {:x?}", found.wrong);
    ensure!(
        found.whole.len() as u64 == count,
        "{} of {count} pages are there",
        found.whole.len()
    );
    let twice: BTreeMap<_, _> = found.whole.iter().filter(|(_, at)| at.len() > 1).collect();
    let more: usize = twice.values().map(|at| at.len() - 1).sum();
    ensure!(
        more <= copies as usize,
        "{more} pages are there more than once: {twice:x?}"
    );
    Ok(())
}

/// `stillframe fetch`, and what it told.
pub fn fetch(base: &Path, to: &Path, more: &[&str]) -> Result<Value> {
    let arguments = [
        "fetch",
        "latest",
        "--store",
        text(base),
        "--to",
        text(to),
        "--output",
        "json",
    ];
    let output = store::stillframe(&[&arguments[..], more].concat())?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

/// Boots a guest that has the agent and the lab's own program.
pub fn boot(machine: &Machine, script: &str) -> Result<Guest> {
    let (agent, lab) = (programs::static_agent()?, programs::static_lab()?);
    machine.boot(script, &[("stillframe-agent", &agent), ("lab", &lab)], &[])
}

/// A guest of half a gigabyte with markers, captured and nothing else; `before` is run before the capture.
pub fn small(kernel: &str, la57: bool, before: &str) -> Result<Captured> {
    let machine = Machine {
        kernel,
        la57,
        // The emulator cannot run code on one processor while another changes it, which 6.12 does when it starts.
        cpus: 1,
        memory: 512,
        disk: 512,
        ..Machine::default()
    };
    let script = format!("{MARKERS}{MODULES}sleep 1\n{before}{CAPTURE}");
    Captured::from(&boot(&machine, &script)?.ended()?)
}

/// The memory of a guest of 1 GiB with 420 MiB of a real system's files in it, as one LiME range.
pub fn guest_image(to: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let files = folder.path().join("files");
    let mut out = File::create(&files)?;
    let mut tar = Command::new("tar")
        .args(["-C", "/usr", "-c", "bin", "lib"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    std::io::copy(&mut tar.stdout.take().context("tar")?.take(420 << 20), &mut out)?;
    let _ = tar.kill();
    tar.wait()?;
    let machine = Machine {
        content: Some(&files),
        disk: 512,
        ..Machine::default()
    };
    let script = format!(
        "{MARKERS}head -c 440401920 \"$1\" > /run/files; sync; echo 3 > /proc/sys/vm/drop_caches; echo READY; read go\n"
    );
    let mut guest = boot(&machine, &script)?;
    guest.wait_for("READY")?;
    let raw = folder.path().join("raw");
    guest.truth(&raw)?;
    let mut image = File::create(to)?;
    image.write_all(&lime::header(0, (1 << 30) - 1))?;
    std::io::copy(&mut File::open(raw)?, &mut image)?;
    Ok(())
}

/// The kernel's own copies: one page for each open /proc/kcore, and what waits in a socket.
pub const COPIES: u32 = 16;

/// An image of 1 GiB so many times over, at addresses of its own each time.
pub fn repeat(image: &Path, times: u64, to: &Path) -> Result<()> {
    let mut out = File::create(to)?;
    for n in 0..times {
        out.write_all(&lime::header(n << 30, (n << 30) + (1 << 30) - 1))?;
        let mut file = File::open(image)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(lime::HEADER as u64))?;
        std::io::copy(&mut file, &mut out)?;
    }
    Ok(())
}

/// Addresses that the chain says are not in the image.
pub fn gaps(base: &Path) -> Result<BTreeSet<u64>> {
    let mut pages = BTreeSet::new();
    for gap in store::records(base, "memory")? {
        if gap["record"] == "memory-gap" {
            let bound = |name: &str| gap[name].as_u64().context("a gap without its bounds");
            pages.extend((bound("start")?..=bound("end")?).step_by(PAGE));
        }
    }
    Ok(pages)
}

/// Neither the seed of the capture's key nor what is made of it (RFC 8032, 5.1.5) is in the image. `truth` is the memory of the guest
/// while it was captured, which has the seed in the pages that are said to hold it: so the search can find it. What is made of it to sign
/// is not even there, as long as nothing is signed.
pub fn the_key_is_not_in_the_image(captured: &Captured, truth: &Path) -> Result<()> {
    let events = store::objects(&store::folder(&captured.base)?)?;
    let first = events
        .iter()
        .find(|(name, _)| name.starts_with("progress/000001"));
    let event: Value = serde_json::from_slice(&fs::read(&first.context("no first event")?.1)?)?;
    let public = &event["signed"]["event"]["opened"]["key"];
    let truth = File::open(truth)?;
    let (mut seeds, mut held) = (BTreeSet::new(), Vec::new());
    for address in gaps(&captured.base)? {
        let mut page = [0; PAGE];
        truth.read_exact_at(&mut page, address)?;
        held.extend(page);
        for seed in page.windows(32).step_by(8) {
            let seed: [u8; 32] = seed.try_into()?;
            if seed != [0; 32] && *public == CaptureKey::from_seed(&seed).public().to_string() {
                seeds.insert(seed);
            }
        }
    }
    ensure!(
        seeds.len() == 1,
        "{} seeds where the key is said to be",
        seeds.len()
    );
    let image = fs::read(captured.image())?;
    for seed in seeds {
        let expanded = <sha2::Sha512 as sha2::Digest>::digest(seed);
        let (scalar, prefix) = expanded.split_at(32);
        let mut clamped: [u8; 32] = scalar.try_into()?;
        clamped[0] &= 248;
        clamped[31] = clamped[31] & 63 | 64;
        for (what, bytes) in [
            ("seed", &seed[..]),
            ("scalar", scalar),
            ("clamped scalar", &clamped),
            ("prefix", prefix),
        ] {
            let at = memchr::memmem::find(&image, bytes);
            ensure!(at.is_none(), "the {what} of the key is in the image at {at:?}");
            ensure!(
                what == "seed" || memchr::memmem::find(&held, bytes).is_none(),
                "the {what} of the key was left on the stack that it was used on"
            );
        }
        // Who has the nonce of a signature has the key. The first half of the signature is made of it: it is the right one.
        for (name, path) in events.iter().filter(|(name, _)| name.starts_with("progress/")) {
            let event = fs::read(path)?;
            let (message, signature) = split(&event)?;
            let digest = <sha2::Sha512 as sha2::Digest>::digest([prefix, message.as_bytes()].concat());
            let nonce = Scalar::from_bytes_mod_order_wide(&digest.into());
            ensure!(
                EdwardsPoint::mul_base(&nonce).compress().as_bytes() == signature.r_bytes(),
                "not the nonce of {name}"
            );
            // As it is used, and as it was hashed.
            for form in [&nonce.as_bytes()[..], &digest[..32], &digest[32..]] {
                for (place, bytes) in [("image", &image), ("stack that it was used on", &held)] {
                    let left = memchr::memmem::find(bytes, form).is_some();
                    ensure!(!left, "the nonce of {name} is in the {place}");
                }
            }
        }
    }
    Ok(())
}
