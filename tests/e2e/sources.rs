//! The other ways to memory: LiME, an image that somebody else took, one process; and what happens when memory cannot be had, or the
//! agent does not live to the end.

use anyhow::Result;
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use stillframe_evidence::{image::Image, root::Hash};
use stillframe_tests::{
    captured::{self, CAPTURE, Captured, FILL, MARKERS, MODULES, text},
    fill,
    guest::{self, Machine},
    programs, store, volatility,
};

fn lime() -> (PathBuf, String) {
    let (_, release) = guest::boot_file("6.1", "vmlinuz-").unwrap();
    let module = programs::target().join("lab/lime").join(release).join("lime.ko");
    let sha256 = Hash::of(&fs::read(&module).expect("tests/run builds LiME's module")).to_string();
    (module, sha256)
}

#[test]
fn lime_stalled_for_ten_seconds_loses_nothing_and_a_killed_agent_leaves_no_module() -> Result<()> {
    let (module, sha256) = lime();
    let (agent, lab) = (programs::static_agent().unwrap(), programs::static_lab().unwrap());
    let machine = Machine {
        memory: 384,
        disk: 384,
        ..Machine::default()
    };
    let capture = CAPTURE.replace("$MORE", &format!("--lime-module /lime.ko --lime-sha256 {sha256}"));
    // Stopped while it reads, for longer than LiME's own patience of a second; then let go. After that three are killed: as soon as the
    // module is there, and later; their rate keeps them reading for ten seconds on the fastest machine.
    let script = format!(
        "FILL=232\n{MARKERS}{FILL}{MODULES}\
         loaded() {{ until grep -q '^lime' /proc/modules; do usleep 10000; done; }}\n\
         agent() {{ grep -l '^stillframe-agen$' /proc/[0-9]*/comm | cut -d / -f 3; }}\n\
         (loaded; sleep 2; echo STOPPED; kill -STOP $(agent); sleep 10; kill -CONT $(agent); echo LET GO) &\n\
         {capture}\
         echo \"AFTER $(grep -c '^lime' /proc/modules)\"\n\
         for wait in 0 1 4; do\n\
         (/stillframe-agent capture --profile memory --max-rate 32 --store - --lime-module /lime.ko --lime-sha256 {sha256} > /dev/null 2>&1) &\n\
         loaded; sleep $wait; echo \"LOADED $(grep -c '^lime' /proc/modules)\"; kill -KILL $(agent); sleep 8\n\
         echo \"KILLED $(grep -c '^lime' /proc/modules)\"\n\
         done\n"
    );
    let files = [
        ("stillframe-agent", agent.as_path()),
        ("lab", &lab),
        ("lime.ko", &module),
    ];
    let mut guest = machine.boot(&script, &files, &[])?;
    let truths = captured::scratch()?;
    let truth = truths.path().join("truth");
    guest.wait_for("STOPPED")?;
    guest.truth(&truth)?;
    let ran = guest.ended()?;
    println!("{}", ran.console);
    assert!(
        ran.console.contains("AFTER 0") && ran.console.matches("KILLED 0").count() == 3,
        "{}",
        ran.console
    );
    assert_eq!(
        ran.console.matches("LOADED 1").count(),
        3,
        "the module was there when the agent was killed"
    );
    let stopped = ran.console.find("STOPPED").unwrap();
    let ended = ran.console.find("AGENT ENDED 0").unwrap();
    assert!(
        stopped < ended && ran.console.find("LET GO").unwrap() < ended,
        "{}",
        ran.console
    );
    let captured = Captured::from(&ran).unwrap();
    captured::every_identity_is_there(&captured.image(), 232 << 8, captured::COPIES)?;
    captured::the_key_is_not_in_the_image(&captured, &truth)?;
    let records = store::records(&captured.base, "memory").unwrap();
    assert!(
        records
            .iter()
            .any(|r| r["method"] == "lime" && r["module_removed"] == "removed"),
        "{records:?}"
    );
    assert_eq!(
        store::outcome(&captured.base, "memory").unwrap()["status"],
        "complete"
    );
    assert_eq!(
        captured.told["differences"],
        serde_json::json!([]),
        "{}",
        captured.told
    );
    // The same kernel as the others', so the same table.
    assert!(captured::symbols(&["--image", text(&captured.image())]).unwrap() == avml().isf);
    assert_marker_in_pslist(&captured.fetched, "image.lime");
    Ok(())
}

