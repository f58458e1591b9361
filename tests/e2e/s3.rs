//! The S3 path: the unmodified programs through the unmodified SDK, against a real S3 API server behind a gate that judges signatures and the
//! project's own policies. Credentials come from the instance metadata service, as on an instance.

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use stillframe_evidence::layout::CaptureId;
use stillframe_tests::{
    captured::{self, MARKERS},
    cloud::{
        BUCKET, Cloud, OPEN, WRITER, checksum,
        faults::{ALL, Fault},
        policy,
        principals::{SECRET, TOKEN},
    },
    fill,
    guest::{Guest, JOIN_NETWORK, Machine},
    programs,
};

/// One gate for all tests that leave its faults alone; a test that makes faults has its own.
fn cloud() -> &'static Cloud {
    static CLOUD: OnceLock<Cloud> = OnceLock::new();
    CLOUD.get_or_init(|| Cloud::start().unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Memory to bring in: pages that each carry their own identity.
fn image(folder: &Path, mib: u64) -> PathBuf {
    let path = folder.join("image.raw");
    let bytes: Vec<u8> = (0..mib << 8).flat_map(fill::page).collect();
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_capture_by_the_instance_s_role_is_verified_by_what_the_store_states() {
    let cloud = cloud();
    let id = CaptureId::mint();
    let output = cloud.agent(id).unwrap().args(["--case", "s3"]).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
    let (verdict, code, report) = cloud.verify(&id.to_string(), &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("verified", 0), "{report}");
    assert!(
        report["because"].as_str().unwrap().contains("locked until"),
        "{report}"
    );
    // The chain has what the store answered.
    let first: Value = serde_json::from_slice(
        output
            .stdout
            .split(|b| *b == b'\n')
            .find(|l| l.windows(9).any(|w| w == b"\"step\":0,"))
            .unwrap(),
    )
    .unwrap();
    let receipt = &first["segments"][0]["receipt"];
    assert_eq!(receipt["confirmed"], true, "{receipt}");
    for known in ["checksum", "version_id", "date"] {
        assert!(receipt[known].is_string(), "{known}: {receipt}");
    }
    // It lies under the name that the store vouches for, and the witness in the case's folder.
    let listed: Value =
        serde_json::from_slice(&cloud.controller(&["list", "--output", "json"]).unwrap().stdout).unwrap();
    assert!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["id"] == id.to_string() && c["case"] == "s3"),
        "{listed}"
    );
    let admin = cloud.gate.principals.add(
        "AIDAADMIN",
        "arn:aws:iam::123456789012:user/admin",
        vec![all()],
        None,
        None,
    );
    let admin = (&admin.0[..], &admin.1.secret[..], None);
    let (status, witness) = cloud
        .ask(
            admin,
            "GET",
            &format!("{BUCKET}?list-type=2&prefix=cases%2Fs3%2F{id}%2Fwitness-"),
            &[],
            "",
        )
        .unwrap();
    assert_eq!(status, 200, "{witness}");
    assert!(witness.contains("<KeyCount>1</KeyCount>"), "{witness}");
    let shown = cloud.controller(&["show", &id.to_string()]).unwrap();
    assert!(
        String::from_utf8_lossy(&shown.stdout).contains("case s3"),
        "{shown:?}"
    );
}

fn all() -> Value {
    serde_json::json!({"Statement": {"Sid": "All", "Effect": "Allow", "Action": "s3:*", "Resource": "*"}})
}

#[test]
fn memory_goes_in_parallel_and_comes_back_whole() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 64);
    let id = CaptureId::mint();
    let output = cloud
        .agent(id)
        .unwrap()
        .args(["--profile", "memory", "--image", text(&image)])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(cloud.verify(&id.to_string(), &[]).unwrap().0, "verified");
    let to = folder.path().join("fetched");
    let fetched = cloud
        .controller(&[
            "fetch",
            &id.to_string(),
            "--no-symbols",
            "--format",
            "raw",
            "--to",
            text(&to),
            "--output",
            "json",
        ])
        .unwrap();
    assert_eq!(fetched.status.code(), Some(0), "{fetched:?}");
    assert!(
        fs::read(to.join("image.raw")).unwrap() == fs::read(&image).unwrap(),
        "the image is another"
    );
}

