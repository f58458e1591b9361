//! Bad luck and malice on the host: what hangs, what is not what it should be, what is killed from outside, a disk that fills up.
//! These mount file systems and therefore need root, which tests/run and a guest have; they say so when they do not.

use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};
use stillframe_tests::{dead_mount::DeadMount, load::Load, programs, slow_folder::SlowFolder, store};

const KINDS: [&str; 8] = [
    "host",
    "processes",
    "sockets",
    "routes",
    "modules",
    "mounts",
    "process-details",
    "sessions",
];

/// What one of these tests does to the machine, every capture of the machine sees: one at a time.
fn alone_and_root() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(
        status.lines().any(|l| l.starts_with("Uid:\t0\t0")),
        "these tests mount file systems: run them as root"
    );
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}

fn capture(base: &Path) -> Output {
    Command::new(programs::agent().unwrap())
        .args(["capture", "--store"])
        .arg(base)
        .output()
        .unwrap()
}

/// Everything else is as complete as on this machine it ever is: no problem but those that `ours` says are of the test's making,
/// and those of processes that this machine hides even from root (the first one, in some containers).
fn assert_rest_complete(base: &Path, ours: impl Fn(&Value) -> bool) {
    for kind in KINDS {
        let outcome = store::outcome(base, kind).unwrap();
        let status = outcome["status"].as_str().unwrap();
        assert!(
            matches!(status, "complete" | "partial" | "unsupported"),
            "{outcome}"
        );
        for problem in outcome["problems"].as_array().into_iter().flatten() {
            let hidden = problem["errno"] == 13
                && problem["source"]
                    .as_str()
                    .is_some_and(|s| s.starts_with("/proc/1/"));
            assert!(hidden || ours(problem), "{kind}: {problem}");
        }
    }
    assert_eq!(store::verify(base, &[]).unwrap().0, "self-consistent");
}

#[test]
fn a_fifo_over_utmp() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("evidence");
    let agent = programs::agent().unwrap();
    // In a mount namespace of its own, so that this machine keeps its /run.
    let script = "mount -t tmpfs run /run && mkfifo /run/fifo && : > /run/utmp && mount --bind /run/fifo /run/utmp && \
                  exec \"$0\" capture --store \"$1\"";
    let began = Instant::now();
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(agent)
        .arg(&base)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(began.elapsed() < Duration::from_secs(30));
    let outcome = store::outcome(&base, "sessions").unwrap();
    assert_eq!(outcome["status"], "partial");
    let problem = &outcome["problems"][0];
    assert_eq!(
        (&problem["source"], &problem["error"]),
        (&"/run/utmp".into(), &"is a FIFO, not a regular file".into())
    );
    assert_rest_complete(&base, |p| p["what"] == "utmp");
}

/// Not dead, but slower than its step may be: the step ends with what it has, and the capture goes on to its end.
#[test]
fn a_step_that_takes_too_long_ends_with_what_it_has() {
    const FILES: u64 = 40;
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    // procfs and sysfs are this machine's; /run is made up.
    let root = folder.path().join("root");
    for name in ["proc", "sys", "run/systemd/sessions"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let script = "mount --rbind /proc \"$1/proc\" && mount --rbind /sys \"$1/sys\" && exec \"$0\" capture --root \"$1\" --store \"$2\"";
    let _slow = SlowFolder::over(
        &root.join("run/systemd/sessions"),
        FILES,
        Duration::from_millis(900),
    )
    .unwrap();
    let base = folder.path().join("evidence");
    let began = Instant::now();
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(programs::agent().unwrap())
        .arg(&root)
        .arg(&base)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let outcome = store::outcome(&base, "sessions").unwrap();
    assert_eq!(outcome["status"], "timed-out", "{outcome}");
    let read = store::records(&base, "sessions").unwrap().len() as u64;
    assert_eq!(outcome["records"], read);
    assert!((1..FILES).contains(&read), "{outcome}");
    assert_eq!(store::verify(&base, &[]).unwrap().0, "self-consistent");
}

#[test]
fn a_dead_file_system_as_somebody_s_program_and_working_directory() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let dead = DeadMount::with_process_in_it().unwrap();
    let base = folder.path().join("evidence");
    let began = Instant::now();
    let output = capture(&base);
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    // One worker's patience, not one for each look at it.
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let records = store::records(&base, "processes").unwrap();
    let process = records.iter().find(|p| p["pid"] == dead.pid()).unwrap();
    assert_eq!(process["cwd"], dead.path().to_str().unwrap());
    assert_eq!(process["exe"], dead.path().join("program").to_str().unwrap());
    let details = store::records(&base, "process-details").unwrap();
    let detail = details.iter().find(|p| p["pid"] == dead.pid()).unwrap();
    assert!(detail["image"].is_null());
    assert!(
        detail["errors"]
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["field"] == "image"),
        "{detail}"
    );
    assert!(!detail["maps"].as_array().unwrap().is_empty() && !detail["environ"].is_null());
    // Every other process has its details.
    let alive = |p: &&Value| p["identity"] == "same" && p["pid"] != 1 && p["pid"] != dead.pid();
    for other in details.iter().filter(alive) {
        // A zombie has neither mappings nor a program.
        assert!(
            other["image"]["sha256"].is_string() || other["maps"].is_null(),
            "{other}"
        );
    }
    let outcome = store::outcome(&base, "process-details").unwrap();
    let named = format!("/proc/{} image", dead.pid());
    let is_named = |p: &Value| {
        p["source"] == named.as_str() && p["error"].as_str().unwrap().contains("said nothing for 2 s")
    };
    assert!(
        outcome["problems"].as_array().unwrap().iter().any(is_named),
        "{outcome}"
    );
    assert_rest_complete(&base, |p| p["what"] == "image");
}

