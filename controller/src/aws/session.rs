//! Credentials lent to hosts whose own role has no right: a session of a role, narrowed to one capture, laid as an order into a bucket of its own, behind an
//! address that is good for minutes. It knows no verb and prints nothing.

use super::{connect, said};
use anyhow::{Result, anyhow, bail};
use aws_sdk_s3::{presigning::PresigningConfig, primitives::ByteStream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use stillframe_evidence::layout::CaptureId;
use stillframe_store::{aws::Reach, lent::LentOrder, s3};
use tokio::runtime::Runtime;

/// What a session may do, with the names of the project's policies in it.
const POLICY: &str = include_str!("../../../ssm-documents/policies/session.json");
/// An address is good for so long: for a host to begin, no longer.
pub const ADDRESS_SECONDS: i32 = 300;
const ATTEMPTS: u32 = 5;

/// Whose credentials are lent, by way of which bucket, for how long.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Session {
    /// The ARN of the role.
    pub role: String,
    /// The bucket for orders; not the one of the evidence, whose objects stay.
    pub bucket: String,
    /// Seconds that one loan is good for.
    pub seconds: i32,
}

/// For how long a host was lent credentials.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Loan {
    /// From then.
    pub lent: Timestamp,
    /// Until then.
    pub expires: Timestamp,
}

/// Lends.
pub struct Lender {
    runtime: Runtime,
    sts: aws_sdk_sts::Client,
    s3: aws_sdk_s3::Client,
    session: Session,
}

fn key(capture: CaptureId, host: &str) -> String {
    format!("orders/{capture}/{host}.json")
}

/// The session policy of one capture on one host.
fn policy(store: &str, session: &Session, capture: CaptureId, host: &str) -> Result<String> {
    let (bucket, prefix) = s3::address(store).map_err(|why| anyhow!(why))?;
    let text = POLICY
        .replace(
            "EVIDENCE_BUCKET/evidence",
            &format!("{bucket}/{}", s3::below(prefix, "evidence")),
        )
        .replace("ORDER_BUCKET", &session.bucket)
        .replace("CAPTURE_ID", &capture.to_string())
        .replace("INSTANCE_ID", host)
        // The role's own policy says which key: a session cannot have more than its role.
        .replace("arn:aws:kms:REGION:ACCOUNT_ID:key/KEY_ID", "*");
    let value: serde_json::Value = serde_json::from_str(&text)?;
    Ok(value.to_string())
}

impl Lender {
    /// Opens it with the responder's own credentials.
    pub fn open(reach: &Reach, session: &Session) -> Result<Self> {
        let (runtime, config) = connect(reach, ATTEMPTS)?;
        Ok(Lender {
            sts: aws_sdk_sts::Client::new(&config),
            s3: aws_sdk_s3::Client::new(&config),
            runtime,
            session: session.clone(),
        })
    }

    /// Makes credentials for one capture on one host and lays them where that host's agent finds them.
    pub fn lend(&self, store: &str, capture: CaptureId, host: &str) -> Result<Loan> {
        let policy = policy(store, &self.session, capture, host)?;
        let lent = Timestamp::now();
        let answer = self
            .runtime
            .block_on(
                self.sts
                    .assume_role()
                    .role_arn(&self.session.role)
                    .role_session_name(host)
                    .duration_seconds(self.session.seconds)
                    .policy(policy)
                    .send(),
            )
            .map_err(|error| {
                anyhow!("STS: {}", said(&error)).context(format!("role {}", self.session.role))
            })?;
        let Some(credentials) = answer.credentials() else {
            bail!("STS gave no credentials of role {}", self.session.role);
        };
        let expires = Timestamp::from_second(credentials.expiration().secs())?;
        let order = LentOrder {
            access_key_id: credentials.access_key_id().to_owned(),
            secret_access_key: credentials.secret_access_key().to_owned(),
            session_token: credentials.session_token().to_owned(),
            lent,
            expires,
            bucket: self.session.bucket.clone(),
            key: key(capture, host),
        };
        self.runtime
            .block_on(
                self.s3
                    .put_object()
                    .bucket(&order.bucket)
                    .key(&order.key)
                    .checksum_algorithm(aws_sdk_s3::types::ChecksumAlgorithm::Sha256)
                    .body(ByteStream::from(serde_json::to_vec(&order)?))
                    .send(),
            )
            .map_err(|error| anyhow!("s3://{}/{}: {}", order.bucket, order.key, said(&error)))?;
        Ok(Loan { lent, expires })
    }

    /// The address of what was laid there: a secret, as long as it is good.
    pub fn address(&self, capture: CaptureId, host: &str) -> Result<String> {
        let request = self
            .s3
            .get_object()
            .bucket(&self.session.bucket)
            .key(key(capture, host))
            .presigned(PresigningConfig::expires_in(Duration::from_secs(
                ADDRESS_SECONDS.unsigned_abs().into(),
            ))?);
        let signed = self
            .runtime
            .block_on(request)
            .map_err(|error| anyhow!("an address for the order: {}", said(&error)))?;
        Ok(signed.uri().to_owned())
    }

    /// Takes away what was laid there.
    pub fn take_back(&self, capture: CaptureId, host: &str) -> Result<()> {
        let key = key(capture, host);
        let request = self.s3.delete_object().bucket(&self.session.bucket).key(&key);
        match self.runtime.block_on(request.send()) {
            Ok(_) => Ok(()),
            Err(error) => bail!("s3://{}/{key}: {}", self.session.bucket, said(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_may_write_one_capture_and_read_one_order() -> Result<()> {
        let session = Session {
            role: "arn:aws:iam::1:role/lent".to_owned(),
            bucket: "orders-bucket".to_owned(),
            seconds: 3600,
        };
        let capture = CaptureId::mint();
        let policy = policy("s3://evidence-bucket/team", &session, capture, "i-1")?;
        assert!(policy.contains(&format!(
            "arn:aws:s3:::evidence-bucket/team/evidence/${{aws:userid}}/{capture}/*"
        )));
        assert!(policy.contains(&format!("arn:aws:s3:::orders-bucket/orders/{capture}/i-1.json")));
        for left in [
            "EVIDENCE_BUCKET",
            "ORDER_BUCKET",
            "CAPTURE_ID",
            "INSTANCE_ID",
            "KEY_ID",
        ] {
            assert!(!policy.contains(left), "{left}");
        }
        // What STS takes of a session policy.
        assert!(policy.len() < 2048);
        Ok(())
    }
}
