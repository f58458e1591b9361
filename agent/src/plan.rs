//! What a profile collects and in which order (RFC 3227, 2.1): what changes fastest first, files last.

use crate::{collect::Collector, sys::COLLECTORS};

/// A set of kinds that a responder asks for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: &'static str,
    /// One line for a person.
    pub about: &'static str,
    kinds: &'static [&'static str],
}

/// Every profile.
pub const PROFILES: &[Profile] = &[Profile {
    name: "triage",
    about: "everything volatile but memory: a second or two, a few megabytes",
    // The first look, by procfs and netlink alone; then what touches pages of processes and files.
    kinds: &[
        "host",
        "processes",
        "sockets",
        "routes",
        "modules",
        "mounts",
        "process-details",
        "sessions",
    ],
}];

impl Profile {
    /// The profile of that name.
    pub fn named(name: &str) -> Option<Self> {
        PROFILES.iter().copied().find(|p| p.name == name)
    }

    /// Its steps on this platform, in order; the kinds that this platform cannot collect are left out.
    pub fn collectors(self) -> impl Iterator<Item = &'static Collector> {
        self.kinds
            .iter()
            .filter_map(|kind| COLLECTORS.iter().find(|c| c.kind == *kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_collector_has_its_place_and_every_name_is_a_kind() {
        for collector in COLLECTORS {
            assert!(
                PROFILES.iter().any(|p| p.kinds.contains(&collector.kind)),
                "{}",
                collector.kind
            );
        }
        for kind in PROFILES.iter().flat_map(|p| p.kinds) {
            assert!(kind.parse::<stillframe_evidence::layout::Kind>().is_ok());
        }
    }
}
