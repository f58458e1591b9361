//! `cargo bench -p stillframe-tests --bench triage`: a triage of a loaded host beside `lsof -nP` in the same run.
//!
//! Machines are noisy: what counts are the ratios of medians, taken by turns.

use anyhow::{Context, Result};
use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillframe_tests::{load::Load, programs, store};

const TURNS: usize = 5;
/// The last kind of the first look.
const FIRST_LOOK: &str = "mounts";

fn main() -> Result<()> {
    stillframe_tests::load::serve();
    programs::require(&["lsof"])?;
    let agent = programs::static_agent()?;
    let size = std::fs::metadata(&agent)?.len();
    println!("machine      {}", machine());
    println!("agent        {:.1} MiB, static", size as f64 / f64::from(1 << 20));
    let mut triages = Vec::new();
    for n in [1000, 4000] {
        let load = Load::start(n).with_context(|| format!("a load of {n} processes"))?;
        let (mut lsof, mut triage, mut look, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for turn in 0..=TURNS {
            let began = Instant::now();
            let status = Command::new("lsof")
                .arg("-nP")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()?;
            anyhow::ensure!(status.success(), "lsof failed");
            let lsof_took = began.elapsed();
            // The first turn warms both up, and is the one in which memory is watched, which takes time from the agent.
            let one = capture(&agent, turn == 0)?;
            if turn == 0 {
                peak = one.peak;
            } else {
                lsof.push(lsof_took);
                triage.push(one.wall);
                look.push(one.first_look);
            }
        }
        drop(load);
        let (lsof, triage, look) = (median(lsof), median(triage), median(look));
        let of = |a: Duration| a.as_secs_f64() / lsof.as_secs_f64();
        println!("N = {n}");
        println!("  lsof -nP     {:6.0} ms", lsof.as_secs_f64() * 1e3);
        println!(
            "  triage       {:6.0} ms   {:.2} of lsof",
            triage.as_secs_f64() * 1e3,
            of(triage)
        );
        println!(
            "  first look   {:6.0} ms   {:.2} of lsof",
            look.as_secs_f64() * 1e3,
            of(look)
        );
        println!(
            "  peak memory  {:6.1} MiB, all processes of the agent together",
            peak as f64 / 1024.0
        );
        triages.push(triage);
    }
    if let [small, large] = triages[..] {
        println!(
            "N = 4000 takes {:.2} times N = 1000",
            large.as_secs_f64() / small.as_secs_f64()
        );
    }
    Ok(())
}

struct One {
    wall: Duration,
    first_look: Duration,
    /// KiB
    peak: u64,
}

fn capture(agent: &Path, watch: bool) -> Result<One> {
    // On a disk, as the main job does: the sync of every object is part of what is measured.
    let store = tempfile::tempdir_in(programs::target())?;
    let began = Instant::now();
    let mut child = Command::new(agent)
        .args(["capture", "--store"])
        .arg(store.path())
        .stdout(Stdio::null())
        .spawn()?;
    let mut peaks: std::collections::BTreeMap<u32, u64> = Default::default();
    while watch && child.try_wait()?.is_none() {
        let workers =
            std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
        for pid in workers
            .split_whitespace()
            .filter_map(|p| p.parse().ok())
            .chain([child.id()])
        {
            if let Some(kib) = high_water(pid) {
                peaks.insert(pid, kib);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.wait()?;
    let wall = began.elapsed();
    let (_, code, report) = store::verify(store.path(), &[])?;
    anyhow::ensure!(code == 0, "the capture does not verify: {report}");
    Ok(One {
        wall,
        first_look: first_look(store.path())?,
        peak: peaks.values().sum(),
    })
}

fn high_water(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok())
}

/// From the opening of the chain until the event of the last kind of the first look was in the store.
fn first_look(base: &Path) -> Result<Duration> {
    for (name, path) in store::objects(&store::folder(base)?)? {
        if name.starts_with("progress/") {
            let event: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
            let event = &event["signed"];
            if event["event"]["step"]["kind"] == FIRST_LOOK {
                return Ok(Duration::from_micros(
                    event["elapsed_us"].as_u64().context("no time")?,
                ));
            }
        }
    }
    anyhow::bail!("no event of {FIRST_LOOK}")
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |name: &str| {
        cpuinfo
            .lines()
            .find(|l| l.starts_with(name))
            .and_then(|l| l.split(": ").nth(1))
            .unwrap_or("?")
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let sha = if value("flags").contains("sha_ni") {
        "with"
    } else {
        "without"
    };
    format!("{} cores, {}, {sha} SHA instructions", cores, value("model name"))
}