/// Each refusal comes from a statement of the policies, and each has a control: the same request, allowed.
#[test]
fn the_agent_s_credentials_can_write_their_own_evidence_once_and_nothing_else() {
    let cloud = cloud();
    let id = CaptureId::mint();
    assert!(matches!(
        cloud.agent(id).unwrap().output().unwrap().status.code(),
        Some(0 | 5)
    ));
    let role = cloud.gate.principals.add(
        WRITER,
        "arn:aws:iam::123456789012:role/instances",
        vec![policy("instance-role.json").unwrap()],
        None,
        Some(600),
    );
    let role = (&role.0[..], &role.1.secret[..], role.1.token.as_deref());
    let admin = cloud.gate.principals.add(
        "AIDAADMIN2",
        "arn:aws:iam::123456789012:user/admin",
        vec![all()],
        None,
        None,
    );
    let admin = (&admin.0[..], &admin.1.secret[..], None);
    let manifest = format!(
        "{BUCKET}/evidence/{}/{id}/manifest.json",
        WRITER.replace(':', "%3A")
    );
    let own = |name: &str| format!("{BUCKET}/evidence/{}/{id}/{name}", WRITER.replace(':', "%3A"));
    let once = "if-none-match: *";
    let sum = checksum("x");
    let refused = |(status, body): (u16, String), why: &str| {
        assert_eq!(status, 403, "{body}");
        assert!(body.contains(why), "{why}: {body}");
    };
    // Reading, listing.
    refused(
        cloud.ask(role, "GET", &manifest, &[], "").unwrap(),
        "no policy allows it",
    );
    assert_eq!(cloud.ask(admin, "GET", &manifest, &[], "").unwrap().0, 200);
    refused(
        cloud
            .ask(role, "GET", &format!("{BUCKET}?list-type=2"), &[], "")
            .unwrap(),
        "no policy allows it",
    );
    assert_eq!(
        cloud
            .ask(admin, "GET", &format!("{BUCKET}?list-type=2"), &[], "")
            .unwrap()
            .0,
        200
    );
    // Deleting: nobody may, not even who may do everything; in a bucket without the policy it works.
    refused(
        cloud.ask(role, "DELETE", &manifest, &[], "").unwrap(),
        "NothingIsDeletedOrUnlocked",
    );
    refused(
        cloud.ask(admin, "DELETE", &manifest, &[], "").unwrap(),
        "NothingIsDeletedOrUnlocked",
    );
    assert_eq!(
        cloud
            .ask(admin, "PUT", &format!("{OPEN}/x"), &[&sum], "x")
            .unwrap()
            .0,
        200
    );
    assert_eq!(
        cloud
            .ask(admin, "DELETE", &format!("{OPEN}/x"), &[], "")
            .unwrap()
            .0,
        204
    );
    // Writing twice: without the condition the policy refuses, with it the store.
    refused(
        cloud.ask(role, "PUT", &manifest, &[&sum], "x").unwrap(),
        "EvidenceIsWrittenOnce",
    );
    assert_eq!(
        cloud.ask(role, "PUT", &manifest, &[&sum, once], "x").unwrap().0,
        412
    );
    assert_eq!(
        cloud
            .ask(role, "PUT", &own("control"), &[&sum, once], "x")
            .unwrap()
            .0,
        200
    );
    // Without a checksum.
    assert_eq!(
        cloud.ask(role, "PUT", &own("without"), &[once], "x").unwrap().0,
        400
    );
    // Elsewhere.
    for elsewhere in [
        "evidence/AROALABinstances%3Ai-0other/x",
        "evidence/AROALABinstances%3Ai-0lab2/x",
        "orders/x",
    ] {
        refused(
            cloud
                .ask(role, "PUT", &format!("{BUCKET}/{elsewhere}"), &[&sum, once], "x")
                .unwrap(),
            "EvidenceIsWrittenUnderOnesOwnName",
        );
    }
    refused(
        cloud
            .ask(role, "PUT", &format!("{BUCKET}/cases/c/x"), &[&sum, once], "x")
            .unwrap(),
        "no policy allows it",
    );
    let responder = (&cloud.responder[0].1[..], &cloud.responder[1].1[..], None);
    assert_eq!(
        cloud
            .ask(
                responder,
                "PUT",
                &format!("{BUCKET}/cases/c/x"),
                &[&sum, once],
                "x"
            )
            .unwrap()
            .0,
        200
    );
    // A locked version cannot be deleted by the store's own word, without any policy.
    let gate = Cloud::start().unwrap();
    gate.gate.bucket("bare", true, None).unwrap();
    let bare = gate.gate.principals.add(
        "AIDAADMIN3",
        "arn:aws:iam::123456789012:user/admin",
        vec![all()],
        None,
        None,
    );
    let bare = (&bare.0[..], &bare.1.secret[..], None);
    assert_eq!(gate.ask(bare, "PUT", "bare/x", &[&sum], "x").unwrap().0, 200);
    let (_, versions) = gate.ask(bare, "GET", "bare?versions=", &[], "").unwrap();
    let version = versions
        .split("<VersionId>")
        .nth(1)
        .and_then(|rest| rest.split('<').next())
        .unwrap_or_else(|| panic!("{versions}"));
    assert_eq!(
        gate.ask(bare, "DELETE", &format!("bare/x?versionId={version}"), &[], "")
            .unwrap()
            .0,
        403
    );
}

