//! Netlink dumps: a request, and the messages and attributes of the answer. Only families that the kernel has for certain
//! are asked (see `sockdiag`).

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};
use std::{io, net::IpAddr, time::Duration};

const NLM_F_REQUEST_DUMP: u16 = 0x0001 | 0x0300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
/// The kernel fills at most 32 KiB of a dump at once.
const BUFFER: usize = 64 << 10;

/// Sends one dump request in the calling thread's network namespace and hands each message of the answer to `each`:
/// its type and its body. No `protocol` is protocol 0, NETLINK_ROUTE. True when the kernel says that the answer may be inconsistent (it changed meanwhile).
pub fn dump(
    protocol: Option<Protocol>,
    kind: u16,
    body: &[u8],
    mut each: impl FnMut(u16, &[u8]),
) -> io::Result<bool> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(1)))?;
    let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
    let mut request = Vec::with_capacity(16 + body.len());
    request.extend_from_slice(&length.to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    send(&socket, &request, SendFlags::empty())?;
    let mut buffer = vec![0; BUFFER];
    let mut changed = false;
    loop {
        let (read, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some((message, flags, body, tail)) = split(rest) {
            rest = tail;
            changed |= flags & NLM_F_DUMP_INTR != 0;
            match message {
                NLMSG_DONE => return Ok(changed),
                NLMSG_OVERRUN => return Err(io::Error::other("the kernel lost a part of the answer")),
                NLMSG_ERROR => {
                    let code = body.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b));
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                message => each(message, body),
            }
        }
    }
}

/// Type, flags and body of the first message, and what is behind it.
fn split(bytes: &[u8]) -> Option<(u16, u16, &[u8], &[u8])> {
    let (header, _) = bytes.split_first_chunk::<16>()?;
    let [a, b, c, d, kind_a, kind_b, flags_a, flags_b, ..] = *header;
    let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
    let body = bytes.get(16..length)?;
    let rest = bytes.get(length.next_multiple_of(4).min(bytes.len())..)?;
    Some((
        u16::from_ne_bytes([kind_a, kind_b]),
        u16::from_ne_bytes([flags_a, flags_b]),
        body,
        rest,
    ))
}

/// The attributes of a message: type (without the nesting bits) and value.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<4>()?;
        let [a, b, c, d] = *header;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4).min(bytes.len())..)?;
        Some((u16::from_ne_bytes([c, d]) & 0x3fff, value))
    })
}

/// A number of four bytes in the machine's order.
pub fn u32_of(value: &[u8]) -> Option<u32> {
    value.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b))
}

/// An address of four or sixteen bytes.
pub fn ip_of(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            let mut messages = 0;
            while let Some((_, _, body, tail)) = split(rest) {
                prop_assert!(attributes(body).count() <= body.len());
                prop_assert!(tail.len() < rest.len());
                rest = tail;
                messages += 1;
            }
            prop_assert!(messages <= bytes.len());
        }
    }
}
