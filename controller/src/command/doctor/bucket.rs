//! Whether a bucket keeps evidence as it must be kept: versions, Object Lock, the project's policy. It asks, and changes nothing.

use super::{Check, Health};
use crate::aws::{connect, said};
use anyhow::{Context as _, Result, anyhow};
use aws_sdk_s3::{
    Client,
    types::{BucketVersioningStatus, ObjectLockEnabled, ObjectLockRetentionMode},
};
use serde_json::Value;
use stillframe_store::{
    aws::Reach,
    s3::{address, below},
};

/// The policy that the bucket must have.
const POLICY: &str = include_str!("../../../../ssm-documents/policies/evidence-bucket.json");
const ATTEMPTS: u32 = 4;

/// What is to be said of the bucket of `s3://bucket/prefix`.
pub fn checks(target: &str, reach: &Reach) -> Result<Vec<Check>> {
    let (bucket, prefix) = address(target).map_err(|why| anyhow!(why))?;
    let (runtime, config) = connect(reach, ATTEMPTS).with_context(|| format!("--store {target}"))?;
    let client = Client::new(&config);
    Ok(runtime.block_on(async {
        vec![
            versioning(&client, bucket).await,
            lock(&client, bucket).await,
            policy(&client, bucket, prefix).await,
        ]
    }))
}

async fn versioning(client: &Client, bucket: &str) -> Check {
    let what = "bucket versioning";
    match client.get_bucket_versioning().bucket(bucket).send().await {
        Ok(answer) if answer.status() == Some(&BucketVersioningStatus::Enabled) => {
            Check::new(what, Health::Good, "enabled")
        }
        Ok(_) => Check::new(
            what,
            Health::Bad,
            "not enabled: Object Lock needs it, and without it nothing is anchored",
        ),
        Err(error) => Check::new(what, Health::Bad, said(&error)),
    }
}

async fn lock(client: &Client, bucket: &str) -> Check {
    let what = "bucket lock";
    let answer = match client.get_object_lock_configuration().bucket(bucket).send().await {
        Ok(answer) => answer,
        Err(error) => {
            let why = format!(
                "{}: without Object Lock no capture in it is verified, only self-consistent",
                said(&error)
            );
            return Check::new(what, Health::Bad, why);
        }
    };
    let configuration = answer.object_lock_configuration();
    if configuration.and_then(|c| c.object_lock_enabled()) != Some(&ObjectLockEnabled::Enabled) {
        return Check::new(what, Health::Bad, "Object Lock is not enabled");
    }
    let retention = configuration.and_then(|c| c.rule()?.default_retention());
    match retention.map(|r| (r.mode(), r.days(), r.years())) {
        Some((Some(ObjectLockRetentionMode::Compliance), days, years)) => {
            let time = match (days, years) {
                (Some(days), _) => format!("{days} days"),
                (_, Some(years)) => format!("{years} years"),
                _ => "a time that is not stated".to_owned(),
            };
            Check::new(what, Health::Good, format!("COMPLIANCE by default, {time}"))
        }
        Some((Some(mode), ..)) => Check::new(
            what,
            Health::Weak,
            format!(
                "{mode:?} by default: whoever may bypass it can take evidence away; COMPLIANCE cannot be bypassed"
            ),
        ),
        _ => Check::new(
            what,
            Health::Bad,
            "no default retention: what agents write would not be locked",
        ),
    }
}

async fn policy(client: &Client, bucket: &str, prefix: &str) -> Check {
    let what = "bucket policy";
    let has = match client.get_bucket_policy().bucket(bucket).send().await {
        Ok(answer) => answer.policy().unwrap_or_default().to_owned(),
        Err(error) => return Check::new(what, Health::Bad, said(&error)),
    };
    match missing(&has, bucket, prefix) {
        Ok(missing) if missing.is_empty() => Check::new(
            what,
            Health::Good,
            "every statement of policies/evidence-bucket.json is in it",
        ),
        Ok(missing) => Check::new(
            what,
            Health::Bad,
            format!(
                "of policies/evidence-bucket.json it has not, or not so: {}",
                missing.join(", ")
            ),
        ),
        Err(error) => Check::new(what, Health::Bad, format!("{error:#}")),
    }
}

/// The statements of the project's policy that a policy does not have word for word; it may have more.
fn missing(has: &str, bucket: &str, prefix: &str) -> Result<Vec<String>> {
    let has: Value = serde_json::from_str(has).context("the policy is no JSON")?;
    // The patterns of a store with a prefix have it before each folder.
    let mut wanted = POLICY.to_owned();
    for folder in ["evidence/", "cases/"] {
        let below = format!("EVIDENCE_BUCKET/{}", below(prefix, folder));
        wanted = wanted.replace(&format!("EVIDENCE_BUCKET/{folder}"), &below);
    }
    let wanted: Value = serde_json::from_str(&wanted.replace("EVIDENCE_BUCKET", bucket))?;
    let statements = |policy: &Value| {
        policy
            .get("Statement")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let there = statements(&has);
    let absent = statements(&wanted)
        .into_iter()
        .filter(|statement| !there.contains(statement));
    let name = |statement: Value| {
        statement
            .get("Sid")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    Ok(absent.map(name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_lacks_a_statement_is_told() -> Result<()> {
        let nothing: [String; 0] = [];
        let whole = POLICY.replace("EVIDENCE_BUCKET", "b");
        assert_eq!(missing(&whole, "b", "")?, nothing);
        // Of a store below a prefix it would refuse every put.
        let names = ["EvidenceIsWrittenOnce", "EvidenceIsWrittenUnderOnesOwnName"];
        assert_eq!(missing(&whole, "b", "team")?, names);
        let moved = whole
            .replace("b/evidence/", "b/team/evidence/")
            .replace("b/cases/", "b/team/cases/");
        assert_eq!(missing(&moved, "b", "team")?, nothing);
        let mut less: Value = serde_json::from_str(&whole)?;
        less["Statement"][0]["Effect"] = "Allow".into();
        less["Statement"][1] = Value::Null;
        assert_eq!(
            missing(&less.to_string(), "b", "")?,
            ["TlsOnly", "EvidenceIsWrittenOnce"]
        );
        assert!(missing("x", "b", "").is_err());
        Ok(())
    }
}
