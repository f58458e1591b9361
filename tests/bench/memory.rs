//! `cargo bench -p stillframe-tests --bench memory`: the memory path beside zstd, AVML and sha256sum in the same run. Needs what
//! `tests/run` fetches. `-- native` or `-- footprint` runs one half.
//!
//! Machines are noisy: what counts are the ratios of medians, taken by turns. In the guest nothing is timed for judgement: the emulator
//! has no SHA instructions, which a processor has.

use anyhow::{Result, ensure};
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use stillframe_tests::{
    captured::{self, FILL, MARKERS},
    cost::{Cost, median, run},
    guest::{Guest, Machine},
    programs, store,
};

const TURNS: usize = 5;

fn main() -> Result<()> {
    programs::require(&["zstd", "sha256sum"])?;
    let asked: Vec<String> = std::env::args().collect();
    let wanted = |part: &str| {
        asked.iter().any(|a| a == part) || !asked.iter().any(|a| a == "native" || a == "footprint")
    };
    if wanted("native") {
        let folder = captured::scratch()?;
        let image = folder.path().join("guest.lime");
        captured::guest_image(&image)?;
        native(&image, folder.path())?;
        large(&image, folder.path())?;
    }
    if wanted("footprint") {
        footprint()?;
    }
    Ok(())
}

fn sha256_pass(path: &Path) -> Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let mut file = File::open(path)?;
    let (mut sha256, mut took) = (Sha256::new(), Duration::ZERO);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(took.as_secs_f64());
        }
        let began = Instant::now();
        sha256.update(&buffer[..n]);
        took += began.elapsed();
    }
}

fn size(path: &Path) -> Result<f64> {
    Ok(fs::metadata(path)?.len() as f64 / f64::from(1 << 20))
}

fn native(image: &Path, folder: &Path) -> Result<()> {
    let (agent, controller) = (programs::static_agent()?, programs::controller()?);
    let avml = programs::target().join("lab/avml/bin/avml");
    let (zst, converted) = (folder.join("image.zst"), folder.join("image.avml"));
    let fetched = folder.join("fetched");
    let [mut ours, mut zstd, mut avmls, mut fetches, mut plain] = [const { Vec::new() }; 5];
    let mut single = Vec::new();
    for turn in 0..=TURNS {
        // What is deleted or still unwritten of the turn before would be paid for by whoever syncs first.
        let base = folder.join(format!("store-{turn}"));
        let _ = (fs::remove_dir_all(&fetched), fs::remove_file(&converted));
        ensure!(Command::new("sync").status()?.success(), "sync");

        let capture = run(Command::new(&agent)
            .args(["capture", "--profile", "memory", "--store"])
            .arg(&base)
            .arg("--image")
            .arg(image))?;
        let one = run(Command::new("zstd")
            .args(["-1", "-T2", "-q", "-f"])
            .arg(image)
            .arg("-o")
            .arg(&zst))?;
        let alone = run(Command::new("zstd")
            .args(["-1", "-T1", "-q", "-f"])
            .arg(image)
            .arg("-o")
            .arg(&zst))?;
        let convert = [
            "convert",
            "--source-format",
            "lime",
            "--format",
            "lime_compressed",
        ];
        let theirs = run(Command::new(&avml).args(convert).arg(image).arg(&converted))?;
        let fetch = run(Command::new(&controller)
            .args(["fetch", "latest", "--no-symbols", "--store"])
            .arg(&base)
            .arg("--to")
            .arg(&fetched))?;
        let pipe = run(Command::new("sh")
            .args(["-c", "zstd -d -T0 -q -c \"$0\" | sha256sum"])
            .arg(&zst))?;
        // The first turn warms up.
        if turn > 0 {
            ours.push(capture);
            zstd.push(one);
            single.push(alone);
            avmls.push(theirs);
            fetches.push(fetch);
            plain.push(pipe);
        }
    }
    let base = folder.join(format!("store-{TURNS}"));
    let (verdict, code, _) = store::verify(&base, &[])?;
    ensure!(code == 0, "the capture is {verdict}");
    let stored: u64 = store::objects(&store::folder(&base)?)?
        .iter()
        .map(|(_, p)| fs::metadata(p).map_or(0, |m| m.len()))
        .sum();
    let stored = stored as f64 / f64::from(1 << 20);
    let wall = |costs: &[Cost]| median(costs.to_vec(), |c| c.wall);
    let hashes = sha256_pass(image)? + sha256_pass(&zst)?;
    let cpu = median(ours.clone(), |c| c.cpu);
    let budget = median(single, |c| c.cpu) + hashes;
    println!("1 GiB of a guest's memory, --image to a directory, {TURNS} turns");
    println!(
        "  stillframe-agent   {:5.2} s  {stored:4.0} MiB  {cpu:5.2} s CPU  {:4.0} MiB resident",
        wall(&ours),
        median(ours.clone(), |c| c.resident)
    );
    println!(
        "  zstd -1 -T2        {:5.2} s  {:4.0} MiB                  ours takes {:.2} of it (limit 0.90)",
        wall(&zstd),
        size(&zst)?,
        wall(&ours) / wall(&zstd)
    );
    println!(
        "  avml convert       {:5.2} s  {:4.0} MiB                  ours takes {:.2} of it (0.70), and stores {:.3} (0.780)",
        wall(&avmls),
        size(&converted)?,
        wall(&ours) / wall(&avmls),
        stored / size(&converted)?
    );
    println!(
        "  zstd -1 and SHA-256 of plaintext and stored: {budget:.2} s CPU    ours takes {:.2} of it (1.10)",
        cpu / budget
    );
    println!("  fetch              {:5.2} s", wall(&fetches));
    println!(
        "  zstd -d | sha256sum {:4.2} s                            fetch takes {:.2} of it (1.00)",
        wall(&plain),
        wall(&fetches) / wall(&plain)
    );
    Ok(())
}

