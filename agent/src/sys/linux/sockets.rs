//! Sockets of every family in every network namespace, from the tables of procfs, tied to processes by inode.

use super::{
    look::Look,
    netns::{self, Netns},
    proc::{fields, hex, number},
    sockdiag,
};
use crate::collect::{Collection, Errors, Unsupported};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};
use stillframe_evidence::{
    records::{
        Data,
        sockets::{Endpoint, Ownership, Socket},
    },
    text::Text,
    verdict::count,
};

const TABLES: [&str; 13] = [
    "tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6", "unix", "packet",
    "netlink",
];

/// Every namespace in the order of its inode, then the sockets that processes hold and no table lists.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    Look::ensure(c);
    let mut look = std::mem::take(&mut c.memory.look);
    look.confess_namespaces(c);
    for pid in &look.closed {
        c.problem(
            "owners",
            format!("/proc/{pid}/fd"),
            Some(libc::EACCES),
            "cannot be read: what it holds is not known",
        );
    }
    let ask = sockdiag::may_ask(c.root());
    if !ask {
        c.note("sock_diag not asked: unix_diag is not loaded, and asking would load it".to_owned());
    }
    let mut tally = Tally::default();
    let namespaces = netns::all(c, &look);
    for netns in &namespaces {
        let name = format!("net:[{}]", netns.inode);
        if c.item(netns.inode, &name) {
            namespace(c, netns, &name, &mut look, ask, &mut tally);
            c.done();
        } else {
            tally.incomplete = true;
        }
    }
    if c.item(u64::MAX, "sockets that no table lists") {
        if tally.incomplete {
            c.note("sockets in no table not looked for: this worker has not seen every table".to_owned());
        } else {
            unlisted(c, &look, &mut tally);
        }
        c.done();
    }
    c.note(count(namespaces.len(), "network namespace"));
    for (n, what) in [
        (tally.ownerless, "without an owner"),
        (
            tally.unknown,
            "whose owner is unknown, since not every process could be read",
        ),
        (tally.unlisted, "in no table"),
    ] {
        if n > 0 {
            c.note(format!("{} {what}", count(n, "socket")));
        }
    }
    c.memory.look = look;
    Ok(())
}

#[derive(Default)]
struct Tally {
    listed: BTreeSet<u64>,
    /// Some table was not read, or read by a worker that is no more.
    incomplete: bool,
    /// The owners were looked for a second time.
    looked_again: bool,
    ownerless: usize,
    unknown: usize,
    unlisted: usize,
}

fn namespace(c: &mut Collection, netns: &Netns, name: &str, look: &mut Look, ask: bool, tally: &mut Tally) {
    let read_at = Timestamp::now();
    if c.touching("tables", None).is_err() {
        tally.incomplete = true;
        return c.problem("tables", name, None, "not read: a worker that read here was lost");
    }
    let tables = match netns.tables(&TABLES) {
        Ok(tables) => tables,
        Err(error) => {
            tally.incomplete = true;
            return c.unread("tables", name, &error);
        }
    };
    let peers = if ask {
        match netns.inside(sockdiag::unix_peers).and_then(|result| result) {
            Ok(peers) => peers,
            Err(error) => {
                c.unread("unix peers", format!("sock_diag {name}"), &error);
                HashMap::new()
            }
        }
    } else {
        HashMap::new()
    };
    for (table, path, bytes) in tables {
        c.alive();
        let source = path.as_os_str().as_encoded_bytes();
        let sockets = match bytes {
            Ok(bytes) => parse(table, &bytes),
            Err(error) => {
                tally.incomplete = true;
                c.unread(table, source, &error);
                continue;
            }
        };
        // The tables are younger than the look: a socket without an owner may have been opened since. One more look tells.
        let orphan = |s: &Socket| s.inode != 0 && ownership(s, look) == Ownership::Ownerless;
        if !tally.looked_again && sockets.iter().any(orphan) {
            tally.looked_again = true;
            if let Ok(newer) = Look::scan(c) {
                // Beside those of before: a socket that its owner has closed since was still its.
                for (inode, owners) in newer.owners {
                    look.owners.entry(inode).or_insert(owners);
                }
                look.closed.extend(newer.closed);
            }
        }
        for mut socket in sockets {
            socket.netns = Some(netns.inode);
            let peer = peers.get(&socket.inode).copied();
            socket.peer_inode = peer.filter(|peer| *peer != 0 && socket.protocol == "unix");
            socket.ownership = ownership(&socket, look);
            socket.owners = look.owners.get(&socket.inode).cloned().unwrap_or_default();
            tally.listed.insert(socket.inode);
            tally.ownerless += usize::from(socket.ownership == Ownership::Ownerless);
            tally.unknown += usize::from(socket.ownership == Ownership::Unknown);
            c.record(source, read_at, Data::Socket(Box::new(socket)), Vec::new());
        }
    }
}

