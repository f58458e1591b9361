//! Windows: `host`, `processes` and TCP and UDP `sockets`, to hold the facade to its word; depth comes later.

mod host;
mod memory;
mod processes;
mod sockets;

use crate::collect::{Collector, Usage};
use jiff::Timestamp;
use std::{io, path::PathBuf, process::ExitStatus, time::Duration};
use stillframe_evidence::records::host::Clock;

pub use host::identity;
pub use memory::*;

/// The kinds that this platform can collect.
pub const COLLECTORS: &[Collector] = &[
    Collector {
        kind: "host",
        about: "identity, version, clock, memory",
        deadline: Duration::from_secs(10),
        collect: host::collect,
    },
    Collector {
        kind: "processes",
        about: "every process: program, command line, owner, start",
        deadline: Duration::from_secs(60),
        collect: processes::collect,
    },
    Collector {
        kind: "sockets",
        about: "TCP and UDP, with the processes that own them",
        deadline: Duration::from_secs(60),
        collect: sockets::collect,
    },
];

/// The kinds share nothing here.
#[derive(Default)]
pub struct Look;

/// The wall clock; the others are not read here yet.
pub fn clock(ordered_at: Option<Timestamp>) -> Clock {
    let realtime = Timestamp::now();
    let behind = |at: Timestamp| realtime.as_microsecond().checked_sub(at.as_microsecond());
    Clock {
        realtime,
        behind_order_us: ordered_at.and_then(behind),
        ..Clock::default()
    }
}

/// Not measured here yet.
pub fn usage() -> Usage {
    Usage::default()
}

/// There is only one root here.
pub fn is_root(root: &std::path::Path) -> bool {
    root == std::path::Path::new("/")
}

/// Windows has no procfs.
pub fn read_by_own_instance() {}

/// Windows takes single pages unless it is asked for large ones.
pub fn spare_memory() {}

/// The running program.
pub fn own_program() -> io::Result<PathBuf> {
    std::env::current_exe()
}

/// There is no signal that a process here could be asked by yet.
pub fn stop(_id: &str) -> io::Result<usize> {
    Err(io::Error::other("on Windows a capture can only be cancelled yet"))
}

/// A worker ends when its pipe breaks; there is no earlier sign here yet.
pub fn die_with_parent() {}

/// Handles are not kept in tables that threads wait for.
pub fn own_descriptors() {}

/// The size of a pipe is fixed here once it is made.
pub fn widen_pipe(_pipe: &std::process::ChildStdout, _bytes: usize) {}

/// How a process ended, in words.
pub fn exit_reason(status: ExitStatus) -> String {
    status
        .code()
        .map_or_else(|| "ended".to_owned(), |code| format!("ended with code {code:#x}"))
}
