//! Finding a kernel in an image, by physical address: one pass over all of it for the few things that have a shape of their own; each
//! hit is then validated by parsing it, and the others follow from it.

use crate::{
    Error, KERNEL_MAP, Kernel, Vmcoreinfo, btf, kernel_offset,
    tables::{self, Tables},
    vmcoreinfo,
};
use memchr::memmem::Finder;
use std::{
    collections::BTreeSet,
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};
use stillframe_evidence::image::Image;

/// What one thread reads at a time.
const WINDOW: u64 = 8 << 20;
/// What windows overlap by: enough to judge a hit at the end of one.
const OVERLAP: u64 = tables::INDEX;
/// Hits of one kind that are looked at, after each was found to have the right form: an image may be full of them on purpose.
const MAX_HITS: usize = 4096;
/// Different notes that are tried. Some are old copies.
const MAX_NOTES: usize = 32;
/// Kernel text is aligned to 2 MiB (`CONFIG_PHYSICAL_ALIGN`), and so is where it was moved to.
const ALIGNED: u64 = 2 << 20;
/// A banner is one line.
const MAX_BANNER: usize = 1024;

#[derive(Default)]
struct Hits {
    notes: Vec<Vmcoreinfo>,
    digits: BTreeSet<u64>,
    banners: BTreeSet<u64>,
    types: BTreeSet<u64>,
}

const NOTE: &[u8] = b"OSRELEASE=";
const BANNER: &[u8] = b"Linux version ";

/// The kernel of an image.
pub fn kernel(image: &Image) -> Result<Kernel, Error> {
    let hits = scan(image)?;
    for at in &hits.digits {
        if let Some(found) = at_tables(image, *at, &hits)? {
            return Ok(found);
        }
    }
    Err(Error::NotFound(match (hits.digits.len(), hits.banners.len()) {
        (_, 0) => "no Linux kernel is in this image: not even the text of /proc/version".to_owned(),
        (0, _) => "a Linux kernel is in this image, but not the tables of its symbols: a part of the image is missing, or the kernel was \
                   built without kallsyms"
            .to_owned(),
        (n, _) => format!("{n} places look like the kernel's symbol tables and none of them is whole: a part of the image is missing"),
    }))
}

fn scan(image: &Image) -> Result<Hits, Error> {
    let mut windows = Vec::new();
    for (start, size) in image.ranges() {
        let mut at = 0;
        while at < size {
            windows.push((start + at, (size - at).min(WINDOW + OVERLAP)));
            at += WINDOW;
        }
    }
    let next = AtomicUsize::new(0);
    let hits: Mutex<Hits> = Mutex::default();
    let failed: Mutex<Option<io::Error>> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                while let Some((start, size)) = windows.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    buffer.resize(usize::try_from(size).unwrap_or(0), 0);
                    match image.read(start, &mut buffer) {
                        Ok(_) => look(start, &buffer, &hits),
                        Err(error) => {
                            failed
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .get_or_insert(error);
                            return;
                        }
                    }
                }
            });
        }
    });
    let hits = hits.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) if hits.digits.is_empty() => Err(error.into()),
        _ => Ok(hits),
    }
}

fn look(start: u64, bytes: &[u8], hits: &Mutex<Hits>) {
    let find = |pattern: &[u8]| -> Vec<usize> { Finder::new(pattern).find_iter(bytes).collect() };
    let at = |offset: usize| start + offset as u64;
    let notes: Vec<Vmcoreinfo> = find(NOTE)
        .into_iter()
        .filter_map(|offset| note(bytes.get(offset..)?))
        .take(MAX_NOTES)
        .collect();
    let digits: Vec<u64> = tables::candidates(bytes)
        .into_iter()
        .map(at)
        .take(MAX_HITS)
        .collect();
    let banners: Vec<u64> = find(BANNER).into_iter().map(at).take(MAX_HITS).collect();
    let header = |offset: &usize| bytes.get(*offset..).and_then(btf::size).is_some();
    let types: Vec<u64> = find(&btf::MAGIC)
        .into_iter()
        .filter(header)
        .map(at)
        .take(MAX_HITS)
        .collect();
    let mut hits = hits.lock().unwrap_or_else(PoisonError::into_inner);
    for note in notes {
        if hits.notes.len() < MAX_NOTES && !hits.notes.contains(&note) {
            hits.notes.push(note);
        }
    }
    let keep = |to: &mut BTreeSet<u64>, from: Vec<u64>| {
        to.extend(from);
        while to.len() > MAX_HITS {
            to.pop_last();
        }
    };
    keep(&mut hits.digits, digits);
    keep(&mut hits.banners, banners);
    keep(&mut hits.types, types);
}

