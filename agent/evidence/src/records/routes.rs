//! Interfaces, addresses, routes, neighbours and tracked connections of every network namespace.
//!
//! Numbers keep the kernel's meaning (include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour}.h).

use crate::text::Text;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// A network interface.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Link {
    /// Inode of the network namespace.
    pub netns: u64,
    /// Index.
    pub index: u32,
    /// Name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Text>,
    /// Other names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Text>,
    /// ARPHRD_*.
    pub hardware: u16,
    /// IFF_* flags.
    pub flags: u32,
    /// True when it receives what is not addressed to it (IFF_PROMISC, or a promiscuity count above 0).
    pub promiscuous: bool,
    /// Hardware address, hexadecimal with colons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Largest packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// `up`, `down`, … (RFC 2863).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Index of the bridge or bond above it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<u32>,
    /// Index of the interface below it or at its other end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<u32>,
    /// Kind: `veth`, `bridge`, `tun`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Text>,
    /// An eBPF program (XDP) is attached.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub xdp: bool,
}

/// An address of an interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Address {
    /// Inode of the network namespace.
    pub netns: u64,
    /// Index of the interface.
    pub index: u32,
    /// The address.
    pub address: Option<IpAddr>,
    /// Length of the prefix.
    pub prefix: u8,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// IFA_F_* flags.
    pub flags: u32,
}

/// A route.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Route {
    /// Inode of the network namespace.
    pub netns: u64,
    /// Destination; absent for the default route.
    pub destination: Option<IpAddr>,
    /// Length of its prefix.
    pub prefix: u8,
    /// Gateway.
    pub gateway: Option<IpAddr>,
    /// Index of the interface.
    pub interface: Option<u32>,
    /// Preferred source address.
    pub preferred_source: Option<IpAddr>,
    /// Routing table.
    pub table: u32,
    /// RTPROT_*: who made it.
    pub protocol: u8,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// RTN_*: unicast, local, blackhole, …
    pub route_type: u8,
    /// Metric.
    pub metric: Option<u32>,
    /// Number of next hops when there are several; they are not taken apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multipath: Option<u32>,
}

/// A neighbour.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Neighbour {
    /// Inode of the network namespace.
    pub netns: u64,
    /// Index of the interface.
    pub interface: i32,
    /// Its address.
    pub address: Option<IpAddr>,
    /// Its hardware address, hexadecimal with colons.
    pub hardware: Option<String>,
    /// NUD_* state.
    pub state: u16,
    /// NTF_* flags.
    pub flags: u8,
}

/// A line of /proc/net/nf_conntrack, byte for byte.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Conntrack {
    /// Inode of the network namespace.
    pub netns: u64,
    /// The line.
    pub line: Text,
}
