//! The instance metadata service, version 2: the instance identity document and its signature, nothing else, and only on
//! a host whose firmware says that it is an EC2 instance, or when the SDKs' own variable names an endpoint.

use std::time::Duration;
use stillframe_evidence::{records::host::Instance, text::Text};

const LINK_LOCAL: &str = "http://169.254.169.254";
const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
/// Documents are about 500 bytes, signatures about 2 KiB.
const MAX_ANSWER: u64 = 64 << 10;

/// Asks for the document and its RSA-2048 signature; the error of the first request that failed stands in the record.
pub fn instance(firmware_id: Option<Text>) -> Option<Instance> {
    let endpoint = std::env::var(ENDPOINT).ok();
    if firmware_id.is_none() && endpoint.is_none() {
        return None;
    }
    let endpoint = endpoint.unwrap_or_else(|| LINK_LOCAL.to_owned());
    let mut instance = Instance {
        firmware_id,
        ..Instance::default()
    };
    match ask(endpoint.trim_end_matches('/')) {
        Ok((document, rsa2048)) => {
            instance.document = Some(document);
            instance.rsa2048 = Some(rsa2048);
        }
        Err(error) => {
            instance.error = Some(stillframe_evidence::text::printable(error.to_string().as_bytes()))
        }
    }
    Some(instance)
}

fn ask(endpoint: &str) -> Result<(Text, Text), ureq::Error> {
    // No proxy: the host's environment does not get to see the token. No redirect: the service sends none.
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_millis(500)))
        .proxy(None)
        .max_redirects(0)
        .build()
        .into();
    let token = agent
        .put(format!("{endpoint}/latest/api/token"))
        .header("X-aws-ec2-metadata-token-ttl-seconds", "60")
        .send_empty()?
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER)
        .read_to_string()?;
    let get = |path: &str| -> Result<Text, ureq::Error> {
        let mut answer = agent
            .get(format!("{endpoint}/latest/dynamic/instance-identity/{path}"))
            .header("X-aws-ec2-metadata-token", &token)
            .call()?;
        Ok(Text(
            answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec()?,
        ))
    };
    Ok((get("document")?, get("rsa2048")?))
}