fn read(image: &Image, at: u64, size: usize) -> Result<Vec<u8>, io::Error> {
    let mut bytes = vec![0; size];
    image.read(at, &mut bytes)?;
    Ok(bytes)
}

/// A kernel's own note, and whole.
fn note(bytes: &[u8]) -> Option<Vmcoreinfo> {
    let note = Vmcoreinfo::parse(bytes.get(..vmcoreinfo::MAX).unwrap_or(bytes))?;
    (note.kernel_offset().is_some() && note.phys_base().is_some() && note.symbol("swapper_pg_dir").is_some())
        .then_some(note)
}

/// The kernel whose token table has its digits at `at`.
fn at_tables(image: &Image, at: u64, hits: &Hits) -> Result<Option<Kernel>, Error> {
    // The tables are aligned by their addresses, so what is read must be, too.
    let start = at.saturating_sub(tables::BEFORE) / 4096 * 4096;
    let size = usize::try_from(at - start + tables::BEHIND).unwrap_or(0);
    let bytes = read(image, start, size)?;
    let digits = usize::try_from(at - start).unwrap_or(0);
    // Which of the notes is this kernel's shows in its banner; a kernel without one is found by its banner alone.
    // Most layouts say by themselves at which addresses the kernel ran.
    let by_itself = tables::decode(&bytes, digits, |_| None);
    for note in hits.notes.iter().map(Some).chain([None]) {
        let base = note.and_then(Vmcoreinfo::phys_base);
        let virtual_of = |base: u64, at: u64| KERNEL_MAP.wrapping_add(at.wrapping_sub(base));
        let address_of = |offset: usize| Some(virtual_of(base?, start.checked_add(offset as u64)?));
        let with_note = match by_itself {
            Some(_) => None,
            None => tables::decode(&bytes, digits, address_of),
        };
        let Some(Tables { symbols, places }) = by_itself.as_ref().or(with_note.as_ref()) else {
            continue;
        };
        let Some(banner_at) = symbols
            .iter()
            .find(|s| s.name == "linux_banner")
            .map(|s| s.address)
        else {
            continue;
        };
        let bases: Vec<u64> = match base {
            Some(base) => vec![base],
            None => {
                let bases = hits
                    .banners
                    .iter()
                    .map(|at| at.wrapping_sub(banner_at.wrapping_sub(KERNEL_MAP)));
                bases.filter(|base| base % ALIGNED == 0).collect()
            }
        };
        for base in bases {
            let physical = |address: u64| address.wrapping_sub(KERNEL_MAP).wrapping_add(base);
            let text = read(image, physical(banner_at), MAX_BANNER)?;
            let banner = text.split(|b| *b == 0).next().unwrap_or_default();
            let release = note.map(|n| format!("Linux version {} ", n.release()));
            let prefix = release.as_deref().map_or(BANNER, str::as_bytes);
            if !banner.starts_with(prefix) || !banner.ends_with(b"\n") {
                continue;
            }
            let btf = types(image, symbols, physical, hits)?;
            let tables = places
                .iter()
                .map(|(name, offset)| ((*name).to_owned(), virtual_of(base, start + *offset as u64)));
            return Ok(Some(Kernel {
                banner: banner.to_vec(),
                offset: kernel_offset(note, symbols),
                vmcoreinfo: note.cloned(),
                btf,
                tables: tables.collect(),
                symbols: symbols.clone(),
            }));
        }
    }
    Ok(None)
}

/// The kernel's BTF: where its symbols say, else the only one in the image that is whole and describes a kernel.
fn types(
    image: &Image,
    symbols: &[crate::Symbol],
    physical: impl Fn(u64) -> u64,
    hits: &Hits,
) -> Result<Option<Vec<u8>>, Error> {
    let address = |name: &str| symbols.iter().find(|s| s.name == name).map(|s| s.address);
    let named = address("__start_BTF")
        .zip(address("__stop_BTF"))
        .filter(|(start, stop)| start < stop);
    if let Some((start, stop)) = named
        && stop - start <= btf::MAX
    {
        let bytes = read(image, physical(start), usize::try_from(stop - start).unwrap_or(0))?;
        return Ok(btf::Types::parse(&bytes)
            .ok()
            .filter(|t| t.has("task_struct"))
            .map(|_| bytes));
    }
    for at in &hits.types {
        let header = read(image, *at, 64)?;
        let Some(size) = btf::size(&header).and_then(|size| usize::try_from(size).ok()) else {
            continue;
        };
        let bytes = read(image, *at, size)?;
        if btf::Types::parse(&bytes).is_ok_and(|t| t.has("task_struct") && t.has("mm_struct")) {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}
