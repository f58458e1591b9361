//! Sockets of every network namespace.

use crate::text::Text;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// One socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Socket {
    /// The table it stood in: `tcp`, `tcp6`, `udp`, `raw`, `icmp`, `unix`, `packet`, `netlink`, …; for a socket that a
    /// process holds and no table lists, the protocol that the socket itself names.
    pub protocol: String,
    /// Inode of its network namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<u64>,
    /// Its inode; 0 for one that belongs to the kernel alone.
    pub inode: u64,
    /// Local end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Endpoint>,
    /// Remote end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Endpoint>,
    /// `LISTEN`, `ESTABLISHED`, … as in include/net/tcp_states.h; for UNIX sockets as in include/uapi/linux/net.h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Owner of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Bytes waiting to be sent and to be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<(u64, u64)>,
    /// UNIX: the path or, with `@` for its first NUL, the abstract name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<Text>,
    /// UNIX and packet: the type, `stream`, `datagram`, `seqpacket`, `raw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_type: Option<String>,
    /// UNIX: inode of the other end, from sock_diag where the kernel already has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_inode: Option<u64>,
    /// Packet: Ethernet protocol, hexadecimal. Netlink: the protocol's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family_protocol: Option<String>,
    /// Packet: index of the interface, 0 for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u64>,
    /// Netlink: port id and multicast groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netlink: Option<(u64, Text)>,
    /// Whose it is.
    pub ownership: Ownership,
    /// The processes that hold it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owners: Vec<Owner>,
    /// True for a socket that a process holds and that no table of a reachable namespace lists.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlisted: bool,
}

/// One end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port; for raw sockets the protocol's number.
    pub port: u16,
}

/// Whose a socket is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// Of the processes in `owners`.
    Owned,
    /// No process holds it, and the open files of every process were read.
    Ownerless,
    /// Of the kernel alone: no inode (what is left of a closed one, such as TIME_WAIT), or a netlink port of 0.
    Kernel,
    /// None was found, but not every process let its open files be read.
    #[default]
    Unknown,
}

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Process id.
    pub pid: u32,
    /// Number of the open file; absent where the platform names only the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
}
