//! Interfaces, addresses, routes and neighbours by rtnetlink, which every kernel has built in; tracked connections by
//! procfs. In every network namespace that can be entered.

use super::{
    look::Look,
    netlink::{attributes, dump, ip_of, u32_of},
    netns,
    proc::lines,
};
use crate::collect::{Collection, Unsupported};
use jiff::Timestamp;
use std::io;
use stillframe_evidence::{
    records::{
        Data,
        routes::{Address, Conntrack, Link, Neighbour, Route},
    },
    text::Text,
    verdict::count,
};

/// Request, size of its header, and what reads an answer.
type Dump = (&'static str, u16, usize, fn(u64, &[u8]) -> Option<Data>);
const DUMPS: [Dump; 4] = [
    ("RTM_GETLINK", 18, 16, link),
    ("RTM_GETADDR", 22, 8, address),
    ("RTM_GETROUTE", 26, 12, route),
    ("RTM_GETNEIGH", 30, 12, neighbour),
];
const IFF_PROMISC: u32 = 0x100;

/// Every namespace in the order of its inode.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    Look::ensure(c);
    let look = std::mem::take(&mut c.memory.look);
    look.confess_namespaces(c);
    c.memory.look = look;
    let namespaces = netns::all(c, &c.memory.look);
    for netns in &namespaces {
        let name = format!("net:[{}]", netns.inode);
        if !c.item(netns.inode, &name) {
            continue;
        }
        if c.touching("rtnetlink", None).is_err() {
            c.problem(
                "rtnetlink",
                &name,
                None,
                "not read: a worker that read here was lost",
            );
            c.done();
            continue;
        }
        let read_at = Timestamp::now();
        let inode = netns.inode;
        let ask = move |(name, kind, header, read): Dump| {
            let mut found = Vec::new();
            let result = dump(None, kind, &vec![0; header], |_, body| {
                found.extend(read(inode, body))
            });
            (name, found, result)
        };
        match netns.inside(move || DUMPS.map(ask)) {
            Ok(answers) => answers.into_iter().for_each(|(request, found, result)| {
                let source = format!("rtnetlink {request} {name}");
                found
                    .into_iter()
                    .for_each(|data| c.record(&source, read_at, data, Vec::new()));
                match result {
                    Ok(false) => (),
                    Ok(true) => c.note(format!("{request} {name} changed while it was read")),
                    Err(error) => c.unread("rtnetlink", &source, &error),
                }
            }),
            Err(error) => c.unread("namespace", &name, &error),
        }
        conntrack(c, netns, &name, read_at);
        c.done();
    }
    c.note(count(namespaces.len(), "network namespace"));
    Ok(())
}

fn conntrack(c: &mut Collection, netns: &netns::Netns, name: &str, read_at: Timestamp) {
    // The namespace could not be entered: said above.
    let Ok(tables) = netns.tables(&["nf_conntrack"]) else {
        return;
    };
    if tables.is_empty() && netns.own {
        c.note("no table of tracked connections in procfs (the kernel offers it by netlink alone, or tracks none)".to_owned());
    }
    for (_, path, bytes) in tables {
        let source = path.as_os_str().as_encoded_bytes();
        match bytes {
            Ok(bytes) => lines(&bytes).for_each(|line| {
                let data = Conntrack {
                    netns: netns.inode,
                    line: Text::from(line),
                };
                c.record(source, read_at, Data::Conntrack(Box::new(data)), Vec::new());
            }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                c.problem(
                    "nf_conntrack",
                    name,
                    error.raw_os_error(),
                    crate::collect::describe(&error),
                );
            }
            Err(error) => c.unread("nf_conntrack", source, &error),
        }
    }
}

fn hardware(value: &[u8]) -> Option<String> {
    let bytes: Vec<String> = value.iter().map(|b| format!("{b:02x}")).collect();
    (!bytes.is_empty()).then(|| bytes.join(":"))
}

fn string(value: &[u8]) -> Text {
    Text::from(value.strip_suffix(b"\0").unwrap_or(value))
}

