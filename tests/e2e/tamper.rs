//! Everything that can be done to a capture in a directory, on a real one: the verdict, its exit code, the object named.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::cast_possible_wrap,
    missing_docs,
    reason = "a test ends where it fails"
)]

use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};
use stillframe_evidence::{
    chain::{Chain, ChainWriter, Event, What},
    frames::Segment,
    layout::{CaptureId, Key},
    manifest::{Manifest, sums},
    segments::{RecordPacker, SegmentEntry},
    signature::CaptureKey,
};
use stillframe_tests::{programs, store};

/// Two captures of this machine, made once.
fn originals() -> &'static (tempfile::TempDir, [PathBuf; 2]) {
    static ORIGINALS: OnceLock<(tempfile::TempDir, [PathBuf; 2])> = OnceLock::new();
    ORIGINALS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let bases = ["a", "b"].map(|name| folder.path().join(name));
        for base in &bases {
            let output = Command::new(programs::agent().unwrap())
                .args(["capture", "--store"])
                .arg(base)
                .output()
                .unwrap();
            assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
        }
        (folder, bases)
    })
}

/// A copy to tamper with: its store, and the folder of its capture.
fn copy() -> (tempfile::TempDir, PathBuf) {
    let copy = tempfile::tempdir().unwrap();
    let status = Command::new("cp")
        .arg("-r")
        .arg(originals().1[0].join("evidence"))
        .arg(copy.path())
        .status()
        .unwrap();
    assert!(status.success());
    let folder = store::folder(copy.path()).unwrap();
    (copy, folder)
}

#[track_caller]
fn assert_verdict(base: &Path, verdict: &str, code: i32) -> Value {
    let (found, exit, report) = store::verify(base, &[]).unwrap();
    assert_eq!((found.as_str(), exit), (verdict, code), "{report}");
    report
}

#[track_caller]
fn assert_tampered(base: &Path, object: &str) {
    let report = assert_verdict(base, "tampered", 1);
    let named: BTreeSet<&str> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["object"].as_str().unwrap())
        .collect();
    assert!(named.contains(object), "{object} is not among {named:?}");
}

#[test]
fn untouched_it_is_self_consistent() {
    let (base, _) = copy();
    assert_verdict(base.path(), "self-consistent", 0);
}

/// Every object; in each, bits all over it: every region of every format is hit, the tables at the ends of segments included.
#[test]
fn every_region_of_every_object() {
    let (base, folder) = copy();
    let id = folder.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut tried = 0;
    for (name, path) in store::objects(&folder).unwrap() {
        let original = fs::read(&path).unwrap();
        let last = original.len() - 1;
        let spread = (0..24).map(|i| i * last / 23);
        // Headers at the front, tables at the back.
        let ends = (0..16).chain(last.saturating_sub(80)..=last);
        for at in spread
            .chain(ends)
            .filter(|at| *at <= last)
            .collect::<BTreeSet<_>>()
        {
            let mut bytes = original.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, &bytes).unwrap();
            // The library here, since the program would be started thousands of times; it is the same code.
            let report = stillframe_evidence::verdict::verify(&Files(&folder), id, None, None);
            assert_eq!(report.verdict.to_string(), "tampered", "{name} at {at}");
            assert!(
                report.findings.iter().any(|f| f.object == name),
                "{name} at {at}: {:?}",
                report.findings
            );
            tried += 1;
        }
        // And the program itself, once for each object.
        assert_tampered(base.path(), &name);
        for length in [0, 1, last / 2, last] {
            fs::write(&path, &original[..length]).unwrap();
            assert_tampered(base.path(), &name);
        }
        fs::write(&path, [&original[..], b"\n"].concat()).unwrap();
        assert_tampered(base.path(), &name);
        fs::write(&path, &original).unwrap();
    }
    assert!(tried > 1000, "{tried}");
    assert_verdict(base.path(), "self-consistent", 0);
}

/// The objects of a folder, for the library.
struct Files<'a>(&'a Path);

impl stillframe_evidence::verdict::Objects for Files<'_> {
    fn list(&self) -> Result<Vec<(String, u64)>, String> {
        let objects = store::objects(self.0).map_err(|e| e.to_string())?;
        Ok(objects
            .into_iter()
            .map(|(name, path)| (name, fs::metadata(path).unwrap().len()))
            .collect())
    }
    fn get(&self, name: &str, _max: u64) -> Result<Vec<u8>, String> {
        fs::read(self.0.join(name)).map_err(|e| e.to_string())
    }
}