fn ownership(socket: &Socket, look: &Look) -> Ownership {
    let kernels_netlink = socket.netlink.as_ref().is_some_and(|(port, _)| *port == 0);
    if look.owners.contains_key(&socket.inode) {
        Ownership::Owned
    } else if kernels_netlink || socket.inode == 0 {
        Ownership::Kernel
    } else if look.closed.is_empty() && !look.blind {
        Ownership::Ownerless
    } else {
        Ownership::Unknown
    }
}

/// Families without a table (vsock, alg, …), and sockets of namespaces that cannot be reached: held, and nowhere listed.
fn unlisted(c: &mut Collection, look: &Look, tally: &mut Tally) {
    let missing: BTreeMap<u64, _> = look
        .owners
        .iter()
        .filter(|(i, _)| !tally.listed.contains(i))
        .map(|(i, o)| (*i, o))
        .collect();
    for (inode, owners) in missing {
        let Some(owner) = owners.first() else { continue };
        let Some(fd) = owner.fd else { continue };
        let path = c.path(format!("proc/{}/fd/{fd}", owner.pid));
        let read_at = Timestamp::now();
        // Another file may have that number by now.
        let target = std::fs::read_link(&path).ok();
        if target.is_none_or(|t| t.as_os_str().as_encoded_bytes() != format!("socket:[{inode}]").as_bytes()) {
            continue;
        }
        let mut errors = Errors::default();
        let protocol = errors.keep("protocol", path.as_os_str().as_encoded_bytes(), protocol(&path));
        let socket = Socket {
            protocol: protocol.unwrap_or_else(|| "unknown".to_owned()),
            inode,
            ownership: Ownership::Owned,
            owners: owners.clone(),
            unlisted: true,
            ..Socket::default()
        };
        tally.unlisted += 1;
        c.record(
            path.as_os_str().as_encoded_bytes(),
            read_at,
            Data::Socket(Box::new(socket)),
            errors.list,
        );
    }
}

/// The name that the socket itself gives for its protocol (net/socket.c, `system.sockprotoname`).
fn protocol(path: &Path) -> std::io::Result<String> {
    let mut name = [0; 64];
    let length = rustix::fs::getxattr(path, "system.sockprotoname", &mut name[..])?;
    let name = name.get(..length).unwrap_or_default();
    Ok(stillframe_evidence::text::printable(
        name.strip_suffix(b"\0").unwrap_or(name),
    ))
}

/// One table of /proc/net. Lines that do not fit its form are left out, but for those of `unix`, whose paths may hold line
/// feeds: they continue the path before them.
pub fn parse(table: &'static str, bytes: &[u8]) -> Vec<Socket> {
    let mut sockets: Vec<Socket> = Vec::new();
    for line in bytes.split(|b| *b == b'\n').skip(1) {
        let parsed = match table {
            "unix" => unix(line),
            "packet" => packet(line),
            "netlink" => netlink(line),
            _ => inet(line, table),
        };
        match (parsed, sockets.last_mut().and_then(|s| s.path.as_mut())) {
            (Some(socket), _) => sockets.push(Socket {
                protocol: table.to_owned(),
                ..socket
            }),
            (None, Some(path)) if table == "unix" => {
                path.0.push(b'\n');
                path.0.extend_from_slice(line);
            }
            _ => (),
        }
    }
    // The table itself ends in a line feed, which is not the last path's.
    if let Some(path) = sockets.last_mut().and_then(|s| s.path.as_mut())
        && bytes.ends_with(b"\n")
        && path.0.last() == Some(&b'\n')
    {
        path.0.pop();
    }
    sockets
}