#[test]
fn a_module_that_is_not_the_ordered_one_is_never_loaded() {
    let (module, _) = lime();
    let agent = programs::agent().unwrap();
    let base = tempfile::tempdir().unwrap();
    let zeros = "0".repeat(64);
    let status = Command::new(agent)
        .args([
            "capture",
            "--profile",
            "memory",
            "--on-this-disk",
            "--store",
            text(&base.path().join("s")),
            "--lime-module",
            text(&module),
            "--lime-sha256",
            &zeros,
        ])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(5));
    let outcome = store::outcome(&base.path().join("s"), "memory").unwrap();
    assert_eq!(outcome["status"], "failed");
    assert!(
        outcome["reason"]
            .as_str()
            .unwrap()
            .contains("not the one that was ordered"),
        "{outcome}"
    );
}

fn assert_marker_in_pslist(folder: &Path, image: &str) {
    let rows = volatility::rows(folder, image, &["linux.pslist"]).unwrap();
    assert!(rows.iter().any(|r| r["COMM"] == "marker-one"), "{rows:?}");
}

/// A guest imaged by AVML itself.
struct Avml {
    folder: tempfile::TempDir,
    isf: Value,
}

fn avml() -> &'static Avml {
    static AVML: OnceLock<Avml> = OnceLock::new();
    AVML.get_or_init(|| {
        let avml = programs::target().join("lab/avml/bin/avml");
        let (agent, lab) = (programs::static_agent().unwrap(), programs::static_lab().unwrap());
        let machine = Machine {
            memory: 384,
            disk: 400,
            ..Machine::default()
        };
        let script = format!("{MARKERS}sleep 1\n/avml acquire \"$1\" && echo ACQUIRED\n");
        let files = [
            ("stillframe-agent", agent.as_path()),
            ("lab", &lab),
            ("avml", &avml),
        ];
        let ran = machine.boot(&script, &files, &[]).unwrap().ended().unwrap();
        assert!(ran.console.contains("ACQUIRED"), "{}", ran.console);
        let folder = captured::scratch().unwrap();
        let plain = folder.path().join("avml.lime");
        fs::copy(&ran.disk, &plain).unwrap();
        // The disk is longer than the image: what follows the last range is zeros.
        let file = File::options().write(true).read(true).open(&plain).unwrap();
        file.set_len(end_of_lime(&file)).unwrap();
        let compressed = folder.path().join("avml.compressed");
        let formats = [
            "convert",
            "--source-format",
            "lime",
            "--format",
            "lime_compressed",
        ];
        let converted = Command::new(&avml)
            .args(formats)
            .arg(&plain)
            .arg(&compressed)
            .output()
            .unwrap();
        assert!(converted.status.success(), "{converted:?}");
        let isf = captured::symbols(&["--image", text(&plain)]).unwrap();
        Avml { folder, isf }
    })
}

fn end_of_lime(file: &File) -> u64 {
    use std::os::unix::fs::FileExt as _;
    let (mut at, mut header) = (0, [0; 32]);
    while file.read_exact_at(&mut header, at).is_ok() {
        let Some((start, end)) = stillframe_evidence::image::lime::parse(&header) else {
            break;
        };
        at += 32 + end - start + 1;
    }
    at
}