#[test]
fn a_deleted_object_is_missed() {
    let (base, folder) = copy();
    for (name, path) in store::objects(&folder).unwrap() {
        let original = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let (verdict, code) = if name == "manifest.json" {
            ("incomplete", 3)
        } else {
            ("tampered", 1)
        };
        let report = assert_verdict(base.path(), verdict, code);
        // An event is known by its number alone when it is gone.
        let start = match name.split_once('-') {
            Some((start, _)) if name.starts_with("progress/") => start,
            _ => &name,
        };
        let named = report["findings"]
            .as_array()
            .unwrap()
            .iter()
            .any(|f| f["object"].as_str().unwrap().starts_with(start));
        assert!(named || name == "manifest.json", "{name}: {report}");
        fs::write(&path, original).unwrap();
    }
}

/// The tail: the manifest, then more and more of what comes before it. Never harmless, never an accusation without ground.
#[test]
fn a_deleted_tail_is_incomplete_however_long() {
    let (base, folder) = copy();
    let mut events: Vec<String> = store::objects(&folder)
        .unwrap()
        .into_iter()
        .map(|(n, _)| n)
        .filter(|n| n.starts_with("progress/"))
        .collect();
    fs::remove_file(folder.join("manifest.json")).unwrap();
    assert_verdict(base.path(), "incomplete", 3);
    fs::remove_file(folder.join("SHA256SUMS")).unwrap();
    assert_verdict(base.path(), "incomplete", 3);
    while let Some(last) = events.pop() {
        fs::remove_file(folder.join(last)).unwrap();
        assert_verdict(base.path(), "incomplete", 3);
    }
}

