//! What capturing memory would meet on this host, in plain words; nothing is loaded and nothing is changed.

use super::{
    Sizes,
    kcore::{self, Kcore},
    ranges,
};
use serde::Serialize;
use std::{fs, path::Path};
use stillframe_evidence::text::printable;

/// The answers.
#[derive(Debug, Serialize)]
pub struct Probe {
    /// `kcore`, or nothing.
    pub method: Option<&'static str>,
    /// Why there is none, or what to know of it.
    pub because: String,
    /// The running kernel.
    pub release: String,
    /// `/sys/kernel/security/lockdown`: `none`, `integrity`, `confidentiality`; nothing where the kernel cannot be locked down.
    pub lockdown: Option<String>,
    /// Five-level paging.
    pub la57: bool,
    /// Secure Boot; nothing where there is no EFI to tell.
    pub secure_boot: Option<bool>,
    /// Whether modules can be loaded at all.
    pub modules: bool,
    /// Whether only signed modules may be loaded.
    pub signed_modules_only: bool,
    /// Whether the kernel carries its types.
    pub btf: bool,
    /// RAM: first address and bytes.
    pub ranges: Vec<(u64, u64)>,
    /// Bytes of RAM.
    pub bytes: u64,
    /// Bytes that an image of it usually takes, compressed.
    pub expected_stored: u64,
    /// Seconds that reading it usually takes on so many processors, with a store that keeps up.
    pub expected_seconds: u64,
    /// Processors that it may use.
    pub threads: usize,
}

/// Compressed bytes of plaintext a second and core, and the ratio: measured on guests whose memory is in use
/// (`cargo bench -p stillframe-tests --bench memory`).
const RATE: u64 = 350 << 20;
const RATIO: (u64, u64) = (2, 5);

/// Looks below `root`.
pub fn probe(root: &Path, threads: usize) -> Probe {
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let lockdown = text("sys/kernel/security/lockdown");
    let lockdown = lockdown
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map(|(word, _)| word.to_owned());
    let la57 = text("proc/cpuinfo")
        .lines()
        .find(|l| l.starts_with("flags"))
        .is_some_and(|l| l.split(' ').any(|f| f == "la57"));
    // The variable of the EFI specification, 3.3: four bytes of attributes, then one byte.
    let secure_boot =
        fs::read(root.join("sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"));
    let secure_boot = secure_boot.ok().and_then(|v| v.get(4).map(|b| *b == 1));
    let enforced = text("sys/module/module/parameters/sig_enforce");
    let kcore = Kcore::open(root);
    let ranges = match &kcore {
        Ok(kcore) => super::Source::expected(kcore),
        Err(_) => ranges::system_ram(&text("proc/iomem")),
    };
    let bytes = ranges
        .iter()
        .fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
    Probe {
        method: kcore.is_ok().then_some("kcore"),
        because: match &kcore {
            Ok(kcore) if kcore.addresses == kcore::Addresses::Physical => {
                "/proc/kcore can be read".to_owned()
            }
            Ok(_) => "/proc/kcore can be read, by the kernel's direct map".to_owned(),
            Err(why) => why.to_string(),
        },
        release: text("proc/sys/kernel/osrelease").trim().to_owned(),
        modules: root.join("proc/modules").exists() && text("proc/sys/kernel/modules_disabled").trim() != "1",
        signed_modules_only: enforced.trim() == "Y"
            || matches!(lockdown.as_deref(), Some("integrity" | "confidentiality")),
        lockdown,
        la57,
        secure_boot,
        btf: root.join("sys/kernel/btf/vmlinux").exists(),
        ranges,
        bytes,
        expected_stored: bytes / RATIO.1 * RATIO.0,
        expected_seconds: bytes / RATE / threads.max(1) as u64 + 1,
        threads,
    }
}

impl Probe {
    /// For a person.
    pub fn lines(&self) -> Vec<String> {
        let yes = |b: bool| if b { "yes" } else { "no" };
        let sizes = Sizes::of(self.bytes, self.bytes, self.threads, 1);
        let mut lines = vec![
            format!(
                "source           {}: {}",
                self.method.unwrap_or("none"),
                self.because
            ),
            format!("kernel           {}", printable(self.release.as_bytes())),
            format!(
                "lockdown         {}",
                self.lockdown
                    .as_deref()
                    .map_or("not built in".into(), |l| printable(l.as_bytes()))
            ),
            format!(
                "paging           {}",
                if self.la57 {
                    "5 levels: Volatility needs the plugin that fetch writes"
                } else {
                    "4 levels"
                }
            ),
            format!(
                "Secure Boot      {}",
                self.secure_boot.map_or("unknown (no EFI variables)", yes)
            ),
            format!(
                "modules          {}",
                match (self.modules, self.signed_modules_only) {
                    (false, _) => "this kernel loads none: LiME could not be loaded",
                    (true, true) => "signed ones only: LiME could not be loaded",
                    (true, false) => "unsigned ones may be loaded",
                }
            ),
            format!(
                "types (BTF)      {}",
                if self.btf {
                    "in the kernel"
                } else {
                    "not in the kernel: `stillframe symbols --btf FILE` will need a file of this release"
                }
            ),
        ];
        for (start, size) in &self.ranges {
            lines.push(format!(
                "RAM              {start:#014x}-{:#014x}  {:>8} MiB",
                start + size - 1,
                size >> 20
            ));
        }
        if self.bytes > 0 {
            lines.push(format!(
                "expected         {} MiB to read, about {} MiB to store in segments of {} MiB, about {} s",
                self.bytes >> 20,
                self.expected_stored >> 20,
                sizes.segment >> 20,
                self.expected_seconds
            ));
        }
        lines
    }
}