#[test]
fn symbols_come_out_of_an_image_that_avml_took() {
    let avml = avml();
    for (name, format) in [("avml.lime", "lime"), ("avml.compressed", "avml")] {
        let image = avml.folder.path().join(name);
        let file = File::open(&image).unwrap();
        assert_eq!(Image::open(&file).unwrap().format().as_str(), format);
        assert!(
            captured::symbols(&["--image", text(&image)]).unwrap() == avml.isf,
            "{name}"
        );
    }
    // Volatility on AVML's own image and our table.
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("symbols/linux")).unwrap();
    let table = folder.path().join("symbols/linux/table.json.xz");
    let output = store::stillframe(&[
        "symbols",
        "--image",
        text(&avml.folder.path().join("avml.compressed")),
        "--to",
        text(&table),
    ])
    .unwrap();
    assert!(output.status.success(), "{output:?}");
    std::os::unix::fs::symlink(
        avml.folder.path().join("avml.lime"),
        folder.path().join("image.lime"),
    )
    .unwrap();
    assert_marker_in_pslist(folder.path(), "image.lime");
}

#[test]
fn an_image_that_somebody_else_took_is_brought_in_as_it_is() {
    let avml = avml();
    for name in ["avml.lime", "avml.compressed"] {
        let image = avml.folder.path().join(name);
        let base = tempfile::tempdir().unwrap();
        let captured = capture(base.path(), &["--image", text(&image)]);
        assert_eq!(captured, Some(0), "{name}");
        let (verdict, _, _) = store::verify(base.path(), &[]).unwrap();
        assert_eq!(verdict, "self-consistent");
        let to = base.path().join("fetched");
        captured::fetch(base.path(), &to, &[]).unwrap();
        let theirs = File::open(&image).unwrap();
        let theirs = Image::open(&theirs).unwrap();
        let mut buffer = vec![0; fill::PAGE];
        let mut count = 0u64;
        captured::pages(&to.join("image.lime"), |address, page| {
            assert_eq!(
                theirs.read(address, &mut buffer[..page.len()]).unwrap(),
                page.len()
            );
            assert_eq!(&buffer[..page.len()], page, "{address:#x}");
            count += page.len() as u64;
        })
        .unwrap();
        assert_eq!(count, theirs.ranges().iter().map(|(_, size)| size).sum::<u64>());
        assert_marker_in_pslist(&to, "image.lime");
    }
}

/// Captures natively; the exit code.
fn capture(base: &Path, more: &[&str]) -> Option<i32> {
    let mut agent = Command::new(programs::agent().unwrap());
    agent
        .args(["capture", "--profile", "memory", "--store", text(base)])
        .args(more);
    agent.stdout(Stdio::null()).status().unwrap().code()
}

#[test]
fn an_image_that_was_cut_off_is_taken_as_far_as_it_goes() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("cut.lime");
    let mut bytes = stillframe_evidence::image::lime::header(0x1000, 0x20_0fff).to_vec();
    (0..100).for_each(|n| bytes.extend(fill::page(n)));
    fs::write(&image, &bytes).unwrap();
    let base = folder.path().join("store");
    assert_eq!(capture(&base, &["--image", text(&image)]), Some(5));
    let outcome = store::outcome(&base, "memory").unwrap();
    assert_eq!(outcome["status"], "partial", "{outcome}");
    assert!(outcome["problems"].to_string().contains("cut off"), "{outcome}");
    captured::fetch(&base, &folder.path().join("fetched"), &[]).unwrap();
    captured::every_identity_is_there(&folder.path().join("fetched/image.lime"), 100, 0)?;
    fs::write(&image, b"").unwrap();
    let base = folder.path().join("empty");
    assert_eq!(capture(&base, &["--image", text(&image)]), Some(5));
    assert_eq!(store::outcome(&base, "memory").unwrap()["status"], "failed");
    Ok(())
}

