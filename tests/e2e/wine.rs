//! The agent for Windows, under Wine: the facade holds, and the Linux controller reads what it writes.

use std::io::{BufRead as _, BufReader};
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

/// Opens TCP sockets (one that listens, one connected to it) and a UDP one, says their ports, and waits for the end of its input. Wine's server
/// holds a socket alone until its program sends or receives, and so gives it no owner before.
const LISTENER: &str = r#"
#include <winsock2.h>
#include <stdio.h>
static int port(SOCKET s) {
    struct sockaddr_in a; int n = sizeof a;
    getsockname(s, (struct sockaddr *)&a, &n);
    return ntohs(a.sin_port);
}
int main(void) {
    WSADATA data; WSAStartup(0x202, &data);
    struct sockaddr_in a = { 0 };
    a.sin_family = AF_INET; a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    SOCKET tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);
    SOCKET client = socket(AF_INET, SOCK_STREAM, 0);
    bind(tcp, (struct sockaddr *)&a, sizeof a); listen(tcp, 1);
    bind(udp, (struct sockaddr *)&a, sizeof a);
    a.sin_port = htons(port(tcp));
    connect(client, (struct sockaddr *)&a, sizeof a); send(client, "x", 1, 0);
    a.sin_port = htons(port(udp));
    sendto(udp, "x", 1, 0, (struct sockaddr *)&a, sizeof a);
    printf("%lu %d %d %d\n", GetCurrentProcessId(), port(tcp), port(client), port(udp)); fflush(stdout);
    getchar();
    return 0;
}
"#;

#[test]
fn sockets_of_windows_have_their_owners() {
    programs::require(&["x86_64-w64-mingw32-gcc", "wine"]).unwrap();
    let wine = Wine::with(&programs::windows_agent().unwrap()).unwrap();
    let mut listener = wine.start(LISTENER, &["-lws2_32"]).unwrap();
    let mut line = String::new();
    BufReader::new(listener.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let said: Vec<u64> = line.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let [pid, tcp, client, udp] = said[..] else {
        panic!("{line}")
    };
    // Wine shows the sockets of the machine below it, too: this one has no owner in there.
    let outside = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let outside = u64::from(outside.local_addr().unwrap().port());
    let output = wine
        .command()
        .args(["capture", "--store", "evidence"])
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
    let sockets = store::records(&wine.folder().join("evidence"), "sockets").unwrap();
    let socket = |protocol: &str, port: u64| {
        let found = sockets
            .iter()
            .find(|s| s["local"]["port"] == port && s["protocol"] == protocol);
        found.unwrap_or_else(|| panic!("{protocol} {port} in {sockets:?}"))
    };
    let listening = socket("tcp", tcp);
    assert_eq!(
        (&listening["state"], &listening["local"]["address"]),
        (&"LISTEN".into(), &"127.0.0.1".into())
    );
    let connected = socket("tcp", client);
    assert_eq!(
        (&connected["state"], &connected["remote"]["port"]),
        (&"ESTABLISHED".into(), &tcp.into())
    );
    for owned in [connected, socket("udp", udp)] {
        assert_eq!(owned["owners"][0]["pid"], pid, "{owned}");
    }
    let unowned = socket("tcp", outside);
    assert!(
        unowned["owners"]
            .as_array()
            .is_none_or(|o| o.iter().all(|o| o["pid"] != pid)),
        "{unowned}"
    );
    drop(listener.stdin.take());
    listener.wait().unwrap();
}
