//! The S3 path: the unmodified programs through the unmodified SDK, against a real S3 API server behind a gate that judges signatures and the
//! project's own policies. Credentials come from the instance metadata service, as on an instance.

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use stillframe_evidence::layout::CaptureId;
use stillframe_tests::{
    cloud::{
        faults::{ALL, Fault},
        gate::Gate,
        http::Server,
        metadata,
    },
    fill, programs,
};

const BUCKET: &str = "evidence-bucket";
const OPEN: &str = "open-bucket";
const WRITER: &str = "AROALABinstances:i-0lab";

/// One gate for all tests that leave its faults alone; a test that makes faults has its own.
fn cloud() -> &'static Cloud {
    static CLOUD: OnceLock<Cloud> = OnceLock::new();
    CLOUD.get_or_init(Cloud::start)
}

struct Cloud {
    gate: Gate,
    metadata: Server,
    /// Environment of whoever runs the controller.
    responder: Vec<(String, String)>,
}

fn policy(name: &str) -> Value {
    let path = programs::workspace().join("ssm-documents/policies").join(name);
    let text = fs::read_to_string(path).unwrap();
    serde_json::from_str(&text.replace("EVIDENCE_BUCKET", BUCKET)).unwrap()
}

impl Cloud {
    fn start() -> Self {
        let gate = Gate::start().unwrap();
        gate.bucket(BUCKET, true, Some(policy("evidence-bucket.json")))
            .unwrap();
        gate.bucket(OPEN, false, None).unwrap();
        let role = vec![policy("instance-role.json")];
        let metadata = metadata::start(gate.principals.clone(), "i-0lab", "instances", role).unwrap();
        let (key, principal) = gate.principals.add(
            "AIDALABRESPONDER",
            "arn:aws:iam::123456789012:user/responder",
            vec![policy("responder.json")],
            None,
            None,
        );
        let responder = vec![
            ("AWS_ACCESS_KEY_ID".to_owned(), key),
            ("AWS_SECRET_ACCESS_KEY".to_owned(), principal.secret),
        ];
        Cloud {
            gate,
            metadata,
            responder,
        }
    }

