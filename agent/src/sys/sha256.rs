//! The compression function of SHA-256 (FIPS 180-4, 6.2.2) over several streams side by side. On x86-64 one stream waits most of the
//! time for the result of its own last instruction (`sha256rnds2`, four cycles); two or three fill the gaps. Elsewhere the streams
//! follow each other.

use sha2::block_api::compress256;

/// A block.
pub type Block = [u8; 64];

/// Advances each state by its blocks; as many as the stream has that has fewest. Returns how many.
pub fn compress<const N: usize>(states: &mut [[u32; 8]; N], streams: [&[Block]; N]) -> usize {
    let blocks = streams.iter().map(|stream| stream.len()).min().unwrap_or(0);
    #[cfg(target_arch = "x86_64")]
    if N > 1
        && is_x86_feature_detected!("sha")
        && is_x86_feature_detected!("ssse3")
        && is_x86_feature_detected!("sse4.1")
    {
        // SAFETY: the processor has the features that the function was compiled for.
        #[allow(unsafe_code)]
        unsafe {
            x86::compress(states, streams, blocks);
        }
        return blocks;
    }
    for (state, stream) in states.iter_mut().zip(streams) {
        compress256(state, stream.get(..blocks).unwrap_or_default());
    }
    blocks
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Block;
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi32, _mm_set_epi64x,
        _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
        _mm_shuffle_epi8, _mm_shuffle_epi32,
    };

    /// FIPS 180-4, 4.2.2.
    #[rustfmt::skip]
    const K: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5], [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3], [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc], [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7], [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13], [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3], [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5], [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208], [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    #[target_feature(enable = "sse2")]
    fn words(low: u32, b: u32, c: u32, high: u32) -> __m128i {
        _mm_set_epi32(
            high.cast_signed(),
            c.cast_signed(),
            b.cast_signed(),
            low.cast_signed(),
        )
    }

    /// Four words of a block, each turned from big endian.
    #[target_feature(enable = "ssse3")]
    fn load(block: &Block) -> [__m128i; 4] {
        let turned = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let mut message = [_mm_setzero_si128(); 4];
        let (quarters, _) = block.as_chunks::<16>();
        for (four, bytes) in message.iter_mut().zip(quarters) {
            let [low, high] = [bytes.first_chunk(), bytes.last_chunk()]
                .map(|half| half.map_or(0, |half| i64::from_le_bytes(*half)));
            *four = _mm_shuffle_epi8(_mm_set_epi64x(high, low), turned);
        }
        message
    }

    /// As the instructions want it: the words A, B, E, F in one register, and C, D, G, H in the other (Intel SDM, volume 2,
    /// SHA256RNDS2).
    #[allow(
        clippy::indexing_slicing,
        reason = "N lanes in arrays of N, four quarters in arrays of four: every index is a constant or a counter below them"
    )]
    #[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
    pub fn compress<const N: usize>(states: &mut [[u32; 8]; N], streams: [&[Block]; N], blocks: usize) {
        let mut abef = states.map(|[a, b, _, _, e, f, _, _]| words(f, e, b, a));
        let mut cdgh = states.map(|[_, _, c, d, _, _, g, h]| words(h, g, d, c));
        for block in 0..blocks {
            let before = (abef, cdgh);
            let mut message = streams.map(|stream| load(&stream[block]));
            for (group, [k0, k1, k2, k3]) in K.into_iter().enumerate() {
                let k = words(k0, k1, k2, k3);
                for lane in 0..N {
                    let m = &mut message[lane];
                    let [now, next, third, last] =
                        [group % 4, (group + 1) % 4, (group + 2) % 4, (group + 3) % 4];
                    if group >= 4 {
                        let sum = _mm_sha256msg1_epu32(m[now], m[next]);
                        let sum = _mm_add_epi32(sum, _mm_alignr_epi8(m[last], m[third], 4));
                        m[now] = _mm_sha256msg2_epu32(sum, m[last]);
                    }
                    let two = _mm_add_epi32(m[now], k);
                    cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], two);
                    abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(two, 0x0e));
                }
            }
            for lane in 0..N {
                abef[lane] = _mm_add_epi32(abef[lane], before.0[lane]);
                cdgh[lane] = _mm_add_epi32(cdgh[lane], before.1[lane]);
            }
        }
        for (state, (abef, cdgh)) in states.iter_mut().zip(abef.into_iter().zip(cdgh)) {
            *state = [
                _mm_extract_epi32(abef, 3),
                _mm_extract_epi32(abef, 2),
                _mm_extract_epi32(cdgh, 3),
                _mm_extract_epi32(cdgh, 2),
                _mm_extract_epi32(abef, 1),
                _mm_extract_epi32(abef, 0),
                _mm_extract_epi32(cdgh, 1),
                _mm_extract_epi32(cdgh, 0),
            ]
            .map(i32::cast_unsigned);
        }
    }
}
