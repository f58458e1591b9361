//! From an order to a verified capture: the unmodified programs through the unmodified SDK, Systems Manager as the only way in, S3 as the only way out.

use anyhow::{Context as _, Result};
use memchr::memmem::Finder;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard, OnceLock},
    time::{Duration, Instant},
};
use stillframe_evidence::root::Hash;
use stillframe_tests::{
    captured::{self, MARKERS},
    cloud::{
        BUCKET, Cloud, DOCUMENTS, INSTANCE, OPEN, ORDERS, SESSION_ROLE, WRITER, checksum,
        document::{render, validate},
        metadata, policy,
        post::Post,
        principals::{Principal, SECRET, TOKEN},
        ssm::{Fate, Host},
    },
    guest::{JOIN_NETWORK, Machine},
    programs, volatility,
};

fn cloud() -> &'static Cloud {
    static CLOUD: OnceLock<Cloud> = OnceLock::new();
    CLOUD.get_or_init(|| Cloud::start().unwrap())
}

/// Tests that make faults, or that count what runs on the instance, take turns.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}

/// The agent is staged where the test built it.
fn order<'a>(agent: &'a str, url: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = [
        "capture",
        "--instance",
        INSTANCE,
        "--agent-path",
        agent,
        "--host-endpoint-url",
        url,
        "--output",
        "json",
    ];
    [&base[..], more].concat()
}

fn agent() -> String {
    programs::agent().unwrap().to_str().unwrap().to_owned()
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// What it said of what went wrong.
fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Orders and does not wait.
fn ordered(cloud: &Cloud, more: &[&str]) -> String {
    let (agent, url) = (agent(), cloud.gate.url());
    let output = cloud.controller(&order(&agent, &url, more)).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    json_of(&output)["capture"].as_str().unwrap().to_owned()
}

/// Orders, and waits until the store has taken so many objects and holds the next.
fn ordered_and_held(cloud: &Cloud, puts: u64, more: &[&str]) -> String {
    cloud.gate.faults.hold(WRITER, puts);
    let id = ordered(cloud, more);
    let began = Instant::now();
    while cloud.gate.faults.held() == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is held");
        std::thread::sleep(Duration::from_millis(20));
    }
    id
}

fn status(cloud: &Cloud, id: &str) -> (Option<i32>, Value) {
    let output = cloud.controller(&["status", id, "--output", "json"]).unwrap();
    (output.status.code(), json_of(&output))
}