/// include/net/tcp_states.h
const TCP_STATES: [&str; 13] = [
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
];

fn state(field: &[u8], names: &[&str]) -> Option<String> {
    let index = usize::try_from(hex(field)?).ok()?;
    names
        .get(index)
        .filter(|name| !name.is_empty())
        .map(|name| (*name).to_owned())
}

fn endpoint(field: &[u8]) -> Option<Endpoint> {
    let colon = field.iter().position(|b| *b == b':')?;
    let (address, port) = (field.get(..colon)?, field.get(colon + 1..)?);
    let port = u16::try_from(hex(port)?).ok()?;
    // The kernel prints each 32-bit word of the address as a number in its own byte order.
    let word = |digits: &[u8]| Some(u32::try_from(hex(digits)?).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(address)?)),
        32 => {
            let words: Option<Vec<[u8; 4]>> = address.chunks(8).map(word).collect();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words?.concat()).ok()?))
        }
        _ => return None,
    };
    Some(Endpoint { address, port })
}

fn inet(line: &[u8], table: &str) -> Option<Socket> {
    let fields: Vec<&[u8]> = fields(line).collect();
    let get = |index: usize| fields.get(index).copied();
    let (local, remote) = (endpoint(get(1)?)?, endpoint(get(2)?)?);
    let queues = get(4)?;
    let colon = queues.iter().position(|b| *b == b':')?;
    let connected = remote.port != 0 || !remote.address.is_unspecified();
    let state = match (table.starts_with("tcp"), connected) {
        (true, _) => state(get(3)?, &TCP_STATES),
        (false, true) => state(get(3)?, &TCP_STATES),
        (false, false) => Some("UNCONNECTED".to_owned()),
    };
    Some(Socket {
        inode: number(get(9)?)?,
        local: Some(local),
        remote: connected.then_some(remote),
        state,
        uid: get(7).and_then(number),
        queues: hex(queues.get(..colon)?).zip(hex(queues.get(colon + 1..)?)),
        ..Socket::default()
    })
}

fn socket_type(code: u64) -> Option<String> {
    let name = match code {
        1 => "stream",
        2 => "datagram",
        3 => "raw",
        5 => "seqpacket",
        10 => "packet",
        _ => return None,
    };
    Some(name.to_owned())
}

/// `Num: RefCount Protocol Flags Type St Inode Path`; the path is the rest of the line, blanks included.
fn unix(line: &[u8]) -> Option<Socket> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|b| *b != b' ')?;
        let end = rest
            .get(start..)?
            .iter()
            .position(|b| *b == b' ')
            .map_or(rest.len(), |n| start + n);
        let field = rest.get(start..end)?;
        rest = rest.get(end..)?;
        Some(field)
    };
    let number_field = field()?;
    hex(number_field.strip_suffix(b":")?).filter(|_| number_field.len() >= 9)?;
    let (_references, _protocol, flags) = (hex(field()?)?, hex(field()?)?, hex(field()?)?);
    let (kind, st, inode) = (hex(field()?)?, field()?, number(field()?)?);
    // __SO_ACCEPTCON, include/linux/net.h: it listens.
    const LISTENS: u64 = 1 << 16;
    let state = if flags & LISTENS != 0 {
        Some("LISTEN".to_owned())
    } else {
        state(
            st,
            &["FREE", "UNCONNECTED", "CONNECTING", "CONNECTED", "DISCONNECTING"],
        )
    };
    let path = rest.strip_prefix(b" ").unwrap_or(rest);
    Some(Socket {
        inode,
        state,
        socket_type: socket_type(kind),
        path: (!path.is_empty()).then(|| Text::from(path)),
        ..Socket::default()
    })
}

