//! Who is logged in: utmp, and the files that logind keeps. What lies in their place and is no file is not opened.

use super::proc::{self, lines};
use crate::collect::{Collection, Unsupported, is_gone};
use jiff::Timestamp;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use stillframe_evidence::{
    records::{
        Data,
        sessions::{Login, Logind},
    },
    text::Text,
};

const UTMP: [&str; 2] = ["run/utmp", "var/run/utmp"];
const MAX_UTMP: usize = 64 << 20;
const LOGIND: [&str; 3] = ["sessions", "users", "seats"];
const MAX_LOGIND: usize = 1 << 20;

/// utmp first, then logind.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    for (key, place) in (0u64..).zip(UTMP) {
        let path = c.path(place);
        let source = path.as_os_str().as_encoded_bytes();
        if !c.item(key, source) {
            continue;
        }
        let read_at = Timestamp::now();
        let read = match c.touching("utmp", None) {
            Ok(()) => proc::read_regular(&path, MAX_UTMP),
            Err(_) => Err(io::Error::other("not read: a worker that read here was lost")),
        };
        let absent = matches!(&read, Err(error) if is_gone(error.raw_os_error()));
        match read {
            Ok(bytes) => utmp(c, source, read_at, &bytes),
            Err(_) if absent => c.note(format!("{}: absent", path.display())),
            Err(error) => c.unread("utmp", source, &error),
        }
        c.done();
        // The second place is the older name of the first.
        if !absent {
            break;
        }
    }
    let mut key = 1000;
    for folder in LOGIND {
        key = logind(c, folder, key);
    }
    Ok(())
}

fn utmp(c: &mut Collection, source: &[u8], read_at: Timestamp, bytes: &[u8]) {
    let mut chunks = bytes.chunks_exact(ENTRY);
    for entry in chunks.by_ref() {
        if let Some(login) = parse(entry) {
            c.record(source, read_at, Data::Login(Box::new(login)), Vec::new());
        }
    }
    if !chunks.remainder().is_empty() {
        c.problem(
            "utmp",
            source,
            None,
            "its length is not a whole number of entries",
        );
    }
}

/// Every file of a folder is an item of its own: one that hangs costs no other. Returns the next item's key.
fn logind(c: &mut Collection, folder: &str, first: u64) -> u64 {
    let path = c.path(format!("run/systemd/{folder}"));
    let mut files = Vec::new();
    // A successor lists the folder again, which its predecessor did without harm.
    let first_time = c.item(first, path.as_os_str().as_encoded_bytes());
    let listed = match if first_time {
        c.touching("logind", None)
    } else {
        Ok(())
    } {
        Ok(()) => std::fs::read_dir(&path),
        Err(_) => Err(io::Error::other("not read: a worker that read here was lost")),
    };
    match listed {
        // logind keeps a FIFO beside each session; it holds nothing.
        Ok(entries) => {
            files.extend(
                entries
                    .flatten()
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_file()))
                    .map(|e| e.path()),
            );
        }
        Err(error) if is_gone(error.raw_os_error()) => c.note(format!("{}: absent", path.display())),
        Err(error) => c.unread("logind", path.as_os_str().as_encoded_bytes(), &error),
    }
    if first_time {
        c.done();
    }
    files.sort();
    let mut key = first;
    for file in files {
        key += 1;
        let (source, read_at) = (file.as_os_str().as_encoded_bytes(), Timestamp::now());
        if !c.item(key, source) {
            continue;
        }
        let read = match c.touching("logind", None) {
            Ok(()) => proc::read_regular(&file, MAX_LOGIND),
            Err(_) => Err(io::Error::other("not read: a worker that read here was lost")),
        };
        match read {
            Ok(bytes) => {
                let values = lines(&bytes)
                    .filter(|l| !l.starts_with(b"#"))
                    .filter_map(pair)
                    .collect();
                c.record(
                    source,
                    read_at,
                    Data::Logind(Box::new(Logind { values })),
                    Vec::new(),
                );
            }
            Err(error) if is_gone(error.raw_os_error()) => (),
            Err(error) => c.unread(folder, source, &error),
        }
        c.done();
    }
    key + 1000
}

fn pair(line: &[u8]) -> Option<(String, Text)> {
    let equals = line.iter().position(|b| *b == b'=')?;
    let key = stillframe_evidence::text::printable(line.get(..equals)?);
    Some((key, Text::from(line.get(equals + 1..)?)))
}

/// Size of struct utmp in the GNU C library: 32-bit session and time where the platform began with 32-bit programs.
const ENTRY: usize = if cfg!(target_arch = "x86_64") { 384 } else { 400 };

fn parse(entry: &[u8]) -> Option<Login> {
    let int = |at: usize| {
        entry
            .get(at..)?
            .first_chunk::<4>()
            .map(|b| i32::from_ne_bytes(*b))
    };
    let text = |at: usize, length: usize| {
        let field = entry.get(at..)?.get(..length)?;
        Some(Text::from(field.split(|b| *b == 0).next()?))
    };
    let kind = i16::from_ne_bytes(*entry.first_chunk::<2>()?);
    let names = [
        "empty",
        "runlevel",
        "boot",
        "new-time",
        "old-time",
        "init",
        "login",
        "user",
        "dead",
        "accounting",
    ];
    let name = usize::try_from(kind)
        .ok()
        .and_then(|k| names.get(k))
        .map_or_else(|| kind.to_string(), |n| (*n).to_owned());
    let (time, address) = if ENTRY == 384 {
        (int(340).zip(int(344)), 348)
    } else {
        (int(344).zip(int(352)), 360)
    };
    let address: [u8; 16] = *entry.get(address..)?.first_chunk()?;
    let address = match address {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => None,
        [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d))),
        whole => Some(IpAddr::V6(Ipv6Addr::from(whole))),
    };
    Some(Login {
        entry: name,
        pid: int(4)?,
        line: text(8, 32)?,
        id: text(40, 4)?,
        user: text(44, 32)?,
        host: text(76, 256)?,
        address,
        session: int(336)?,
        // The seconds are unsigned in all but name: they reach to 2106.
        time: time
            .and_then(|(s, us)| Timestamp::new(i64::from(s.cast_unsigned()), us.checked_mul(1000)?).ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn an_entry_of_the_gnu_c_library() {
        let mut entry = vec![0; ENTRY];
        entry[0] = 7;
        entry[4..8].copy_from_slice(&4711i32.to_ne_bytes());
        entry[8..13].copy_from_slice(b"pts/0");
        entry[44..48].copy_from_slice(b"ro\xfft");
        entry[76..80].copy_from_slice(b"evil");
        entry[340..344].copy_from_slice(&1_700_000_000i32.to_ne_bytes());
        entry[348..352].copy_from_slice(&[192, 0, 2, 1]);
        let login = parse(&entry).unwrap();
        assert_eq!((login.entry.as_str(), login.pid), ("user", 4711));
        assert_eq!(
            (login.user, login.line),
            (Text::from(b"ro\xfft"), Text::from("pts/0"))
        );
        assert_eq!(login.address.unwrap().to_string(), "192.0.2.1");
        assert_eq!(login.time.unwrap().as_second(), 1_700_000_000);
    }

    proptest! {
        #[test]
        fn hostile_entries_never_panic(entry in proptest::collection::vec(any::<u8>(), 0..=ENTRY)) {
            parse(&entry);
        }
    }
}