#[test]
fn a_key_that_somebody_wrote_first_is_tampering_and_named() {
    let cloud = cloud();
    let id = CaptureId::mint();
    let role = cloud.gate.principals.add(
        WRITER,
        "arn:aws:iam::123456789012:role/instances",
        vec![policy("instance-role.json").unwrap()],
        None,
        Some(600),
    );
    let role = (&role.0[..], &role.1.secret[..], role.1.token.as_deref());
    let manifest = format!(
        "{BUCKET}/evidence/{}/{id}/manifest.json",
        WRITER.replace(':', "%3A")
    );
    assert_eq!(
        cloud
            .ask(
                role,
                "PUT",
                &manifest,
                &[&checksum("squat"), "if-none-match: *"],
                "squat"
            )
            .unwrap()
            .0,
        200
    );
    let output = cloud.agent(id).unwrap().output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("somebody else has written it"),
        "{output:?}"
    );
    let (verdict, code, report) = cloud.verify(&id.to_string(), &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("tampered", 1), "{report}");
    assert!(
        report["findings"]
            .as_array()
            .unwrap()
            .iter()
            .any(|f| f["object"] == "manifest.json"),
        "{report}"
    );
}

/// Each fault alone, and all of them mixed: a verified capture, or a truthful word. Never a false `verified`, never an acknowledged segment lost.
#[test]
fn whatever_goes_wrong_on_the_way_the_verdict_is_true() {
    let cloud = Cloud::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 24);
    let mixes: Vec<Vec<Fault>> = ALL
        .iter()
        .map(|fault| vec![*fault])
        .chain([ALL.to_vec()])
        .collect();
    for (seed, faults) in (1u64..).zip(mixes) {
        let id = CaptureId::mint();
        cloud.gate.faults.set(&faults, 3, seed);
        let began = Instant::now();
        let output = cloud
            .agent(id)
            .unwrap()
            .args(["--profile", "memory", "--image", text(&image)])
            .output()
            .unwrap();
        let hit = cloud.gate.faults.hit();
        cloud.gate.faults.set(&[], 0, 0);
        assert!(hit > 0, "{faults:?} hit nothing");
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{faults:?} took {:?}",
            began.elapsed()
        );
        let (verdict, _, report) = cloud.verify(&id.to_string(), &[]).unwrap();
        let acknowledged: u64 = output
            .stdout
            .split(|b| *b == b'\n')
            .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
            .map(|event| {
                event["segments"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|s| s["artifact"] == "memory/image" && s["receipt"]["confirmed"] == true)
                    .count() as u64
            })
            .sum();
        assert!(
            report["findings"].as_array().unwrap().is_empty(),
            "{faults:?}: {report}"
        );
        match output.status.code() {
            Some(0 | 5) => assert_eq!(verdict, "verified", "{faults:?}: {report}"),
            // An answer that contradicts what was sent ends it, and that is no capture.
            Some(1) => {
                assert!(faults.contains(&Fault::AnswerWrong), "{faults:?}: {output:?}");
                assert_eq!(verdict, "incomplete", "{faults:?}: {report}");
            }
            other => panic!("{faults:?}: {other:?} {output:?}"),
        }
        let salvaged = cloud
            .controller(&[
                "fetch",
                &id.to_string(),
                "--no-symbols",
                "--to",
                text(&folder.path().join(id.to_string())),
                "--output",
                "json",
            ])
            .unwrap();
        // What was acknowledged of the image is there, every segment of it.
        match serde_json::from_slice::<Value>(&salvaged.stdout) {
            Ok(told) => {
                assert_eq!(told["damaged"], serde_json::json!([]), "{faults:?}: {told}");
                assert!(
                    told["segments"].as_u64().unwrap() >= acknowledged,
                    "{faults:?}: {acknowledged} {told}"
                );
            }
            Err(_) => assert_eq!(acknowledged, 0, "{faults:?}: {salvaged:?}"),
        }
        let _ = fs::remove_dir_all(folder.path().join(id.to_string()));
    }
}

