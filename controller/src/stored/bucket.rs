//! A store in S3, for reading; and the case's folder in it, for writing. Only here are a store's own statements seen: versions, retention,
//! checksums, times. They are what anchors a capture.

use super::Place;
use crate::aws::{connect, said};
use anyhow::{Context as _, Result, anyhow};
use aws_sdk_s3::{
    Client,
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ChecksumMode, ObjectLockMode},
};
use jiff::Timestamp;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use stillframe_evidence::{
    chain::Chain,
    verdict::{Anchor, Finding},
};
use stillframe_store::{
    aws::Reach,
    s3::{address, below},
};
use tokio::runtime::Runtime;

/// How often the SDK tries.
const ATTEMPTS: u32 = 6;

/// Seconds between the store's answer to a put and what it states of the object: retries lie between them.
const APART: i64 = 15 * 60;

/// A bucket and a prefix in it.
pub struct Bucket {
    runtime: Runtime,
    client: Client,
    bucket: String,
    prefix: String,
    /// What the store stated of each object that was read, by its key.
    seen: Mutex<BTreeMap<String, Statement>>,
}

/// What the store states of one object.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Statement {
    size: Option<i64>,
    checksum_sha256: Option<String>,
    version_id: Option<String>,
    last_modified: Option<Timestamp>,
    lock_mode: Option<String>,
    retain_until: Option<Timestamp>,
}

impl Bucket {
    /// Opens `s3://bucket/prefix`.
    pub fn open(target: &str, reach: &Reach) -> Result<Self> {
        let (bucket, prefix) = address(target).map_err(|why| anyhow!(why))?;
        let (runtime, config) = connect(reach, ATTEMPTS).with_context(|| format!("--store {target}"))?;
        Ok(Bucket {
            client: Client::new(&config),
            runtime,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            seen: Mutex::default(),
        })
    }

    fn statements(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Statement>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn list_below(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
    ) -> Result<(Vec<String>, Vec<(String, u64)>), String> {
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix)
            .set_delimiter(delimiter.map(str::to_owned))
            .into_paginator()
            .send();
        let (mut folders, mut objects) = (Vec::new(), Vec::new());
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| said(&error))?;
            let name = |key: &str| key.strip_prefix(prefix).map(str::to_owned);
            folders.extend(
                page.common_prefixes()
                    .iter()
                    .filter_map(|p| name(p.prefix()?)?.strip_suffix('/').map(str::to_owned)),
            );
            objects.extend(
                page.contents().iter().filter_map(|o| {
                    Some((name(o.key()?)?, u64::try_from(o.size().unwrap_or(0)).unwrap_or(0)))
                }),
            );
        }
        Ok((folders, objects))
    }

    async fn read(&self, key: &str, max: u64) -> Result<Vec<u8>, String> {
        let mut answer = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key)
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await
            .map_err(|error| said(&error))?;
        let time = |at: Option<&aws_sdk_s3::primitives::DateTime>| Timestamp::from_second(at?.secs()).ok();
        let statement = Statement {
            size: answer.content_length(),
            checksum_sha256: answer.checksum_sha256().map(str::to_owned),
            version_id: answer.version_id().map(str::to_owned),
            last_modified: time(answer.last_modified()),
            lock_mode: answer.object_lock_mode().map(|mode| mode.as_str().to_owned()),
            retain_until: time(answer.object_lock_retain_until_date()),
        };
        let mut bytes = Vec::new();
        while let Some(piece) = answer.body.next().await {
            let piece = piece.map_err(|error| error.to_string())?;
            if (bytes.len() + piece.len()) as u64 > max {
                return Err(format!("more than {max} bytes"));
            }
            bytes.extend_from_slice(&piece);
        }
        self.statements().insert(key.to_owned(), statement);
        Ok(bytes)
    }

    /// How many versions, and how many deletions, the bucket has of each key below a prefix.
    async fn versions(&self, prefix: &str) -> Result<BTreeMap<String, (usize, usize)>, String> {
        let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        let (mut key, mut version) = (None, None);
        loop {
            let page = self
                .client
                .list_object_versions()
                .bucket(&self.bucket)
                .prefix(prefix)
                .set_key_marker(key)
                .set_version_id_marker(version)
                .send()
                .await
                .map_err(|error| said(&error))?;
            for one in page.versions() {
                counts
                    .entry(one.key().unwrap_or_default().to_owned())
                    .or_default()
                    .0 += 1;
            }
            for one in page.delete_markers() {
                counts
                    .entry(one.key().unwrap_or_default().to_owned())
                    .or_default()
                    .1 += 1;
            }
            if page.is_truncated() != Some(true) {
                return Ok(counts);
            }
            if page.next_key_marker().is_none() {
                return Err("a list of versions that is cut off without saying where".to_owned());
            }
            (key, version) = (
                page.next_key_marker().map(str::to_owned),
                page.next_version_id_marker().map(str::to_owned),
            );
        }
    }
}

