//! Segments: a right one, changed in a few places. Whatever is still read is what was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillframe_evidence::frames::{Framer, Segment, SegmentBuilder};

fuzz_target!(|data: &[u8]| {
    let _ = Segment::open(data);
    let Some((changes, plain)) = data.split_first_chunk::<12>() else { return };
    if plain.is_empty() {
        return;
    }
    let (mut framer, mut builder) = (Framer::new(1).unwrap(), SegmentBuilder::default());
    for frame in plain.chunks(1 + plain.len() / 3) {
        builder.push(&mut framer, frame, jiff::Timestamp::UNIX_EPOCH).unwrap();
    }
    let (mut bytes, _) = builder.finish().unwrap();
    for [low, high, bits] in changes.as_chunks::<3>().0 {
        // From the end, where the tables are.
        let at = usize::from(u16::from_le_bytes([*low, *high])) % bytes.len();
        let at = bytes.len() - 1 - at;
        bytes[at] ^= bits;
    }
    if let Ok(read) = Segment::open(&bytes).and_then(|segment| segment.plaintext()) {
        assert!(read == plain);
    }
});