#[test]
fn killed_on_its_way_it_loses_nothing_that_was_acknowledged() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 48);
    for share in [15, 35, 55, 75] {
        let id = CaptureId::mint();
        let mut agent = cloud.agent(id).unwrap();
        agent.args(["--profile", "memory", "--image", text(&image), "--max-rate", "8"]);
        let mut agent = agent.stdout(Stdio::piped()).spawn().unwrap();
        let (mut acknowledged, began) = (0, Instant::now());
        for line in std::io::BufRead::lines(std::io::BufReader::new(agent.stdout.take().unwrap())) {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            acknowledged += event["segments"].as_array().unwrap().len();
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
        let (verdict, code, report) = cloud.verify(&id.to_string(), &[]).unwrap();
        assert_eq!((verdict.as_str(), code), ("incomplete", 3), "{report}");
        let salvaged = cloud
            .controller(&["salvage", &id.to_string(), "--output", "json"])
            .unwrap();
        assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
        let salvaged: Value = serde_json::from_slice(&salvaged.stdout).unwrap();
        assert!(
            salvaged["holds"]["segments"].as_u64().unwrap() >= acknowledged as u64,
            "{salvaged}"
        );
        assert_eq!(cloud.verify(&id.to_string(), &[]).unwrap().0, "salvaged");
    }
}

/// The secrets that the lab handed out stand in nothing that the programs printed or stored.
#[test]
fn no_secret_is_printed_or_stored() {
    let cloud = cloud();
    let id = CaptureId::mint();
    let output = cloud.agent(id).unwrap().output().unwrap();
    let shown = cloud
        .controller(&["cat", "process-details", &id.to_string()])
        .unwrap();
    // The agent's own environment is evidence; it holds no key, since the role's came from the metadata service.
    for said in [&output.stdout, &output.stderr, &shown.stdout] {
        let text = String::from_utf8_lossy(said);
        assert!(!text.contains(TOKEN), "a token");
        assert!(
            !text
                .lines()
                .any(|line| line.contains(SECRET) && line.contains("stillframe-agent")),
            "a secret"
        );
    }
}

/// A guest that captures its own memory into S3, by the rights of its role; `$MORE` adds to what the agent is told.
fn in_a_guest(cloud: &Cloud, id: CaptureId, more: &str) -> Guest {
    let machine = Machine {
        memory: 512,
        disk: 16,
        network: true,
        ..Machine::default()
    };
    let port = |url: &str| url.rsplit_once(':').unwrap().1.to_owned();
    let script = format!(
        "{MARKERS}{JOIN_NETWORK}sleep 1\nexport AWS_EC2_METADATA_SERVICE_ENDPOINT=http://10.0.2.2:{}\n\
         /stillframe-agent capture --case guest --profile memory --store s3://{BUCKET} --id {id} --region us-east-1 \
         --endpoint-url http://10.0.2.2:{} {more} 2>&1\necho AGENT ENDED $?\ngrep VmHWM /proc/self/status\n",
        port(&cloud.metadata.url()),
        cloud.gate.port(),
    );
    let (agent, lab) = (programs::static_agent().unwrap(), programs::static_lab().unwrap());
    machine
        .boot(
            &script,
            &[("stillframe-agent", &agent), ("lab", &lab)],
            &["virtio_net"],
        )
        .unwrap()
}

