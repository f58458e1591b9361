//! The main job on this machine: `capture --local`, and what the other verbs make of it.
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

use serde_json::{Value, json};
use std::{
    ffi::OsString,
    fs,
    io::Write as _,
    net::{TcpListener, TcpStream},
    os::unix::{ffi::OsStringExt as _, fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};
use stillframe_tests::{
    programs,
    store::{self, stillframe},
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn capture(base: &Path) -> Output {
    let agent = programs::agent().unwrap();
    stillframe(&[
        "capture",
        "--local",
        "--store",
        text(base),
        "--case",
        "e2e",
        "--agent",
        text(&agent),
    ])
    .unwrap()
}

/// Done, and partly done where this machine hides something from whoever runs the test.
fn assert_done(output: &Output) {
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn find(records: &[Value], pid: u32) -> &Value {
    records.iter().find(|r| r["pid"] == pid).unwrap()
}

#[test]
fn a_newcomer_holds_a_capture_of_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("evidence");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let output = capture(&base);
    assert_done(&output);
    let state = if output.status.code() == Some(0) {
        "complete"
    } else {
        "partial"
    };
    let said = String::from_utf8(output.stdout).unwrap();
    for expected in [
        "capture ",
        "processes        ",
        "self-consistent",
        "stillframe show",
    ] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
    assert!(!base.join(".partial").exists());

    let listed = stillframe(&["list", "--store", text(&base), "--output", "json"]).unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(
        (
            &listed[0]["case"],
            &listed[0]["state"],
            listed.as_array().unwrap().len()
        ),
        (&json!("e2e"), &json!(state), 1)
    );
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(listed[0]["host"], hostname.trim());
    assert!(listed[0]["started"].as_str().unwrap().starts_with("20"));
    let id = listed[0]["id"].as_str().unwrap();
    // A unique beginning is enough.
    assert!(
        stillframe(&["verify", &id[..13], "--store", text(&base)])
            .unwrap()
            .status
            .success()
    );

    let own = std::process::id();
    let processes = store::records(&base, "processes").unwrap();
    let process = find(&processes, own);
    assert_eq!(
        process["comm"].as_str().unwrap(),
        fs::read_to_string("/proc/self/comm").unwrap().trim_end()
    );
    assert_eq!(process["exe"], text(&std::env::current_exe().unwrap()));
    assert_eq!(process["exe_deleted"], false);
    let arguments: Vec<String> = std::env::args().collect();
    assert_eq!(process["cmdline"], json!(arguments));
    assert!(process["fds"].as_array().unwrap().len() >= 4);
    assert!(process["start_ticks"].as_u64().is_some() && process["capabilities"]["effective"].is_string());

    let details = store::records(&base, "process-details").unwrap();
    let detail = find(&details, own);
    assert_eq!(detail["identity"], "same");
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    assert_eq!(
        detail["image"]["sha256"],
        stillframe_evidence::root::Hash::of(&program).to_string()
    );
    assert!(
        detail["environ"]
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e.as_str().is_some_and(|e| e.starts_with("PATH=")))
    );
    assert!(
        detail["maps"]
            .as_array()
            .unwrap()
            .iter()
            .any(|m| m["path"] == "[stack]")
    );

    let sockets = store::records(&base, "sockets").unwrap();
    let port = listener.local_addr().unwrap().port();
    let at = |state: &str, end: &str| {
        sockets
            .iter()
            .find(|s| s["protocol"] == "tcp" && s["state"] == state && s[end]["port"] == port)
            .unwrap()
    };
    assert_eq!(at("LISTEN", "local")["owners"][0]["pid"], own);
    assert_eq!(at("ESTABLISHED", "remote")["owners"][0]["pid"], own);
    drop(client);

    let (verdict, code, report) = store::verify(&base, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("self-consistent", 0));
    let key = report["key"].as_str().unwrap().to_owned();
    assert!(said.contains(&key), "the key is printed when the capture begins");
    assert_eq!(
        store::verify(&base, &["--expect-key", &key]).unwrap().0,
        "verified"
    );
    // A key that is one, and is another's.
    let other = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let (verdict, code, _) = store::verify(&base, &["--expect-key", other]).unwrap();
    assert_eq!((verdict.as_str(), code), ("tampered", 1));
}

#[test]
fn coreutils_alone_can_check_it() {
    let folder = tempfile::tempdir().unwrap();
    assert_done(&capture(folder.path()));
    let inside = store::folder(folder.path()).unwrap();
    let checked = Command::new("sha256sum")
        .args(["--strict", "-c", "SHA256SUMS"])
        .current_dir(&inside)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let listed = fs::read_to_string(inside.join("SHA256SUMS"))
        .unwrap()
        .lines()
        .count();
    assert_eq!(
        listed + 2,
        store::objects(&inside).unwrap().len(),
        "everything but itself and the manifest"
    );
}

#[test]
fn hostile_names_are_kept_exactly_and_never_reach_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let hostile = b"line\nfeed \x1b[2J\x1b]0;title\x07 \xff\xfe \xc2\x9b31m \xe2\x80\xae end".to_vec();
    let long = vec![b'A'; 128 << 10];
    let mut child = Command::new("sleep");
    child.arg0(OsString::from_vec(hostile.clone())).arg("1000");
    // One string of an argument list holds at most 128 KiB, its NUL included.
    child.env("LONG", OsString::from_vec(long[..100 << 10].to_vec()));
    let child = Running(child.spawn().unwrap());
    let shell = Running(
        Command::new("sh")
            .args(["-c", "read nothing; :"])
            .args((0..128).map(|_| OsString::from_vec(long[..1023].to_vec())))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    // A program whose file name is hostile as well, gone by the time of the capture.
    let path = folder
        .path()
        .join(OsString::from_vec(b"evil\n\x1b[31m\xff".to_vec()));
    fs::copy("/bin/sleep", &path).unwrap();
    let gone = Running(Command::new(&path).arg("1000").spawn().unwrap());
    fs::remove_file(&path).unwrap();
    std::thread::sleep(Duration::from_millis(100));

    let base = folder.path().join("evidence");
    assert_done(&capture(&base));
    let processes = store::records(&base, "processes").unwrap();
    let raw = |value: &Value| -> Vec<u8> {
        serde_json::from_value::<stillframe_evidence::text::Text>(value.clone())
            .unwrap()
            .0
    };
    assert_eq!(raw(&find(&processes, child.0.id())["cmdline"][0]), hostile);
    let exe = find(&processes, gone.0.id());
    assert_eq!(raw(&exe["exe"]), path.clone().into_os_string().into_vec());
    assert_eq!(exe["exe_deleted"], true);
    let words = find(&processes, shell.0.id())["cmdline"].as_array().unwrap();
    assert_eq!(
        words.iter().map(|w| w.as_str().unwrap().len() + 1).sum::<usize>(),
        "sh\0-c\0read nothing; :\0".len() + (128 << 10)
    );
    let details = store::records(&base, "process-details").unwrap();
    let environ = find(&details, child.0.id())["environ"].as_array().unwrap();
    assert!(
        environ
            .iter()
            .any(|e| e.as_str().is_some_and(|e| e.len() == "LONG=".len() + (100 << 10)))
    );

    for arguments in [
        &["show", "latest"][..],
        &["show", "latest", "--output", "json"],
        &["cat", "processes", "latest"],
        &["verify", "latest"],
        &["list"],
    ] {
        let output = stillframe(&[arguments, &["--store", text(&base)]].concat()).unwrap();
        let said = String::from_utf8(output.stdout).expect("UTF-8");
        let raw = said
            .chars()
            .find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(raw, None, "{arguments:?}");
    }
    // As it lies in the store, too: zstdcat on a terminal is what people do.
    for (name, path) in store::objects(&store::folder(&base).unwrap()).unwrap() {
        if name.starts_with("volatile/processes/") {
            let bytes = fs::read(path).unwrap();
            let plain = stillframe_evidence::frames::Segment::open(&bytes)
                .unwrap()
                .plaintext()
                .unwrap();
            assert!(
                plain
                    .iter()
                    .all(|b| *b == b'\n' || (0x20..0x7f).contains(b) || *b >= 0xa0)
            );
        }
    }
}

/// Control characters grow six-fold as JSON: an environment of 1.6 MiB is more than a record may hold.
#[test]
fn a_giant_environment_costs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let one = vec![1u8; 100 << 10];
    let giants: Vec<Running> = (0..3)
        .map(|_| {
            let mut command = Command::new("sleep");
            command.arg("1000").env_clear();
            command.envs((0..16).map(|i| (format!("V{i}"), OsString::from_vec(one.clone()))));
            Running(command.spawn().unwrap())
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    let base = folder.path().join("evidence");
    assert_done(&capture(&base));
    let details = store::records(&base, "process-details").unwrap();
    for giant in &giants {
        let parts: Vec<&Value> = details.iter().filter(|d| d["pid"] == giant.0.id()).collect();
        assert!(parts.len() > 1 && parts[0]["image"]["sha256"].is_string());
        let strings: Vec<&str> = parts
            .iter()
            .flat_map(|p| p["environ"].as_array().into_iter().flatten())
            .map(|s| s.as_str().unwrap())
            .collect();
        assert_eq!(strings.len(), 16);
        assert!(
            strings
                .iter()
                .all(|s| s.bytes().filter(|b| *b == 1).count() == one.len())
        );
        assert!(
            parts
                .iter()
                .any(|p| p["maps"].as_array().is_some_and(|m| !m.is_empty()))
        );
    }
    let problems = store::outcome(&base, "process-details").unwrap()["problems"].clone();
    assert!(!problems.to_string().contains("worker"), "{problems}");
}

/// A metadata service on loopback, by the variable that the SDKs use; version 2 only: no answer without a token.
#[test]
fn the_instance_identity_is_bound_into_the_first_event() {
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = service.local_addr().unwrap();
    let served = std::thread::spawn(move || {
        for _ in 0..3 {
            let (mut stream, _) = service.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                std::io::Read::read_exact(&mut stream, &mut byte).unwrap();
                request.push(byte[0]);
            }
            let request = String::from_utf8(request).unwrap().to_lowercase();
            let authorized = request.contains("x-aws-ec2-metadata-token: secret");
            let body = match request.split_whitespace().collect::<Vec<_>>()[..2] {
                ["put", "/latest/api/token"] if request.contains("x-aws-ec2-metadata-token-ttl-seconds:") => {
                    "secret"
                }
                ["get", "/latest/dynamic/instance-identity/document"] if authorized => {
                    "{\"instanceId\": \"i-0\"}"
                }
                ["get", "/latest/dynamic/instance-identity/rsa2048"] if authorized => "signature",
                _ => panic!("{request}"),
            };
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
            .unwrap();
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(programs::agent().unwrap())
        .args(["capture", "--store", text(folder.path())])
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{address}/"))
        .output()
        .unwrap();
    assert_done(&output);
    served.join().unwrap();
    let manifest = fs::read(store::folder(folder.path()).unwrap().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let instance = &manifest["signed"]["host"]["instance"];
    assert_eq!(
        (&instance["document"], &instance["rsa2048"]),
        (&json!("{\"instanceId\": \"i-0\"}"), &json!("signature"))
    );
    let everything = store::objects(&store::folder(folder.path()).unwrap()).unwrap();
    assert!(
        everything
            .iter()
            .all(|(_, path)| !fs::read(path).unwrap().windows(6).any(|w| w == b"secret"))
    );
}

#[test]
fn two_captures_at_once_into_one_store() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("evidence");
    std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| capture(&base)));
        both.into_iter().for_each(|one| assert_done(&one.join().unwrap()));
    });
    let listed = stillframe(&["list", "--store", text(&base), "--output", "json"]).unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    for one in listed.as_array().unwrap() {
        let output = stillframe(&["verify", one["id"].as_str().unwrap(), "--store", text(&base)]).unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}

#[test]
fn a_wrong_store_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), b"").unwrap();
    let cases = [
        (folder.path().join("file"), "not a directory"),
        (
            folder.path().join("no/where"),
            "its parent directory does not exist",
        ),
        // Nobody can make a folder here, root included.
        (Path::new("/sys/evidence").to_owned(), "cannot be made"),
        (Path::new("/sys/kernel").to_owned(), "cannot be written to"),
    ];
    for (path, says) in cases {
        let output = capture(&path);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.contains(says) && error.trim_end().lines().count() == 1,
            "{error}"
        );
    }
    let output = stillframe(&["verify", "latest", "--store", text(&folder.path().join("none"))]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output = stillframe(&["verify", "latest", "--store", text(folder.path())]).unwrap();
    assert_eq!(
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).contains("no capture")
        ),
        (Some(2), true)
    );
}