/// The same four times over, at addresses of its own each time.
fn large(image: &Path, folder: &Path) -> Result<()> {
    let large = folder.join("large.lime");
    captured::repeat(image, 4, &large)?;
    let base = folder.join("large-store");
    let cost = run(Command::new(programs::static_agent()?)
        .args(["capture", "--profile", "memory", "--store"])
        .arg(&base)
        .arg("--image")
        .arg(&large))?;
    println!(
        "4 GiB to a directory: {:.2} s, {:.0} MiB resident (limit 32)",
        cost.wall, cost.resident
    );
    fs::remove_dir_all(&base)?;
    fs::remove_file(&large)?;
    Ok(())
}

/// To the disk, past the page cache, with no more around it than it takes: what shells and large buffers change is not what is measured.
const OUT: &str = "dd of=\"$1\" bs=16k iflag=fullblock oflag=direct conv=sync 2> /dev/null";

/// What a capture that streams out changes of a full guest's memory, beside the same guest left alone for as long, and AVML.
fn footprint() -> Result<()> {
    println!("a guest of 1 GiB, 600 MiB filled, streaming out");
    let watch = "(while sleep 0.2; do for p in $(pidof stillframe-agent); do grep -E 'RssAnon|VmHWM' /proc/$p/status; done; done) > /run/watched 2>/dev/null &\nwatch=$!\n";
    let told = "kill $watch; echo \"PEAK $(grep RssAnon /run/watched | awk '{print $2}' | sort -n | tail -1) KiB anonymous, $(grep VmHWM /run/watched | awk '{print $2}' | sort -n | tail -1) KiB in all\"\n";
    let capture = format!(
        "/stillframe-agent capture --case guest --profile memory --store - 2> /dev/console | {OUT}\n"
    );
    let (ours, took, console) = changed(&capture)?;
    ensure!(
        console
            .lines()
            .any(|line| line.starts_with("  memory           complete")),
        "{console}"
    );
    // Watching costs pages, too: a guest of its own.
    let (.., console) = changed(&format!("{watch}{capture}{told}"))?;
    let peak = console
        .lines()
        .find_map(|line| line.strip_prefix("PEAK "))
        .unwrap_or("unknown")
        .to_owned();
    let (idle, ..) = changed(&format!("sleep {}\n", took.as_secs()))?;
    let avml = format!("mkfifo /run/pipe; {OUT} < /run/pipe & /avml acquire /run/pipe; wait $!\n");
    let (theirs, avml_took, _) = changed(&avml)?;
    println!(
        "  stillframe-agent   {ours:.2} % of its pages changed, {:3.0} s, {peak}",
        took.as_secs_f64()
    );
    println!(
        "  left alone as long {idle:.2} %                        ours less this: {:.2} (limit 0.50)",
        ours - idle
    );
    println!(
        "  avml acquire       {theirs:.2} %, {:3.0} s",
        avml_took.as_secs_f64()
    );
    Ok(())
}

/// The share of pages that are others after `job` than before, how long that took, and what the guest said.
fn changed(job: &str) -> Result<(f64, Duration, String)> {
    let machine = Machine {
        disk: 1280,
        cpus: 1,
        ..Machine::default()
    };
    let script = format!("FILL=600\n{MARKERS}{FILL}echo READY; read go\n{job}echo DONE; read go\n");
    let (agent, lab) = (programs::static_agent()?, programs::static_lab()?);
    let avml: PathBuf = programs::target().join("lab/avml/bin/avml");
    let mut guest: Guest = machine.boot(
        &script,
        &[("stillframe-agent", &agent), ("lab", &lab), ("avml", &avml)],
        &[],
    )?;
    let folder = tempfile::tempdir()?;
    let (before, after) = (folder.path().join("before"), folder.path().join("after"));
    guest.wait_for("READY")?;
    guest.truth(&before)?;
    let began = Instant::now();
    guest.say("go")?;
    guest.wait_for("DONE")?;
    let took = began.elapsed();
    guest.truth(&after)?;
    let (before, after) = (File::open(before)?, File::open(after)?);
    let (mut pages, mut others, mut at) = (0u32, 0u32, 0);
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while at < 1 << 30 {
        before.read_exact_at(&mut a, at)?;
        after.read_exact_at(&mut b, at)?;
        for (a, b) in a.chunks(4096).zip(b.chunks(4096)) {
            pages += 1;
            others += u32::from(a != b);
        }
        at += 1 << 20;
    }
    Ok((
        f64::from(others) * 100.0 / f64::from(pages),
        took,
        guest.console(),
    ))
}
