//! Which physical addresses are RAM: `/proc/iomem` (kernel `kernel/resource.c`, `r_show`). Ends are inclusive, ranges can be
//! nested (virtio-mem and dax devices have their RAM indented below them), and without the right to see them all addresses
//! are zero.

use super::PAGE;

/// RAM as first address and bytes: whole pages, rising, neighbours joined. Nothing when no address is shown.
pub fn system_ram(iomem: &str) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = iomem.lines().filter_map(ram).collect();
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            // Nested RAM is listed below a range that is itself RAM, or beside it.
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => joined.push((start, end)),
        }
    }
    joined
        .into_iter()
        .map(|(start, end)| (start, end - start))
        .collect()
}

/// First address and the address behind the last, of the whole pages of one line.
fn ram(line: &str) -> Option<(u64, u64)> {
    let (range, name) = line.split_once(" : ")?;
    if !name.trim_end().starts_with("System RAM") {
        return None;
    }
    let (start, end) = range.trim().split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    // The kernel itself uses whole pages only.
    let start = start.checked_next_multiple_of(PAGE)?;
    let end = end.checked_add(1)? / PAGE * PAGE;
    (start < end).then_some((start, end))
}

/// What is in both lists; first address and bytes, rising.
pub fn common(a: &[(u64, u64)], b: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for (start, size) in a {
        for (other, other_size) in b {
            let from = *start.max(other);
            let to = start.saturating_add(*size).min(other.saturating_add(*other_size));
            if from < to {
                found.push((from, to - from));
            }
        }
    }
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
0009fc00-0009ffff : Reserved
00100000-3ffdafff : System RAM
  01000000-01ffffff : Kernel code
100000000-23fffffff : System RAM
240000000-2bfffffff : abcd
  240000000-2bfffffff : virtio0
    248000000-24fffffff : System RAM (virtio_mem)
    250000000-257ffffff : System RAM (virtio_mem)
";

    #[test]
    fn ends_are_inclusive_and_ram_may_be_nested() {
        assert_eq!(
            system_ram(IOMEM),
            [
                (0x1000, 0x9e000),
                (0x10_0000, 0x3fed_b000),
                (0x1_0000_0000, 0x1_4000_0000),
                (0x2_4800_0000, 0x1000_0000),
            ]
        );
    }

    #[test]
    fn hidden_addresses_are_no_ranges() {
        assert!(system_ram("00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n").is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[0-9a-f:\\- SystemRAM\n]{0,200}") {
            for (start, size) in system_ram(&text) {
                prop_assert!(size > 0 && start % PAGE == 0 && start.checked_add(size).is_some());
            }
        }
    }
}