#[test]
fn what_was_added_is_named() {
    let (base, folder) = copy();
    let segment = store::objects(&folder)
        .unwrap()
        .into_iter()
        .find(|(n, _)| n.starts_with("volatile/host"))
        .unwrap();
    let second = segment.0.replace("/000001-", "/000002-");
    let other = store::folder(&originals().1[1]).unwrap();
    let foreign = store::objects(&other)
        .unwrap()
        .into_iter()
        .find(|(n, _)| n.starts_with("volatile/sockets"))
        .unwrap();
    for (name, from) in [
        (second, segment.1.clone()),
        (foreign.0, foreign.1),
        ("notes.txt".to_owned(), segment.1.clone()),
        ("volatile/unknown/x".to_owned(), segment.1.clone()),
    ] {
        let path = folder.join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(from, &path).unwrap();
        assert_tampered(base.path(), &name);
        fs::remove_file(path).unwrap();
    }
    // A link where a file should be is not followed.
    let manifest = folder.join("manifest.json");
    fs::rename(&manifest, base.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(base.path().join("elsewhere"), &manifest).unwrap();
    assert_tampered(base.path(), "manifest.json (not a regular file)");
    fs::rename(base.path().join("elsewhere"), &manifest).unwrap();
    fs::create_dir(folder.join("extra")).unwrap();
    assert_tampered(base.path(), "extra/");
}

#[test]
fn reordered_or_swapped_objects_are_named() {
    let (base, folder) = copy();
    let objects = store::objects(&folder).unwrap();
    let events: Vec<&(String, PathBuf)> = objects
        .iter()
        .filter(|(n, _)| n.starts_with("progress/"))
        .collect();
    // Two events change their numbers, hashes and all.
    let renumber = |name: &str, n: usize| format!("progress/{n:06}{}", &name["progress/000000".len()..]);
    let (third, fourth) = (renumber(&events[2].0, 4), renumber(&events[3].0, 3));
    fs::rename(&events[2].1, folder.join(&third)).unwrap();
    fs::rename(&events[3].1, folder.join(&fourth)).unwrap();
    assert_tampered(base.path(), &fourth);
    fs::rename(folder.join(&third), &events[2].1).unwrap();
    fs::rename(folder.join(&fourth), &events[3].1).unwrap();
    assert_verdict(base.path(), "self-consistent", 0);

    // Each object in turn gives way to its like from another capture of the same machine.
    let other = store::folder(&originals().1[1]).unwrap();
    let like = |name: &str| name.split('-').next().unwrap().to_owned();
    for (name, path) in &objects {
        let twin = store::objects(&other)
            .unwrap()
            .into_iter()
            .find(|(n, _)| like(n) == like(name));
        let Some((twin, from)) = twin else { continue };
        let original = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::copy(from, folder.join(&twin)).unwrap();
        let report = assert_verdict(base.path(), "tampered", 1);
        let findings = report["findings"].as_array().unwrap();
        let named = |name: &str| {
            findings
                .iter()
                .any(|f| f["object"].as_str().unwrap().starts_with(&like(name)))
        };
        assert!(named(name), "{name}: {report}");
        fs::remove_file(folder.join(&twin)).unwrap();
        fs::write(path, original).unwrap();
    }

    // The whole capture under another's id.
    let renamed = folder.with_file_name(CaptureId::mint().to_string());
    fs::rename(&folder, renamed).unwrap();
    let report = assert_verdict(base.path(), "tampered", 1);
    let first = &report["findings"][0];
    assert!(
        first["object"].as_str().unwrap().starts_with("progress/000001-"),
        "{report}"
    );
    assert!(
        first["why"].as_str().unwrap().contains("belongs to capture"),
        "{report}"
    );
}

/// Somebody who can write to the store makes the whole capture anew, the host's name and every record of processes changed, with our own code, under a key of
/// their own. Nothing in a plain directory can show that, and it is never called verified; the key shows it.
#[test]
fn forged_anew() {
    let (base, folder) = copy();
    let key = store::verify(base.path(), &[]).unwrap().2["key"]
        .as_str()
        .unwrap()
        .to_owned();
    forge(&folder);
    let report = assert_verdict(base.path(), "self-consistent", 0);
    assert_ne!(report["key"], key);
    let (verdict, code, report) = store::verify(base.path(), &["--expect-key", &key]).unwrap();
    assert_eq!((verdict.as_str(), code), ("tampered", 1));
    assert!(
        report["findings"][0]["why"]
            .as_str()
            .unwrap()
            .contains("not the expected one"),
        "{report}"
    );
}

/// Of processes, every record is dated a century back; the others stay.
fn reforge(folder: &Path, entry: SegmentEntry) -> SegmentEntry {
    if entry.artifact.to_string() != "volatile/processes" {
        return entry;
    }
    let path = folder.join(entry.key().to_string());
    let plain = Segment::open(&fs::read(&path).unwrap())
        .unwrap()
        .plaintext()
        .unwrap();
    let plain = String::from_utf8(plain)
        .unwrap()
        .replace("\"read_at\":\"20", "\"read_at\":\"19");
    let mut packer = RecordPacker::new(entry.artifact, 1).unwrap();
    for line in plain.lines() {
        assert!(packer.push(line.as_bytes()).unwrap().is_none(), "one segment");
    }
    let packed = packer.flush().unwrap().unwrap();
    assert_ne!(packed.entry.sha256, entry.sha256);
    fs::remove_file(path).unwrap();
    fs::write(folder.join(packed.entry.key().to_string()), &packed.bytes).unwrap();
    SegmentEntry {
        receipt: entry.receipt,
        ..packed.entry
    }
}

fn forge(folder: &Path) {
    let id: CaptureId = folder.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut writer = ChainWriter::new(Box::new(CaptureKey::from_seed(&[7; 32])), id);
    let mut chain: Option<Chain> = None;
    for (name, path) in store::objects(folder).unwrap() {
        if !name.starts_with("progress/") {
            continue;
        }
        let object = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let sealed: Value = serde_json::from_slice(&object).unwrap();
        let event: Event = serde_json::from_value(sealed["signed"].clone()).unwrap();
        let what = match event.event {
            What::Opened(mut opening) => {
                opening.key = writer.key();
                opening.host.hostname = stillframe_evidence::text::Text::from("innocent");
                What::Opened(opening)
            }
            other => other,
        };
        let segments: Vec<SegmentEntry> = event
            .segments
            .into_iter()
            .map(|entry| reforge(folder, entry))
            .collect();
        let (key, object, _) = writer.next(event.elapsed_us, segments, what).unwrap();
        fs::write(folder.join(key.to_string()), &object).unwrap();
        match &mut chain {
            Some(chain) => chain.push(&object).unwrap(),
            None => chain = Some(Chain::open(id, &object).unwrap()),
        }
    }
    let chain = chain.unwrap();
    fs::write(folder.join(Key::Sums.to_string()), sums(&chain)).unwrap();
    let manifest = writer.seal(Manifest::of(&chain).unwrap().payload().unwrap());
    fs::write(folder.join(Key::Manifest.to_string()), manifest).unwrap();
}
