//! AWS as the controller uses it beside the store: Systems Manager, and sessions that are lent. It knows no verb and prints nothing.

pub mod session;
pub mod ssm;

use anyhow::{Context as _, Result, anyhow};
pub use stillframe_store::aws::said;
use stillframe_store::aws::{Reach, config};

/// Whose credentials the programs have, as STS says it: an ARN.
pub fn caller(reach: &Reach) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(async {
        let config = config(reach, 3, None).await.map_err(|why| anyhow!(why))?;
        let answer = aws_sdk_sts::Client::new(&config)
            .get_caller_identity()
            .send()
            .await;
        let answer = answer.map_err(|error| anyhow!("STS: {}", said(&error)))?;
        Ok(answer.arn().unwrap_or("STS names nobody").to_owned())
    })
}