/// The host's own work is worth more than the rest of its image: what came until then is whole, and what is missing is told.
#[test]
fn a_host_that_is_short_of_memory_is_let_go() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.raw");
    let mut file = File::create(&image).unwrap();
    (0..16 << 8).for_each(|n| file.write_all(&fill::page(n)).unwrap());
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("proc/pressure")).unwrap();
    let pressure =
        "some avg10=90.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=80.00 avg60=0.00 avg300=0.00 total=1\n";
    fs::write(root.join("proc/pressure/memory"), pressure).unwrap();
    let base = folder.path().join("store");
    let more = [
        "--image",
        text(&image),
        "--root",
        text(&root),
        "--max-rate",
        "4",
        "--cpus",
        "1",
    ];
    assert_eq!(capture(&base, &more), Some(5));
    let outcome = store::outcome(&base, "memory").unwrap();
    assert_eq!(outcome["status"], "partial", "{outcome}");
    assert!(
        outcome["reason"].to_string().contains("short of memory"),
        "{outcome}"
    );
    let (missing, read) = (&outcome["ranges"][0]["missing"], &outcome["ranges"][0]["read"]);
    let [missing, read] = [missing, read].map(|n| n.as_u64().unwrap_or(0));
    assert!(missing > 0 && read > 0 && missing + read == 16 << 20, "{outcome}");
    let (verdict, code, _) = store::verify(&base, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("self-consistent", 0));
    captured::fetch(&base, &folder.path().join("fetched"), &[]).unwrap();
    captured::every_identity_is_there(&folder.path().join("fetched/image.lime"), read / 4096, 0)
}

