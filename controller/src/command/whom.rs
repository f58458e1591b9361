//! Whom an order is for, as a person names them.

use crate::aws::ssm::{MOST_INSTANCES, Targets};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use std::collections::BTreeMap;
use stillframe_evidence::text::printable;

/// Hosts, named in one of three ways.
#[derive(Args)]
pub struct Whom {
    /// This instance; may be given up to 50 times
    #[arg(long)]
    pub instance: Vec<String>,
    /// Every instance with this tag
    #[arg(long, value_name = "KEY=VALUE")]
    pub tag: Vec<String>,
    /// Every instance of this resource group
    #[arg(long)]
    pub resource_group: Option<String>,
}

impl Whom {
    /// True when anybody is named.
    pub fn is_meant(&self) -> bool {
        !self.instance.is_empty() || !self.tag.is_empty() || self.resource_group.is_some()
    }

    /// The same, as Systems Manager takes them.
    pub fn targets(&self) -> Result<Targets> {
        let kinds = [
            !self.instance.is_empty(),
            !self.tag.is_empty(),
            self.resource_group.is_some(),
        ];
        if kinds.iter().filter(|k| **k).count() != 1 {
            bail!("name hosts in one way: --instance, --tag or --resource-group");
        }
        if !self.instance.is_empty() {
            if self.instance.len() > MOST_INSTANCES {
                bail!("--instance may be given {MOST_INSTANCES} times; a fleet is named by --tag");
            }
            for id in &self.instance {
                let known = id.strip_prefix("i-").or_else(|| id.strip_prefix("mi-"));
                if !known
                    .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
                {
                    bail!(
                        "--instance {}: an instance id is expected",
                        printable(id.as_bytes())
                    );
                }
            }
            // Once each: two agents of one capture would contradict each other.
            let mut ids = self.instance.clone();
            ids.sort_unstable();
            ids.dedup();
            return Ok(Targets::Instances(ids));
        }
        let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for tag in &self.tag {
            let (key, value) = tag.split_once('=').context("--tag KEY=VALUE")?;
            keys.entry(format!("tag:{key}"))
                .or_default()
                .push(value.to_owned());
        }
        if let Some(group) = &self.resource_group {
            keys.insert("resource-groups:Name".to_owned(), vec![group.clone()]);
        }
        if keys.len() > 5 || keys.values().any(|values| values.len() > 50) {
            bail!("Systems Manager takes 5 tags with 50 values each");
        }
        Ok(Targets::Keys(keys))
    }
}
