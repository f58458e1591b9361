//! Kernel modules.

use crate::text::Text;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One loaded module.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Module {
    /// Its name.
    pub name: Text,
    /// Where it was seen: `procfs` (/proc/modules), `sysfs` (/sys/module/NAME/initstate). A module in one only is
    /// worth a question.
    pub seen_in: Vec<String>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// References; absent when the kernel does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub references: Option<i64>,
    /// Modules that use it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub used_by: Vec<Text>,
    /// `Live`, `Loading`, `Unloading`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<Text>,
    /// Load address; 0 when the kernel hides it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// Taint letters, such as `OE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taint: Option<Text>,
    /// Files of /sys/module/NAME: version, srcversion, initstate, coresize, …
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysfs: BTreeMap<String, Text>,
}
