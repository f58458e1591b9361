//! The typed records: one line of JSON each. Every record says where it was read, when, and what of it could not be.
//!
//! A field that is absent was not there; a field that could not be read is absent *and* named in `errors`.

pub mod host;
pub mod memory;
pub mod modules;
pub mod mounts;
pub mod processes;
pub mod routes;
pub mod sessions;
pub mod sockets;

use crate::text::Text;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Where it was read: `/proc/17`, `/proc/17/net/tcp`, `rtnetlink net:[4026531840]`, a Windows function.
    pub source: Text,
    /// When the reading of it began, by the guest's clock.
    pub read_at: Timestamp,
    /// What of it could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// The data.
    #[serde(flatten)]
    pub data: Data,
}

/// Bytes of lists that one record holds at most. Escaped as JSON they may grow six-fold and stay below
/// [`crate::frames::MAX_FRAME`].
const LISTS: usize = 1 << 20;

impl Record {
    /// The record, and as many behind it as its long lists need: each repeats what identifies it (`pid`, `start_ticks`) and
    /// continues the lists of the one before. Nearly always it is one.
    pub fn in_parts(mut self) -> Vec<Record> {
        let mut parts = Vec::new();
        loop {
            let rest = match &mut self.data {
                Data::Process(p) => p.split_off(LISTS).map(|rest| Data::Process(Box::new(rest))),
                Data::ProcessDetails(p) => p
                    .split_off(LISTS)
                    .map(|rest| Data::ProcessDetails(Box::new(rest))),
                _ => None,
            };
            let Some(data) = rest else {
                parts.push(self);
                return parts;
            };
            let next = Record {
                source: self.source.clone(),
                read_at: self.read_at,
                errors: Vec::new(),
                data,
            };
            parts.push(std::mem::replace(&mut self, next));
        }
    }
}

/// What of `list` is beyond `room`, which shrinks by what is kept. At least one element is kept when nothing else is in
/// the record, so that splitting ends.
fn beyond<T>(list: &mut Vec<T>, room: &mut usize, size: impl Fn(&T) -> usize) -> Vec<T> {
    let mut kept = 0;
    for element in list.iter() {
        let size = size(element);
        if size > *room && (kept > 0 || *room < LISTS) {
            break;
        }
        *room = room.saturating_sub(size);
        kept += 1;
    }
    list.split_off(kept)
}

/// A part of a record that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// The field.
    pub field: String,
    /// Where it would have been read.
    pub source: Text,
    /// The error number of the system, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
    /// What went wrong.
    pub error: String,
}

/// The data of a record, told apart by `record`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Data {
    /// `host`.
    Host(Box<host::Host>),
    /// `processes`.
    Process(Box<processes::Process>),
    /// `process-details`.
    ProcessDetails(Box<processes::ProcessDetails>),
    /// `sockets`.
    Socket(Box<sockets::Socket>),
    /// `modules`.
    Module(Box<modules::Module>),
    /// `mounts`.
    Mount(Box<mounts::Mount>),
    /// `routes`: a network interface.
    Link(Box<routes::Link>),
    /// `routes`: an address of an interface.
    Address(Box<routes::Address>),
    /// `routes`: a route.
    Route(Box<routes::Route>),
    /// `routes`: a neighbour (ARP, NDP).
    Neighbour(Box<routes::Neighbour>),
    /// `routes`: a tracked connection.
    Conntrack(Box<routes::Conntrack>),
    /// `sessions`: an entry of utmp.
    Login(Box<sessions::Login>),
    /// `sessions`: a session or a user as logind keeps it.
    Logind(Box<sessions::Logind>),
    /// `companions`: something stored beside the image that is needed to read it.
    Companion(Box<memory::Companion>),
    /// `memory`, `process-memory`: how it was read.
    MemorySource(Box<memory::MemorySource>),
    /// `memory`, `process-memory`: addresses whose content is not in the image.
    MemoryGap(Box<memory::MemoryGap>),
    /// `secret-mappings`: memory that a process has the kernel hide from everybody.
    SecretMapping(Box<memory::SecretMapping>),
    /// `memory`, `process-memory`: a range, where there are too many for the outcome.
    MemoryRange(crate::chain::RangeAccount),
    /// `process-memory`: a mapping of the process.
    Region(Box<memory::Region>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use processes::{Fd, Process, ProcessDetails};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn long_lists_go_on_in_further_records(words in proptest::collection::vec(0usize..400_000, 0..12), fds in 0usize..40_000) {
            let process = Process {
                pid: 7,
                start_ticks: Some(9),
                cmdline: Some(words.iter().map(|n| Text(vec![1; *n])).collect()),
                fds: (0..u32::try_from(fds).unwrap()).map(|fd| Fd { fd, target: Text::from("/x") }).collect(),
                ..Process::default()
            };
            let (cmdline, fds) = (process.cmdline.clone().unwrap(), process.fds.clone());
            let data = Data::Process(Box::new(process));
            let record = Record { source: Text::from("/proc/7"), read_at: Timestamp::UNIX_EPOCH, errors: vec![], data };
            let (mut all_words, mut all_fds) = (vec![], vec![]);
            for part in record.in_parts() {
                let mut line = Vec::new();
                crate::text::write_json(&part, &mut line).unwrap();
                prop_assert!(line.len() < crate::frames::MAX_FRAME);
                let Data::Process(part) = part.data else { panic!("another kind") };
                prop_assert_eq!((part.pid, part.start_ticks), (7, Some(9)));
                all_words.extend(part.cmdline.unwrap_or_default());
                all_fds.extend(part.fds);
            }
            prop_assert_eq!(all_words, cmdline);
            prop_assert_eq!(all_fds, fds);
        }
    }

    #[test]
    fn one_string_larger_than_a_record_ends_too() {
        let details = ProcessDetails {
            pid: 1,
            environ: Some(vec![Text(vec![b'a'; 3 << 20]); 3]),
            ..Default::default()
        };
        let data = Data::ProcessDetails(Box::new(details));
        let record = Record {
            source: Text::default(),
            read_at: Timestamp::UNIX_EPOCH,
            errors: vec![],
            data,
        };
        assert_eq!(record.in_parts().len(), 3);
    }
}
