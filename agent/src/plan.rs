//! What a profile collects and in which order (RFC 3227, 2.1): a first look at what changes fastest, memory, the same look
//! again, which bounds what changed meanwhile, and files last.

use crate::{collect::Collector, sys::COLLECTORS};
use std::time::Duration;

/// A set of kinds that a responder asks for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: &'static str,
    /// One line for a person.
    pub about: &'static str,
    /// Whether memory is part of it.
    pub memory: bool,
    /// What touches pages of processes and files comes last, if at all.
    details: bool,
}

/// Every profile.
pub const PROFILES: &[Profile] = &[
    Profile {
        name: "triage",
        about: "everything volatile but memory: a second or two, a few megabytes",
        memory: false,
        details: true,
    },
    Profile {
        name: "memory",
        about: "physical memory, with a look at processes, sockets, modules before and after",
        memory: true,
        details: false,
    },
    Profile {
        name: "full",
        about: "triage and memory",
        memory: true,
        details: true,
    },
];

/// By procfs and netlink alone.
const LOOK: &[&str] = &["processes", "sockets", "routes", "modules", "mounts"];

/// What a step does.
#[derive(Clone, Copy)]
pub enum Action {
    /// Runs a collector in a worker.
    Collect(&'static Collector),
    /// Stores what is needed to read the image.
    Companions,
    /// Streams physical memory.
    Memory,
    /// Streams the memory of the processes that were named.
    ProcessMemory,
}

/// One step.
#[derive(Clone)]
pub struct Step {
    /// The kind of its records.
    pub kind: String,
    /// One line for a person.
    pub about: &'static str,
    /// When it is ended with what it has.
    pub deadline: Duration,
    /// What it does.
    pub action: Action,
}

/// What an order adds to its profile.
#[derive(Clone, Copy, Default)]
pub struct Extras {
    /// Memory comes from an image that somebody else took: nothing of this host is collected.
    pub image: bool,
    /// Some processes' memory is wanted.
    pub processes: bool,
}

fn collect(kind: &str, again: bool) -> Option<Step> {
    // A kind that this platform cannot collect is left out.
    let collector = COLLECTORS.iter().find(|c| c.kind == kind)?;
    Some(Step {
        kind: if again {
            format!("{kind}-again")
        } else {
            kind.to_owned()
        },
        about: collector.about,
        deadline: collector.deadline,
        action: Action::Collect(collector),
    })
}

fn memory(kind: &str, about: &'static str, hours: u64, action: Action) -> Step {
    Step {
        kind: kind.to_owned(),
        about,
        deadline: Duration::from_secs(hours * 3600),
        action,
    }
}

impl Profile {
    /// The profile of that name.
    pub fn named(name: &str) -> Option<Self> {
        PROFILES.iter().copied().find(|p| p.name == name)
    }

    /// Its steps on this platform, in order.
    pub fn steps(self, extras: Extras) -> Vec<Step> {
        let image = || {
            memory(
                "memory",
                "physical memory, as a LiME image in compressed segments",
                12,
                Action::Memory,
            )
        };
        if extras.image {
            return vec![image()];
        }
        let mut steps: Vec<Step> = ["host"]
            .iter()
            .chain(LOOK)
            .filter_map(|kind| collect(kind, false))
            .collect();
        if extras.processes {
            steps.push(memory(
                "process-memory",
                "the memory of the processes named, as ELF cores",
                2,
                Action::ProcessMemory,
            ));
        }
        if self.memory {
            steps.extend(collect("secret-mappings", false));
            let about = "types, symbols and maps of the running kernel, to read the image with";
            steps.push(memory("companions", about, 1, Action::Companions));
            steps.push(image());
            steps.extend(LOOK.iter().filter_map(|kind| collect(kind, true)));
        }
        if self.details {
            steps.extend(
                ["process-details", "sessions"]
                    .iter()
                    .filter_map(|kind| collect(kind, false)),
            );
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_collector_has_its_place_and_every_name_is_a_kind() {
        let steps: Vec<Step> = PROFILES.iter().flat_map(|p| p.steps(Extras::default())).collect();
        for collector in COLLECTORS {
            assert!(
                steps.iter().any(|s| s.kind == collector.kind),
                "{}",
                collector.kind
            );
        }
        for step in steps {
            assert!(step.kind.parse::<stillframe_evidence::layout::Kind>().is_ok());
        }
    }

    #[test]
    fn memory_lies_between_two_looks() {
        let full = Profile::named("full").unwrap();
        let kinds: Vec<String> = full
            .steps(Extras::default())
            .into_iter()
            .map(|s| s.kind)
            .collect();
        let at = |kind: &str| kinds.iter().position(|k| k == kind).unwrap();
        assert!(at("processes") < at("companions") && at("companions") < at("memory"));
        assert!(at("memory") < at("processes-again") && at("mounts-again") < at("process-details"));
    }
}
