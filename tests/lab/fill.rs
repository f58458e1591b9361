//! Pages that carry their own identity: in an image of memory each says which it is, and whether it is whole.

use anyhow::{Context as _, Result, ensure};
use std::{collections::BTreeMap, io::Write as _};
use stillframe_evidence::root::Hash;

/// Bytes of a page.
pub const PAGE: usize = 4096;
const MARK: &[u8; 16] = b"STILLFRAME PAGE\n";

/// The content of page `number`: the mark, the number, noise that follows from it, and the hash of all that. Half of it is noise, so
/// that it compresses as memory does.
pub fn page(number: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..16].copy_from_slice(MARK);
    page[16..24].copy_from_slice(&number.to_le_bytes());
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page[24..PAGE / 2].chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    let hash = Hash::of(&page[..PAGE - 32]);
    page[PAGE - 32..].copy_from_slice(&hash.0);
    page
}

/// The number of a page that has the mark, and whether the rest is right; nothing when it is another page.
pub fn identify(bytes: &[u8]) -> Option<(u64, bool)> {
    let number = u64::from_le_bytes(bytes.strip_prefix(MARK)?.first_chunk()?.to_owned());
    Some((number, bytes == page(number)))
}

/// What was found of so many pages, and at which addresses.
#[derive(Default, Debug)]
pub struct Found {
    /// Where each number was seen whole.
    pub whole: BTreeMap<u64, Vec<u64>>,
    /// Pages with the mark that are not what they say.
    pub wrong: Vec<u64>,
}

impl Found {
    /// Looks at one page.
    pub fn look(&mut self, address: u64, bytes: &[u8]) {
        match identify(bytes) {
            Some((number, true)) => self.whole.entry(number).or_default().push(address),
            Some((_, false)) => self.wrong.push(address),
            None => (),
        }
    }
}

/// Fills so many MiB with such pages, says so and where, and keeps them until standard input ends.
pub fn fill(mib: usize) -> Result<()> {
    let pages = mib << 8;
    let size = pages * PAGE;
    // SAFETY: a new private mapping of the kernel's choice, which is checked before it is used and never unmapped.
    #[allow(unsafe_code)]
    let memory = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let start = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        );
        ensure!(
            start != libc::MAP_FAILED,
            "no memory: {}",
            std::io::Error::last_os_error()
        );
        std::slice::from_raw_parts_mut(start.cast::<u8>(), size)
    };
    for (number, bytes) in (0u64..).zip(memory.chunks_mut(PAGE)) {
        bytes.copy_from_slice(&page(number));
    }
    println!("FILLED {pages} {:p}", memory.as_ptr());
    std::io::stdout().flush()?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).context("standard input")?;
    // Used to the end: nothing is given back before.
    ensure!(
        identify(&memory[..PAGE]) == Some((0, true)),
        "the first page is another"
    );
    Ok(())
}