/// Waits for a state of the instance.
fn wait_for(cloud: &Cloud, id: &str, wanted: &[&str]) -> Value {
    let began = Instant::now();
    loop {
        let (_, view) = status(cloud, id);
        if view["hosts"][0]["state"]
            .as_str()
            .is_some_and(|s| wanted.contains(&s))
        {
            return view;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{wanted:?}: {view}");
    }
}

#[test]
fn an_order_becomes_a_verified_capture() -> Result<()> {
    let _alone = alone();
    let cloud = cloud();
    let (agent, url) = (agent(), cloud.gate.url());
    let mode = || fs::metadata(&agent).map(|file| file.mode());
    let before = mode()?;
    let output = cloud
        .controller(&order(&agent, &url, &["--case", "C-17", "--watch"]))
        .unwrap();
    assert_eq!(mode()?, before, "an agent that is ready is left as it is");
    let view = json_of(&output);
    let host = &view["hosts"][0];
    let outcome = host["told"]["outcome"].as_str().unwrap();
    assert_eq!(host["state"], outcome, "{view}");
    // This machine may hide something even from root; then the capture is partial, and the code says so.
    assert_eq!(
        output.status.code(),
        Some(if outcome == "complete" { 0 } else { 5 }),
        "{output:?}"
    );
    let id = view["capture"].as_str().unwrap();
    let (verdict, code, report) = cloud.verify(id, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("verified", 0), "{report}");
    // The key that came by Systems Manager is that of the chain in S3; another is not.
    let key = host["told"]["key"].as_str().unwrap();
    assert_eq!(cloud.verify(id, &["--expect-key", key]).unwrap().0, "verified");
    // The order reached the agent, and stands in the signed chain.
    let shown = json_of(&cloud.controller(&["show", id, "--output", "json"]).unwrap());
    assert_eq!(shown["summary"]["case"], "C-17", "{shown}");
    // Its first event says how the host's clock stands to the store's, which tells whole seconds.
    let prefix = format!(
        "{BUCKET}?list-type=2&prefix=evidence%2F{}%2F{id}%2Fprogress%2F000001",
        WRITER.replace(':', "%3A")
    );
    let (_, list) = responder(cloud, &prefix);
    let first = list
        .split("<Key>")
        .nth(1)
        .unwrap()
        .split("</Key>")
        .next()
        .unwrap();
    let (_, event) = responder(cloud, &format!("{BUCKET}/{}", first.replace(':', "%3A")));
    // Who that is to AWS stands in the case, and the host does not learn it.
    let (_, kept) = responder(cloud, &format!("{BUCKET}/cases/C-17/{id}/order.json"));
    let arn = "arn:aws:iam::123456789012:user/responder";
    assert!(kept.contains(arn) && !event.contains(arn), "{kept} {event}");
    // The host is one of its own, and the agent says that it sees no more.
    assert_eq!(shown["host"]["agent_contained"], true, "{shown}");
    let clock = event.split("\"behind_store_us\":").nth(1).unwrap();
    let ahead: i64 = clock.split([',', '}']).next().unwrap().parse().unwrap();
    assert!(ahead.abs() < 5_000_000, "{ahead}");
    let (code, again) = status(cloud, id);
    assert_eq!(
        (code, &again["hosts"][0]["state"]),
        (output.status.code(), &host["state"])
    );
    Ok(())
}

/// A host whose own role has no right writes with a session that is lent to it, renewed while it works, and good for this capture alone.
#[test]
fn credentials_are_lent_for_one_capture() -> Result<()> {
    let _alone = alone();
    let cloud = cloud();
    let (agent, url) = (agent(), cloud.gate.url());
    // No metadata service: it has no role at all.
    cloud.ssm.host(Host {
        id: "i-0bare".to_owned(),
        fate: Fate::Executes(vec![("AWS_EC2_METADATA_DISABLED".to_owned(), "true".to_owned())]),
        profile: None,
        ..Host::default()
    });
    let lending = |role| {
        let more = [
            "--credentials",
            "session",
            "--session-role",
            role,
            "--order-bucket",
            ORDERS,
            "--watch",
        ];
        let mut arguments = order(&agent, &url, &more);
        arguments[2] = "i-0bare";
        arguments
    };
    // Another role is not the responder's to lend, and nothing is sent then.
    let refused = cloud.controller(&lending("arn:aws:iam::123456789012:role/other"))?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    for part in ["AccessDenied", "role/other"] {
        assert!(said(&refused).contains(part), "{refused:?}");
    }
    let arguments = lending(SESSION_ROLE);
    // Shorter than the capture: without new ones it could not end.
    cloud.gate.principals.shorten_sessions(40);
    cloud.gate.faults.hold("AROALABlent:i-0bare", 3);
    let mut watch = cloud.responder().unwrap();
    watch
        .args(&arguments)
        .args(["--store", &format!("s3://{BUCKET}")]);
    let watch = watch
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while cloud.gate.faults.held() == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is held");
        std::thread::sleep(Duration::from_millis(50));
    }
    let (first_key, first) = cloud.gate.principals.session("AROALABlent:i-0bare").unwrap();
    // While it is at work: no secret in what runs.
    let mut seen = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
        if line.contains("--lent") {
            seen += 1;
            for text in [line, String::from_utf8_lossy(&read("environ")).into_owned()] {
                assert!(!text.contains(SECRET) && !text.contains(TOKEN), "{text}");
                assert!(
                    !text.contains("X-Amz-Signature"),
                    "the address of the order: {text}"
                );
            }
        }
    }
    assert!(seen > 0, "the agent was not seen");
    // Until it has read its order again, by the rights that it has.
    let has_read = || {
        let log = cloud.gate.log.lock().unwrap();
        let mut reads = log
            .iter()
            .filter(|d| d.userid == "AROALABlent:i-0bare" && d.action == "s3:GetObject");
        reads.any(|d| d.resource.contains(ORDERS) && d.refused.is_none())
    };
    while !has_read() {
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "the order was not read again"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    // What comes from here on is signed with the new ones, or refused.
    while first.expires > Some(jiff::Timestamp::now()) {
        std::thread::sleep(Duration::from_millis(100));
    }
    cloud.gate.faults.release();
    let output = watch.wait_with_output().unwrap();
    cloud.gate.principals.shorten_sessions(0);
    let view = json_of(&output);
    assert!(
        ["complete", "partial"].contains(&view["hosts"][0]["state"].as_str().unwrap()),
        "{output:?}"
    );
    let id = view["capture"].as_str().unwrap();
    let (verdict, code, report) = cloud.verify(id, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("verified", 0), "{report}");
    let (last_key, last) = cloud.gate.principals.session("AROALABlent:i-0bare").unwrap();
    assert_ne!(first_key, last_key, "they were not renewed");
    assert!(first.expires < last.expires);
    // What was lent is taken back.
    let order_key = format!("{ORDERS}/orders/{id}/i-0bare.json");
    assert_eq!(responder(cloud, &order_key).0, 404);
    // Who holds the session can write this capture, and nothing else: beside every refusal stands what is allowed.
    let (key, session) = lend(cloud, id);
    let ask = |method: &str, path: &str, once: bool| {
        let mut headers = vec![checksum("x")];
        headers.extend(once.then(|| "if-none-match: *".to_owned()));
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let headers = if method == "PUT" { &headers[..] } else { &[] };
        let who = (&key[..], &session.secret[..], session.token.as_deref());
        let body = if method == "PUT" { "x" } else { "" };
        cloud.ask(who, method, path, headers, body).unwrap()
    };
    let own = format!("{BUCKET}/evidence/AROALABlent:i-0bare");
    assert_eq!(ask("PUT", &format!("{own}/{id}/x"), true).0, 200);
    for (method, path, once) in [
        ("PUT", format!("{own}/{id}/y"), false),
        (
            "PUT",
            format!("{own}/{}/x", "01a21079-f1eb-70c6-ab5d-18fbb733dcd4"),
            true,
        ),
        ("PUT", format!("{BUCKET}/evidence/{WRITER}/{id}/x"), true),
        ("PUT", format!("{BUCKET}/cases/x"), true),
        ("PUT", order_key.clone(), true),
        ("GET", format!("{own}/{id}/x"), false),
        ("GET", format!("{ORDERS}/orders/{id}/i-0lab.json"), false),
        ("GET", format!("{BUCKET}?list-type=2"), false),
        ("DELETE", format!("{own}/{id}/x"), false),
    ] {
        let (status, body) = ask(method, &path, once);
        assert_eq!(status, 403, "{method} {path}: {body}");
        assert!(body.contains("AccessDenied"), "{method} {path}: {body}");
    }
    assert_eq!(ask("GET", &order_key, false).0, 404, "its own order it may read");
    Ok(())
}