/// `sk RefCnt Type Proto Iface R Rmem User Inode`
fn packet(line: &[u8]) -> Option<Socket> {
    let fields: Vec<&[u8]> = fields(line).collect();
    let get = |index: usize| fields.get(index).copied();
    Some(Socket {
        inode: number(get(8)?)?,
        socket_type: get(2).and_then(number).and_then(socket_type),
        family_protocol: get(3).map(stillframe_evidence::text::printable),
        interface: get(4).and_then(number),
        uid: get(7).and_then(number),
        ..Socket::default()
    })
}

/// `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`
fn netlink(line: &[u8]) -> Option<Socket> {
    let fields: Vec<&[u8]> = fields(line).collect();
    let get = |index: usize| fields.get(index).copied();
    // The port id is printed as a signed number by some kernels.
    let port = number::<i64>(get(2)?)?;
    Some(Socket {
        inode: number(get(9)?)?,
        family_protocol: get(1).map(stillframe_evidence::text::printable),
        netlink: Some((u64::try_from(port).unwrap_or(u64::MAX), Text::from(get(3)?))),
        ..Socket::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TCP: &[u8] = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0000000000000000 100 0 0 10 0
   1: 0100007F:D431 0100007F:1F90 01 00000002:00000003 00:00000000 00000000     0        0 31338 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:D432 0100007F:1F90 06 00000000:00000000 03:00001770 00000000     0        0 0 3 0000000000000000
";
    const TCP6: &[u8] = b"header
   0: 0000000000000000FFFF00000100007F:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 7 1 0 100 0 0 10 0
";

    #[test]
    #[cfg(target_endian = "little")]
    fn tcp_tables_are_read() {
        let sockets = parse("tcp", TCP);
        assert_eq!(sockets.len(), 3);
        assert_eq!(sockets[0].local.unwrap().port, 8080);
        assert_eq!(sockets[0].local.unwrap().address.to_string(), "127.0.0.1");
        assert_eq!(
            (sockets[0].state.as_deref(), sockets[0].uid, sockets[0].remote),
            (Some("LISTEN"), Some(1000), None)
        );
        assert_eq!(sockets[1].queues, Some((2, 3)));
        assert_eq!(sockets[1].remote.unwrap().port, 8080);
        assert_eq!(
            (sockets[2].state.as_deref(), sockets[2].inode),
            (Some("TIME_WAIT"), 0)
        );
        assert_eq!(
            parse("tcp6", TCP6)[0].local.unwrap().address.to_string(),
            "::ffff:127.0.0.1"
        );
    }

    #[test]
    fn unix_paths_keep_blanks_and_line_feeds() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path
00000000f1e2d3c4: 00000002 00000000 00010000 0001 01 4711 /run/a  b\nc: d
00000000f1e2d3c5: 00000003 00000000 00000000 0001 03 4712
00000000f1e2d3c6: 00000002 00000000 00000000 0002 01 4713 @abstract\xff
";
        let sockets = parse("unix", table);
        assert_eq!(sockets.len(), 3);
        assert_eq!(sockets[0].path, Some(Text::from("/run/a  b\nc: d")));
        assert_eq!(
            (sockets[0].state.as_deref(), sockets[0].socket_type.as_deref()),
            (Some("LISTEN"), Some("stream"))
        );
        assert_eq!(
            (sockets[1].path.as_ref(), sockets[1].state.as_deref()),
            (None, Some("CONNECTED"))
        );
        assert_eq!(sockets[2].path, Some(Text::from(b"@abstract\xff")));
    }

    #[test]
    fn what_has_no_owner_is_only_called_so_when_everybody_was_asked() {
        let mut look = Look::default();
        let socket = Socket {
            inode: 5,
            ..Socket::default()
        };
        assert_eq!(ownership(&socket, &look), Ownership::Ownerless);
        look.closed.insert(1);
        assert_eq!(ownership(&socket, &look), Ownership::Unknown);
        look.fd(7, 3, b"socket:[5]");
        assert_eq!(ownership(&socket, &look), Ownership::Owned);
        assert_eq!(ownership(&Socket::default(), &Look::default()), Ownership::Kernel);
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..600) {
            for table in TABLES {
                parse(table, &bytes);
                parse(table, &TCP[..cut.min(TCP.len())]);
            }
        }
    }
}