    /// The agent on an instance with the role.
    fn agent(&self, id: CaptureId) -> Command {
        let mut agent = Command::new(programs::agent().unwrap());
        agent
            .args([
                "capture",
                "--store",
                &format!("s3://{BUCKET}"),
                "--id",
                &id.to_string(),
                "--output",
                "json",
            ])
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.metadata.url())
            .env("AWS_ENDPOINT_URL", self.gate.url())
            .env_remove("AWS_ACCESS_KEY_ID");
        agent
    }

    fn controller(&self, arguments: &[&str]) -> Output {
        Command::new(programs::controller().unwrap())
            .args(arguments)
            .args(["--store", &format!("s3://{BUCKET}")])
            .envs(self.responder.iter().cloned())
            .env("AWS_ENDPOINT_URL", self.gate.url())
            .env("AWS_REGION", "us-east-1")
            .output()
            .unwrap()
    }

    fn verify(&self, id: CaptureId) -> (String, i32, Value) {
        let output = self.controller(&["verify", &id.to_string(), "--output", "json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        (
            report["verdict"].as_str().unwrap().to_owned(),
            output.status.code().unwrap(),
            report,
        )
    }

    /// The AWS command line's own requests, signed with these credentials: curl signs them.
    fn ask(
        &self,
        (key, secret, token): (&str, &str, Option<&str>),
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> (u16, String) {
        let mut curl = Command::new("curl");
        curl.args([
            "-s",
            "-X",
            method,
            "-w",
            "\n%{http_code}",
            "--aws-sigv4",
            "aws:amz:us-east-1:s3",
            "--user",
            &format!("{key}:{secret}"),
        ]);
        if let Some(token) = token {
            curl.args(["-H", &format!("x-amz-security-token: {token}")]);
        }
        let sum = sha256(body.as_bytes());
        curl.args(["-H", &format!("x-amz-content-sha256: {}", hex::encode(sum))]);
        if method == "PUT" {
            curl.args([
                "-H",
                "content-type: application/octet-stream",
                "--data-binary",
                body,
            ]);
        }
        for header in headers {
            curl.args(["-H", header]);
        }
        let output = curl.arg(format!("{}/{path}", self.gate.url())).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or_else(|| panic!("{output:?}"));
        (
            status.parse().unwrap_or_else(|_| panic!("{output:?}")),
            body.to_owned(),
        )
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    <sha2::Sha256 as sha2::Digest>::digest(bytes).into()
}

fn checksum(body: &str) -> String {
    use base64::Engine as _;
    format!(
        "x-amz-checksum-sha256: {}",
        base64::engine::general_purpose::STANDARD.encode(sha256(body.as_bytes()))
    )
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
    let output = cloud.agent(id).args(["--case", "s3"]).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
    let (verdict, code, report) = cloud.verify(id);
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
        serde_json::from_slice(&cloud.controller(&["list", "--output", "json"]).stdout).unwrap();
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
    let (status, witness) = cloud.ask(
        admin,
        "GET",
        &format!("{BUCKET}?list-type=2&prefix=cases%2Fs3%2F{id}%2Fwitness-"),
        &[],
        "",
    );
    assert_eq!(status, 200, "{witness}");
    assert!(
        witness.contains("<KeyCount>1</KeyCount>") || witness.contains("witness-"),
        "{witness}"
    );
    let shown = cloud.controller(&["show", &id.to_string()]);
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
        .args(["--profile", "memory", "--image", text(&image)])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(cloud.verify(id).0, "verified");
    let to = folder.path().join("fetched");
    let fetched = cloud.controller(&[
        "fetch",
        &id.to_string(),
        "--no-symbols",
        "--format",
        "raw",
        "--to",
        text(&to),
        "--output",
        "json",
    ]);
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
        cloud.agent(id).output().unwrap().status.code(),
        Some(0 | 5)
    ));
    let role = cloud.gate.principals.add(
        WRITER,
        "arn:aws:iam::123456789012:role/instances",
        vec![policy("instance-role.json")],
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
    refused(cloud.ask(role, "GET", &manifest, &[], ""), "no policy allows it");
    assert_eq!(cloud.ask(admin, "GET", &manifest, &[], "").0, 200);
    refused(
        cloud.ask(role, "GET", &format!("{BUCKET}?list-type=2"), &[], ""),
        "no policy allows it",
    );
    assert_eq!(
        cloud
            .ask(admin, "GET", &format!("{BUCKET}?list-type=2"), &[], "")
            .0,
        200
    );
    // Deleting: nobody may, not even who may do everything; in a bucket without the policy it works.
    refused(
        cloud.ask(role, "DELETE", &manifest, &[], ""),
        "NothingIsDeletedOrUnlocked",
    );
    refused(
        cloud.ask(admin, "DELETE", &manifest, &[], ""),
        "NothingIsDeletedOrUnlocked",
    );
    assert_eq!(cloud.ask(admin, "PUT", &format!("{OPEN}/x"), &[&sum], "x").0, 200);
    assert_eq!(cloud.ask(admin, "DELETE", &format!("{OPEN}/x"), &[], "").0, 204);
    // Writing twice: without the condition the policy refuses, with it the store.
    refused(
        cloud.ask(role, "PUT", &manifest, &[&sum], "x"),
        "EvidenceIsWrittenOnce",
    );
    assert_eq!(cloud.ask(role, "PUT", &manifest, &[&sum, once], "x").0, 412);
    assert_eq!(cloud.ask(role, "PUT", &own("control"), &[&sum, once], "x").0, 200);
    // Without a checksum.
    assert_eq!(cloud.ask(role, "PUT", &own("without"), &[once], "x").0, 400);
    // Elsewhere.
    for elsewhere in [
        "evidence/AROALABinstances%3Ai-0other/x",
        "evidence/AROALABinstances%3Ai-0lab2/x",
        "orders/x",
    ] {
        refused(
            cloud.ask(role, "PUT", &format!("{BUCKET}/{elsewhere}"), &[&sum, once], "x"),
            "EvidenceIsWrittenUnderOnesOwnName",
        );
    }
    refused(
        cloud.ask(role, "PUT", &format!("{BUCKET}/cases/c/x"), &[&sum, once], "x"),
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
            .0,
        200
    );
    // A locked version cannot be deleted by the store's own word, without any policy.
    let gate = Cloud::start();
    gate.gate.bucket("bare", true, None).unwrap();
    let bare = gate.gate.principals.add(
        "AIDAADMIN3",
        "arn:aws:iam::123456789012:user/admin",
        vec![all()],
        None,
        None,
    );
    let bare = (&bare.0[..], &bare.1.secret[..], None);
    assert_eq!(gate.ask(bare, "PUT", "bare/x", &[&sum], "x").0, 200);
    let (_, versions) = gate.ask(bare, "GET", "bare?versions=", &[], "");
    let version = versions
        .split("<VersionId>")
        .nth(1)
        .and_then(|rest| rest.split('<').next())
        .unwrap_or_else(|| panic!("{versions}"));
    assert_eq!(
        gate.ask(bare, "DELETE", &format!("bare/x?versionId={version}"), &[], "")
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
        vec![policy("instance-role.json")],
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
            .0,
        200
    );
    let output = cloud.agent(id).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("somebody else has written it"),
        "{output:?}"
    );
    let (verdict, code, report) = cloud.verify(id);
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
    let cloud = Cloud::start();
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
        let (verdict, _, report) = cloud.verify(id);
        let acknowledged: usize = output
            .stdout
            .split(|b| *b == b'\n')
            .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
            .map(|event| {
                event["segments"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|s| s["receipt"]["confirmed"] == true)
                    .count()
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
        let salvaged = cloud.controller(&[
            "fetch",
            &id.to_string(),
            "--no-symbols",
            "--to",
            text(&folder.path().join(id.to_string())),
            "--output",
            "json",
        ]);
        if let Ok(told) = serde_json::from_slice::<Value>(&salvaged.stdout) {
            assert_eq!(told["damaged"], serde_json::json!([]), "{faults:?}: {told}");
            assert!(
                told["segments"].as_u64().unwrap() as usize + 1 >= acknowledged.min(1),
                "{told}"
            );
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
        let mut agent = cloud.agent(id);
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
        let (verdict, code, report) = cloud.verify(id);
        assert_eq!((verdict.as_str(), code), ("incomplete", 3), "{report}");
        let salvaged = cloud.controller(&["salvage", &id.to_string(), "--output", "json"]);
        assert_eq!(salvaged.status.code(), Some(4), "{salvaged:?}");
        let salvaged: Value = serde_json::from_slice(&salvaged.stdout).unwrap();
        assert!(
            salvaged["holds"]["segments"].as_u64().unwrap() >= acknowledged as u64,
            "{salvaged}"
        );
        assert_eq!(cloud.verify(id).0, "salvaged");
    }
}

/// The secrets that the lab handed out stand in nothing that the programs printed or stored.
#[test]
fn no_secret_is_printed_or_stored() {
    let cloud = cloud();
    let id = CaptureId::mint();
    let output = cloud.agent(id).output().unwrap();
    let shown = cloud.controller(&["cat", "process-details", &id.to_string()]);
    // The agent's own environment is evidence; it holds no key, since the role's came from the metadata service.
    for said in [&output.stdout, &output.stderr, &shown.stdout] {
        let text = String::from_utf8_lossy(said);
        assert!(!text.contains("lab+token+"), "a token");
        assert!(
            !text
                .lines()
                .any(|line| line.contains("lab/secret/") && line.contains("stillframe-agent")),
            "a secret"
        );
    }
}
