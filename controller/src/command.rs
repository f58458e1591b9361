//! The verbs, one file each. A verb returns its exit code; an error is wrong use or a store that cannot be read (2).

pub mod capture;
pub mod cat;
pub mod doctor;
pub mod fetch;
pub mod list;
pub mod order;
pub mod receive;
pub mod salvage;
pub mod show;
pub mod stop;
pub mod symbols;
pub mod verify;
pub mod watch;
pub mod whom;

use clap::Args;
use std::path::PathBuf;
use stillframe_store::aws::Reach;

/// Which store, and how it is reached.
#[derive(Args)]
pub struct At {
    /// The store: a directory, or s3://bucket/prefix
    #[arg(long)]
    pub store: PathBuf,
    /// How it is reached, where it is in S3.
    #[command(flatten)]
    pub aws: AwsArgs,
}

/// How AWS is reached, where it is not as the SDK's own variables say.
#[derive(Args, Default)]
#[command(next_help_heading = "AWS")]
pub struct AwsArgs {
    /// The region
    #[arg(long)]
    pub region: Option<String>,
    /// Where requests go instead of AWS
    #[arg(long)]
    pub endpoint_url: Option<String>,
    /// FIPS endpoints
    #[arg(long)]
    pub fips: bool,
    /// Endpoints that answer over IPv6 too
    #[arg(long)]
    pub dual_stack: bool,
    /// PEM certificates to trust instead of the roots built in
    #[arg(long)]
    pub ca_bundle: Option<PathBuf>,
}

impl AwsArgs {
    /// The same, as the clients take it.
    pub fn reach(&self) -> Reach {
        Reach {
            region: self.region.clone(),
            endpoint: self.endpoint_url.clone(),
            fips: self.fips,
            dual_stack: self.dual_stack,
            ca_bundle: self.ca_bundle.clone(),
        }
    }
}

/// Which capture, in which store.
#[derive(Args)]
pub struct Which {
    /// Its id, a unique beginning of it, or `latest`
    pub capture: String,
    /// Where it is.
    #[command(flatten)]
    pub at: At,
}