#[test]
fn a_worker_killed_from_outside() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let agent = programs::agent().unwrap();
    // So that there is time to kill it.
    let load = Load::of_program(&programs::lab().unwrap(), 1500).unwrap();
    for (i, signal) in [libc::SIGSEGV, libc::SIGKILL].into_iter().enumerate() {
        let base = folder.path().join(i.to_string());
        let mut child = Command::new(&agent)
            .args(["capture", "--store"])
            .arg(&base)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let worker = loop {
            let children = format!("/proc/{0}/task/{0}/children", child.id());
            let children = std::fs::read_to_string(children).unwrap_or_default();
            match children.split_whitespace().next() {
                Some(pid) => break pid.parse::<i32>().unwrap(),
                None => assert!(child.try_wait().unwrap().is_none(), "it ended without a worker"),
            }
        };
        // Well into its looks at processes.
        std::thread::sleep(Duration::from_millis(40));
        // Rust's runtime answers the first SIGSEGV that no access of memory caused by putting the default action back.
        for _ in 0..if signal == libc::SIGSEGV { 2 } else { 1 } {
            // SAFETY: kill(2) takes no pointer; the process is a child of a child that is still waited for.
            assert_eq!(unsafe { libc::kill(worker, signal) }, 0);
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(child.wait().unwrap().code(), Some(5));
        let killed = format!("was killed by signal {signal}");
        let mut found = Vec::new();
        for kind in KINDS {
            let outcome = store::outcome(&base, kind).unwrap();
            let problems = outcome["problems"].as_array().cloned().unwrap_or_default();
            found.extend(
                problems
                    .into_iter()
                    .filter(|p| p["error"].as_str().unwrap().contains(&killed)),
            );
        }
        assert!(!found.is_empty(), "the item is named");
        assert_rest_complete(&base, |p| p["error"].as_str().unwrap().contains(&killed));
        // Nobody is lost: what it was at is read again.
        let processes = store::records(&base, "processes").unwrap();
        let pids: Vec<u64> = processes.iter().map(|p| p["pid"].as_u64().unwrap()).collect();
        assert!(
            load.pids()
                .all(|pid| pids.iter().filter(|p| **p == u64::from(pid)).count() == 1)
        );
    }
}

#[test]
fn a_full_disk() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let load = Load::of_program(&programs::lab().unwrap(), 600).unwrap();
    let mut failed = 0;
    // From too small to begin to nearly large enough.
    for kib in [64, 280, 300, 320, 360, 400, 440, 480] {
        let base = folder.path().join(kib.to_string());
        std::fs::create_dir(&base).unwrap();
        let mounted = Mounted::tmpfs(&base, kib);
        let output = capture(&base);
        let code = output.status.code().unwrap();
        if code == 2 {
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(
                error.contains("has no room") && error.trim_end().lines().count() == 1,
                "{error}"
            );
            assert!(kib < 280);
            continue;
        }
        let (verdict, _, report) = store::verify(&base, &[]).unwrap();
        match (code, verdict.as_str()) {
            (5, "self-consistent") => {
                let is_failed = |kind: &str| store::outcome(&base, kind).unwrap()["status"] == "failed";
                let kind = KINDS
                    .iter()
                    .find(|kind| is_failed(kind))
                    .expect("an outcome is failed");
                let reason = store::outcome(&base, kind).unwrap()["reason"]
                    .as_str()
                    .unwrap()
                    .to_owned();
                assert!(reason.contains("No space left on device"), "{reason}");
                failed += 1;
            }
            other => panic!("{other:?}: {report}"),
        }
        drop(mounted);
    }
    drop(load);
    assert!(
        failed > 0,
        "no size was small enough for a segment and large enough for the events"
    );
}

/// A file system of a given size, unmounted when dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, kib: u32) -> Self {
        let size = format!("size={kib}k");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "small"])
            .arg(at)
            .status()
            .unwrap();
        assert!(status.success());
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_read_only_store_is_one_clear_line() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let mounted = Mounted::tmpfs(folder.path(), 64);
    let status = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    for path in [folder.path().to_owned(), folder.path().join("new")] {
        let output = capture(&path);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.contains("Read-only file system") && error.trim_end().lines().count() == 1,
            "{error}"
        );
    }
    drop(mounted);
}

/// SIGTERM while a worker hangs: what there is is signed, and the rest is said to be skipped.
#[test]
fn asked_to_stop_it_signs_what_it_has() {
    let _alone = alone_and_root();
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("evidence");
    let _dead = DeadMount::with_process_in_it().unwrap();
    let mut child = Command::new(programs::agent().unwrap())
        .args(["capture", "--store"])
        .arg(&base)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(700));
    // SAFETY: kill(2) takes no pointer; the process is a child that has not been waited for.
    assert_eq!(
        unsafe { libc::kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM) },
        0
    );
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(store::verify(&base, &[]).unwrap().0, "self-consistent");
    assert_eq!(
        store::outcome(&base, "process-details").unwrap()["status"],
        "partial"
    );
    let last = store::outcome(&base, "sessions").unwrap();
    assert_eq!(last["status"], "skipped");
    assert!(last["reason"].as_str().unwrap().contains("stopped"), "{last}");
}
