//! LiME, AVML and ELF images: opened, listed, and read at their edges.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::image::Image;

fuzz_target!(|data: &[u8]| {
    let Ok(image) = Image::open(&data) else { return };
    let mut buffer = [0; 8192];
    let mut end = 0;
    for (start, size) in image.ranges() {
        assert!(start >= end && size > 0);
        end = start + size;
        let _ = image.read(start.saturating_sub(100), &mut buffer);
        let _ = image.read(end - 1, &mut buffer);
    }
});