#[test]
fn a_plan_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("evidence");
    let agent = programs::agent().unwrap();
    let output = Command::new(agent)
        .args(["capture", "--plan", "--output", "json", "--store", text(&base)])
        .output()
        .unwrap();
    let kinds: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let kinds: Vec<&str> = kinds.iter().map(|k| k["kind"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        [
            "host",
            "processes",
            "sockets",
            "routes",
            "modules",
            "mounts",
            "process-details",
            "sessions"
        ]
    );
    assert!(output.status.success() && !base.exists());
}

/// Whoever runs the tests, the agent here runs as nobody in particular.
#[test]
fn without_privilege_it_says_what_it_could_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let agent = folder.path().join("stillframe-agent");
    fs::copy(programs::agent().unwrap(), &agent).unwrap();
    let base = folder.path().join("evidence");
    fs::create_dir(&base).unwrap();
    for path in [folder.path(), &base] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let mut command = Command::new(&agent);
    command
        .args(["capture", "--store", text(&base)])
        .current_dir(folder.path());
    let is_root = fs::metadata("/proc/self")
        .map(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
        .unwrap();
    if is_root {
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert_eq!(store::verify(&base, &[]).unwrap().0, "self-consistent");
    let outcome = store::outcome(&base, "processes").unwrap();
    assert_eq!(outcome["status"], "partial");
    let denied = |what: &str| {
        let problems = outcome["problems"].as_array().unwrap();
        problems
            .iter()
            .any(|p| p["what"] == what && p["errno"] == 13 && p["count"].as_u64().unwrap() > 0)
    };
    assert!(["fds", "cwd"].into_iter().all(denied), "{outcome}");
    // Process 1 is somebody else's: its record says what of it could not be read, and its sockets are not called ownerless.
    let processes = store::records(&base, "processes").unwrap();
    let first = find(&processes, 1);
    assert!(
        first["errors"]
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["field"] == "fds" && e["errno"] == 13),
        "{first}"
    );
    assert!(first["comm"].is_string());
    let sockets = store::records(&base, "sockets").unwrap();
    assert!(sockets.iter().all(|s| s["ownership"] != "ownerless"));
}