/// Host death, not agent death.
#[test]
fn a_host_whose_power_is_taken_is_incomplete_and_salvaged() {
    let cloud = cloud();
    let id = CaptureId::mint();
    let name = id.to_string();
    let mut guest = in_a_guest(cloud, id, "--max-rate 16");
    // What is told was put before: a third, so that an eighth is surely acknowledged.
    let told = |console: String| {
        let before = console
            .rsplit_once(" % of 511 MiB")
            .map(|(before, _)| before.to_owned());
        before
            .and_then(|b| b.rsplit(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    guest.wait_for("% of 511 MiB").unwrap();
    while told(guest.console()) < 33 {
        assert!(!guest.console().contains("AGENT ENDED"), "{}", guest.console());
        std::thread::sleep(Duration::from_millis(200));
    }
    guest.power_off().unwrap();
    let (verdict, code, report) = cloud.verify(&name, &[]).unwrap();
    assert_eq!((verdict.as_str(), code), ("incomplete", 3), "{report}");
    let salvaged = cloud.controller(&["salvage", &name, "--output", "json"]).unwrap();
    assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
    let folder = captured::scratch().unwrap();
    let to = folder.path().join("fetched");
    let fetched = cloud
        .controller(&[
            "fetch",
            &name,
            "--no-symbols",
            "--to",
            text(&to),
            "--output",
            "json",
        ])
        .unwrap();
    assert_eq!(fetched.status.code(), Some(5), "{fetched:?}");
    let told: Value = serde_json::from_slice(&fetched.stdout).unwrap();
    assert_eq!(
        (&told["complete"], &told["damaged"]),
        (&serde_json::json!(false), &serde_json::json!([])),
        "{told}"
    );
    assert!(
        told["bytes"].as_u64().unwrap() > 64 << 20 && !told["holes"].as_array().unwrap().is_empty(),
        "{told}"
    );
}

/// A bucket that is locked, and that lets everything be written again: what was done to the evidence is in its versions.
#[test]
fn what_was_written_twice_or_deleted_is_named_by_its_versions() {
    let cloud = Cloud::start().unwrap();
    cloud.gate.bucket("loose", true, None).unwrap();
    let arn = "arn:aws:iam::123456789012:user/admin";
    let (key, admin) = cloud
        .gate
        .principals
        .add("AIDAADMIN", arn, vec![all()], None, None);
    let as_admin = (&key[..], &admin.secret[..], None);
    let id = CaptureId::mint();
    let run = |program: PathBuf, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).args(["--store", "s3://loose"]);
        command
            .env("AWS_ACCESS_KEY_ID", &key)
            .env("AWS_SECRET_ACCESS_KEY", &admin.secret);
        command
            .env("AWS_ENDPOINT_URL", cloud.gate.url())
            .env("AWS_REGION", "us-east-1");
        command.output().unwrap()
    };
    let name = id.to_string();
    let output = run(programs::agent().unwrap(), &["capture", "--id", &name]);
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
    let verify = || -> Value {
        let output = run(
            programs::controller().unwrap(),
            &["verify", &name, "--output", "json"],
        );
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
    };
    assert_eq!(verify()["verdict"], "verified");
    let sums = format!("loose/evidence/AIDAADMIN/{id}/SHA256SUMS");
    let (status, bytes) = cloud.ask(as_admin, "GET", &sums, &[], "").unwrap();
    assert_eq!(status, 200);
    // The very same bytes: every hash holds, and yet it was put again.
    let (status, _) = cloud
        .ask(as_admin, "PUT", &sums, &[&checksum(&bytes)], &bytes)
        .unwrap();
    assert_eq!(status, 200);
    let twice = verify();
    assert_eq!(twice["verdict"], "tampered", "{twice}");
    let named = |report: &Value, why: &str| {
        let findings = report["findings"].as_array().unwrap();
        findings
            .iter()
            .any(|f| f["object"] == "SHA256SUMS" && f["why"].as_str().unwrap().contains(why))
    };
    assert!(named(&twice, "was written 2 times"), "{twice}");
    let (status, _) = cloud.ask(as_admin, "DELETE", &sums, &[], "").unwrap();
    assert_eq!(status, 204);
    let deleted = verify();
    assert!(named(&deleted, "was deleted"), "{deleted}");
}
