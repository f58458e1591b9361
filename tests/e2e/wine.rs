//! The agent for Windows, under Wine: the facade holds, and the Linux controller reads what it writes.

use stillframe_tests::{programs, store, wine::Wine};

#[test]
fn a_windows_capture_is_proven_and_shown_on_linux() {
    programs::require(&["x86_64-w64-mingw32-gcc", "wine"]).unwrap();
    let wine = Wine::with(&programs::windows_agent().unwrap()).unwrap();
    let output = wine
        .command()
        .args(["capture", "--store", "evidence", "--case", "wine"])
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        matches!(output.status.code(), Some(0 | 5)),
        "{:?} {said}",
        output.status
    );

    let base = wine.folder().join("evidence");
    let (verdict, code, report) = store::verify(&base, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("self-consistent", 0), "{report}");

    let processes = store::records(&base, "processes").unwrap();
    let named = |p: &serde_json::Value| {
        p["comm"]
            .as_str()
            .is_some_and(|c| c.starts_with("stillframe-agent"))
    };
    let agent = processes
        .iter()
        .find(|p| named(p))
        .expect("the agent sees itself");
    assert!(
        agent["cmdline"].as_array().is_some_and(|c| !c.is_empty()),
        "{agent}"
    );

    let host = store::records(&base, "host").unwrap();
    assert_eq!(host[0]["identity"]["os"], "windows");
    assert!(host[0]["memory"]["total"].as_u64().unwrap() > 0);

    for kind in ["host", "processes", "sockets"] {
        let outcome = store::outcome(&base, kind).unwrap();
        assert_eq!(outcome["status"], "complete", "{outcome}");
    }
    let shown = store::stillframe(&["show", "latest", "--store", base.to_str().unwrap()]).unwrap();
    assert!(
        String::from_utf8_lossy(&shown.stdout).contains("stillframe-agent"),
        "{shown:?}"
    );
}

#[test]
fn a_listening_socket_of_windows_has_its_owner() {
    programs::require(&["x86_64-w64-mingw32-gcc", "wine"]).unwrap();
    let wine = Wine::with(&programs::windows_agent().unwrap()).unwrap();
    // Wine shows the sockets of the machine below it; this test's own is among them.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let output = wine
        .command()
        .args(["capture", "--store", "evidence"])
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
    let sockets = store::records(&wine.folder().join("evidence"), "sockets").unwrap();
    let found = sockets
        .iter()
        .find(|s| s["local"]["port"] == port && s["protocol"] == "tcp");
    let found = found.unwrap_or_else(|| panic!("port {port} in {sockets:?}"));
    assert_eq!(
        (&found["state"], &found["local"]["address"]),
        (&"LISTEN".into(), &"127.0.0.1".into())
    );
}
