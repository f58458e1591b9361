//! The typed records: one line of JSON each. Every record says where it was read, when, and what of it could not be.
//!
//! A field that is absent was not there; a field that could not be read is absent *and* named in `errors`.

pub mod host;
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
}
