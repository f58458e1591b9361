//! What was ordered, and where: the order stands in the case's folder from before anything is sent, so that whoever comes later can find, watch, stop or
//! cancel it. Shared by the verbs that speak of captures by way of Systems Manager.

use super::At;
use crate::{
    aws::{
        session::{Loan, Session},
        ssm::{Document, Invocation, Ssm, Targets},
    },
    stored::Store,
};
use anyhow::{Result, bail};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use stillframe_evidence::{
    layout::{CaptureId, CaseName},
    text::printable,
};

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
    /// Who ordered, as the host is told.
    pub ordered_by: String,
    /// The same, as STS says it: an ARN. It stays in the case.
    #[serde(default)]
    pub caller: Option<String>,
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
    /// Whose credentials are lent to the hosts; nothing where their own roles' serve.
    pub session: Option<Session>,
    /// For how long each host was lent its first ones.
    #[serde(default)]
    pub loans: BTreeMap<String, Loan>,
    /// The ids that Systems Manager gave it: one, or one a host where credentials are lent; nothing until it was sent.
    pub commands: Vec<String>,
    /// Why nothing of it was sent.
    #[serde(default)]
    pub refused: Option<String>,
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

    /// The commands, once they were sent.
    pub fn commands(&self) -> Result<&[String]> {
        if let Some(why) = &self.refused {
            bail!("{}: {}", self.capture, printable(why.as_bytes()));
        }
        if self.commands.is_empty() {
            bail!(
                "the order {} was written down, and no command of it: it was not sent, or the answer was lost; look for its comment in Run Command's history",
                self.capture
            );
        }
        Ok(&self.commands)
    }

    /// What became of it, host by host.
    pub fn invocations(&self, ssm: &Ssm) -> Result<Vec<Invocation>> {
        let mut all = Vec::new();
        for command in self.commands()? {
            all.extend(ssm.invocations(command)?);
        }
        Ok(all)
    }

    /// True when the service knows of every command, which it does a moment after it took it.
    pub fn is_listed(&self, invocations: &[Invocation]) -> bool {
        let known = |command: &String| invocations.iter().any(|one| one.command == *command);
        !self.commands.is_empty() && self.commands.iter().all(known)
    }

    /// True when nothing more will come of any host.
    pub fn is_over(&self, invocations: &[Invocation]) -> bool {
        self.is_listed(invocations) && invocations.iter().all(|one| one.state.is_over())
    }

    /// Has it killed on these hosts, or on all. What fails for one command does not keep it from the others.
    pub fn cancel(&self, ssm: &Ssm, hosts: Option<&[&Invocation]>) -> Result<()> {
        let mut failed = None;
        for command in self.commands()? {
            let ids = hosts.map(|hosts| {
                let of = hosts.iter().filter(|one| one.command == *command);
                of.map(|one| one.host.clone()).collect::<Vec<_>>()
            });
            let done = match ids {
                Some(ids) if ids.is_empty() => Ok(()),
                ids => ssm.cancel(command, &ids.unwrap_or_default()),
            };
            failed = failed.or(done.err());
        }
        failed.map_or(Ok(()), Err)
    }
}
