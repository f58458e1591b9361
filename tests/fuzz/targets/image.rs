//! LiME, AVML and ELF images: opened, listed, and read at their edges.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::image::Image;

/// How images begin: a fuzzer guesses what follows, not what stands first.
const BEGIN: [&[u8]; 4] = [b"", b"EMiL\x01\0\0\0", b"AVML\x02\0\0\0", b"\x7fELF\x02\x01\x01\0"];

fuzz_target!(|data: &[u8]| {
    let Some((which, rest)) = data.split_first() else { return };
    let bytes = [BEGIN[usize::from(*which) % BEGIN.len()], rest].concat();
    let bytes = bytes.as_slice();
    let Ok(image) = Image::open(&bytes) else { return };
    let mut buffer = [0; 8192];
    let mut end = 0;
    for (start, size) in image.ranges() {
        assert!(start >= end && size > 0);
        end = start + size;
        let _ = image.read(start.saturating_sub(100), &mut buffer);
        let _ = image.read(end - 1, &mut buffer);
    }
});