#[test]
fn lockdown_is_one_plain_sentence_and_costs_the_rest_nothing() {
    let machine = Machine {
        memory: 256,
        append: "lockdown=confidentiality",
        ..Machine::default()
    };
    let capture = CAPTURE.replace("--profile memory", "--profile full");
    let script = format!("{MARKERS}/stillframe-agent memory-probe\n{capture}");
    let ran = captured::boot(&machine, &script).unwrap().ended().unwrap();
    assert!(
        ran.console
            .contains("source           none: the kernel is locked down (confidentiality)"),
        "{}",
        ran.console
    );
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("store");
    let mut receive = Command::new(programs::controller().unwrap());
    let received = receive
        .args(["receive", "--store"])
        .arg(&base)
        .stdin(File::open(&ran.disk).unwrap())
        .output()
        .unwrap();
    assert_eq!(received.status.code(), Some(5), "{received:?}");
    let outcome = store::outcome(&base, "memory").unwrap();
    assert_eq!(outcome["status"], "unsupported", "{outcome}");
    assert!(
        outcome["reason"]
            .as_str()
            .unwrap()
            .starts_with("the kernel is locked down"),
        "{outcome}"
    );
    let at = |key: &str| outcome[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(
        at("ended").as_millisecond() - at("started").as_millisecond() < 1000,
        "{outcome}"
    );
    for kind in [
        "processes",
        "companions",
        "processes-again",
        "process-details",
        "sessions",
    ] {
        assert_eq!(
            store::outcome(&base, kind).unwrap()["status"],
            "complete",
            "{kind}"
        );
    }
}

#[test]
fn one_process_s_memory_is_a_core_that_gdb_opens() {
    programs::require(&["gdb"]).unwrap();
    let mut child = Command::new(programs::lab().unwrap())
        .args(["fill", "3"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut said)
        .unwrap();
    assert!(said.starts_with("FILLED"));
    let base = tempfile::tempdir().unwrap();
    let pid = child.id().to_string();
    let mut agent = Command::new(programs::agent().unwrap());
    agent
        .args([
            "capture",
            "--on-this-disk",
            "--store",
            text(base.path()),
            "--pid",
            &pid,
            "--pid",
            &pid,
        ])
        .stdout(Stdio::null());
    assert!(matches!(agent.status().unwrap().code(), Some(0 | 5)));
    assert_eq!(
        store::outcome(base.path(), "process-memory").unwrap()["status"],
        "complete"
    );
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    drop(child.stdin.take());
    child.wait().unwrap();
    let to = base.path().join("fetched");
    captured::fetch(base.path(), &to, &[]).unwrap();
    let core = to.join(format!("process-{pid}.core"));
    let regions = store::records(base.path(), "process-memory").unwrap();
    let address = u64::from_str_radix(said.trim().rsplit("0x").next().unwrap(), 16).unwrap();
    let holds = |r: &&Value| {
        r["record"] == "region"
            && r["start"].as_u64().unwrap() <= address
            && address < r["end"].as_u64().unwrap()
    };
    let filled = regions.iter().find(holds).expect("its region");
    assert!(filled["captured"].as_u64().unwrap() >= 3 << 20, "{filled}");
    assert!(
        maps.contains(&format!(
            "{:x}-{:x} rw-p",
            filled["start"].as_u64().unwrap(),
            filled["end"].as_u64().unwrap()
        )),
        "{maps}"
    );
    let show = format!("x/s {:#x}", address + 4096 * 5);
    let gdb = Command::new("gdb")
        .args([
            "-nx",
            "-batch",
            "-c",
            text(&core),
            "-ex",
            "info threads",
            "-ex",
            "info proc mappings",
            "-ex",
            &show,
        ])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&gdb.stdout);
    assert!(said.contains("STILLFRAME PAGE"), "{gdb:?}");
    assert!(
        said.contains(&format!("LWP {pid}")) && said.contains("/lab"),
        "{gdb:?}"
    );
}

#[test]
fn killed_on_its_way_it_leaves_an_image_with_its_hole_stated() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.raw");
    let pages = 96 << 8;
    let bytes: Vec<u8> = (0..pages).flat_map(fill::page).collect();
    fs::write(&image, &bytes).unwrap();
    for share in [20, 50, 90] {
        let base = folder.path().join(format!("store-{share}"));
        let mut agent = Command::new(programs::agent().unwrap());
        agent.args([
            "capture",
            "--profile",
            "memory",
            "--store",
            text(&base),
            "--image",
            text(&image),
            "--max-rate",
            "6",
            "--output",
            "json",
        ]);
        let mut agent = agent.stdout(Stdio::piped()).spawn().unwrap();
        let (mut acknowledged, mut key) = (0, String::new());
        let began = Instant::now();
        for line in BufReader::new(agent.stdout.take().unwrap()).lines() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            acknowledged += event["segments"].as_array().unwrap().len();
            if let Some(own) = event["event"]["opened"]["key"].as_str() {
                own.clone_into(&mut key);
            }
            let progress = &event["event"]["progress"];
            if progress["done"].as_u64().unwrap_or(0) * 100
                >= progress["expected"].as_u64().unwrap_or(1) * share
            {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60));
        }
        agent.kill().unwrap();
        agent.wait().unwrap();
        assert!(acknowledged > 0);
        let (verdict, code, _) = store::verify(&base, &[]).unwrap();
        assert_eq!((verdict.as_str(), code), ("incomplete", 3));
        assert_eq!(
            store::verify(&base, &["--expect-key", &key]).unwrap().0,
            "incomplete"
        );
        let salvaged =
            store::stillframe(&["salvage", "latest", "--store", text(&base), "--output", "json"]).unwrap();
        assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
        // Not even with the key that signed it: what is missing is missing.
        for more in [&[][..], &["--expect-key", &key]] {
            assert_eq!(store::verify(&base, more).unwrap().0, "salvaged");
        }
        let to = folder.path().join(format!("fetched-{share}"));
        let output = store::stillframe(&[
            "fetch",
            "latest",
            "--store",
            text(&base),
            "--to",
            text(&to),
            "--output",
            "json",
        ])
        .unwrap();
        assert_eq!(output.status.code(), Some(5), "{output:?}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(
            told["segments"].as_u64().unwrap() >= acknowledged as u64,
            "{told}"
        );
        let mut there = 0;
        captured::pages(&to.join("image.lime"), |address, page| {
            assert_eq!(page, fill::page(address / 4096));
            there += 1;
        })
        .unwrap();
        assert!(
            there * 100 >= pages * (share - 10) && there < pages,
            "{there} of {pages}"
        );
        assert_eq!(
            told["holes"],
            serde_json::json!([[there * 4096, pages * 4096 - 1]]),
            "{told}"
        );
        assert_eq!(told["complete"], false);
    }
}
