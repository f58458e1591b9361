//! AWS as the controller uses it beside the store: Systems Manager, and sessions that are lent. It knows no verb and prints nothing.

pub mod session;
pub mod ssm;

use anyhow::{Context as _, Result, anyhow};
use std::time::Duration;
pub use stillframe_store::aws::said;
use stillframe_store::aws::{Reach, SdkConfig, config};
use tokio::runtime::Runtime;

/// How AWS is reached, and what runs the requests of one client after another. The SDK tries so often.
pub fn connect(reach: &Reach, attempts: u32) -> Result<(Runtime, SdkConfig)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    let config = runtime
        .block_on(config(reach, attempts, None))
        .map_err(|why| anyhow!(why))?;
    Ok((runtime, config))
}

/// An order does not wait longer for what it can do without.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whose credentials the programs have, as STS says it: an ARN.
pub fn caller(reach: &Reach) -> Result<String> {
    let (runtime, config) = connect(reach, 3)?;
    let request = aws_sdk_sts::Client::new(&config).get_caller_identity();
    let answer = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, request.send()).await })
        .map_err(|_| anyhow!("STS did not answer in {} s", PATIENCE.as_secs()))?
        .map_err(|error| anyhow!("STS: {}", said(&error)))?;
    Ok(answer.arn().unwrap_or("STS names nobody").to_owned())
}