impl Place for Bucket {
    fn name(&self) -> String {
        format!(
            "s3://{}",
            below(&self.bucket, &self.prefix).trim_start_matches('/')
        )
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let prefix = below(&self.prefix, prefix) + "/";
        self.runtime
            .block_on(self.list_below(&prefix, Some("/")))
            .map(|(folders, _)| folders)
            .map_err(|why| anyhow!("{}: {why}", self.name()))
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>, String> {
        let prefix = below(&self.prefix, prefix) + "/";
        self.runtime
            .block_on(self.list_below(&prefix, None))
            .map(|(_, objects)| objects)
    }

    fn get(&self, key: &str, max: u64) -> Result<Vec<u8>, String> {
        self.runtime.block_on(self.read(&below(&self.prefix, key), max))
    }

    fn keep(&self, key: &str, object: &[u8]) -> Result<()> {
        let key = below(&self.prefix, key);
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(&key)
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .body(ByteStream::from(object.to_vec()))
            .send();
        self.runtime
            .block_on(put)
            .map(|_| ())
            .map_err(|error| anyhow!("{key}: {}", said(&error)))
    }

    /// Write-once is what the store itself says of every object of the capture: one version, never deleted, locked in COMPLIANCE mode (which nobody can
    /// lift) beyond now. What contradicts what the store told the agent is a finding.
    fn anchor(&self, prefix: &str, chain: &Chain) -> Anchor {
        let folder = below(&self.prefix, prefix) + "/";
        let counts = match self.runtime.block_on(self.versions(&folder)) {
            Ok(counts) => counts,
            Err(why) => return Anchor::None(format!("versions could not be listed: {why}")),
        };
        let seen = self.statements();
        let here: BTreeMap<&str, &Statement> = seen
            .iter()
            .filter_map(|(key, statement)| Some((key.strip_prefix(&folder)?, statement)))
            .collect();
        let mut findings = Vec::new();
        let mut wrong = |object: &str, why: String| {
            findings.push(Finding {
                object: object.to_owned(),
                why,
            });
        };
        for (key, (versions, deletions)) in &counts {
            let object = key.strip_prefix(&folder).unwrap_or(key);
            if *versions > 1 {
                wrong(object, format!("was written {versions} times"));
            }
            if *deletions > 0 {
                wrong(object, "was deleted; its versions are still there".to_owned());
            }
        }
        for entry in chain.segments() {
            let key = entry.key().to_string();
            let put = here.get(key.as_str()).and_then(|s| s.last_modified);
            if let (Some(put), Some(answered)) = (put, entry.receipt.date)
                && (put.as_second() - answered.as_second()).abs() > APART
            {
                wrong(
                    &key,
                    format!("was put at {put}; the store answered the agent at {answered}"),
                );
            }
            let stated = here.get(key.as_str()).and_then(|s| s.version_id.as_deref());
            if let (Some(stated), Some(answered)) = (stated, entry.receipt.version_id.as_deref())
                && stated != answered
            {
                wrong(
                    &key,
                    format!("is version {stated}; the store answered the agent {answered}"),
                );
            }
        }
        if !findings.is_empty() {
            return Anchor::Contradicted(findings);
        }
        let now = Timestamp::now();
        let locked = |s: &&&Statement| {
            s.lock_mode.as_deref() == Some(ObjectLockMode::Compliance.as_str())
                && s.retain_until.is_some_and(|until| until > now)
        };
        let unlocked = here.len() - here.values().filter(locked).count();
        let until = here.values().filter_map(|s| s.retain_until).min();
        match (unlocked, until) {
            (0, Some(until)) => Anchor::WriteOnce(format!(
                "the store states one version of every object, locked until {until:.0}"
            )),
            (n, _) => Anchor::None(format!(
                "{n} of {} objects are not locked in COMPLIANCE mode",
                here.len()
            )),
        }
    }

    fn put_at(&self, key: &str) -> Option<Timestamp> {
        let key = below(&self.prefix, key);
        Bucket::statements(self).get(&key)?.last_modified
    }

    fn statements(&self, prefix: &str) -> Option<serde_json::Value> {
        let folder = below(&self.prefix, prefix) + "/";
        let seen = Bucket::statements(self);
        let of = |(key, statement): (&String, &Statement)| {
            Some((key.strip_prefix(&folder)?.to_owned(), statement.clone()))
        };
        let list: BTreeMap<String, Statement> = seen.iter().filter_map(of).collect();
        serde_json::to_value(list).ok()
    }
}
