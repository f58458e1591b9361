//! The verbs, one file each. A verb returns its exit code; an error is wrong use or a store that cannot be read (2).

pub mod capture;
pub mod cat;
pub mod fetch;
pub mod list;
pub mod receive;
pub mod salvage;
pub mod show;
pub mod symbols;
pub mod verify;

use clap::Args;
use std::path::PathBuf;

/// Which capture, in which store.
#[derive(Args)]
pub struct Which {
    /// Its id, a unique beginning of it, or `latest`
    pub capture: String,
    /// The store: a directory
    #[arg(long)]
    pub store: PathBuf,
}