/// struct ifinfomsg and IFLA_* (include/uapi/linux/if_link.h)
fn link(netns: u64, body: &[u8]) -> Option<Data> {
    let (head, rest) = body.split_first_chunk::<16>()?;
    let [_, _, t0, t1, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *head;
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    let mut link = Link {
        netns,
        index: u32::from_ne_bytes([i0, i1, i2, i3]),
        hardware: u16::from_ne_bytes([t0, t1]),
        flags,
        promiscuous: flags & IFF_PROMISC != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(rest) {
        match kind {
            1 => link.address = hardware(value),
            3 => link.name = Some(string(value)),
            4 => link.mtu = u32_of(value),
            5 => link.peer = u32_of(value),
            10 => link.master = u32_of(value),
            16 => link.state = value.first().and_then(|s| operational_state(*s)),
            18 => link.kind = attributes(value).find(|(k, _)| *k == 1).map(|(_, v)| string(v)),
            20 => link.alias = Some(string(value)),
            30 => link.promiscuous |= u32_of(value).is_some_and(|n| n > 0),
            43 => {
                link.xdp = attributes(value).any(|(k, v)| k == 2 && v.first().is_some_and(|mode| *mode != 0))
            }
            _ => (),
        }
    }
    Some(Data::Link(Box::new(link)))
}

/// RFC 2863, 3.1.14, in the kernel's numbering (IF_OPER_*).
fn operational_state(state: u8) -> Option<String> {
    let names = [
        "unknown",
        "not-present",
        "down",
        "lower-layer-down",
        "testing",
        "dormant",
        "up",
    ];
    names.get(usize::from(state)).map(|name| (*name).to_owned())
}

/// struct ifaddrmsg and IFA_* (include/uapi/linux/if_addr.h)
fn address(netns: u64, body: &[u8]) -> Option<Data> {
    let (head, rest) = body.split_first_chunk::<8>()?;
    let [_, prefix, flags, scope, i0, i1, i2, i3] = *head;
    let find = |wanted: u16| {
        attributes(rest)
            .find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    };
    // On a point-to-point link IFA_ADDRESS is the other end and IFA_LOCAL ours.
    let address = find(2).or_else(|| find(1)).and_then(ip_of);
    let flags = find(8).and_then(u32_of).unwrap_or_else(|| u32::from(flags));
    let index = u32::from_ne_bytes([i0, i1, i2, i3]);
    Some(Data::Address(Box::new(Address {
        netns,
        index,
        address,
        prefix,
        scope,
        flags,
    })))
}

/// struct rtmsg and RTA_* (include/uapi/linux/rtnetlink.h)
fn route(netns: u64, body: &[u8]) -> Option<Data> {
    let (head, rest) = body.split_first_chunk::<12>()?;
    let [_, prefix, _, _, table, protocol, scope, route_type, ..] = *head;
    let mut route = Route {
        netns,
        destination: None,
        prefix,
        gateway: None,
        interface: None,
        preferred_source: None,
        table: u32::from(table),
        protocol,
        scope,
        route_type,
        metric: None,
        multipath: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            1 => route.destination = ip_of(value),
            4 => route.interface = u32_of(value),
            5 => route.gateway = ip_of(value),
            6 => route.metric = u32_of(value),
            7 => route.preferred_source = ip_of(value),
            9 => route.multipath = Some(next_hops(value)),
            15 => route.table = u32_of(value).unwrap_or(route.table),
            _ => (),
        }
    }
    Some(Data::Route(Box::new(route)))
}

/// struct rtnexthop begins with its own length.
fn next_hops(mut value: &[u8]) -> u32 {
    let mut count = 0;
    while let Some(length) = value
        .first_chunk::<2>()
        .map(|b| usize::from(u16::from_ne_bytes(*b)))
    {
        let Some(rest) = value.get(length.max(8).next_multiple_of(4)..) else {
            return count + 1;
        };
        value = rest;
        count += 1;
    }
    count
}

/// struct ndmsg and NDA_* (include/uapi/linux/neighbour.h)
fn neighbour(netns: u64, body: &[u8]) -> Option<Data> {
    let (head, rest) = body.split_first_chunk::<12>()?;
    let [_, _, _, _, i0, i1, i2, i3, s0, s1, flags, _] = *head;
    let find = |wanted: u16| {
        attributes(rest)
            .find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    };
    Some(Data::Neighbour(Box::new(Neighbour {
        netns,
        interface: i32::from_ne_bytes([i0, i1, i2, i3]),
        address: find(1).and_then(ip_of),
        hardware: find(2).and_then(hardware),
        state: u16::from_ne_bytes([s0, s1]),
        flags,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_messages_never_panic(body in proptest::collection::vec(any::<u8>(), 0..120)) {
            for (_, _, _, read) in DUMPS {
                read(1, &body);
            }
        }
    }
}
