//! What was ordered, and where: the order stands in the case's folder from before anything is sent, so that whoever comes later can find, watch, stop or
//! cancel it. Shared by the verbs that speak of captures by way of Systems Manager.

use super::At;
use crate::{
    aws::ssm::{Document, Targets},
    stored::Store,
};
use anyhow::Result;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stillframe_evidence::layout::{CaptureId, CaseName};

/// An order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The capture: one id on every host.
    pub capture: CaptureId,
    /// The case.
    pub case: CaseName,
    /// The profile.
    pub profile: String,
    /// Where the evidence goes.
    pub store: String,
    /// Repeated by the first event of every host.
    pub nonce: String,
    /// Who ordered.
    pub ordered_by: String,
    /// When.
    pub ordered_at: Timestamp,
    /// Whom it is for.
    pub targets: Targets,
    /// What was sent.
    pub document: Document,
    /// The agent that must run.
    pub agent_sha256: String,
    /// Where it is on Linux.
    pub agent: String,
    /// The id that Systems Manager gave it; nothing until it was sent.
    pub command: Option<String>,
}

impl Order {
    /// The order of a capture: by its id, a unique beginning, or `latest`.
    pub fn find(at: &At, capture: &str) -> Result<(Store, Order)> {
        let store = Store::open(at)?;
        let order: Order = serde_json::from_slice(&store.order(capture)?)?;
        Ok((store, order))
    }

    /// Writes it down, or what is new of it.
    pub fn keep(&self, store: &Store) -> Result<()> {
        store.keep_order(
            &self.case,
            self.capture,
            (serde_json::to_string(self)? + "\n").as_bytes(),
        )
    }

    /// The command, once it was sent.
    pub fn command(&self) -> Result<&str> {
        self.command.as_deref().ok_or_else(|| {
            anyhow::anyhow!(
                "the order {} was written down, and no command of it: it was not sent, or the answer was lost; look for its comment in Run Command's history",
                self.capture
            )
        })
    }
}
