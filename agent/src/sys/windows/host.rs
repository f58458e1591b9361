//! The host, as the `sysinfo` library reads it.

use crate::collect::{Collection, Unsupported};
use jiff::Timestamp;
use std::{collections::BTreeMap, path::Path};
use stillframe_evidence::{
    records::{
        Data,
        host::{Host, Identity, Memory},
    },
    text::Text,
};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// What tells this host from another.
pub fn identity(_root: &Path) -> Identity {
    Identity {
        hostname: System::host_name().map(|n| Text::from(&n)).unwrap_or_default(),
        os: "windows".to_owned(),
        ..Identity::default()
    }
}

/// One record.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    if !c.item(0, "host") {
        return Ok(());
    }
    let read_at = Timestamp::now();
    let specifics = RefreshKind::nothing().with_memory(MemoryRefreshKind::everything());
    let memory = System::new_with_specifics(specifics).ok().map(|s| Memory {
        total: s.total_memory(),
        available: Some(s.available_memory()),
        swap_total: s.total_swap(),
        swap_free: s.free_swap(),
    });
    let seconds = |s: u64| i64::try_from(s).ok().and_then(|s| Timestamp::from_second(s).ok());
    let name = System::long_os_version().map(|v| ("PRETTY_NAME".to_owned(), Text::from(&v)));
    let host = Host {
        identity: identity(c.root()),
        clock: super::clock(None),
        kernel: System::kernel_version().ok().map(|v| Text::from(&v)),
        architecture: Some(Text::from(std::env::consts::ARCH)),
        distribution: name.into_iter().collect::<BTreeMap<_, _>>(),
        booted: System::boot_time().ok().and_then(seconds),
        uptime_s: System::uptime()
            .ok()
            .map(|s| std::time::Duration::from_secs(s).as_secs_f64()),
        memory,
        ..Host::default()
    };
    c.record(
        "GetSystemInfo, GlobalMemoryStatusEx, registry",
        read_at,
        Data::Host(Box::new(host)),
        Vec::new(),
    );
    Ok(())
}
