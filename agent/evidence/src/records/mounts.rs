//! Mounts of every mount namespace that holds a process.

use crate::text::Text;
use serde::{Deserialize, Serialize};

/// One line of /proc/PID/mountinfo (proc_pid_mountinfo(5)); octal escapes are undone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Inode of the mount namespace; absent when the process's link could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mntns: Option<u64>,
    /// The process through which it was read.
    pub seen_by: u32,
    /// Id of the mount.
    pub id: u64,
    /// Id of the mount below it.
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: Text,
    /// What of the file system is mounted.
    pub root: Text,
    /// Where.
    pub target: Text,
    /// Options of the mount.
    pub options: Text,
    /// Propagation: `shared:1`, `master:2`, …
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub propagation: Vec<Text>,
    /// Type of the file system.
    pub fstype: Text,
    /// Its source.
    pub source_device: Text,
    /// Its own options.
    pub super_options: Text,
}
