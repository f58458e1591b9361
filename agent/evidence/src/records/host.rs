//! The host: who it is, what it runs, what time it thinks it is.

use crate::text::Text;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What tells one host from another; also in the first event of the chain.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Identity {
    /// The name that the kernel has for it.
    pub hostname: Text,
    /// `linux`, `windows`.
    pub os: String,
    /// /proc/sys/kernel/random/boot_id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<Text>,
    /// /etc/machine-id; MachineGuid on Windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<Text>,
    /// The cloud instance, when it says that it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
}

/// An EC2 instance, as the firmware and the metadata service (IMDSv2) state it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Instance {
    /// The instance id that the firmware carries (DMI board asset tag, Nitro).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware_id: Option<Text>,
    /// The instance identity document, byte for byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<Text>,
    /// Its PKCS #7 signature (RSA-2048), as the service gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rsa2048: Option<Text>,
    /// Why document or signature are missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The host's clocks, read together.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Clock {
    /// The wall clock.
    pub realtime: Timestamp,
    /// CLOCK_MONOTONIC, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monotonic_us: Option<u64>,
    /// CLOCK_BOOTTIME (it counts suspension), microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boottime_us: Option<u64>,
    /// What the kernel's clock discipline says of the wall clock: adjtimex(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discipline: Option<Discipline>,
    /// Wall clock minus the orderer's clock when the agent started, microseconds; transit included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_order_us: Option<i64>,
    /// Wall clock minus the store's clock (the Date of its last answer, in whole seconds) when that answer came, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_store_us: Option<i64>,
}

/// adjtimex(2), read only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Discipline {
    /// True when the kernel holds the clock to be synchronized.
    pub synchronized: bool,
    /// Offset still to be worked off, microseconds.
    pub offset_us: i64,
    /// Largest possible error, microseconds.
    pub max_error_us: i64,
    /// Estimated error, microseconds.
    pub estimated_error_us: i64,
    /// The status bits (STA_*).
    pub status: i32,
}

/// The `host` record.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Host {
    /// Who it is.
    pub identity: Identity,
    /// Its clocks.
    pub clock: Clock,
    /// /proc/version, or the version of Windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Text>,
    /// The machine's architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Text>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<Text>,
    /// /etc/os-release, its values unquoted; `PRETTY_NAME` on Windows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub distribution: BTreeMap<String, Text>,
    /// Where the wall clock's zone comes from: the target of /etc/localtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timezone: Option<Text>,
    /// When the kernel was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted: Option<Timestamp>,
    /// Seconds since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_s: Option<f64>,
    /// One, five and fifteen minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<[f64; 3]>,
    /// Processors that are online.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processors: Option<u64>,
    /// The processor's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<Text>,
    /// /proc/meminfo in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Swap devices and files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub swaps: Vec<Swap>,
    /// /proc/sys/kernel/tainted, and what its bits mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taint: Option<Taint>,
    /// The mode of the lockdown LSM: `none`, `integrity`, `confidentiality`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lockdown: Option<Text>,
    /// /proc/sys/kernel/modprobe: what the kernel would run to load a module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modprobe: Option<Text>,
    /// Signs of a hypervisor.
    pub virtualization: Virtualization,
    /// The namespaces of the agent itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub agent_namespaces: BTreeMap<String, Namespace>,
    /// True when the agent sees a container instead of the host; absent when that cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_contained: Option<bool>,
}

/// Memory, in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory {
    /// MemTotal.
    pub total: u64,
    /// MemAvailable.
    pub available: Option<u64>,
    /// SwapTotal.
    pub swap_total: u64,
    /// SwapFree.
    pub swap_free: u64,
}

/// One line of /proc/swaps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Swap {
    /// Device or file.
    pub path: Text,
    /// `partition` or `file`.
    pub kind: Text,
    /// Bytes.
    pub size: u64,
    /// Bytes in use.
    pub used: u64,
    /// Priority.
    pub priority: i64,
}

/// The kernel's taint (Documentation/admin-guide/tainted-kernels.rst).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Taint {
    /// The bits.
    pub bits: u64,
    /// What each bit means.
    pub reasons: Vec<String>,
}

/// Signs of virtualization, as they stand; no guess is made of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Virtualization {
    /// True when the processor says that there is a hypervisor (CPUID).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_bit: Option<bool>,
    /// /sys/hypervisor/type (Xen).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_type: Option<Text>,
    /// DMI strings: vendor, product, board, firmware, asset tag.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dmi: BTreeMap<String, Text>,
}

/// A namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its inode.
    pub inode: u64,
    /// True when it is the one that the kernel booted with, as its fixed inode tells (include/linux/proc_ns.h);
    /// absent for kinds without a fixed inode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<bool>,
}
