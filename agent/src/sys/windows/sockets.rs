//! TCP and UDP sockets with the processes that own them: GetExtendedTcpTable, GetExtendedUdpTable.

use crate::collect::{Collection, Unsupported};
use jiff::Timestamp;
use std::{
    ffi::c_void,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use stillframe_evidence::records::{
    Data,
    sockets::{Endpoint, Owner, Ownership, Socket},
};
use windows_sys::Win32::{
    Foundation::{ERROR_INSUFFICIENT_BUFFER, NO_ERROR},
    NetworkManagement::IpHelper::{
        GetExtendedTcpTable, GetExtendedUdpTable, TCP_TABLE_OWNER_PID_ALL, UDP_TABLE_OWNER_PID,
    },
    Networking::WinSock::{AF_INET, AF_INET6},
};

/// A table: its name, and where in a row (counted in words of 32 bits) its fields stand.
struct Table {
    protocol: &'static str,
    tcp: bool,
    v6: bool,
    row: usize,
    local: (usize, usize),
    remote: Option<(usize, usize)>,
    state: Option<usize>,
    pid: usize,
}

/// The rows of `tcpmib.h` and `udpmib.h`: MIB_TCPROW_OWNER_PID, MIB_TCP6ROW_OWNER_PID and their UDP kin.
const TABLES: [Table; 4] = [
    Table {
        protocol: "tcp",
        tcp: true,
        v6: false,
        row: 6,
        local: (1, 2),
        remote: Some((3, 4)),
        state: Some(0),
        pid: 5,
    },
    Table {
        protocol: "tcp6",
        tcp: true,
        v6: true,
        row: 14,
        local: (0, 5),
        remote: Some((6, 11)),
        state: Some(12),
        pid: 13,
    },
    Table {
        protocol: "udp",
        tcp: false,
        v6: false,
        row: 3,
        local: (0, 1),
        remote: None,
        state: None,
        pid: 2,
    },
    Table {
        protocol: "udp6",
        tcp: false,
        v6: true,
        row: 7,
        local: (0, 5),
        remote: None,
        state: None,
        pid: 6,
    },
];

/// MIB_TCP_STATE, from 1, in the words that Linux uses.
const STATES: [&str; 12] = [
    "CLOSE",
    "LISTEN",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "CLOSE_WAIT",
    "CLOSING",
    "LAST_ACK",
    "TIME_WAIT",
    "DELETE_TCB",
];

/// The four tables.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    for (key, table) in (0u64..).zip(&TABLES) {
        if !c.item(key, table.protocol) || c.touching(table.protocol, None).is_err() {
            continue;
        }
        let read_at = Timestamp::now();
        let source = if table.tcp {
            "GetExtendedTcpTable"
        } else {
            "GetExtendedUdpTable"
        };
        match read(table) {
            Ok(words) => rows(table, &words).for_each(|socket| {
                c.record(source, read_at, Data::Socket(Box::new(socket)), Vec::new());
            }),
            Err(error) => c.unread(table.protocol, source, &error),
        }
        c.done();
    }
    Ok(())
}

/// The table as the system writes it: the number of rows, then the rows.
fn read(table: &Table) -> io::Result<Vec<u32>> {
    let family = u32::from(if table.v6 { AF_INET6 } else { AF_INET });
    let mut words: Vec<u32> = vec![0; 4096];
    // The table may grow between two calls, a bounded number of times.
    for _ in 0..8 {
        let mut size = u32::try_from(words.len() * 4).map_err(io::Error::other)?;
        let buffer = words.as_mut_ptr().cast::<c_void>();
        // SAFETY: `buffer` points at `size` writable bytes, aligned for the tables' 32-bit fields, and the system
        // writes no more than `size`.
        #[allow(unsafe_code)]
        let code = unsafe {
            if table.tcp {
                GetExtendedTcpTable(buffer, &mut size, 0, family, TCP_TABLE_OWNER_PID_ALL, 0)
            } else {
                GetExtendedUdpTable(buffer, &mut size, 0, family, UDP_TABLE_OWNER_PID, 0)
            }
        };
        match code {
            NO_ERROR => return Ok(words),
            ERROR_INSUFFICIENT_BUFFER => {
                let needed = usize::try_from(size).map_err(io::Error::other)?;
                words.resize(needed.div_ceil(4).saturating_mul(2).min(64 << 20), 0);
            }
            code => return Err(io::Error::from_raw_os_error(code.cast_signed())),
        }
    }
    Err(io::Error::other("the table grew faster than it could be read"))
}

fn rows<'a>(table: &'a Table, words: &'a [u32]) -> impl Iterator<Item = Socket> + 'a {
    let count = words.first().and_then(|n| usize::try_from(*n).ok()).unwrap_or(0);
    let rows = words
        .get(1..)
        .unwrap_or_default()
        .chunks_exact(table.row)
        .take(count);
    rows.filter_map(|row| socket(table, row))
}

fn socket(table: &Table, row: &[u32]) -> Option<Socket> {
    let end = |(address, port): (usize, usize)| {
        let address = if table.v6 {
            let words: Vec<u8> = row
                .get(address..)?
                .get(..4)?
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?))
        } else {
            IpAddr::V4(Ipv4Addr::from(row.get(address)?.to_ne_bytes()))
        };
        // The low 16 bits, in network order.
        let [high, low, ..] = row.get(port)?.to_ne_bytes();
        Some(Endpoint {
            address,
            port: u16::from_be_bytes([high, low]),
        })
    };
    let state = table
        .state
        .and_then(|at| row.get(at))
        .and_then(|s| usize::try_from(*s).ok()?.checked_sub(1));
    let state = state.and_then(|s| STATES.get(s)).map(|s| (*s).to_owned());
    let pid = *row.get(table.pid)?;
    let listens = state.as_deref() == Some("LISTEN");
    Some(Socket {
        protocol: table.protocol.to_owned(),
        local: end(table.local),
        remote: table.remote.filter(|_| !listens).and_then(end),
        state,
        ownership: if pid == 0 {
            Ownership::Kernel
        } else {
            Ownership::Owned
        },
        owners: if pid == 0 {
            Vec::new()
        } else {
            vec![Owner { pid, fd: None }]
        },
        ..Socket::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_where_they_stand() {
        let port = u32::from_ne_bytes([0x1f, 0x90, 0, 0]);
        let words = [1, 2, u32::from_ne_bytes([127, 0, 0, 1]), port, 0, 0, 4711, 9, 9];
        let sockets: Vec<Socket> = rows(&TABLES[0], &words).collect();
        assert_eq!(sockets.len(), 1);
        assert_eq!(
            sockets[0].local.unwrap(),
            Endpoint {
                address: "127.0.0.1".parse().unwrap(),
                port: 8080
            }
        );
        assert_eq!(
            (sockets[0].state.as_deref(), sockets[0].owners[0].pid),
            (Some("LISTEN"), 4711)
        );
        assert_eq!(rows(&TABLES[0], &[u32::MAX, 1]).count(), 0);
    }
}