/// What the responder reads of S3.
fn responder(cloud: &Cloud, path: &str) -> (u16, String) {
    let variable = |name: &str| {
        let found = cloud.responder.iter().find(|(n, _)| n == name);
        found.unwrap().1.clone()
    };
    let (key, secret) = (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"));
    cloud.ask((&key, &secret, None), "GET", path, &[], "").unwrap()
}

/// A session as the responder lends it, for a capture that is over.
fn lend(cloud: &Cloud, id: &str) -> (String, Principal) {
    let (_, one) = cloud.gate.principals.session("AROALABlent:i-0bare").unwrap();
    assert!(one.session.as_ref().unwrap().to_string().contains(id));
    let seconds = Some(600);
    let again = &cloud.gate.principals;
    again.add(&one.userid, &one.arn, one.policies, one.session, seconds)
}

/// Into a guest by Systems Manager, out of it by S3, its memory included; and the credentials that carried it are not in the image.
#[test]
fn the_memory_of_a_guest_that_was_ordered_opens_in_volatility() {
    let cloud = cloud();
    let post = Post::open().unwrap();
    let role = vec![policy("instance-role.json").unwrap()];
    let metadata = metadata::start(cloud.gate.principals.clone(), "i-0guest", "instances", role).unwrap();
    cloud.ssm.host(Host {
        id: "i-0guest".to_owned(),
        fate: Fate::InGuest(post.clone()),
        ..Host::default()
    });
    let machine = Machine {
        memory: 512,
        disk: 16,
        network: true,
        ..Machine::default()
    };
    let script = format!(
        "{MARKERS}{JOIN_NETWORK}sleep 1\nexport AWS_EC2_METADATA_SERVICE_ENDPOINT=http://10.0.2.2:{}\n{}",
        metadata.port(),
        post.script()
    );
    let (agent, lab) = (programs::static_agent().unwrap(), programs::static_lab().unwrap());
    let files = [("stillframe-agent", agent.as_path()), ("lab", lab.as_path())];
    let mut guest = machine.boot(&script, &files, &["virtio_net"]).unwrap();
    let sha256 = Hash::of(&fs::read(&agent).unwrap()).to_string();
    let url = format!("http://10.0.2.2:{}", cloud.gate.port());
    let order = [
        "capture",
        "--instance",
        "i-0guest",
        "--agent-path",
        "/stillframe-agent",
        "--agent-sha256",
        &sha256,
        "--host-endpoint-url",
        &url,
        "--profile",
        "memory",
        "--watch",
        "--output",
        "json",
    ];
    let ordered = cloud.controller(&order).unwrap();
    assert_eq!(ordered.status.code(), Some(0), "{ordered:?}\n{}", guest.console());
    let id = json_of(&ordered)["capture"].as_str().unwrap().to_owned();
    let (verdict, code, report) = cloud.verify(&id, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("verified", 0), "{report}");
    let folder = captured::scratch().unwrap();
    let to = folder.path().join("fetched");
    let fetched = cloud
        .controller(&["fetch", &id, "--to", to.to_str().unwrap(), "--output", "json"])
        .unwrap();
    assert_eq!(fetched.status.code(), Some(0), "{fetched:?}");
    let told = json_of(&fetched);
    assert_eq!(
        (&told["differences"], &told["holes"]),
        (&json!([]), &json!([])),
        "{told}"
    );
    let rows = volatility::rows(&to, "image.lime", &["linux.pslist"]).unwrap();
    for marker in ["marker-one", "marker-two", "marker-three"] {
        assert!(rows.iter().any(|row| row["COMM"] == marker), "{marker}: {rows:?}");
    }

    // The ends of secrets, too: a copy may be cut by the end of a page.
    let secrets = cloud.gate.principals.secrets();
    let ends = secrets.iter().map(|secret| &secret[secret.len() - 16..]);
    let finders: Vec<Finder> = ends.map(Finder::new).collect();
    let held = |path: &Path| {
        let image = fs::read(path).unwrap();
        finders
            .iter()
            .filter(|finder| finder.find(&image).is_some())
            .count()
    };
    assert_eq!(held(&to.join("image.lime")), 0, "credentials are in the image");
    let truth = folder.path().join("truth");
    guest.truth(&truth).unwrap();
    assert!(held(&truth) > 0, "they were in the guest's memory all the same");
    let records = cloud.controller(&["cat", "memory", &id]).unwrap();
    let records = String::from_utf8_lossy(&records.stdout).into_owned();
    assert!(records.contains("a secret of this capture"), "{records}");
}

#[test]
fn what_was_not_sent_is_said_to_be_so() -> Result<()> {
    // A bucket of its own: `latest` is looked at.
    let cloud = Cloud::start()?;
    let (agent, url) = (agent(), cloud.gate.url());
    let keys = || {
        let (status, list) = responder(&cloud, &format!("{BUCKET}?list-type=2&prefix=cases%2F"));
        assert_eq!(status, 200, "{list}");
        list.matches("<Key>").count()
    };
    let to = |kind: &'static str, whom: &'static str| {
        let mut arguments = order(&agent, &url, &[]);
        (arguments[1], arguments[2]) = (kind, whom);
        cloud.controller(&arguments)
    };
    // Nobody has that tag.
    let refused = to("--tag", "Role=nobody")?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(said(&refused).contains("with that tag"), "{refused:?}");
    // No such profile.
    let refused = cloud.controller(&order(&agent, &url, &["--profile", "everything"]))?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert_eq!(
        (keys(), cloud.ssm.taken()),
        (0, 0),
        "they were written down, or sent"
    );
    // A capture that is there does not answer for an order that came to nothing.
    let view = json_of(&cloud.controller(&order(&agent, &url, &["--watch"]))?);
    assert_eq!(cloud.verify("latest", &[])?.2["capture"], view["capture"]);
    let refused = to("--instance", "i-0nothere")?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    for part in ["InvalidInstanceId", "was not sent", "stillframe doctor"] {
        assert!(said(&refused).contains(part), "{part}: {refused:?}");
    }
    let status = cloud.controller(&["status", "latest"])?;
    assert!(said(&status).contains("InvalidInstanceId"), "{status:?}");
    let verified = cloud.controller(&["verify", "latest"])?;
    assert_eq!(verified.status.code(), Some(2), "{verified:?}");
    assert!(said(&verified).contains("the latest order is"), "{verified:?}");
    // Of one whose answer was lost that is not said; and it is not sent again.
    let taken = cloud.ssm.taken();
    cloud.ssm.lose_an_answer();
    let lost = to("--instance", INSTANCE)?;
    assert_eq!(lost.status.code(), Some(2), "{lost:?}");
    for output in [lost, cloud.controller(&["status", "latest"])?] {
        assert!(said(&output).contains("Run Command's history"), "{output:?}");
        assert!(!said(&output).contains("the order was not sent:"), "{output:?}");
    }
    assert_eq!(cloud.ssm.taken(), taken + 1);
    Ok(())
}

/// An order for memory that got none says so, and why.
#[test]
fn what_is_missing_is_told_by_systems_manager() -> Result<()> {
    let _alone = alone();
    let cloud = cloud();
    let (agent, url) = (agent(), cloud.gate.url());
    let output = cloud.controller(&order(&agent, &url, &["--profile", "memory", "--watch"]))?;
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let view = json_of(&output);
    let why = view["hosts"][0]["told"]["why"].as_str().unwrap_or_default();
    assert!(
        why.contains("memory unsupported (") && why.contains("/proc/kcore"),
        "{view}"
    );
    Ok(())
}

/// Its policy lets a responder order by the project's documents, and run nothing else.
#[test]
fn a_responder_runs_no_other_document() -> Result<()> {
    let cloud = cloud();
    cloud
        .ssm
        .document("AWS-RunShellScript", document("Stillframe-Capture"))?;
    let (agent, url) = (agent(), cloud.gate.url());
    let refused = cloud.controller(&order(&agent, &url, &["--document", "AWS-RunShellScript"]))?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    for part in ["AccessDenied", "document/AWS-RunShellScript"] {
        assert!(said(&refused).contains(part), "{refused:?}");
    }
    Ok(())
}

#[test]
fn a_plan_says_who_is_meant_and_touches_nothing() {
    let cloud = cloud();
    let (agent, url) = (agent(), cloud.gate.url());
    let before = cloud.ssm.scripts().len();
    let mut plan = order(&agent, &url, &["--plan"]);
    (plan[1], plan[2]) = ("--tag", "Role=web");
    let told = json_of(&cloud.controller(&plan).unwrap());
    assert_eq!(told["hosts"][0]["id"], INSTANCE, "{told}");
    assert_eq!(told["document"]["version"], "1", "{told}");
    assert_eq!(told["document"]["hash"].as_str().unwrap().len(), 64, "{told}");
    assert_eq!(cloud.ssm.scripts().len(), before);
    let id = told["capture"].as_str().unwrap();
    assert_eq!(
        cloud.controller(&["status", id]).unwrap().status.code(),
        Some(2),
        "nothing was written down"
    );
}

#[test]
fn a_doctor_says_what_would_fail() {
    let cloud = cloud();
    let doctor = |arguments: &[&str]| {
        let mut doctor = cloud.responder().unwrap();
        let output = doctor
            .args(["doctor", "--output", "json"])
            .args(arguments)
            .output()
            .unwrap();
        let told = json_of(&output);
        let checks = told["checks"].as_array().unwrap().clone();
        let of = move |what: &str| {
            let check = checks.iter().find(|check| check["what"] == what);
            check.unwrap_or_else(|| panic!("{what}: {checks:?}"))["health"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        (output.status.code(), of)
    };
    let good = format!("s3://{BUCKET}");
    let (code, health) = doctor(&["--store", &good, "--instance", INSTANCE]);
    for what in [
        "credentials",
        "bucket versioning",
        "bucket lock",
        "bucket policy",
        "host i-0lab",
    ] {
        assert_eq!(health(what), "good", "{what}");
    }
    assert_eq!(health("role of i-0lab"), "unseen");
    // The agent that was built beside it needs this machine's libc.
    assert_eq!((health("agent").as_str(), code), ("weak", Some(5)));
    // Hosts that Systems Manager reaches, and that could not write, or not run the agent; among as many others as one call does not take.
    let others: Vec<String> = (0..45).map(|n| format!("i-0other{n}")).collect();
    let ids = others.iter().map(|id| (&id[..], Some("x"), "x86_64")).chain([
        ("i-0norole", None, "x86_64"),
        ("i-0arm", Some("x"), "arm64"),
        ("mi-0desk", Some("hybrid"), "x86_64"),
    ]);
    let mut arguments = vec!["--store", &good];
    for (id, profile, architecture) in ids {
        arguments.extend(["--instance", id]);
        cloud.ssm.host(Host {
            id: id.to_owned(),
            fate: Fate::Skips,
            profile,
            architecture,
            ..Host::default()
        });
    }
    let (code, health) = doctor(&arguments);
    for (what, seen) in [
        ("role of i-0other44", "unseen"),
        ("host i-0norole", "good"),
        ("role of i-0norole", "bad"),
        ("role of mi-0desk", "bad"),
        ("role of i-0arm", "unseen"),
        ("processor of i-0arm", "bad"),
    ] {
        assert_eq!(health(what), seen, "{what}");
    }
    assert_eq!(code, Some(1));
    // Lent credentials need no role.
    let (_, health) = doctor(&[
        "--store",
        &good,
        "--instance",
        "i-0norole",
        "--credentials",
        "session",
    ]);
    assert_eq!(health("role of i-0norole"), "unseen");
    // A bucket that keeps nothing, and a host that nobody knows.
    let open = format!("s3://{OPEN}");
    let (code, health) = doctor(&[
        "--store",
        &open,
        "--instance",
        "i-0nobody",
        "--document",
        "Nothing",
    ]);
    for what in [
        "bucket versioning",
        "bucket lock",
        "bucket policy",
        "document Nothing",
        "host i-0nobody",
    ] {
        assert_eq!(health(what), "bad", "{what}");
    }
    assert_eq!(code, Some(1));
}

/// Each service may be reached by a way of its own, and the variable for all does not stand in its way.
#[test]
fn one_service_is_reached_by_its_own_variable() {
    let cloud = cloud();
    let output = cloud
        .responder()
        .unwrap()
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        .envs(["S3", "SSM", "STS"].map(|service| (format!("AWS_ENDPOINT_URL_{service}"), cloud.gate.url())))
        .args([
            "doctor",
            "--store",
            &format!("s3://{BUCKET}"),
            "--instance",
            INSTANCE,
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
}

#[test]
fn stopped_at_any_moment_it_ends_in_a_signed_manifest() -> Result<()> {
    let _alone = alone();
    let cloud = cloud();
    // More steps than the agent has puts under way at once: some are not begun. With all of them behind it, there is nothing left to stop.
    for (moment, states) in [
        (0, &["stopped"][..]),
        (1, &["stopped"]),
        (4, &["stopped"]),
        (8, &["stopped"]),
        (16, &["stopped", "complete", "partial"]),
    ] {
        let id = ordered_and_held(cloud, moment, &["--profile", "full"]);
        wait_for(cloud, &id, &["in-progress"]);
        let output = cloud.controller(&["stop", &id, "--output", "json"])?;
        assert_eq!(output.status.code(), Some(0), "{moment}: {output:?}");
        // Held until the agent was asked: else it may be at its end before.
        let view = json_of(&output);
        let command = view["commands"][0].as_str().context("no command")?;
        let began = Instant::now();
        while !cloud.ssm.is_over(command) {
            assert!(began.elapsed() < Duration::from_secs(60), "nobody was asked");
            std::thread::sleep(Duration::from_millis(20));
        }
        cloud.gate.faults.release();
        let view = wait_for(cloud, &id, &["stopped", "complete", "partial"]);
        let state = view["hosts"][0]["state"].as_str().context("no state")?;
        assert!(states.contains(&state), "{moment}: {view}");
        let (verdict, code, report) = cloud.verify(&id, &[])?;
        assert_eq!((verdict.as_str(), code), ("verified", 0), "{moment}: {report}");
        let again = cloud.controller(&["stop", &id])?;
        assert_eq!(again.status.code(), Some(2), "{moment}: {again:?}");
    }
    Ok(())
}

#[test]
fn cancelled_at_any_moment_what_was_acknowledged_is_salvaged() {
    let _alone = alone();
    let cloud = cloud();
    let mut salvaged = 0;
    for moment in 0..10u64 {
        let id = ordered_and_held(cloud, moment, &[]);
        let output = cloud.controller(&["cancel", &id]).unwrap();
        cloud.gate.faults.release();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(said(&output).contains("SIGKILL"), "{output:?}");
        wait_for(cloud, &id, &["cancelled"]);
        let Ok((verdict, code, report)) = cloud.verify(&id, &[]) else {
            // Killed before its first event landed: there is no capture of that id, and that is what is said.
            assert_eq!(cloud.controller(&["verify", &id]).unwrap().status.code(), Some(2));
            continue;
        };
        assert_eq!((verdict.as_str(), code), ("incomplete", 3), "{report}");
        let output = cloud.controller(&["salvage", &id, "--output", "json"]).unwrap();
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        // What the chain acknowledges is there, every segment of it.
        let holds = json_of(&output);
        assert!(holds["findings"].as_array().unwrap().is_empty(), "{holds}");
        assert_eq!(cloud.verify(&id, &[]).unwrap().0, "salvaged");
        salvaged += 1;
    }
    assert!(salvaged >= 8, "{salvaged}");
}

/// A host that falls silent is not waited for without end.
#[test]
fn a_host_that_is_silent_is_incomplete() -> Result<()> {
    let _alone = alone();
    let cloud = cloud();
    let id = ordered_and_held(cloud, 3, &[]);
    let output = cloud
        .controller(&["watch", &id, "--stall", "4", "--output", "json"])
        .unwrap();
    let (verdict, code, report) = cloud.verify(&id, &[]).unwrap();
    // Who looks but once sees it, too; with more patience not yet.
    for (stall, lost) in [("2", true), ("600", false)] {
        let looked = cloud.controller(&["status", &id, "--stall", stall, "--output", "json"])?;
        assert_eq!(json_of(&looked)["hosts"][0]["lost"], lost, "{stall}: {looked:?}");
        assert_eq!(looked.status.code(), Some(3), "{looked:?}");
    }
    cloud.gate.faults.release();
    let view = json_of(&output);
    assert_eq!(
        (
            output.status.code(),
            &view["hosts"][0]["lost"],
            &view["hosts"][0]["state"]
        ),
        (Some(3), &json!(true), &json!("in-progress")),
        "{output:?}"
    );
    assert_eq!((verdict.as_str(), code), ("incomplete", 3), "{report}");
    // It was not gone after all.
    wait_for(cloud, &id, &["complete", "partial"]);
    assert_eq!(cloud.verify(&id, &[]).unwrap().0, "verified");
    let cancelled = cloud.controller(&["cancel", &id]).unwrap();
    assert_eq!(cancelled.status.code(), Some(2), "what is over is not cancelled");
    Ok(())
}

/// Whatever a person or a tag puts into an order is refused by a pattern or carried as data.
#[test]
fn nothing_that_is_injected_executes() {
    let _alone = alone();
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("mark");
    let touch = format!("touch {}", mark.display());
    let (agent, url) = (agent(), cloud.gate.url());
    for hostile in [
        format!("'; {touch}; '"),
        format!("$({touch})"),
        format!("`{touch}`"),
        format!("x\n{touch}"),
        "{{ Agent }}".to_owned(),
        format!("\"; {touch} #"),
    ] {
        // By our own command line.
        for flag in ["--case", "--max-rate"] {
            let refused = cloud.controller(&order(&agent, &url, &[flag, &hostile])).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{flag} {hostile}: {refused:?}");
        }
        // By the document's patterns, where our own command line has none.
        for (place, flag) in [(4, "--agent-path"), (6, "--host-endpoint-url")] {
            let mut arguments = order(&agent, &url, &["--watch"]);
            assert_eq!(arguments[place - 1], flag);
            arguments[place] = &hostile;
            let output = cloud.controller(&arguments).unwrap();
            assert_eq!(output.status.code(), Some(5), "{flag} {hostile}: {output:?}");
            assert_eq!(
                json_of(&output)["hosts"][0]["state"],
                "script-failed",
                "{output:?}"
            );
        }
        let mut tagged = order(&agent, &url, &["--plan"]);
        let tag = format!("Role={hostile}");
        (tagged[1], tagged[2]) = ("--tag", &tag);
        let told = json_of(&cloud.controller(&tagged).unwrap());
        assert_eq!(told["hosts"], json!([]), "{told}");
    }
    assert!(!mark.exists());
    // The control: the same script in the same place would have run.
    assert!(
        Command::new("sh")
            .args(["-c", &touch])
            .status()
            .unwrap()
            .success()
            && mark.exists()
    );
}

/// No secret stands in what a host is sent, in what it is told to run, or in what is printed.
#[test]
fn no_secret_stands_in_a_script_or_an_argument() {
    let _alone = alone();
    let cloud = cloud();
    let id = ordered_and_held(cloud, 2, &[]);
    let mut seen = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
        if line.contains(&id)
            && line.contains("capture")
            && !line.contains("--store\0s3://evidence-bucket\0--output\0json\0--tag")
        {
            seen += 1;
            for text in [line, String::from_utf8_lossy(&read("environ")).into_owned()] {
                assert!(!text.contains(SECRET) && !text.contains(TOKEN), "{text}");
            }
        }
    }
    cloud.gate.faults.release();
    assert!(seen > 0, "the agent was not seen");
    wait_for(cloud, &id, &["complete", "partial"]);
    let scripts = cloud.ssm.scripts();
    assert!(!scripts.is_empty());
    for script in scripts {
        assert!(!script.contains(SECRET) && !script.contains(TOKEN), "{script}");
    }
}

/// An agent that is another than was ordered does not run; a host without one says so.
#[test]
fn only_the_agent_that_was_ordered_runs() {
    let _alone = alone();
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("stillframe-agent");
    let mark = folder.path().join("mark");
    fs::write(&other, format!("#!/bin/sh\ntouch {}\n", mark.display())).unwrap();
    let url = cloud.gate.url();
    for (path, says) in [
        (other.to_str().unwrap(), "is not the agent that was ordered"),
        ("/nowhere/stillframe-agent", "no agent at /nowhere"),
    ] {
        let output = cloud.controller(&order(path, &url, &["--watch"])).unwrap();
        let view = json_of(&output);
        assert_eq!(
            (output.status.code(), &view["hosts"][0]["state"]),
            (Some(5), &json!("script-failed")),
            "{view}"
        );
        assert!(
            view["hosts"][0]["output"].as_str().unwrap().contains(says),
            "{view}"
        );
    }
    assert!(!mark.exists());
}

/// A host on which nothing is staged has the agent fetched, and runs it only if it is the one that was ordered.
#[test]
fn an_agent_that_is_not_there_is_fetched() {
    let _alone = alone();
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let agent = fs::read(agent()).unwrap();
    cloud.gate.plant(OPEN, "agents/good", agent).unwrap();
    cloud
        .gate
        .plant(OPEN, "agents/other", b"#!/bin/sh\n".to_vec())
        .unwrap();
    for (name, code, state) in [("good", None, None), ("other", Some(5), Some("script-failed"))] {
        let (path, url) = (folder.path().join(name), cloud.gate.url());
        let from = format!("{url}/{OPEN}/agents/{name}");
        let more = ["--agent-url", &from, "--watch"];
        let output = cloud
            .controller(&order(path.to_str().unwrap(), &url, &more))
            .unwrap();
        let view = json_of(&output);
        assert!(path.exists(), "{output:?}");
        match state {
            None => assert_eq!(
                cloud.verify(view["capture"].as_str().unwrap(), &[]).unwrap().0,
                "verified"
            ),
            Some(state) => {
                assert_eq!(
                    (output.status.code(), &view["hosts"][0]["state"]),
                    (code, &json!(state)),
                    "{view}"
                );
            }
        }
    }
}

fn document(name: &str) -> Value {
    stillframe_tests::cloud::document(name).unwrap()
}

#[test]
fn the_documents_are_valid_and_twenty_broken_ones_are_not() {
    for name in DOCUMENTS {
        validate(&document(name)).unwrap();
    }
    let good = document("Stillframe-Capture");
    type Break<'a> = (&'a str, &'a dyn Fn(&mut Value));
    let breaks: [Break; 21] = [
        ("another schema", &|d| d["schemaVersion"] = json!("1.2")),
        ("no description", &|d| d["description"] = json!("")),
        ("a key that is none", &|d| d["comment"] = json!("x")),
        ("no steps", &|d| d["mainSteps"] = json!([])),
        ("a parameter without a type", &|d| {
            d["parameters"]["Case"]["type"] = Value::Null
        }),
        ("a parameter without a description", &|d| {
            d["parameters"]["Case"]["description"] = Value::Null
        }),
        ("a parameter without a pattern", &|d| {
            _ = d["parameters"]["Case"]
                .as_object_mut()
                .unwrap()
                .remove("allowedPattern")
        }),
        ("a pattern without an end", &|d| {
            d["parameters"]["Case"]["allowedPattern"] = json!("^[a-z]+")
        }),
        ("a pattern that lets a quote in", &|d| {
            d["parameters"]["Case"]["allowedPattern"] = json!("^[a-z']+$")
        }),
        ("a pattern that lets a line in", &|d| {
            d["parameters"]["Case"]["allowedPattern"] = json!("^[^']*$")
        }),
        ("a count that the agent's regular expressions do not take", &|d| {
            d["parameters"]["Case"]["allowedPattern"] = json!("^[a-z]{1,1001}$")
        }),
        ("a pattern that is none", &|d| {
            d["parameters"]["Case"]["allowedPattern"] = json!("^[a-z$")
        }),
        ("a default against its pattern", &|d| {
            d["parameters"]["Case"]["default"] = json!("a b")
        }),
        ("a default that is not allowed", &|d| {
            d["parameters"]["Profile"]["default"] = json!("everything")
        }),
        ("a parameter that is not used", &|d| {
            d["parameters"]["Spare"] = d["parameters"]["Case"].clone()
        }),
        ("a placeholder that is none", &|d| {
            d["mainSteps"][1]["inputs"]["runCommand"][0] = json!("echo {{ Nothing }}")
        }),
        ("two steps of one name", &|d| {
            d["mainSteps"][2]["name"] = d["mainSteps"][1]["name"].clone()
        }),
        ("an action that is none", &|d| {
            d["mainSteps"][1]["action"] = json!("aws:runScript")
        }),
        ("no precondition", &|d| {
            _ = d["mainSteps"][1].as_object_mut().unwrap().remove("precondition")
        }),
        ("the wrong platform", &|d| {
            d["mainSteps"][1]["precondition"]["StringEquals"][1] = json!("Windows")
        }),
        ("a timeout that becomes an hour", &|d| {
            d["mainSteps"][1]["inputs"]["timeoutSeconds"] = json!("3")
        }),
    ];
    for (what, broken) in breaks {
        let mut document = good.clone();
        broken(&mut document);
        assert_ne!(document, good, "{what}");
        assert!(validate(&document).is_err(), "{what}");
    }
}

/// What a host would run, to the letter.
#[test]
fn what_a_host_would_run() {
    let given: BTreeMap<String, String> = [
        ("CaptureId", "0197c9e2-0000-7000-8000-000000000000"),
        ("Store", "s3://evidence/x"),
        ("Case", "C-17"),
        ("Profile", "full"),
        ("Nonce", "00112233445566778899aabbccddeeff"),
        ("OrderedBy", "responder@desk"),
        ("OrderedAt", "2026-11-24T03:00:00Z"),
        ("Region", "eu-central-1"),
        (
            "AgentSha256",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ),
        ("MaxRate", "200"),
    ]
    .map(|(n, v)| (n.to_owned(), v.to_owned()))
    .into();
    let mut all = String::new();
    for platform in ["Linux", "Windows"] {
        for step in render(&document("Stillframe-Capture"), &given, platform).unwrap() {
            all += &format!(
                "# {platform}: {} by {}, {} s\n{}\n",
                step.name, step.action, step.timeout, step.script
            );
        }
    }
    insta::with_settings!({prepend_module_to_snapshot => false, snapshot_path => "snapshots"}, { insta::assert_snapshot!("what_a_host_would_run", all) });
    let mut hostile = given.clone();
    hostile.insert("Case".to_owned(), "'; id; '".to_owned());
    assert!(render(&document("Stillframe-Capture"), &hostile, "Linux").is_err());
    let mut unknown = given;
    unknown.insert("Extra".to_owned(), "x".to_owned());
    assert!(render(&document("Stillframe-Capture"), &unknown, "Linux").is_err());
}

/// A fleet of which some come to every fate: the table is right, the service is asked less than twice a second, and memory stays small.
#[test]
fn a_fleet_of_ten_thousand() {
    const HOSTS: usize = 10_000;
    let cloud = Cloud::start().unwrap();
    let line = |outcome: &str| {
        format!(
            "stillframe-result {{\"capture\":\"x\",\"outcome\":\"{outcome}\",\"key\":\"k\",\"events\":9,\"why\":null}}\n"
        )
    };
    let fates = [
        ("complete", Fate::Says(line("complete"))),
        ("partial", Fate::Says(line("partial"))),
        ("script-failed", Fate::Fails),
        ("no-result", Fate::Skips),
        ("undeliverable", Fate::Undeliverable),
        ("execution-timed-out", Fate::TooLong),
        ("access-denied", Fate::Denied),
        (
            "no-result",
            Fate::Says("stillframe-result is not here\n".to_owned()),
        ),
    ];
    let mut expected: BTreeMap<&str, u64> = BTreeMap::new();
    for n in 0..HOSTS {
        let (state, fate) = &fates[n % fates.len()];
        *expected.entry(state).or_default() += 1;
        cloud.ssm.host(Host {
            id: format!("i-{n:08x}fleet"),
            tags: [("Fleet".to_owned(), "all".to_owned())].into(),
            fate: fate.clone(),
            ..Host::default()
        });
    }
    cloud.ssm.throttle(20);
    let mut controller = cloud.responder().unwrap();
    let store = format!("s3://{BUCKET}");
    controller.args([
        "capture",
        "--tag",
        "Fleet=all",
        "--agent-sha256",
        &"a".repeat(64),
        "--max-concurrency",
        "100%",
        "--watch",
        "--output",
        "json",
        "--store",
        &store,
    ]);
    let calls = cloud.ssm.calls();
    let began = Instant::now();
    let child = controller
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let peak = std::thread::spawn(move || {
        let mut peak = 0;
        while let Ok(status) = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")) {
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            peak = peak.max(
                line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
                    .unwrap_or(0),
            );
            std::thread::sleep(Duration::from_millis(100));
            if line.is_none() {
                break;
            }
        }
        peak
    });
    let output = child.wait_with_output().unwrap();
    let rate = (cloud.ssm.calls() - calls) as f64 / began.elapsed().as_secs_f64();
    assert_eq!(
        output.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let view = json_of(&output);
    let counts: BTreeMap<&str, u64> = view["counts"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| (&k[..], v.as_u64().unwrap()))
        .collect();
    assert_eq!(counts, expected);
    assert_eq!(view["hosts"].as_array().unwrap().len(), HOSTS);
    assert!(rate < 2.0, "{rate} calls a second");
    let peak = peak.join().unwrap();
    assert!(peak > 0 && peak < 200 << 10, "{peak} KiB");
}
