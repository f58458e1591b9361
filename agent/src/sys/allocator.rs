//! The allocator of the static agent, for a host whose free memory may be evidence: little of its own, and what was large goes back at
//! once. That of musl does so, but asks the kernel at every other turn, and a look at processes, which is a million
//! small things, takes half as long again; so small things are dlmalloc's. Allocators made for speed keep a heap for each thread and
//! a page for each size: with one of them a capture of memory changed a megabyte more.

use dlmalloc::GlobalDlmalloc;
use std::alloc::{GlobalAlloc, Layout, System};

/// See the module.
pub struct Allocator;

/// Bytes from which something is large: where musl maps and unmaps (`MMAP_THRESHOLD` of its mallocng is 131,052).
const LARGE: usize = 128 << 10;

fn of(layout: Layout) -> &'static dyn GlobalAlloc {
    if layout.size() < LARGE {
        &GlobalDlmalloc
    } else {
        &System
    }
}

#[allow(unsafe_code)]
// SAFETY: each block goes back to the allocator that it came from, since its size alone decides, and `realloc` moves what crosses
// the line; both are allocators by themselves.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { of(layout).alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { of(layout).alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises, and `layout` is that of its allocation.
        unsafe { of(layout).dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises; what is copied is as long as the shorter of two blocks that do not overlap.
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            if (layout.size() < LARGE) == (size < LARGE) {
                return of(layout).realloc(block, layout, size);
            }
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// What is in a block is still in it after it has grown or shrunk over the line, and blocks do not overlap.
        #[test]
        fn content_survives(sizes in proptest::collection::vec(1usize..400_000, 1..20), align in 0u32..14) {
            let layout = |size| {
                Layout::from_size_align(size, 1 << align).map_err(|e| TestCaseError::fail(e.to_string()))
            };
            let beside = layout(LARGE - 1)?;
            #[allow(unsafe_code)]
            // SAFETY: every block is asked for, written and given back with its own layout.
            unsafe {
                let other = Allocator.alloc(beside);
                other.write_bytes(7, LARGE - 1);
                let mut size = sizes[0];
                let mut block = Allocator.alloc_zeroed(layout(size)?);
                prop_assert!((0..size).all(|at| *block.add(at) == 0));
                for (number, next) in (1u8..).zip(&sizes) {
                    block.write_bytes(number, size);
                    block = Allocator.realloc(block, layout(size)?, *next);
                    prop_assert_eq!(block as usize % (1 << align), 0);
                    prop_assert!((0..size.min(*next)).all(|at| *block.add(at) == number));
                    size = *next;
                }
                Allocator.dealloc(block, layout(size)?);
                prop_assert!((0..LARGE - 1).all(|at| *other.add(at) == 7));
                Allocator.dealloc(other, beside);
            }
        }
    }
}