#[test]
fn a_stream_is_received_and_a_broken_one_leaves_a_valid_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let stream = Command::new(programs::agent().unwrap())
        .args(["capture", "--store", "-"])
        .stderr(Stdio::null())
        .output()
        .unwrap();
    assert_done(&stream);
    let done = stream.status.code();
    let stream = stream.stdout;
    let receive = |name: &str, bytes: &[u8]| {
        let base = folder.path().join(name);
        let mut child = Command::new(programs::controller().unwrap())
            .args(["receive", "--store", text(&base)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may refuse before the end.
        let _ = child.stdin.take().unwrap().write_all(bytes);
        (base, child.wait_with_output().unwrap())
    };
    let (base, output) = receive("whole", &stream);
    // Partly done at one end is partly done at the other.
    assert_eq!(output.status.code(), done, "{output:?}");
    assert_eq!(store::verify(&base, &[]).unwrap().0, "self-consistent");

    // Plain tar makes the same folder of it.
    let plain = folder.path().join("plain");
    fs::create_dir(&plain).unwrap();
    fs::write(folder.path().join("stream.tar"), &stream).unwrap();
    let tar = Command::new("tar")
        .args(["-xf", "../stream.tar"])
        .current_dir(&plain)
        .status()
        .unwrap();
    assert!(tar.success());
    assert_eq!(store::verify(&plain, &[]).unwrap().0, "self-consistent");

    for tenth in 1..10 {
        let (base, output) = receive(&format!("cut-{tenth}"), &stream[..stream.len() * tenth / 10]);
        if !base.join("evidence").exists() {
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            continue;
        }
        assert!(matches!(output.status.code(), Some(3 | 5)), "{output:?}");
        let (verdict, _, report) = store::verify(&base, &[]).unwrap();
        // The last tenths may hold only the padding behind the manifest.
        assert!(
            matches!(verdict.as_str(), "incomplete" | "self-consistent"),
            "{report}"
        );
        if verdict == "incomplete" {
            let salvaged = stillframe(&["salvage", "latest", "--store", text(&base)]).unwrap();
            assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
        }
    }

    // What somebody else put into the stream does not land.
    let hostile = |path: &[u8], kind: tar::EntryType| {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_size(4);
        header.set_cksum();
        let mut archive = tar::Builder::new(Vec::new());
        archive.append(&header, &b"evil"[..]).unwrap();
        archive.into_inner().unwrap()
    };
    let id = "0197c9e2-0000-7000-8000-000000000000";
    for (i, (path, kind)) in [
        (b"../../outside".to_vec(), tar::EntryType::Regular),
        (
            format!("evidence/local/{id}/../../../../outside").into_bytes(),
            tar::EntryType::Regular,
        ),
        (b"/tmp/outside".to_vec(), tar::EntryType::Regular),
        (
            format!("evidence/local/{id}/manifest.json").into_bytes(),
            tar::EntryType::Symlink,
        ),
        (b"x".to_vec(), tar::EntryType::GNULongName),
    ]
    .into_iter()
    .enumerate()
    {
        let (base, output) = receive(&format!("hostile-{i}"), &hostile(&path, kind));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(!base.join("evidence").exists() && !folder.path().join("outside").exists());
    }
}

#[test]
fn killed_at_any_moment_it_leaves_what_salvage_reads() {
    let folder = tempfile::tempdir().unwrap();
    let agent = programs::agent().unwrap();
    let mut incomplete = 0;
    for moment in 0..12 {
        let base = folder.path().join(format!("{moment}"));
        let mut child = Command::new(&agent)
            .args(["capture", "--store", text(&base)])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(4 + moment * 5));
        child.kill().unwrap();
        child.wait().unwrap();
        let Ok((verdict, code, report)) = store::verify(&base, &[]) else {
            continue;
        };
        match verdict.as_str() {
            "self-consistent" => assert_eq!(code, 0),
            "incomplete" => {
                assert_eq!(code, 3);
                let salvaged =
                    stillframe(&["salvage", "latest", "--store", text(&base), "--output", "json"]).unwrap();
                if report["events"] == 0 {
                    assert_eq!(salvaged.status.code(), Some(3), "{salvaged:?}");
                    continue;
                }
                incomplete += 1;
                assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
                assert_eq!(store::verify(&base, &[]).unwrap().1, 4);
                // Every acknowledged segment is there and right, so `cat` gives every record of a step that has an outcome.
                let shown =
                    stillframe(&["show", "latest", "--store", text(&base), "--output", "json"]).unwrap();
                let view: Value = serde_json::from_slice(&shown.stdout).unwrap();
                for outcome in view["outcomes"].as_array().unwrap() {
                    let kind = outcome["kind"].as_str().unwrap();
                    let records = store::records(&base, kind).unwrap().len();
                    assert_eq!(json!(records), outcome["records"], "{kind}");
                }
            }
            other => panic!("{other}: {report}"),
        }
    }
    assert!(incomplete > 0, "no kill came in the middle");
}
