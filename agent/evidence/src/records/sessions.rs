//! Who is logged in.

use crate::text::Text;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// An entry of utmp (utmp(5)), ended and empty ones included.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Login {
    /// `user`, `login`, `init`, `boot`, `runlevel`, `dead`, … (ut_type).
    pub entry: String,
    /// Process id of the login process.
    pub pid: i32,
    /// Terminal.
    pub line: Text,
    /// Suffix of the terminal.
    pub id: Text,
    /// User, or the kernel for a boot entry.
    pub user: Text,
    /// Where from, as a name.
    pub host: Text,
    /// Where from, as an address.
    pub address: Option<IpAddr>,
    /// Session id.
    pub session: i32,
    /// When.
    pub time: Option<Timestamp>,
}

/// A file of /run/systemd/{sessions,users,seats}.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Logind {
    /// Its `KEY=value` lines.
    pub values: BTreeMap<String, Text>,
}
