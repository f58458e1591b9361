//! Segments: their tables and frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::{Error, frames::Segment};

fuzz_target!(|data: &[u8]| {
    if let Ok(segment) = Segment::open(data) {
        let _ = segment.read(|_, _| Ok::<_, Error>(()));
    }
});
