//! AWS on loopback, as far as Stillframe uses it: an S3 API server behind a gate that judges what that server does not, STS and the instance
//! metadata service for the credentials, Systems Manager with hosts that execute what they are sent, and faults between them and whoever
//! calls. The unmodified programs reach it by the SDK's own variables.

pub mod document;
pub mod faults;
pub mod gate;
pub mod http;
pub mod iam;
pub mod localstack;
pub mod metadata;
pub mod namespaces;
pub mod post;
pub mod principals;
pub mod sigv4;
pub mod ssm;

use crate::programs;
use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use gate::Gate;
use http::Server;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use ssm::Ssm;
use std::{
    process::{Command, Output},
    sync::Arc,
};
use stillframe_evidence::layout::CaptureId;

/// The bucket of evidence: locked, under the project's policy.
pub const BUCKET: &str = "evidence-bucket";
/// A bucket without lock and policy.
pub const OPEN: &str = "open-bucket";
/// The bucket for orders that lend credentials.
pub const ORDERS: &str = "order-bucket";
/// The role whose sessions are lent.
pub const SESSION_ROLE: &str = "arn:aws:iam::123456789012:role/lent";
/// What the store calls the writer of the lab's instance.
pub const WRITER: &str = "AROALABinstances:i-0lab";
/// The lab's instance.
pub const INSTANCE: &str = "i-0lab";

/// All of it.
pub struct Cloud {
    /// S3, STS, and by it Systems Manager.
    pub gate: Gate,
    /// Systems Manager, with the project's documents.
    pub ssm: Ssm,
    /// The metadata service of [`INSTANCE`].
    pub metadata: Server,
    /// Variables of whoever runs the controller.
    pub responder: Vec<(String, String)>,
}

/// A policy of the project, for the lab's bucket.
pub fn policy(name: &str) -> Result<Value> {
    let path = programs::workspace().join("ssm-documents/policies").join(name);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let text = text
        .replace("EVIDENCE_BUCKET", BUCKET)
        .replace("ORDER_BUCKET", ORDERS)
        .replace("arn:aws:iam::ACCOUNT_ID:role/SESSION_ROLE", SESSION_ROLE);
    Ok(serde_json::from_str(&text)?)
}

/// A document of the project.
pub fn document(name: &str) -> Result<Value> {
    let path = programs::workspace()
        .join("ssm-documents")
        .join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// The documents of the project.
pub const DOCUMENTS: [&str; 3] = ["Stillframe-Capture", "Stillframe-Stop", "Stillframe-Stage"];

impl Cloud {
    /// Starts it: a locked bucket under the project's policy, the project's documents, one host of the fate to execute what it is sent.
    pub fn start() -> Result<Self> {
        let gate = Gate::start()?;
        gate.bucket(BUCKET, true, Some(policy("evidence-bucket.json")?))?;
        gate.bucket(OPEN, false, None)?;
        gate.bucket(ORDERS, false, None)?;
        gate.role(SESSION_ROLE, vec![policy("session-role.json")?]);
        let role = vec![policy("instance-role.json")?];
        let metadata = metadata::start(gate.principals.clone(), INSTANCE, "instances", role)?;
        let responder = "arn:aws:iam::123456789012:user/responder";
        let (key, principal) = gate.principals.add(
            "AIDALABRESPONDER",
            responder,
            vec![policy("responder.json")?],
            None,
            None,
        );
        let ssm = Ssm::new()?;
        for name in DOCUMENTS {
            ssm.document(name, document(name)?)?;
        }
        gate.serve("ssm", ssm.handler());
        // By the rights of the instance's role, which may read where agents lie.
        let (principals, url) = (gate.principals.clone(), gate.url());
        let agents = serde_json::json!({"Statement": {"Effect": "Allow", "Action": "s3:GetObject", "Resource": format!("arn:aws:s3:::{OPEN}/agents/*")}});
        ssm.download_by(Arc::new(move |address| {
            let (key, who) = principals.add(
                WRITER,
                "arn:aws:iam::123456789012:role/instances",
                vec![agents.clone()],
                None,
                Some(600),
            );
            let path = address
                .strip_prefix(&url)
                .context("another S3")?
                .trim_start_matches('/');
            let (status, body) = ask(
                &url,
                (&key, &who.secret, who.token.as_deref()),
                "GET",
                path,
                &[],
                "",
            )?;
            ensure!(status == 200, "{address}: {status}");
            Ok(body)
        }));
        ssm.host(ssm::Host {
            id: INSTANCE.to_owned(),
            tags: [("Role".to_owned(), "web".to_owned())].into(),
            fate: ssm::Fate::Executes(vec![(
                "AWS_EC2_METADATA_SERVICE_ENDPOINT".to_owned(),
                metadata.url(),
            )]),
            ..ssm::Host::default()
        });
        let responder = [
            ("AWS_ACCESS_KEY_ID", key),
            ("AWS_SECRET_ACCESS_KEY", principal.secret),
            ("AWS_ENDPOINT_URL", gate.url()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ];
        Ok(Cloud {
            ssm,
            metadata,
            responder: responder.into_iter().map(|(n, v)| (n.to_owned(), v)).collect(),
            gate,
        })
    }

    /// The agent on the instance, by hand.
    pub fn agent(&self, id: CaptureId) -> Result<Command> {
        let mut agent = Command::new(programs::agent()?);
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
        Ok(agent)
    }

    /// The controller of the responder, ready for arguments.
    pub fn responder(&self) -> Result<Command> {
        let mut controller = Command::new(programs::controller()?);
        controller.envs(self.responder.iter().cloned());
        Ok(controller)
    }

    /// Runs the controller on the bucket.
    pub fn controller(&self, arguments: &[&str]) -> Result<Output> {
        let store = format!("s3://{BUCKET}");
        Ok(self
            .responder()?
            .args(arguments)
            .args(["--store", &store])
            .output()?)
    }

    /// The verdict on a capture, the exit code, the report.
    pub fn verify(&self, id: &str, more: &[&str]) -> Result<(String, i32, Value)> {
        let output = self.controller(&[&["verify", id, "--output", "json"], more].concat())?;
        let report: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
        let verdict = report["verdict"].as_str().context("no verdict")?.to_owned();
        Ok((verdict, output.status.code().unwrap_or(-1), report))
    }

    /// One request to S3, as [`ask`] makes it.
    pub fn ask(
        &self,
        who: (&str, &str, Option<&str>),
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> Result<(u16, String)> {
        let (status, body) = ask(&self.gate.url(), who, method, path, headers, body)?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

/// One request to S3, signed by curl with this key, secret and token: its status and its body.
pub fn ask(
    gate: &str,
    (key, secret, token): (&str, &str, Option<&str>),
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> Result<(u16, Vec<u8>)> {
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
    curl.args([
        "-H",
        &format!("x-amz-content-sha256: {}", hex::encode(Sha256::digest(body))),
    ]);
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
    let output = curl.arg(format!("{gate}/{path}")).output().context("curl")?;
    let said = &output.stdout;
    let at = said
        .iter()
        .rposition(|b| *b == b'\n')
        .context("curl said nothing")?;
    let status = String::from_utf8_lossy(&said[at + 1..]).parse();
    Ok((
        status.with_context(|| format!("{:?}", output.stderr))?,
        said[..at].to_vec(),
    ))
}

/// The header that states the checksum of a body.
pub fn checksum(body: &str) -> String {
    format!(
        "x-amz-checksum-sha256: {}",
        base64::engine::general_purpose::STANDARD.encode(Sha256::digest(body))
    )
}
